"""Ways to keep a picture in fewer bytes: fewer pixels, or a lossy format of which the quality is chosen."""

import io
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

from PIL import Image, ImageOps

from seitpp.images.decode import Sample, open_image

Format = Literal["JPEG", "WEBP", "AVIF"]
# Returns the file of a picture, given the file of its original.
Change = Callable[[Image.Image, bytes], bytes]

JPEG_QUALITY = 95  # of what is changed without a quality of its own
MOST_QUALITY = 100


def opened(sample: Sample) -> Image.Image:
    """Return a picture as it is looked at, gray or RGB. Raises ImageError if it cannot be read."""
    with open_image(sample.data, sample.name) as image:
        turned = ImageOps.exif_transpose(image)
        return turned.convert("L" if turned.mode in ("1", "L", "LA") else "RGB")


def encode(image: Image.Image, file_format: str, quality: int | None = None) -> bytes:
    """Return the file of a picture as Pillow writes it, at a quality or, as PNG, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **({"optimize": True} if quality is None else {"quality": quality}))
    return buffer.getvalue()


def in_kind(image: Image.Image, original: bytes) -> bytes:
    """Return the file of a picture in the kind of its original: JPEG at quality 95, else PNG."""
    jpeg = original.startswith(b"\xff\xd8")
    return encode(image, "JPEG", JPEG_QUALITY) if jpeg else encode(image, "PNG")


def smaller(image: Image.Image, original: bytes, *, scale: float) -> bytes:
    """Return the file of a picture with both sides times `scale`, at least 1 pixel each, in the kind it had."""
    return in_kind(_scaled(image, scale), original)


def compressed(image: Image.Image, original: bytes, *, file_format: Format, quality: int) -> bytes:
    """Return the file of a picture with all its pixels in a lossy format."""
    return encode(image, file_format, quality)


def fitted(
    image: Image.Image, original: bytes, *, file_format: Format, quality: int, size: tuple[int, int]
) -> bytes:
    """Return the file of a picture in a lossy format, with at most as many pixels as one of (height, width).

    Its aspect ratio is kept, and it is never enlarged.
    """
    scale = min(1.0, (size[0] * size[1] / (image.width * image.height)) ** 0.5)
    return encode(_scaled(image, scale), file_format, quality)


def changed(sample: Sample, change: Change) -> Sample:
    """Return a picture with its new file. Raises ImageError if it cannot be read."""
    return sample._replace(data=change(opened(sample), sample.data))


def framing(samples: Iterable[Sample], change: Change) -> int:
    """Return the bytes that the files of pictures without content take: of one gray, each of the same size."""
    known: dict[tuple, int] = {}
    total = 0
    for sample in samples:
        image = opened(sample)
        key = (image.mode, image.size, sample.data[:2])
        if key not in known:
            gray = Image.new(image.mode, image.size, (128,) * len(image.getbands()))
            known[key] = len(change(gray, sample.data))
        total += known[key]
    return total


def best_quality(samples: Iterable[Sample], change: Callable[..., bytes], most: float) -> int | None:
    """Return the largest quality at which files of pictures have at most `most` bytes on average.

    `change` is a Change without its quality. Returns None if even those of quality 0 have more.
    """
    pictures = [(opened(sample), sample.data) for sample in samples]

    def fits(quality: int) -> bool:
        sizes = [len(partial(change, quality=quality)(*picture)) for picture in pictures]
        return sum(sizes) <= most * len(pictures)

    low, high = -1, MOST_QUALITY  # the largest that is known to fit, and that may
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return None if low < 0 else low


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    sides = tuple(max(1, round(scale * side)) for side in image.size)
    return image if sides == image.size else image.resize(sides, Image.Resampling.BICUBIC)
