#!/usr/bin/env bash
# SeiT++ on ImageNet-1k, from images to top-1: tokenize, train TokenAdapt, pre-train, fine-tune, evaluate.
# The paper reports 77.8 % top-1 (ViT-B, 1.4 GB of tokens). This script has not been run: neither its result nor
# the time of any step is measured.
#
#     IMAGENET=/data/imagenet TOKENIZER=vitvqgan.ckpt bash recipes/runs/seitpp_imagenet.sh
#
# After an interruption, the same command continues where the script stopped. To test a training command first,
# add --dry-run to it.
set -euo pipefail

IMAGENET=${IMAGENET:?a folder that holds train/CLASS/NAME.JPEG and val/CLASS/NAME.JPEG}
TOKENIZER=${TOKENIZER:?a ViT-VQGAN checkpoint, or a tokenizer of recipes/tokenizer_train.py published}
OUT=${OUT:-runs/seitpp-imagenet}
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

# 2. Train TokenAdapt, which makes pixel augmentations valid for tokens.
$LAUNCH recipes/tokenadapt_train.py published --data "$IMAGENET" --split train --validation-split val \
    --tokenizer "$CODES" --out "$OUT/tokenadapt" --resume

# 3. Pre-train by masked token modeling for 400 epochs, half of the images augmented by TokenAdapt.
$LAUNCH recipes/mtm_pretrain.py published --store "$STORE" --tokenadapt "$OUT/tokenadapt" --tokenizer "$CODES" \
    --out "$OUT/pretrain" --resume

# 4. Fine-tune on the same tokens for 100 epochs.
$LAUNCH recipes/finetune.py published --store "$STORE" --tokenadapt "$OUT/tokenadapt" \
    --checkpoint "$OUT/pretrain" --out "$OUT/finetune" --resume

# 5. Evaluate top-1 on stored tokens, and on images with the tokenizer.
$LAUNCH recipes/evaluate.py published --checkpoint "$OUT/finetune" --store "$STORE" \
    --out "$OUT/evaluate-tokens" --overwrite
$LAUNCH recipes/evaluate.py published --checkpoint "$OUT/finetune" --data "$IMAGENET" --split val \
    --tokenizer "$CODES" --out "$OUT/evaluate-images" --overwrite
