#!/usr/bin/env bash
# The whole experiment on real images that need no download, the handwritten digits of scikit-learn:
# pre-train without labels, probe, inpaint, fine-tune with labels, evaluate, export. One CPU is enough.
#
#     bash recipes/runs/digits.sh
#     PRESET=smoke OUT=runs/smoke bash recipes/runs/digits.sh    # every step, with two epochs of training
#
# The same command goes on where the script was stopped.
set -euo pipefail

PRESET=${PRESET:-digits}           # the preset of every recipe: digits, or smoke
OUT=${OUT:-runs/digits}            # every result lies in a folder below it
SEED=${SEED:-0}
LAUNCH=${LAUNCH:-accelerate launch}

# 1. Masked token modeling on the tokens, without labels. Measured: 97 s on one core (docs/results.md).
$LAUNCH recipes/mtm_pretrain.py "$PRESET" --seed "$SEED" --out "$OUT/pretrain" --resume

# 2. What the frozen encoder knows: linear probe and k-NN. What the model fills in: inpainting.png.
$LAUNCH recipes/probe.py "$PRESET" --checkpoint "$OUT/pretrain" --out "$OUT/probe" --overwrite
$LAUNCH recipes/inpaint.py "$PRESET" --checkpoint "$OUT/pretrain" --out "$OUT/inpaint" --overwrite

# 3. Fine-tuning with labels. Measured: 47 s on one core.
$LAUNCH recipes/finetune.py "$PRESET" --seed "$SEED" --checkpoint "$OUT/pretrain" --out "$OUT/finetune" --resume

# 4. Accuracies, per class and as confusions.
$LAUNCH recipes/evaluate.py "$PRESET" --checkpoint "$OUT/finetune" --out "$OUT/evaluate" --overwrite

# 5. The model for timm and the hub, with a model card.
[ -d "$OUT/exported" ] || seitpp export-model "$OUT/finetune" "$OUT/exported"
