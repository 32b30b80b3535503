#!/usr/bin/env bash
# Other tokens than those of the ViT-VQGAN: ViT-B, supervised. Top-1 in the papers:
#
#     VQGAN of OpenImages, 8 x 8 pixels a token    78.4     most likely ldm's vq-f8-n256: 256 codes of dimension 4
#     DCT coefficients                             -        mentioned, without a setting or a figure we could reach
#
# Ours are not measured on ImageNet.
#
#     IMAGENET=/data/imagenet VQGAN=vq-f8-n256 bash recipes/runs/inputs.sh
#
# VQGAN is the folder of a diffusers VQModel. After an interruption, the same command continues.
set -euo pipefail

IMAGENET=${IMAGENET:?a folder that holds train/CLASS/NAME.JPEG and val/CLASS/NAME.JPEG}
VQGAN=${VQGAN:?a folder or file of any tokenizer, such as a VQModel of diffusers}
OUT=${OUT:-runs/inputs}
LAUNCHER=${LAUNCHER:-recipes/accelerate/eight_gpus.yaml}

LAUNCH="accelerate launch --config_file $LAUNCHER"

# 1. A tokenizer of cosines, fitted to some images in a minute.
[ -f "$OUT/dct/tokenizer.safetensors" ] || accelerate launch recipes/tokenizer_train.py dct --data "$IMAGENET" \
    --split train --validation-split val --num-codes 4096 --fit-images 2000 --out "$OUT/dct" --overwrite

# 2. Tokens and a classifier of each.
for name in vqgan dct; do
    tokenizer=$([ $name = vqgan ] && echo "$VQGAN" || echo "$OUT/dct/tokenizer.safetensors")
    [ -d "$OUT/$name-tokens/train" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET" \
        --source-split train --tokenizer "$tokenizer" --out "$OUT/$name-tokens"
    [ -d "$OUT/$name-tokens/validation" ] || $LAUNCH recipes/tokenize_images.py published --data "$IMAGENET" \
        --source-split val --tokenizer "$tokenizer" --out "$OUT/$name-tokens" --split validation
    $LAUNCH recipes/seit_train.py published --store "$OUT/$name-tokens" --out "$OUT/$name" --resume
done
