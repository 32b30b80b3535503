"""Compare SeiT, SeiT + MTM and SeiT++ on the embedded digits with few labels, over several seeds.

    python tests/bench/seitpp_digits.py [--seeds 5] [--labels 1 5 10] [--processes 2]

For each seed: masked token modeling on all 1,437 training images without labels, once on whole grids, and once
with TokenAdapt on half of the images and random resized crops of the others; then recipes/finetune.py on 1, 5 and
10 labels per class, from both and from the untrained model, with the same number of steps and the same settings.
The table has the top-1 on the 360 validation images: the mean over the seeds and the half-width of its 95 %
interval (Student's t), then the difference to the untrained start, paired by seed. The script only reports; no
result makes it fail.
"""

import argparse
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from seitpp import TokenStore
from seitpp.codebook import codebook_fingerprint
from seitpp.data.digits import digits
from seitpp.models import MTM
from seitpp.models.weights.pretrained import save_pretrained

RECIPES = Path(__file__).parents[2] / "recipes"
STARTS = {"untrained": "SeiT", "mtm": "SeiT + MTM", "seitpp": "SeiT++"}
STEPS = 300


def run(recipe: str, folder: Path, *flags: object) -> Path:
    command = ["accelerate", "launch", str(RECIPES / f"{recipe}.py"), *map(str, flags), "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return folder


def untrained(folder: Path, seed: int) -> Path:
    """Save the model of the digits preset with its initial weights."""
    store = TokenStore(digits().store)
    torch.manual_seed(seed)
    model = MTM(
        "mtm_vit_nano",
        grid=store.grid,
        num_codes=store.num_codes,
        code_dim=32,
        decoder_width=96,
        decoder_depth=2,
        decoder_heads=4,
        dropout=0.0,
    )
    folder.mkdir()
    save_pretrained(folder / "model.safetensors", model, codebook_fingerprint(store.codebook))
    return folder


def starts(root: Path, seed: int, adapt: Path) -> dict[str, Path]:
    """Create the initial models of fine-tuning; in "seitpp" TokenAdapt augments half of the images."""
    plain = ["digits", "--seed", seed]
    with_adapt = [
        *plain,
        "--crop-size",
        8,
        "--crop-scale",
        0.7,
        1,
        "--tokenadapt",
        adapt,
        "--tokenadapt-fraction",
        0.5,
    ]
    return {
        "untrained": untrained(root / f"untrained-{seed}", seed),
        "mtm": run("mtm_pretrain", root / f"mtm-{seed}", *plain),
        "seitpp": run("mtm_pretrain", root / f"seitpp-{seed}", *with_adapt),
    }


def top1(start: Path, labels: int, seed: int) -> float:
    """Fine-tune for STEPS updates at a batch size of up to 64 and return the top-1 in percent."""
    batch = min(64, labels * 10 // 4 * 4)
    epochs = STEPS / (labels * 10 // batch)
    folder = run(
        "finetune",
        start.with_name(f"{start.name}-{labels}"),
        *("digits", "--checkpoint", start, "--labels-per-class", labels, "--batch-size", batch, "--seed", seed),
        *("--epochs", epochs, "--warmup-epochs", epochs / 10, "--evaluation-epochs", epochs),
        *("--checkpoint-epochs", epochs, "--crop-scale", 0.7, 1),
    )
    return json.loads((folder / "result.json").read_text())["top1"]


def interval(values: np.ndarray) -> str:
    """Format the mean and the half-width of its 95 % interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.1f} +- {half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.processes) as pool:
        root = Path(folder)
        adapt = run("tokenadapt_train", root / "tokenadapt", "digits")
        models = list(pool.map(lambda seed: starts(root, seed, adapt), seeds))
        jobs = [(name, labels, seed) for labels in arguments.labels for name in STARTS for seed in seeds]
        results = list(pool.map(lambda job: top1(models[job[2]][job[0]], job[1], job[2]), jobs))
    scores = np.array(results).reshape(len(arguments.labels), len(STARTS), len(seeds))
    print("| labels per class | from | top-1, % | gain over untrained, points |\n|---|---|---|---|")
    for labels, rows in zip(arguments.labels, scores, strict=True):
        for name, row in zip(STARTS, rows, strict=True):
            gain = "" if name == "untrained" else interval(row - rows[0])
            print(f"| {labels} | {STARTS[name]} | {interval(row)} | {gain} |")


if __name__ == "__main__":
    main()
