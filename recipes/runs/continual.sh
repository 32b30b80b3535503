#!/usr/bin/env bash
# The figure of continual learning: average accuracy against the bytes of the memory, for tokens and for pixels.
#
#     bash recipes/runs/continual.sh                           # on the digits
#     PRESET=smoke OUT=runs/smoke SEEDS=0 bash recipes/runs/continual.sh   # every step, with few images
#     PRESET=published STORE="--store imagenet100-tokens" DATA="--data imagenet100" \
#         SIZES="57.5MiB 143.6MiB 287.2MiB 574.3MiB" bash recipes/runs/continual.sh
#
# After an interruption, the same command continues where the script stopped.
set -euo pipefail

PRESET=${PRESET:-digits}                    # the preset of every run: published, digits, or smoke
OUT=${OUT:-runs/continual}                  # the folder of all results
SEEDS=${SEEDS:-0 1 2}
SIZES=${SIZES:-24.6kB 123kB 614.4kB}        # of the memory
STORE=${STORE:-}                            # the tokens, unless they are the digits
DATA=${DATA:-}                              # the same images
LAUNCH=${LAUNCH:-accelerate launch}

# 1. Tokens and pixels with each memory, without one, and all classes at once.
for seed in $SEEDS; do
    for input in tokens pixels; do
        images=$([ $input = tokens ] && echo "$STORE" || echo "$DATA")
        for memory in $SIZES 0; do
            # shellcheck disable=SC2086
            $LAUNCH recipes/continual.py "$PRESET" --input $input $images --memory "$memory" --seed "$seed" \
                --out "$OUT/$input-$memory-$seed" --resume
        done
        # shellcheck disable=SC2086
        $LAUNCH recipes/continual.py "$PRESET" --input $input $images --memory 0 --tasks 1 --seed "$seed" \
            --out "$OUT/$input-joint-$seed" --resume
    done
done

# 2. The figure, memory.png: means and standard deviations over the seeds.
$LAUNCH recipes/continual.py "$PRESET" --figure "$OUT"/{tokens,pixels}-*-* --out "$OUT/figure" --overwrite
