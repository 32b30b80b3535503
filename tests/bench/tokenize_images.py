"""Compare the speed of recipes/tokenize_images.py with its two parts, decoding and tokenizing, measured alone.

    OMP_NUM_THREADS=1 python tests/bench/tokenize_images.py
    OMP_NUM_THREADS=1 python tests/bench/tokenize_images.py --images 64 --repeats 1 --workers 1

The images are crops of scikit-learn's photographs as JPEG of 400 x 300 pixels, tokenized at 256 pixels (32 x 32
tokens, K = 391). "Decoding alone" is the recipe's loader without the tokenizer; "tokenizer alone" runs on decoded
batches. All three are measured in turns, the best of three, with the recipe's own number of workers, one for each
core, unless --workers says otherwise. The goal is at least 0.9 times the speed of the slower part.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader

from seitpp.engine.system import loader_workers
from seitpp.images.batches import ImageDataset, already_a_batch
from seitpp.images.sources import open_source
from seitpp.tokenizers import PatchKMeans

RECIPE = Path(__file__).parents[2] / "recipes/tokenize_images.py"
BATCH = 32


def make_images(root: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for number in range(count):
        top, left = rng.integers(127), rng.integers(240)
        crop = photographs[number % 2][top : top + 300, left : left + 400]
        Image.fromarray(crop).save(root / f"{number:05d}.jpg", quality=90)


def make_tokenizer(path: Path) -> PatchKMeans:
    photographs = [torch.tensor(image).permute(2, 0, 1)[None] / 255 for image in load_sample_images().images]
    tokenizer = PatchKMeans.fit(torch.cat(photographs), image_size=256, patch=8, num_codes=391, code_dim=32)
    tokenizer.save(path)
    return tokenizer


def decoded_batches(root: Path, workers: int) -> DataLoader:
    dataset = ImageDataset(open_source(str(root), None), (256, 256))
    starts = range(0, len(dataset), BATCH)
    batches = [list(range(start, min(start + BATCH, len(dataset)))) for start in starts]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=already_a_batch, num_workers=workers)


def decoding_rate(root: Path, workers: int) -> float:
    loader = decoded_batches(root, workers)
    start = time.perf_counter()
    return sum(len(batch.images) for batch in loader) / (time.perf_counter() - start)


def forward_rate(tokenizer: PatchKMeans, batches: list[Tensor]) -> float:
    tokenizer.encode(batches[0].float() / 255)
    start = time.perf_counter()
    for pixels in batches:
        tokenizer.encode(pixels.float() / 255)
    return sum(map(len, batches)) / (time.perf_counter() - start)


def recipe_rate(root: Path, *, tokenizer: Path, out: Path, workers: int) -> float:
    command = [sys.executable, RECIPE, "--data", root, "--tokenizer", tokenizer, "--out", out]
    command += ["--workers", workers, "--batch-size-per-process", BATCH]
    printed = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    return float(re.search(r"([\d.]+) images/s", printed)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, help="data loading processes; one for each core unless given")
    options = parser.parse_args()
    workers = loader_workers(options.workers)
    best = {"decoding alone": 0.0, "tokenizer alone": 0.0, "recipe": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        images, file = Path(folder) / "images", Path(folder) / "tokenizer.safetensors"
        images.mkdir()
        make_images(images, options.images)
        tokenizer = make_tokenizer(file)
        batches = [batch.images.clone() for batch in decoded_batches(images, workers)]
        for turn in range(options.repeats):
            rates = {
                "decoding alone": decoding_rate(images, workers),
                "tokenizer alone": forward_rate(tokenizer, batches),
                "recipe": recipe_rate(images, tokenizer=file, out=Path(folder) / f"tokens{turn}", workers=workers),
            }
            best = {name: max(rate, best[name]) for name, rate in rates.items()}
    print(f"{workers} workers, {torch.get_num_threads()} threads")
    for name, rate in best.items():
        print(f"{name:16} {rate:8.1f} images/s")
    print(f"recipe / slower part {best['recipe'] / min(best['decoding alone'], best['tokenizer alone']):.2f}")


if __name__ == "__main__":
    main()
