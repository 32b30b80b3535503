#!/usr/bin/env bash
# SeiT's Stem-Adapters: ViT-B on ImageNet-1k tokens, 300 epochs each, top-1 in the paper:
#
#     stem_linear    58.6     a linear layer for each vector, on maps of 14 x 14
#     stem_conv2     73.1     a convolution of 2 x 2, stride 2
#     published      74.0     a convolution of 4 x 4, stride 2
#
# Ours are not measured.
#
#     STORE=runs/seit-imagenet/tokens bash recipes/runs/seit_stems.sh
#
# STORE is made by step 1 of seit_imagenet.sh. After an interruption, the same command continues.
set -euo pipefail

STORE=${STORE:?the token store of ImageNet-1k, with the splits train and validation}
OUT=${OUT:-runs/seit-stems}
LAUNCHER=${LAUNCHER:-recipes/accelerate/eight_gpus.yaml}

for preset in stem_linear stem_conv2 published; do
    accelerate launch --config_file "$LAUNCHER" recipes/seit_train.py $preset --store "$STORE" \
        --out "$OUT/$preset" --resume
done
