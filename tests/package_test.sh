#!/usr/bin/env bash
# What docs/api.md shows, done: installs a build into an empty prefix, builds the page's project against it and nothing
# else, and compares what the program prints.   package_test.sh BUILD_DIRECTORY [CXX_FLAGS]
set -euo pipefail
build=$(cd "$1" && pwd)
page=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/docs/api.md
export CMAKE_GENERATOR=Ninja  # a fresh machine has no make
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# block LANGUAGE N: the page's Nth block in it
block() { awk -v fence="\`\`\`$1" -v n="$2" '$0 == fence { shown = ++seen == n; next } /^```/ { shown = 0 } shown' "$page"; }
# project N: the page's Nth program, built against what was installed
project() {
  mkdir "$scratch/project$1"
  block cmake "$1" >"$scratch/project$1/CMakeLists.txt"
  block cpp "$1" >"$scratch/project$1/main.cpp"
  block text "$1" >"$scratch/expected$1"
  { cmake -S "$scratch/project$1" -B "$scratch/project$1/build" -DCMAKE_PREFIX_PATH="$scratch/prefix" \
      -DCMAKE_CXX_FLAGS="$flags -Wall -Wextra -Werror" && cmake --build "$scratch/project$1/build"; } \
    >"$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }
}
flags=${2:-}

cmake --install "$build" --prefix "$scratch/prefix" >"$scratch/log" || { cat "$scratch/log"; exit 1; }
project 1
(cd "$scratch" && ./project1/build/advise) | diff "$scratch/expected1" -
if (cd "$scratch" && ./project1/build/advise missing/model) >/dev/null 2>"$scratch/error"; then
  echo "a model that is not there was accepted"
  exit 1
fi
grep -q '^error: ' "$scratch/error"
"$scratch/prefix/bin/bitwright" --version
if [ -e "$(find "$scratch/prefix" -name BitwrightTorchTargets.cmake)" ]; then
  project 2
  (cd "$scratch" && ./project2/build/shrink) | diff "$scratch/expected2" -
fi
