#!/usr/bin/env bash
# Semantic segmentation of ADE-20k on tokens, from images to mIoU: tokenize, fine-tune UPerNet, evaluate.
# This script has not been run on ADE-20k: neither its mIoU nor the time of any step is measured.
# Needs pip install "seitpp[segmentation]". docs/segmentation.md explains the settings.
#
#     ADE20K=ADEChallengeData2016 TOKENIZER=tokenizer.safetensors CHECKPOINT=runs/seitpp-imagenet/finetune \
#         TOKENADAPT=runs/seitpp-imagenet/tokenadapt bash recipes/runs/ade20k.sh
#
# After an interruption, the same command continues where the script stopped.
set -euo pipefail

ADE20K=${ADE20K:?the folder ADEChallengeData2016, which holds images/ and annotations/}
TOKENIZER=${TOKENIZER:?the tokenizer with the codes of the checkpoint, for example tokens-tokenizer.safetensors}
CHECKPOINT=${CHECKPOINT:?a run of mtm_pretrain, seit_train or finetune, or an official checkpoint}
TOKENADAPT=${TOKENADAPT:?a run of tokenadapt_train, or an official checkpoint with TokenAdapt; it flips images}
OUT=${OUT:-runs/ade20k}
LAUNCHER=${LAUNCHER:-recipes/accelerate/eight_gpus.yaml}

LAUNCH="accelerate launch --config_file $LAUNCHER"
STORE=$OUT/tokens

# 1. Tokenize images and annotations: 512 pixels on the short side, every image with its own grid.
[ -d "$STORE/train" ] || $LAUNCH recipes/tokenize_images.py ade20k --data "$ADE20K" --tokenizer "$TOKENIZER" \
    --out "$STORE"
[ -d "$STORE/validation" ] || $LAUNCH recipes/tokenize_images.py ade20k --data "$ADE20K" \
    --tokenizer "$TOKENIZER" --source-split validation --out "$STORE" --split validation

# 2. Train UPerNet for 160,000 steps with the settings of MAE and BEiT.
$LAUNCH recipes/segment_ade20k.py published --store "$STORE" --checkpoint "$CHECKPOINT" \
    --tokenadapt "$TOKENADAPT" --out "$OUT/upernet" --resume

# 3. Evaluate: mIoU, per-class results, pictures; then mIoU with several scales and flipped images.
$LAUNCH recipes/evaluate_segmentation.py published --checkpoint "$OUT/upernet" --store "$STORE" \
    --tokenizer "$TOKENIZER" --out "$OUT/evaluate" --overwrite
$LAUNCH recipes/evaluate_segmentation.py published --checkpoint "$OUT/upernet" --store "$STORE" \
    --scales 0.5 0.75 1 1.25 1.5 1.75 --flip "$TOKENADAPT" --out "$OUT/evaluate-scales" --overwrite
