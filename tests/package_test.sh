#!/usr/bin/env bash
# What docs/api.md shows, done: installs a build into an empty prefix, builds the page's project against it and nothing
# else, and compares what the program prints.   package_test.sh BUILD_DIRECTORY [CXX_FLAGS]
set -euo pipefail
build=$(cd "$1" && pwd)
page=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/docs/api.md
export CMAKE_GENERATOR=Ninja  # a fresh machine has no make
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# block LANGUAGE: the page's first block in it
block() { awk -v fence="\`\`\`$1" '$0 == fence && !done { shown = 1; next } /^```/ && shown { shown = 0; done = 1 } shown' "$page"; }

cmake --install "$build" --prefix "$scratch/prefix" >"$scratch/log" || { cat "$scratch/log"; exit 1; }
mkdir "$scratch/project"
block cmake >"$scratch/project/CMakeLists.txt"
block cpp >"$scratch/project/main.cpp"
block text >"$scratch/expected"
{ cmake -S "$scratch/project" -B "$scratch/project/build" -DCMAKE_PREFIX_PATH="$scratch/prefix" \
    -DCMAKE_CXX_FLAGS="${2:-} -Wall -Wextra -Werror" && cmake --build "$scratch/project/build"; } >"$scratch/log" || { cat "$scratch/log"; exit 1; }
(cd "$scratch" && ./project/build/advise) | diff "$scratch/expected" -
if (cd "$scratch" && ./project/build/advise missing/model) >/dev/null 2>"$scratch/error"; then
  echo "a model that is not there was accepted"
  exit 1
fi
grep -q '^error: ' "$scratch/error"
"$scratch/prefix/bin/bitwright" --version
