#!/usr/bin/env bash
# Fine-grained classification: a set as its authors distribute it becomes a store, a model is fine-tuned on it.
# The settings are ours and no result is measured. docs/finegrained.md lists the sets and their folders.
#
#     DATA=/data/flowers-102 TOKENIZER=tokenizer.safetensors CHECKPOINT=runs/seitpp-imagenet/pretrain \
#         bash recipes/runs/finegrained.sh
#
# The same command goes on where the script was stopped.
set -euo pipefail

SET=${SET:-flowers102}             # or cars, cub200, inat18, inat19, pets, food101
DATA=${DATA:?the folder of the set, see docs/finegrained.md}
TOKENIZER=${TOKENIZER:?the tokenizer with the codes of the checkpoint, for example tokens-tokenizer.safetensors}
CHECKPOINT=${CHECKPOINT:?a run of mtm_pretrain or seit_train, or an official checkpoint}
OUT=${OUT:-runs/finegrained}
LAUNCHER=${LAUNCHER:-recipes/accelerate/one_gpu.yaml}

LAUNCH="accelerate launch --config_file $LAUNCHER"
STORE=$OUT/$SET-tokens

# 1. Both splits of the set to one store.
[ -d "$STORE/validation" ] || $LAUNCH recipes/tokenize_images.py published --set "$SET" --data "$DATA" \
    --tokenizer "$TOKENIZER" --out "$STORE"

# 2. Fine-tuning, 100 epochs of batch 256, then its accuracies.
$LAUNCH recipes/finetune.py finegrained --checkpoint "$CHECKPOINT" --store "$STORE" --out "$OUT/$SET" --resume
$LAUNCH recipes/evaluate.py published --checkpoint "$OUT/$SET" --store "$STORE" \
    --out "$OUT/$SET-evaluate" --overwrite
