"""How many images a memory of so many bytes holds, by several ways to count."""

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Literal

import numpy as np
from accelerate.utils import tqdm

from seitpp.errors import UserError
from seitpp.images.sources import ImageSource
from seitpp.store import TokenStore

FLOAT32, ID = 4, 4  # bytes of a value of a pixel and of an id, or of a digit, as the paper counts
LABEL = 8  # bytes of a label in a store
READ = 10_000  # files that are read at most, evenly spaced, for the mean of their sizes

# What the paper counts (float32 pixels, 4-byte ids), a byte a value of a pixel, image files, or ids and label as
# stored.
Count = Literal["paper", "uint8", "jpeg", "stored"]
COUNTS: dict[str, Sequence[Count]] = {"tokens": ("paper", "stored"), "pixels": ("paper", "uint8", "jpeg")}


def token_bytes(store: TokenStore, count: Count) -> float:
    """Return the bytes of an image of a store with one grid: 4 for each digit, or what is stored and the label."""
    if count == "stored":
        return store.payload_bytes / len(store) + LABEL
    return ID * prod((*store.books.planes, *store.grid))


def pixel_bytes(shape: tuple[int, int, int], source: ImageSource, count: Count) -> float:
    """Return the bytes of an image of (channels, height, width): of its values, or the mean of the image files.

    At most 10,000 files are read.
    """
    if count == "jpeg":
        chosen = np.linspace(0, len(source) - 1, min(len(source), READ)).round().astype(int).tolist()
        sizes = [len(source.read(index).data) for index in tqdm(chosen, desc="sizes of files", delay=2.0)]
        return sum(sizes) / len(sizes)
    return (FLOAT32 if count == "paper" else 1) * prod(shape)


def images_held(memory: int, image: float, count: Count) -> int:
    """Return how many images of `image` bytes `memory` bytes hold. Raises UserError if some bytes hold none."""
    if 0 < memory < image:
        raise UserError(
            f"--memory of {memory:,} bytes: expected 0, or at least the {image:,.0f} bytes of one image by "
            f"--count {count}"
        )
    return int(memory / Fraction(image))
