#!/usr/bin/env bash
# Kills quantize at random moments and resumes it:  resume_test.sh PROGRAM_DIRECTORY
#
# Each time: nothing that `inspect` takes for a complete model before it is one, and after --resume the same bytes as
# without interruption. BITWRIGHT_KILLS: how often (default 6). BITWRIGHT_SCRATCH: where the models go.
set -euo pipefail

program=$(cd "$1" && pwd)/bitwright
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")/tools" && pwd)
kills=${BITWRIGHT_KILLS:-6}
scratch=$(mktemp -d "${BITWRIGHT_SCRATCH:-${TMPDIR:-/tmp}}/resume-XXXXXX")
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

"$tools/synthetic_model.py" model 1024,2816,8,256,8000 --random --shards 2
options=(--method int4 --range minmax --max-shard-size 16MB -q)
digest() { (cd "$1" && find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum); }
now() { date +%s%N; }

start=$(now)
"$program" quantize model -o whole "${options[@]}" >/dev/null
whole=$(($(now) - start))
expected=$(digest whole)
[ "$(find whole -name 'model-*.safetensors' | wc -l)" -gt 2 ]
mkdir old && cp whole/* old

fail() {
  echo "FAILED: $*" >&2
  ls -la . out .out.partial >&2 2>/dev/null || true
  exit 1
}

killed=0 resumed=0 finished=0
for ((i = 1; i <= kills; ++i)); do
  rm -rf out .out.partial
  replace=() && if ((i % 3 == 0)); then cp -r old out && replace=(--force); fi
  # A kill in the second half of a run may itself hit a resumed run: up to three in a row.
  for ((again = 0; again < 1 + i % 3; ++again)); do
    resume=() && if ((again > 0)); then resume=(--resume); fi
    "$program" quantize model -o out "${options[@]}" "${replace[@]}" "${resume[@]}" >/dev/null 2>&1 &
    pid=$!
    sleep "$(awk -v max="$whole" -v r="$RANDOM" 'BEGIN { printf "%.4f", 1.1 * max / 1e9 * r / 32768 }')"
    if kill -9 "$pid" 2>/dev/null; then killed=$((killed + 1)); fi
    wait "$pid" 2>/dev/null || true
    if [ -e .out.partial ] && "$program" inspect .out.partial >/dev/null 2>&1; then
      [ ! -e .out.partial/.bitwright-partial ] || fail "$i: inspect takes an unfinished directory for a model"
      ((i % 3 == 0)) || fail "$i: inspect takes a staging directory for a model"
    fi
    if [ -e out ]; then
      [ "$(find out -type f ! -name .bitwright-complete -print0 | LC_ALL=C sort -z | xargs -0 cat | wc -c)" = \
        "$(cat whole/* | wc -c)" ] || fail "$i: the output's name holds something unfinished"
    fi
  done
  if [ -e out/.bitwright-complete ] || [ ! -e .out.partial ] && [ -e out ]; then
    finished=$((finished + 1))
    [ -e .out.partial ] && "$program" quantize model -o out "${options[@]}" --force >/dev/null
  else
    resumed=$((resumed + 1))
    "$program" quantize model -o out "${options[@]}" "${replace[@]}" --resume >/dev/null || fail "$i: --resume failed"
  fi
  rm -f out/.bitwright-complete
  [ "$(digest out)" = "$expected" ] || fail "$i: other bytes than without interruption"
  [ ! -e .out.partial ] || fail "$i: something is left"
  "$program" inspect out >/dev/null || fail "$i: the result cannot be read"
done
echo "cases: $kills ($killed kills, $resumed resumed, $finished had finished)"

# TERM is an interruption too: one line, status 130, and the journal stays.
rm -rf out .out.partial
"$program" quantize model -o out "${options[@]}" >term.log 2>&1 &
pid=$!
until [ "$(du -sk .out.partial 2>/dev/null | cut -f1)" -gt 4000 ] 2>/dev/null; do sleep 0.005; done  # pieces are done
kill -TERM "$pid"
status=0 && wait "$pid" || status=$?
[ "$status" = 130 ] && [ "$(cat term.log)" = "error: interrupted; --resume goes on" ] || fail "TERM: $status $(cat term.log)"
"$program" quantize model -o out "${options[@]}" >twice.log 2>&1 && fail "an unfinished run was thrown away"
grep -q -e '--resume to go on with it or --force to start again' twice.log || fail "$(cat twice.log)"
"$program" quantize model -o out "${options[@]}" --resume --method int8 >other.log 2>&1 && fail "another recipe was resumed"
grep -q 'the recipe changed' other.log || fail "$(cat other.log)"
mv .out.partial/model-00001-of-*.safetensors .
"$program" quantize model -o out "${options[@]}" --no-verify --resume >lost.log 2>&1 && fail "a lost shard became zeros"
grep -q 'model-00001-of-.* is missing' lost.log || fail "$(cat lost.log)"
mv model-00001-of-*.safetensors .out.partial
touch model/model-00001-of-00002.safetensors
"$program" quantize model -o out "${options[@]}" --resume >other.log 2>&1 && fail "another model was resumed"
grep -q 'the model changed' other.log || fail "$(cat other.log)"

# What was started to outlive its terminal (nohup) does.
rm -rf .out.partial
(trap '' HUP; exec "$program" quantize model -o out "${options[@]}" >/dev/null 2>hup.log) &
pid=$!
until [ -s .out.partial/.bitwright-partial ]; do sleep 0.005; done
kill -HUP "$pid"
wait "$pid" || fail "nohup: $(cat hup.log)"
[ "$(digest out)" = "$expected" ] || fail "nohup: other bytes"
"$program" quantize model -o out "${options[@]}" --resume >twice.log 2>&1 && fail "a complete output was resumed"
grep -q 'complete: nothing is left to resume' twice.log || fail "$(cat twice.log)"

rm -rf out

# A full disk keeps the journal; with room again the run goes on to the same bytes.
rm -rf .out.partial
(ulimit -f 9000; "$program" quantize model -o out "${options[@]}" >full.log 2>&1) && fail "a full disk was not seen"
grep -q 'File too large; .*; --resume goes on$' full.log || fail "$(cat full.log)"
"$program" quantize model -o out "${options[@]}" --resume >/dev/null
[ "$(digest out)" = "$expected" ] || fail "after a full disk: other bytes"

# A shard that is cut short while it is read: one line, no SIGBUS, nothing under the output's name.
rm -rf out && cp -r model cut
"$program" quantize cut -o out "${options[@]}" >cut.log 2>&1 &
pid=$!
until [ -s .out.partial/.bitwright-partial ]; do sleep 0.002; done
truncate -s 100000 cut/model-00001-of-00002.safetensors cut/model-00002-of-00002.safetensors
status=0 && wait "$pid" || status=$?
[ "$status" = 1 ] && [ "$(wc -l <cut.log)" = 1 ] && grep -q 'changed' cut.log || fail "cut: $status $(cat cut.log)"
[ ! -e out ] && [ ! -e .out.partial ] || fail "cut: something is left"
echo "faults: interruption, other recipe, other model, lost shard, lost terminal, full disk, cut input"

# convert goes the same way: into one file, and by pieces that another container has.
for format in gguf gptq; do
  rm -rf out .out.partial converted
  start=$(now)
  "$program" convert whole -o converted --format $format -q >/dev/null
  took=$(($(now) - start))
  expected=$(digest converted)
  resumed=0
  for ((i = 1; i <= kills; ++i)); do
    rm -rf out .out.partial
    "$program" convert whole -o out --format $format -q >/dev/null 2>&1 &
    pid=$!
    sleep "$(awk -v max="$took" -v r="$RANDOM" 'BEGIN { printf "%.4f", max / 1e9 * (0.3 + 0.7 * r / 32768) }')"
    kill -9 "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    if [ -e .out.partial ]; then
      [ ! -e out ] || fail "convert to $format: the output's name holds something unfinished"
      resumed=$((resumed + 1))
      "$program" convert whole -o out --format $format -q --resume >/dev/null || fail "convert to $format: --resume failed"
    fi
    [ ! -e out ] || [ "$(digest out)" = "$expected" ] || fail "convert to $format: other bytes than without interruption"
  done
  echo "convert to $format: $kills kills, $resumed resumed"
done
