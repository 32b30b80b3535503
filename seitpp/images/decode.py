"""Decode and resize one encoded image."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from seitpp.errors import UserError

# (height, width) of every resized image, or a function from the original (height, width) to the resized one.
Size = tuple[int, int] | Callable[[tuple[int, int]], tuple[int, int]]
# A box in an image: top, left, height, width in pixels.
Box = tuple[float, float, float, float]
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides of the box then still have this many times the
# pixels of the result. With 3, three photographs differed by at most 0.5 of 255 levels on average (above 50 dB).
DRAFT_MARGIN = 3


class ImageError(UserError):
    """Raised for a source without images and for an image that cannot be read."""


class Sample(NamedTuple):
    """One encoded image: the bytes of its file, its name in the source, and its class (0 without labels)."""

    data: bytes
    name: str
    label: int


@contextmanager
def open_image(data: bytes, name: str) -> Iterator[Image.Image]:
    """Open an image without decoding it. Errors of the image inside the block are raised as ImageError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: cannot be read as an image ({error})") from error


def image_size(sample: Sample) -> tuple[int, int]:
    """Read (height, width) from the header of an image. Raises ImageError if it cannot be read."""
    with open_image(sample.data, sample.name) as image:
        return image.height, image.width


def decode_image(sample: Sample, size: Size, box: Box | None = None) -> np.ndarray:
    """Decode an image to RGB and resize it to `size`, bicubic with antialias; return (3, height, width) uint8.

    With `box`, only this part of the image is resized. Raises ImageError that names the image if it cannot be
    read, or if it has too many pixels before or after resizing (Pillow's limits for decompression bombs).
    """
    with open_image(sample.data, sample.name) as image:
        height, width = size((image.height, image.width)) if callable(size) else size
        if height * width > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{height} x {width} pixels after resizing")
        corners = box and _draft(image, box, (height, width))
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, corners)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _draft(image: Image.Image, box: Box, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Let a large JPEG be decoded at reduced size if that suffices to resize `box` to `size` (height, width).

    Returns left, upper, right and lower bounds of the box in decoded pixels.
    """
    top, left, height, width = box
    spare = min(height / size[0], width / size[1]) / DRAFT_MARGIN
    whole, ratio = image.width, 1.0
    if image.format == "JPEG" and spare >= 2:
        divisor = min(8, int(spare))
        drafted = image.draft(None, (whole // divisor, image.height // divisor))  # rounded down to a power of two
        ratio = drafted[1][2] / whole
    return ratio * left, ratio * top, ratio * (left + width), ratio * (top + height)


def fit_short_side(size: tuple[int, int], short_side: int, multiple: int) -> tuple[int, int]:
    """Return (height, width) of an image of `size` (height, width) resized to a short side of `short_side` pixels.

    The long side keeps the aspect ratio, rounded to the nearest multiple of `multiple`, up if there are two.
    `short_side` must be such a multiple.
    """
    unit = 2 * min(size) * multiple
    height, width = ((2 * side * short_side + unit // 2) // unit * multiple for side in size)
    return height, width
