#!/usr/bin/env bash
# SeiT on ImageNet-1k, supervised training on tokens; with ImageNet-21k also the three stages
# tokens 21k -> tokens 1k -> pixels 1k. The paper reports 74.0 % (ViT-B), and 82.8 % after three stages.
# This project has not run it: neither a result nor the time of any step is measured here.
#
#     IMAGENET=/data/imagenet TOKENIZER=vitvqgan.ckpt bash recipes/runs/seit_imagenet.sh
#     IMAGENET=... TOKENIZER=... IMAGENET21K=/data/imagenet21k bash recipes/runs/seit_imagenet.sh
#
# The same command goes on where the script was stopped. Try it first: add --dry-run to a training command.
set -euo pipefail

IMAGENET=${IMAGENET:?a folder that holds train/CLASS/NAME.JPEG and val/CLASS/NAME.JPEG}
TOKENIZER=${TOKENIZER:?a ViT-VQGAN checkpoint, or a tokenizer of recipes/tokenizer_train.py published}
IMAGENET21K=${IMAGENET21K:-}       # the same layout; empty: the first part alone
PRESET=${PRESET:-published}        # or vit_small, resnet50, resnet18
OUT=${OUT:-runs/seit-imagenet}
LAUNCHER=${LAUNCHER:-recipes/accelerate/eight_gpus.yaml}

LAUNCH="accelerate launch --config_file $LAUNCHER"
STORE=$OUT/tokens
CODES=$STORE-tokenizer.safetensors # the tokenizer with the codes of the store, which --compact writes

# 1. Images to tokens, once. The store keeps the codes that the training images use.
[ -d "$STORE/train" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET" --source-split train \
    --tokenizer "$TOKENIZER" --compact --out "$STORE"
[ -d "$STORE/validation" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET" --source-split val \
    --tokenizer "$CODES" --out "$STORE" --split validation
seitpp info "$STORE"

# 2. 300 epochs of supervised training, then its accuracies.
$LAUNCH recipes/seit_train.py "$PRESET" --store "$STORE" --out "$OUT/$PRESET" --resume
$LAUNCH recipes/evaluate.py published --checkpoint "$OUT/$PRESET" --store "$STORE" \
    --out "$OUT/$PRESET-evaluate" --overwrite

if [ -z "$IMAGENET21K" ]; then exit; fi

# 3. ImageNet-21k to tokens of the same codes.
STORE21K=$OUT/tokens21k
[ -d "$STORE21K/train" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET21K" \
    --source-split train --tokenizer "$CODES" --out "$STORE21K"
[ -d "$STORE21K/validation" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET21K" \
    --source-split val --tokenizer "$CODES" --out "$STORE21K" --split validation

# 4. Three stages: tokens of 21k (270 epochs), tokens of 1k (100 epochs), pixels of 1k (100 epochs).
$LAUNCH recipes/seit_train.py imagenet21k --store "$STORE21K" --out "$OUT/stage1" --resume
$LAUNCH recipes/finetune.py tokens --checkpoint "$OUT/stage1" --store "$STORE" --out "$OUT/stage2" --resume
$LAUNCH recipes/finetune.py pixels --checkpoint "$OUT/stage2" --data "$IMAGENET" --split train \
    --validation-split val --out "$OUT/stage3" --resume
$LAUNCH recipes/evaluate.py published --checkpoint "$OUT/stage3" --data "$IMAGENET" --split val \
    --out "$OUT/stage3-evaluate" --overwrite
