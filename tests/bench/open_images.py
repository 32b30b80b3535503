"""Measure how long it takes to list a folder of images, beside torchvision's ImageFolder.

    python tests/bench/open_images.py
    python tests/bench/open_images.py --images 2000 --repeats 1

Makes a folder of 200,000 empty files in 1,000 class folders, in a temporary place, and lists it in turns by
`open_source`, by ImageFolder, and by its `os.walk` alone: the best of three each, after one that fills the
system's cache. Prints a table for docs/results.md.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torchvision.datasets import ImageFolder

from seitpp.images.sources import open_source

CLASSES = 1000


def make(folder: Path, images: int) -> None:
    """Write empty files; listing does not open files that have the suffix of an image."""
    for number in range(CLASSES):
        (folder / f"n{number:08d}").mkdir()
    for number in range(images):
        (folder / f"n{number % CLASSES:08d}" / f"n{number % CLASSES:08d}_{number}.JPEG").touch()


def seconds_of(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the best time of each way, taken in turns."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), arguments.images)
        assert open_source(folder).labels.values == ImageFolder(folder, allow_empty=True).targets
        ways = {
            "open_source": lambda: open_source(folder),
            "ImageFolder": lambda: ImageFolder(folder, allow_empty=True),
            "os.walk": lambda: sum(len(files) for _, _, files in os.walk(folder)),
        }
        best = seconds_of(ways, arguments.repeats)
    print(
        f"{arguments.images:,} images in {CLASSES:,} folders\n\n| way | seconds | of ImageFolder |\n|---|---|---|"
    )
    for name, seconds in best.items():
        print(f"| {name} | {seconds:.2f} | {seconds / best['ImageFolder']:.2f} |")


if __name__ == "__main__":
    main()
