"""The claims of SeiT on the embedded digits, over seeds: augmentation against none, and the stems.

    python tests/bench/seit_digits.py [--seeds 5]

Each row is recipes/seit_train.py, preset digits, with the flags that it names; top-1 of the moving average of the
weights on the 360 validation images. Printed are the mean over the seeds and the half-width of its 95 % interval
(Student's t), then the same of each difference to the full recipe, paired by seed. Nothing fails: it reports.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from scipy import stats

RECIPE = Path(__file__).parents[2] / "recipes/seit_train.py"
ROWS = {
    "full recipe (conv4)": [],
    "no augmentation": ["--crop", "None", "--eda", "None", "--colour", "None", "--cutmix", "0"],
    "no crop": ["--crop", "None"],
    "no EDA": ["--eda", "None"],
    "no noise": ["--colour", "None"],
    "no CutMix": ["--cutmix", "0"],
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
    """Mean and half-width of its 95 % interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():6.2f} +- {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    full = None
    print("| recipe | top-1, % | full recipe minus this one, points |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as root:
        for number, (name, flags) in enumerate(ROWS.items()):
            found = np.array([top1(flags, seed, Path(root) / f"{number}-{seed}") for seed in seeds])
            full = found if full is None else full
            difference = interval(full - found) if name != "full recipe (conv4)" else ""
            print(f"| {name} | {interval(found)} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
