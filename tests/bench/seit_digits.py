"""Check the claims of SeiT on the embedded digits over several seeds: augmentation against none, and the stems.

    python tests/bench/seit_digits.py [--seeds 5] [--processes 2]

Each row is recipes/seit_train.py, preset digits, with the flags in ROWS; the score is the top-1 of the moving
average of the weights on the 360 validation images. The table has the mean over the seeds and the half-width of
its 95 % interval (Student's t), then the same for the difference to the full recipe, paired by seed. The script
only reports; no result makes it fail.
"""

import argparse
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy import stats

RECIPE = Path(__file__).parents[2] / "recipes/seit_train.py"
ROWS = {
    "full recipe (conv4)": [],
    "no augmentation": ["--crop-mode", "None", "--eda", "None", "--color", "None", "--cutmix", "0"],
    "conv2 stem": ["--stem", "conv2"],
    "linear stem": ["--stem", "linear", "--size", "4"],
}


def top1(flags: list[str], seed: int, folder: Path) -> float:
    command = ["accelerate", "launch", str(RECIPE), "digits", "--seed", str(seed), "--out", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads((folder / "result.json").read_text())["top1_ema"]


def interval(values: np.ndarray) -> str:
    """Format the mean and the half-width of its 95 % interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():6.2f} +- {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(name, seed) for name in ROWS for seed in range(arguments.seeds)]
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(arguments.processes) as pool:
        results = pool.map(lambda job: top1(ROWS[job[0]], job[1], Path(root) / f"{job[0]}-{job[1]}"), jobs)
        scores = np.array(list(results)).reshape(len(ROWS), arguments.seeds)
    print("| recipe | top-1, % | full recipe minus this one, points |\n|---|---|---|")
    for name, row in zip(ROWS, scores, strict=True):
        difference = interval(scores[0] - row) if name != "full recipe (conv4)" else ""
        print(f"| {name} | {interval(row)} | {difference} |")


if __name__ == "__main__":
    main()
