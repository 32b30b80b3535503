"""Check that pre-training on tokens of synthetic scenes improves segmentation: three seeds, held-out scenes.

    python tests/long/segmentation_scenes.py [SEEDS]

For each seed recipes/mtm_pretrain.py is trained on the tokens of the scenes without labels. Then
recipes/segment_ade20k.py, preset `scenes`, is trained from that model and from scratch for the same number of
steps. Prints mIoU, aAcc, mIoU during training, and the differences. Fails unless the pre-trained model is better
for every seed and reaches 60 mIoU.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from downstream.segmentation.default import default_scenes

RECIPES = Path(__file__).parents[2] / "recipes"
PRETRAINING = ("--epochs", 40, "--warmup-epochs", 3, "--batch-size", 64, "--base-lr", 1.2e-2)
WANTED = 60.0


def run(recipe: str, folder: Path, *arguments: object) -> dict:
    """Run a recipe and return its result.json, with its evaluations as `course`."""
    line = [sys.executable, str(RECIPES / f"{recipe}.py"), *map(str, arguments), "--out", str(folder)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    evaluations = folder / "evaluations.jsonl"
    course = [json.loads(line) for line in evaluations.read_text().splitlines()] if evaluations.exists() else []
    return {**json.loads((folder / "result.json").read_text()), "course": course}


def main() -> None:
    seeds, store = int(sys.argv[1]) if len(sys.argv) > 1 else 3, default_scenes().store
    print("| seed | from | mIoU | aAcc | mIoU during training | seconds |\n|---|---|---|---|---|---|", flush=True)
    pairs = []
    with tempfile.TemporaryDirectory() as root:
        for seed in range(seeds):
            pretrained = Path(root, f"mtm-{seed}")
            before = run("mtm_pretrain", pretrained, "digits", *PRETRAINING, "--store", store, "--seed", seed)
            scores = []
            for start, flags in (("MTM", ("--checkpoint", pretrained)), ("scratch", ())):
                r = run("segment_ade20k", Path(root, f"{start}-{seed}"), "scenes", *flags, "--seed", seed)
                course = ", ".join(f"{evaluation['mIoU']:.1f}" for evaluation in r["course"])
                seconds = f"{r['seconds']:.0f}" + (f" after {before['seconds']:.0f}" if flags else "")
                print(
                    f"| {seed} | {start} | {r['mIoU']:.1f} | {r['aAcc']:.1f} | {course} | {seconds} |", flush=True
                )
                scores.append(r["mIoU"])
            pairs.append(scores)
    gains = [pretrained - scratch for pretrained, scratch in pairs]
    means = [sum(column) / seeds for column in zip(*pairs, strict=True)]
    differences = ", ".join(f"{gain:.1f}" for gain in gains)
    print(f"mean mIoU {means[0]:.1f} from MTM, {means[1]:.1f} from scratch; differences {differences}")
    if min(gains) <= 0 or min(pretrained for pretrained, _ in pairs) < WANTED:
        sys.exit(f"expected a gain for every seed and at least {WANTED} mIoU from MTM")


if __name__ == "__main__":
    main()
