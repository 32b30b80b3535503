#!/usr/bin/env bash
# SeiT's ablation of token augmentations: ViT-B on ImageNet-1k tokens, 300 epochs each, top-1 in the paper:
#
#     none           63.8     no augmentation but the random resized crop
#     cutmix         71.9     Token-CutMix
#     cutmix_eda     72.2     and Token-EDA
#     cutmix_noise   73.3     CutMix and Emb-Noise
#     published      74.0     all three
#
# Ours are not measured on ImageNet; docs/results.md has them on the digits.
#
#     STORE=runs/seit-imagenet/tokens bash recipes/runs/seit_augmentation.sh
#
# STORE is made by step 1 of seit_imagenet.sh. After an interruption, the same command continues.
set -euo pipefail

STORE=${STORE:?the token store of ImageNet-1k, with the splits train and validation}
OUT=${OUT:-runs/seit-augmentation}
LAUNCHER=${LAUNCHER:-recipes/accelerate/eight_gpus.yaml}

for preset in none cutmix cutmix_eda cutmix_noise published; do
    accelerate launch --config_file "$LAUNCHER" recipes/seit_train.py $preset --store "$STORE" \
        --out "$OUT/$preset" --resume
done
