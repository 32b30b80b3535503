#!/usr/bin/env bash
# SeiT on ImageNet-1k: supervised training on tokens. With ImageNet-21k also the three stages tokens 21k ->
# tokens 1k -> pixels 1k. The paper reports 74.0 % top-1 (ViT-B), and 82.8 % after three stages.
# This script has not been run: neither a result nor the time of any step is measured.
#
#     IMAGENET=/data/imagenet TOKENIZER=vitvqgan.ckpt bash recipes/runs/seit_imagenet.sh
#     IMAGENET=... TOKENIZER=... IMAGENET21K=/data/imagenet21k bash recipes/runs/seit_imagenet.sh
#
# After an interruption, the same command continues where the script stopped. To test a training command first,
# add --dry-run to it.
set -euo pipefail

IMAGENET=${IMAGENET:?a folder that holds train/CLASS/NAME.JPEG and val/CLASS/NAME.JPEG}
TOKENIZER=${TOKENIZER:?a ViT-VQGAN checkpoint, or a tokenizer of recipes/tokenizer_train.py published}
IMAGENET21K=${IMAGENET21K:-}       # the same layout; empty: skip steps 3 and 4
PRESET=${PRESET:-published}        # or vit_small, resnet50, resnet18
OUT=${OUT:-runs/seit-imagenet}
LAUNCHER=${LAUNCHER:-recipes/accelerate/eight_gpus.yaml}

LAUNCH="accelerate launch --config_file $LAUNCHER"
STORE=$OUT/tokens
CODES=$STORE-tokenizer.safetensors # the tokenizer with the codes of the store, which --compact writes

# 1. Tokenize the images once. The store keeps the codes that the training images use.
[ -d "$STORE/train" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET" --source-split train \
    --tokenizer "$TOKENIZER" --compact --out "$STORE"
[ -d "$STORE/validation" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET" --source-split val \
    --tokenizer "$CODES" --out "$STORE" --split validation
seitpp info "$STORE"

# 2. Train for 300 epochs with labels, then evaluate.
$LAUNCH recipes/seit_train.py "$PRESET" --store "$STORE" --out "$OUT/$PRESET" --resume
$LAUNCH recipes/evaluate.py published --checkpoint "$OUT/$PRESET" --store "$STORE" \
    --out "$OUT/$PRESET-evaluate" --overwrite

if [ -z "$IMAGENET21K" ]; then exit; fi

# 3. Tokenize ImageNet-21k with the same codes.
STORE21K=$OUT/tokens21k
[ -d "$STORE21K/train" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET21K" \
    --source-split train --tokenizer "$CODES" --out "$STORE21K"
[ -d "$STORE21K/validation" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET21K" \
    --source-split val --tokenizer "$CODES" --out "$STORE21K" --split validation

# 4. Train in three stages: tokens of 21k (270 epochs), tokens of 1k (100 epochs), pixels of 1k (100 epochs).
$LAUNCH recipes/seit_train.py imagenet21k --store "$STORE21K" --out "$OUT/stage1" --resume
$LAUNCH recipes/finetune.py tokens --checkpoint "$OUT/stage1" --store "$STORE" --out "$OUT/stage2" --resume
$LAUNCH recipes/finetune.py pixels --checkpoint "$OUT/stage2" --data "$IMAGENET" --split train \
    --validation-split val --out "$OUT/stage3" --resume
$LAUNCH recipes/evaluate.py published --checkpoint "$OUT/stage3" --data "$IMAGENET" --split val \
    --out "$OUT/stage3-evaluate" --overwrite
