#!/usr/bin/env bash
# Several processes train, one is killed, the rest resumes:  train_processes_test.sh PROGRAM_DIRECTORY REPOSITORY
#
# Each time one process of two or three, split or not, gets SIGKILL at a random step. The others must end with status 1
# and name it; the run goes on from its last checkpoint with another number of processes. In the end each step's loss is
# that of one process that nobody disturbed, to 1e-5. BITWRIGHT_KILLS: how often (default 5).
set -euo pipefail

program=$(cd "$1" && pwd)/bitwright
repository=$(cd "$2" && pwd)
kills=${BITWRIGHT_KILLS:-5}
scratch=$(mktemp -d "${TMPDIR:-/tmp}/train-processes-XXXXXX")
running=()
cleanup() {
  for process in "${running[@]}"; do kill -9 "$process" 2>/dev/null || true; done
  rm -rf "$scratch"
}
trap cleanup EXIT
cd "$scratch"
export OMP_NUM_THREADS=1

cat >config.yaml <<END
architecture: {architectures: [LlamaForCausalLM], model_type: llama, hidden_size: 64, intermediate_size: 128,
  num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 4096, max_position_embeddings: 64,
  rms_norm_eps: 1.0e-5, hidden_act: silu, tie_word_embeddings: true}
tokenizer: $repository/examples/tinystories-4m
data: {text: $repository/examples/tinystories-4m/tinystories_valid.txt, sequence_length: 32}
max_steps: 60
batch_size: 12
learning_rate: 2.0e-3
checkpoint_every: 5
eval_windows: 4
END

fail() {
  echo "FAILED: $*" >&2
  tail -n 5 rank-* >&2 2>/dev/null || true
  exit 1
}
lines() { if [ -f "$1/loss.jsonl" ]; then wc -l <"$1/loss.jsonl"; else echo 0; fi; }

# start SIZE OUTPUT WORD...: one process a rank, its output in rank-N
start() {
  local size=$1 output=$2 port=$((20000 + RANDOM % 20000))
  shift 2
  running=()
  for ((rank = 0; rank < size; ++rank)); do
    RANK=$rank WORLD_SIZE=$size MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      "$program" train config.yaml --set "output=$output" "$@" >"rank-$rank" 2>&1 &
    running+=($!)
  done
}

start 1 alone
wait "${running[0]}" || fail "one process"

resume=()
for ((i = 0; i < kills; ++i)); do
  size=$((2 + i % 2)) victim=$((RANDOM % size)) sharding=$([ $((RANDOM % 2)) = 0 ] && echo none || echo parameters)
  from=$(lines several) && until=$((from + 3 + RANDOM % 6))
  ((until < 55)) || until=55
  start "$size" several --set "sharding=$sharding" "${resume[@]}"
  # On resuming, lines after the checkpoint are dropped first.
  for ((again = 0; $(lines several) < until; ++again)); do
    kill -0 "${running[0]}" 2>/dev/null && ((again < 6000)) || fail "round $i did not get to step $until"
    sleep 0.05
  done
  kill -9 "${running[victim]}"
  before=$SECONDS
  for ((rank = 0; rank < size; ++rank)); do
    status=0 && wait "${running[rank]}" 2>/dev/null || status=$?
    if ((rank == victim)); then continue; fi
    ((status == 1)) || fail "rank $rank of $size ended with status $status after $victim was killed"
    grep -q "rank $victim ended without a word" "rank-$rank" || fail "rank $rank does not say that $victim has gone"
  done
  ((SECONDS - before < 30)) || fail "the others took $((SECONDS - before)) s to end"
  resume=(--resume)
done

start 2 several --set sharding=parameters --resume
for process in "${running[@]}"; do wait "$process" || fail "the last run"; done
running=()
[ -d several/model ] || fail "no model was exported"

for run in alone several; do jq -r '[.step, .loss] | @tsv' "$run/loss.jsonl" >"$run.losses"; done
paste alone.losses several.losses | awk '
  $1 != $3 || ($2 - $4) ^ 2 > (1e-5 * $2) ^ 2 { print "differs: " $0; bad = 1 }
  END { if (NR != 60 || bad) exit 1 }' || fail "the losses of $(wc -l <several.losses) steps"
echo "$kills killed; all 60 losses as of one process"
