"""Compare a loader worker's speed on the crops of fine-tuning with decoding whole photographs to 256 x 256.

    python tests/bench/pixels.py [--images 64] [--rounds 7]

The images are scikit-learn's photographs as JPEG of quality 90: crops of the usual sizes of ImageNet, and images
enlarged to three megapixels. One thread; the methods alternate, and the best round of each is reported. The goal
is a ratio of at least 1.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from seitpp.augment import CentralBoxes, RandomBoxes
from seitpp.data.dataset import MicroBatch
from seitpp.images.batches import ImageDataset
from seitpp.images.sources import open_source

SIZES = ((400, 350), (500, 375), (2000, 1500))  # width, height


def make_images(root: Path, size: tuple[int, int], count: int) -> None:
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    for number in range(count):
        image = Image.fromarray(photographs[number % 2])
        if image.width < size[0]:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (rng.integers(whole - part + 1) for whole, part in zip(image.size, size, strict=True))
        image.crop((left, top, left + size[0], top + size[1])).save(root / f"{number:05d}.jpg", quality=90)


def rates(root: Path, rounds: int) -> dict[str, float]:
    """Return the images per second of each method."""
    source = open_source(str(root), None)
    datasets = {
        "whole": ImageDataset(source, (256, 256)),
        "random crop": ImageDataset(source, (224, 224), RandomBoxes(0, (224, 224))),
        "center": ImageDataset(source, (224, 224), CentralBoxes((224, 224))),
    }
    seconds = {name: [] for name in datasets}
    for epoch in range(rounds):
        for name, dataset in datasets.items():
            start = time.perf_counter()
            dataset.__getitems__(MicroBatch(range(len(source)), epoch))
            seconds[name].append(time.perf_counter() - start)
    return {name: len(source) / min(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder), size, options.images)
            speeds = rates(Path(folder), options.rounds)
        columns = (f"{name} {speed:.0f} ({speed / speeds['whole']:.2f})" for name, speed in speeds.items())
        print(f"{size[0]} x {size[1]}, images/s and ratio to whole: {', '.join(columns)}")


if __name__ == "__main__":
    main()
