#!/usr/bin/env bash
# Quantizes the bundled model in three ways and shows what that gains and costs. Does all set-up by itself.
set -euo pipefail
export LC_ALL=C.UTF-8  # figures with a point
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
PATH=$PWD/build/release/bin:$PATH
model=examples/tinystories-4m
text=$model/tinystories_valid.txt
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

variants=("original $model")
for method in int8 int4 nf4; do
  echo "== bitwright quantize $model -o $out/$method --method $method"
  bitwright quantize "$model" -o "$out/$method" --method "$method"
  variants+=("$method $out/$method")
done

printf '\n%-9s %9s %12s %11s %9s %9s\n' model "size, MB" "bits/weight" perplexity "KL, nats" tokens/s
for variant in "${variants[@]}"; do
  read -r name path <<<"$variant"
  facts=$(bitwright inspect "$path" --json)
  quality=$(bitwright eval "$path" --reference "$model" --text "$text" --split '<|endoftext|>' --context 256 --json)
  # shellcheck disable=SC2046,SC2183  # a word for each figure
  printf '%-9s %9.2f %12.3f %11.3f %9.5f %9.0f\n' "$name" $(jq -nr --argjson facts "$facts" --argjson quality "$quality" \
    '$facts.bytes / 1e6, $facts.bits_per_weight, ($quality | .perplexity, .reference.kl_mean, .tokens_per_second)')
done

for variant in "${variants[@]}"; do
  read -r name path <<<"$variant"
  printf '\n%s: ' "$name"
  bitwright generate "$path" --prompt "Once upon a time" -n 40
done
