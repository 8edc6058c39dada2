#!/usr/bin/env bash
# Everything that must hold before a change goes in. Does all set-up by itself; stops at the first stage that fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage() {
  echo "== $1"
  local start=$SECONDS
  "${@:2}"
  echo "== $1: passed in $((SECONDS - start)) s"
}
sources() { find include src tests benchmarks -name '*.cpp' "$@"; }
# Tests are compiled with the same warnings; reading them by clang-tidy too would take as long again.
# Nor are the sources that include libtorch's headers, which clang 14 cannot read as C++20.
check_tidy() {
  find src benchmarks -name '*.cpp' ! -name '*_test.cpp' ! -name precompiled.cpp ! -path 'src/train/*' ! -path 'src/cli/train_main.cpp' \
    ! -path 'benchmarks/train*' | sort | xargs -P "$(nproc)" -n 1 clang-tidy -p build/release --quiet 2>/dev/null
}
check_format() { sources -o -name '*.hpp' | xargs clang-format --dry-run --Werror; }

stage packages scripts/setup.sh --packages-only
stage layers tests/layers_test.sh
stage format check_format
stage release cmake --workflow --preset release
stage scalar cmake --workflow --preset scalar
stage lint check_tidy
stage asan cmake --workflow --preset asan
stage tsan cmake --workflow --preset tsan
echo "== all stages passed in $SECONDS s"
