#!/usr/bin/env bash
# Runs the commands that README.md and docs/ show:  docs_test.sh PROGRAM_DIRECTORY
# In each ```sh block, the lines that start with "bitwright " or "./build/release/bin/bitwright " (with the lines they
# continue on after a "\") must succeed, in order, in a directory of their own for each document, with examples/ in it.
# A command that is shown but cannot be run there belongs in a ```text block.
set -euo pipefail
PATH="$(cd "$1" && pwd):$PATH"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repository=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

commands() {
  awk '/^```/ { shown = $0 == "```sh"; next }
       !shown { next }
       continued || /^(\.\/build\/release\/bin\/)?bitwright / { print; continued = /\\$/ }' "$1" |
    sed 's|^\./build/release/bin/||'
}

cases=0
while IFS= read -r document; do
  script=$(commands "$document")
  [ -n "$script" ] || continue
  if [ "$document" = docs/training.md ] && ! command -v bitwright-train >/dev/null; then
    echo "$document: skipped, this build does not train"
    continue
  fi
  echo "$document"
  rm -rf "${scratch:?}"/*
  cp -r "$repository/examples" "$scratch"
  (cd "$scratch" && bash -eux -c "$script" </dev/null)
  cases=$((cases + $(grep -c '^bitwright ' <<<"$script")))
done < <(find README.md docs -name '*.md' | sort)
echo "cases: $cases"
