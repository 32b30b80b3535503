"""One encoded image, and how it becomes pixels."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from seitpp.errors import UserError

# (height, width) of every resized image, or a function that makes it of an image's own (height, width).
Size = tuple[int, int] | Callable[[tuple[int, int]], tuple[int, int]]
# A part of an image: top, left, height, width in its pixels.
Box = tuple[float, float, float, float]
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where a side of the box then still has so many times the pixels
# that are made of it. At 3, three photographs came out within 0.5 of 255 levels on average, more than 50 dB.
DRAFT_MARGIN = 3


class ImageError(UserError):
    """A source that holds no images, or an image that cannot be read."""


class Sample(NamedTuple):
    """One encoded image: its file's bytes, a name to find it by, and its class (0 where there are no labels)."""

    data: bytes
    name: str
    label: int


@contextmanager
def open_image(data: bytes, name: str) -> Iterator[Image.Image]:
    """The image in a file's bytes, not decoded yet; whatever goes wrong with it in the block is an ImageError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: cannot be read as an image ({error})") from error


def image_size(sample: Sample) -> tuple[int, int]:
    """(height, width) of an image, from its header alone. Raises ImageError if it cannot be read."""
    with open_image(sample.data, sample.name) as image:
        return image.height, image.width


def decode_image(sample: Sample, size: Size, box: Box | None = None) -> np.ndarray:
    """Decode to RGB and resize to exactly `size`, bicubic with antialias: (3, height, width) uint8.

    With `box`, only that part of the image is resized. Raises ImageError naming the image if it cannot be read; an
    image that is or would be enormous is one of those.
    """
    with open_image(sample.data, sample.name) as image:
        height, width = size((image.height, image.width)) if callable(size) else size
        if height * width > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{height} x {width} pixels when it is resized")
        corners = box and _draft(image, box, (height, width))
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, corners)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _draft(image: Image.Image, box: Box, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Have a large JPEG decoded with fewer pixels, if (height, width) `size` of `box` needs no more; left, upper,
    right and lower end of the box in the pixels that will be decoded.
    """
    top, left, height, width = box
    spare = min(height / size[0], width / size[1]) / DRAFT_MARGIN
    whole, ratio = image.width, 1.0
    if image.format == "JPEG" and spare >= 2:
        divisor = min(8, int(spare))
        drafted = image.draft(None, (whole // divisor, image.height // divisor))  # at the next power of two
        ratio = drafted[1][2] / whole
    return ratio * left, ratio * top, ratio * (left + width), ratio * (top + height)


def fit_short_side(size: tuple[int, int], short_side: int, multiple: int) -> tuple[int, int]:
    """(height, width) of an image of `size` (height, width) that is resized to `short_side` pixels.

    The long side becomes that multiple of `multiple` which is nearest to the same aspect ratio, the larger of two.
    `short_side` is a multiple already.
    """
    unit = 2 * min(size) * multiple
    height, width = ((2 * side * short_side + unit // 2) // unit * multiple for side in size)
    return height, width
