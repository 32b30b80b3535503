#!/usr/bin/env bash
# The whole experiment on real images without a download, the handwritten digits of scikit-learn: pre-train
# without labels, probe, inpaint, fine-tune with labels, evaluate, export. One CPU is enough.
#
#     bash recipes/runs/digits.sh
#     PRESET=smoke OUT=runs/smoke bash recipes/runs/digits.sh    # every step, with two epochs of training
#
# After an interruption, the same command continues where the script stopped.
set -euo pipefail

PRESET=${PRESET:-digits}           # the preset of every recipe: digits, or smoke
OUT=${OUT:-runs/digits}            # the folder of all results
SEED=${SEED:-0}
LAUNCH=${LAUNCH:-accelerate launch}

# 1. Pre-train by masked token modeling, without labels. Measured: 97 s on one core (docs/results.md).
$LAUNCH recipes/mtm_pretrain.py "$PRESET" --seed "$SEED" --out "$OUT/pretrain" --resume

# 2. Evaluate the frozen encoder by linear probing and k-NN; fill hidden tokens, see inpainting.png.
$LAUNCH recipes/probe.py "$PRESET" --checkpoint "$OUT/pretrain" --out "$OUT/probe" --overwrite
$LAUNCH recipes/inpaint.py "$PRESET" --checkpoint "$OUT/pretrain" --out "$OUT/inpaint" --overwrite

# 3. Fine-tune with labels. Measured: 47 s on one core.
$LAUNCH recipes/finetune.py "$PRESET" --seed "$SEED" --checkpoint "$OUT/pretrain" --out "$OUT/finetune" --resume

# 4. Evaluate: accuracy, per-class accuracy and the confusion matrix.
$LAUNCH recipes/evaluate.py "$PRESET" --checkpoint "$OUT/finetune" --out "$OUT/evaluate" --overwrite

# 5. Export the model for timm and the hub, with a model card.
[ -d "$OUT/exported" ] || seitpp export-model "$OUT/finetune" "$OUT/exported"
