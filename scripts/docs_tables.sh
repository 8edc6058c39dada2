#!/usr/bin/env bash
# Writes the tables of the facts into the documentation:  docs_tables.sh [PROGRAM]
# What stands between "<!-- table NAME -->" and "<!-- /table -->" becomes what `bitwright engines --table NAME` prints.
set -euo pipefail
program=$(realpath "${1:-build/release/bin/bitwright}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for document in docs/precision-*.md; do
  copy=$(mktemp)
  while IFS= read -r line; do
    case $line in
      '<!-- table '*' -->')
        name=${line#'<!-- table '}
        printf '%s\n' "$line"
        "$program" engines --table "${name%' -->'}"
        while IFS= read -r line && [ "$line" != '<!-- /table -->' ]; do :; done
        ;;
    esac
    printf '%s\n' "$line"
  done <"$document" >"$copy"
  cat "$copy" >"$document"
  rm "$copy"
done
