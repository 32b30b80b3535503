#!/usr/bin/env bash
# SeiT's figure of accuracy against storage: ViT-B on ImageNet-1k, top-1 in the paper:
#
#     uniform sampling, 70, 40, 20 % of the images    78.2, 74.0, 59.8
#     C-score sampling, 60, 40, 20 %                  77.5, 73.3, 65.1
#     resolution, 30, 20, 10 %                        78.6, 75.2, 63.3
#     JPEG quality 10, 5, 1                           78.1, 74.6, 67.8
#     tokens, 1.4 GB                                  74.0
#     tokens of ImageNet-1k-5M, 7.5 GB                78.6     (5 crops an image, labels of ReLabel)
#     60 % of them, 4.5 GB                            75.9
#
# The paper gives pixels and tokens recipes of their own; storage_tradeoff gives all rows the same updates, and adds
# WebP and AVIF at the bytes of the tokens, which no paper compares. Ours are not measured on ImageNet;
# docs/results.md has the digits.
#
#     IMAGENET=/data/imagenet TOKENIZER=vitvqgan.ckpt bash recipes/runs/seit_storage.sh
#     IMAGENET=... TOKENIZER=... RELABEL=relabel_imagenet SCORES=cscores.txt bash recipes/runs/seit_storage.sh
#
# After an interruption, the same command continues.
set -euo pipefail

IMAGENET=${IMAGENET:?a folder that holds train/CLASS/NAME.JPEG and val/CLASS/NAME.JPEG}
TOKENIZER=${TOKENIZER:?a ViT-VQGAN checkpoint, or a tokenizer of recipes/tokenizer_train.py published}
RELABEL=${RELABEL:-}               # the folder of ReLabel's maps; empty: crops have the label of their image
SCORES=${SCORES:-}                 # a score of each training image, a line each; empty: scores of our own
OUT=${OUT:-runs/seit-storage}
LAUNCHER=${LAUNCHER:-recipes/accelerate/eight_gpus.yaml}

LAUNCH="accelerate launch --config_file $LAUNCHER"
STORE=$OUT/imagenet5m

# 1. All rows of the table at equal updates, on one GPU.
accelerate launch recipes/storage_tradeoff.py published --data "$IMAGENET" --validation-split val \
    --tokenizer "$TOKENIZER" ${SCORES:+--scores "$SCORES"} --out "$OUT/table" --resume

# 2. ImageNet-1k-5M, and 60 % of it.
[ -d "$STORE/train" ] || $LAUNCH recipes/tokenize_images.py imagenet5m --data "$IMAGENET" --source-split train \
    --tokenizer "$TOKENIZER" --compact ${RELABEL:+--label-maps "$RELABEL"} --out "$STORE"
[ -d "$STORE/validation" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET" --source-split val \
    --tokenizer "$STORE-tokenizer.safetensors" --out "$STORE" --split validation
for fraction in 1 0.6; do
    $LAUNCH recipes/seit_train.py published --store "$STORE" --fraction $fraction --out "$OUT/5m-$fraction" --resume
done
