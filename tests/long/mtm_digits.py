"""Check that pre-training on the embedded digits improves the encoder as the README says, over three seeds.

    python tests/long/mtm_digits.py

About 6 minutes on 2 CPU cores. Fails unless, for every seed, the linear probe gains at least 20 points and k-NN at
least 30 over the untrained encoder, the loss starts at ln K, and the run takes at most 4 minutes.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes/mtm_pretrain.py"


def run(seed: int, folder: Path) -> dict:
    command = ["accelerate", "launch", str(RECIPE), "--seed", str(seed), "--out", str(folder)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    first = json.loads((folder / "metrics.jsonl").open().readline())
    return {"first_loss": first["loss"], **json.loads((folder / "result.json").read_text())}


def main() -> None:
    print("| seed | linear probe | untrained | k-NN | untrained | loss, first and last | images/s | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    gains = []
    with tempfile.TemporaryDirectory() as root:
        for seed in range(3):
            r = run(seed, Path(root) / str(seed))
            print(
                f"| {seed} | {r['linear_probe_top1']:.1f} | {r['linear_probe_top1_untrained']:.1f} "
                f"| {r['knn_top1']:.1f} | {r['knn_top1_untrained']:.1f} | {r['first_loss']:.2f}, {r['loss']:.2f} "
                f"| {r['images_per_second']:.0f} | {r['seconds']:.0f} |",
                flush=True,
            )
            linear = r["linear_probe_top1"] - r["linear_probe_top1_untrained"]
            nearest = r["knn_top1"] - r["knn_top1_untrained"]
            gains.append((linear, nearest))
            passed = (
                linear >= 20
                and nearest >= 30
                and abs(r["first_loss"] - math.log(64)) < 0.05
                and r["seconds"] <= 240
            )
            if not passed:
                sys.exit(f"seed {seed}: gains {linear:.1f} and {nearest:.1f} points, {r['seconds']} s")
    smallest = [min(column) for column in zip(*gains, strict=True)]
    print(
        f"smallest gain over the untrained encoder: linear probe {smallest[0]:.1f}, k-NN {smallest[1]:.1f} points"
    )


if __name__ == "__main__":
    main()
