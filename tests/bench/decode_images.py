"""Measure JPEG decoding and resizing beside Pillow alone and torchvision, and what scaled decoding changes.

    python tests/bench/decode_images.py
    python tests/bench/decode_images.py --images 2 --repeats 1

Crops of two photographs, enlarged to 400 x 300 pixels and to 12 megapixels, are saved as JPEG (quality 90) and
resized to 256 x 256 pixels on one thread, all ways in turns, the best of five. Ids are those of a PatchKMeans of
391 codes and patches of 8 pixels, fitted to the same crops. Prints a table for docs/results.md.
"""

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import InterpolationMode, resize

from seitpp.images.decode import Reading, Sample, decode_image
from seitpp.tokenizers import PatchKMeans

SIZES = {"400 x 300": (300, 400), "4000 x 3000": (3000, 4000)}
SIDE = 256


def photographs(size: tuple[int, int], count: int) -> list[bytes]:
    """Return JPEG files of this (height, width)."""
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        whole = load_sample_images().images[number % 2]
        top, left = rng.integers(whole.shape[0] - 299), rng.integers(whole.shape[1] - 399)
        crop = Image.fromarray(whole[top : top + 300, left : left + 400])
        buffer = io.BytesIO()
        crop.resize(size[::-1], Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


def torchvision(data: bytes) -> Tensor:
    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return resize(image, [SIDE, SIDE], InterpolationMode.BICUBIC, antialias=True)


def ours(data: bytes, reading: Reading) -> np.ndarray:
    return decode_image(Sample(data, "photograph", None), (SIDE, SIDE), reading=reading)


def milliseconds(ways: dict[str, Callable[[bytes], object]], files: list[bytes], repeats: int) -> dict[str, float]:
    """Return the best time of each way for an image, taken in turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            for data in files:
                way(data)
            best[name] = min(best[name], 1000 * (time.perf_counter() - started) / len(files))
    return best


def changed(files: list[bytes]) -> tuple[float, float]:
    """Return how much of the ids scaled decoding changes, in percent, and of the levels on average."""
    exact, scaled = (
        np.stack([ours(data, reading) for data in files]) for reading in (Reading(), Reading(scaled=True))
    )
    images = [torch.from_numpy(pixels) for pixels in (exact, scaled)]
    tokenizer = PatchKMeans.fit_to_images([images[0]], image_size=SIDE)
    first, second = (tokenizer.encode(pixels.float() / 255) for pixels in images)
    levels = np.abs(exact.astype(int) - scaled).mean()
    return 100 * (first != second).float().mean().item(), float(levels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = {
        "Pillow alone": pillow,
        "torchvision": torchvision,
        "decode_image": lambda data: ours(data, Reading()),
        "decode_image, scaled": lambda data: ours(data, Reading(scaled=True)),
    }
    print("| picture | " + " | ".join(ways) + " | ids changed by scaling | levels |\n|" + "---|" * (len(ways) + 3))
    for title, size in SIZES.items():
        files = photographs(size, arguments.images)
        best = milliseconds(ways, files, arguments.repeats)
        ids, levels = changed(files)
        cells = [f"{value:.1f} ms ({value / best['Pillow alone']:.2f})" for value in best.values()]
        print(f"| {title} | {' | '.join(cells)} | {ids:.1f} % | {levels:.2f} |")


if __name__ == "__main__":
    main()
