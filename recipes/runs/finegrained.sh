#!/usr/bin/env bash
# Fine-grained classification: tokenize a data set as its authors distribute it, and fine-tune a model on it. The
# settings are chosen by this project and no result is measured. docs/finegrained.md lists the sets and folders.
#
#     DATA=/data/flowers-102 TOKENIZER=tokenizer.safetensors CHECKPOINT=runs/seitpp-imagenet/pretrain \
#         bash recipes/runs/finegrained.sh
#
# After an interruption, the same command continues where the script stopped.
set -euo pipefail

SET=${SET:-flowers102}             # or cars, cub200, inat18, inat19, pets, food101
DATA=${DATA:?the folder of the set, see docs/finegrained.md}
TOKENIZER=${TOKENIZER:?the tokenizer with the codes of the checkpoint, for example tokens-tokenizer.safetensors}
CHECKPOINT=${CHECKPOINT:?a run of mtm_pretrain or seit_train, or an official checkpoint}
OUT=${OUT:-runs/finegrained}
LAUNCHER=${LAUNCHER:-recipes/accelerate/one_gpu.yaml}

LAUNCH="accelerate launch --config_file $LAUNCHER"
STORE=$OUT/$SET-tokens

# 1. Tokenize both splits of the data set into one store.
[ -d "$STORE/validation" ] || $LAUNCH recipes/tokenize_images.py published --set "$SET" --data "$DATA" \
    --tokenizer "$TOKENIZER" --out "$STORE"

# 2. Fine-tune for 100 epochs at batch size 256, then evaluate.
$LAUNCH recipes/finetune.py finegrained --checkpoint "$CHECKPOINT" --store "$STORE" --out "$OUT/$SET" --resume
$LAUNCH recipes/evaluate.py published --checkpoint "$OUT/$SET" --store "$STORE" \
    --out "$OUT/$SET-evaluate" --overwrite
