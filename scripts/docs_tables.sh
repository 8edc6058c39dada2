#!/usr/bin/env bash
# Writes what is made elsewhere into the documentation:  docs_tables.sh [PROGRAM]
# "<!-- table NAME -->" … "<!-- /table -->" holds what `bitwright engines --table NAME` prints, a table of the facts;
# "<!-- file PATH -->" … "<!-- /file -->" a file of this repository. docs/conversions.md comes from the test that makes
# each conversion, where it is built.
set -euo pipefail
program=$(realpath "${1:-build/release/bin/bitwright}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for document in docs/precision-*.md docs/containers.md; do
  copy=$(mktemp)
  while IFS= read -r line; do
    printf '%s\n' "$line"
    case $line in
      '<!-- table '*' -->')
        name=${line#'<!-- table '} end='<!-- /table -->'
        "$program" engines --table "${name%' -->'}"
        ;;
      '<!-- file '*' -->')
        name=${line#'<!-- file '} end='<!-- /file -->'
        # shellcheck disable=SC2016  # a fence of Markdown, no command
        printf '```yaml\n%s\n```\n' "$(cat "${name%' -->'}")"
        ;;
      *) continue ;;
    esac
    while IFS= read -r line && [ "$line" != "$end" ]; do :; done
    printf '%s\n' "$line"
  done <"$document" >"$copy"
  cat "$copy" >"$document"
  rm "$copy"
done

tests=$(dirname "$program")/bitwright_tests
if [ -x "$tests" ]; then BITWRIGHT_WRITE_DOCS=1 "$tests" --gtest_filter='ConversionMatrix.*' --gtest_brief=1 >&2; fi
