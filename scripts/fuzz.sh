#!/usr/bin/env bash
# Builds the preset fuzz (clang: packages clang and libclang-rt-14-dev) and runs every target, or those named:
#   scripts/fuzz.sh [SECONDS_EACH] [NAME]...
# Each starts from tests/corpus/NAME and what earlier runs found (build/fuzz/found/NAME). Stops at the first finding,
# which then lies in build/fuzz/ under the name that is printed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:-600}
shift || true
[[ $seconds =~ ^[0-9]+$ ]] || { echo "usage: scripts/fuzz.sh [SECONDS_EACH] [NAME]..." >&2; exit 2; }

names=("$@")
if ((${#names[@]} == 0)); then
  mapfile -t names < <(find src -name '*_fuzz.cpp' -printf '%f\n' | sed 's/_fuzz\.cpp$//' | sort)
fi
cmake --preset fuzz
cmake --build --preset fuzz --target "${names[@]/%/_fuzz}"
for name in "${names[@]}"; do
  echo "== $name: $seconds s"
  mkdir -p "build/fuzz/found/$name"
  "build/fuzz/bin/${name}_fuzz" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -verbosity=0 \
    -print_final_stats=1 -artifact_prefix="build/fuzz/$name-" "build/fuzz/found/$name" "tests/corpus/$name"
done
echo "== no finding in ${#names[@]} targets"
