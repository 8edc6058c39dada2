#!/usr/bin/env bash
# Memory does not grow with the model, and --max-memory is kept or refused:  memory_test.sh PROGRAM_DIRECTORY
#
# BITWRIGHT_SHAPE: another shape (8b: 16 GB in sparse files, its output 6 GB). BITWRIGHT_LIMIT: another limit.
set -euo pipefail

program=$(cd "$1" && pwd)/bitwright
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")/tools" && pwd)
shape=${BITWRIGHT_SHAPE:-2048,5632,4,256,32000}
limit=${BITWRIGHT_LIMIT:-96MiB}
scratch=$(mktemp -d "${BITWRIGHT_SCRATCH:-${TMPDIR:-/tmp}}/memory-XXXXXX")
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

"$tools/synthetic_model.py" model "$shape" --shards 4
bytes=$(numfmt --from=auto "${limit%B}")

check() {  # NAME RESULT.json
  peak=$(jq .peak_memory_bytes "$2") expected=$(jq .estimate.memory_bytes "$2")
  echo "$1: peak $peak, estimate $expected, limit $bytes"
  ((peak <= bytes && expected <= bytes && peak <= expected))
}
"$program" quantize model -o int4 --method int4 --max-memory "$limit" --json -q >int4.json
check "int4, groups" int4.json
"$program" dequantize int4 -o plain --dtype bfloat16 --max-memory "$limit" --json -q >plain.json
check "dequantize" plain.json
rm -r plain int4
# Nested scales are quantized together, so a tensor is worked on as a whole: more than this limit.
if "$program" quantize model -o nested --method nf4 --nested-scales true --max-memory 64MiB -q 2>refused.log; then exit 1; fi
grep -q '^error: cannot keep within --max-memory: it would take .*; allow .* MiB$' refused.log || { cat refused.log; exit 1; }
[ ! -e nested ] && [ ! -e .nested.partial ]
needed=$(sed 's/.*; allow \(.*\) MiB$/\1MiB/' refused.log)
"$program" quantize model -o nested --method nf4 --nested-scales true --max-memory "$needed" --json -q >nested.json
limit=$needed bytes=$(numfmt --from=auto "${needed%B}")
check "nf4, whole tensors" nested.json
