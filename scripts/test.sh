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
check_format() { sources -o -name '*.hpp' | xargs clang-format --dry-run --Werror; }

stage packages scripts/setup.sh --packages-only
stage layers tests/layers_test.sh
stage format check_format
stage release cmake --workflow --preset release
stage scalar cmake --workflow --preset scalar
stage lint scripts/lint.sh
stage asan cmake --workflow --preset asan
stage tsan cmake --workflow --preset tsan
echo "== all stages passed in $SECONDS s"
