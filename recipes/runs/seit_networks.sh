#!/usr/bin/env bash
# SeiT's networks: top-1 on ImageNet-1k from tokens (300 epochs of seit_train) and from pixels, in the paper:
#
#     network      tokens    pixels
#     ViT-B/16     74.0      81.8
#     ViT-S/16     73.5      79.9
#     ResNet-50    67.7      76.1
#     ResNet-18    58.0      69.7
#
# Ours are not measured on ImageNet. The settings of the pixel models are DeiT's as far as docs/recipes.md says.
#
#     IMAGENET=/data/imagenet STORE=runs/seit-imagenet/tokens bash recipes/runs/seit_networks.sh
#
# STORE is made by step 1 of seit_imagenet.sh. After an interruption, the same command continues.
set -euo pipefail

IMAGENET=${IMAGENET:?a folder that holds train/CLASS/NAME.JPEG and val/CLASS/NAME.JPEG}
STORE=${STORE:?the token store of ImageNet-1k, with the splits train and validation}
OUT=${OUT:-runs/seit-networks}
LAUNCHER=${LAUNCHER:-recipes/accelerate/eight_gpus.yaml}

LAUNCH="accelerate launch --config_file $LAUNCHER"
for preset in published vit_small resnet50 resnet18; do
    $LAUNCH recipes/seit_train.py $preset --store "$STORE" --out "$OUT/tokens-$preset" --resume
done
for preset in deit_base deit_small resnet50 resnet18; do
    $LAUNCH recipes/finetune.py $preset --data "$IMAGENET" --split train --validation-split val \
        --out "$OUT/pixels-$preset" --resume
done
