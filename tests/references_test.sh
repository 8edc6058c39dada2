#!/usr/bin/env bash
# Every command that runs a model works on every case of tools/reference:  references_test.sh PROGRAM_DIRECTORY CASES
set -euo pipefail

export PATH="$1:$PATH"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
printf 'the cat sat on the mat and the dog ran to the red house, then it was late.\n%.0s' {1..4} >"$tmp/text"

cases=0
for model in "$2"/*/model; do
  name=$(basename "$(dirname "$model")")
  fail() { echo "$name: $1" >&2 && exit 1; }
  bitwright inspect "$model" >/dev/null || fail inspect
  bitwright generate "$model" -p "the cat" -n 5 --json | jq -e '.tokens | length >= 7' >/dev/null || fail generate
  bitwright quantize "$model" -o "$tmp/$name" --method int8 --json -q >"$tmp/json" || fail quantize
  jq -e '.verification.kl_mean | . != null and . >= 0 and . < 0.2' "$tmp/json" >/dev/null || fail "not judged"
  bitwright eval "$tmp/$name" --text "$tmp/text" --reference "$model" --context 20 --json |
    jq -e '.reference.kl_mean < 0.2' >/dev/null || fail eval
  cases=$((cases + 1))
done
((cases > 0)) || { echo "no cases in $2" >&2 && exit 1; }
echo "cases: $cases"
