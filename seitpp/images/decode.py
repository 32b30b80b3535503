"""Decode one encoded image: named formats, orientation, bit depth, bands, and the rule that fits it to a size."""

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from seitpp.errors import UserError, reason
from seitpp.store.labels import Label

# (height, width) of every resized image, or a function from the original (height, width) to the resized one.
Size = tuple[int, int] | Callable[[tuple[int, int]], tuple[int, int]]
# A box in an image: top, left, height, width in pixels.
Box = tuple[float, float, float, float]
# The formats that are read, by their content. Others that Pillow knows start programs (EPS) or are no photographs.
# Formats without a mark at their beginning (TGA) would take any damaged file for a picture.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "QOI", "SGI")
# A box of a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides of the box then still have this many
# times the pixels of the result. With 3, three photographs differed by at most 0.5 of 255 levels on average (above
# 50 dB).
DRAFT_MARGIN = 3
NPY = b"\x93NUMPY"
# Tags of TIFF: values per pixel, and what those beyond the colors are; 1 and 2 mean alpha.
SAMPLES_PER_PIXEL, EXTRA_SAMPLES, ALPHA = 277, 338, (1, 2)


class ImageError(UserError):
    """Raised for a source without images and for an image that cannot be read."""


class Sample(NamedTuple):
    """One encoded image: the bytes of its file, its name in the source, and its label.

    With `box`, only this part of the image is meant.
    """

    data: bytes
    name: str
    label: Label
    box: Box | None = None


@dataclass(frozen=True)
class Reading:
    """How encoded images become pixels; recorded with the tokens.

    `resize` fits an image to a size of another aspect ratio: "squash" changes its aspect ratio (as both papers),
    "center_crop" cuts off its ends, "pad" adds black borders. `channels` is the number of bands that the tokenizer
    takes. `intensity` (low, high) are the values that become 0 and 255; None: 0 and the largest value of the
    integer type. With `scaled`, a JPEG of at least twice the size is decoded at a half, a quarter or an eighth,
    which is faster and changes pixels slightly. The orientation in an image's EXIF is always applied.
    """

    resize: Literal["squash", "center_crop", "pad"] = "squash"
    channels: int = 3
    intensity: tuple[float, float] | None = None
    scaled: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the record of this reading, without the channels, which the tokenizer's own record has."""
        intensity = {} if self.intensity is None else {"intensity": list(self.intensity)}
        return {
            "orientation": "exif",
            "resize": self.resize,
            **intensity,
            **({"scaled": True} if self.scaled else {}),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any] | None, channels: int = 3) -> "Reading":
        """Return the reading of a record, as `to_json` made it; of None, the default."""
        record = record or {}
        intensity = record.get("intensity")
        return cls(
            record.get("resize", "squash"),
            channels,
            None if intensity is None else (float(intensity[0]), float(intensity[1])),
            record.get("scaled", False),
        )


RGB = Reading()


@contextmanager
def open_image(data: bytes, name: str) -> Iterator[Image.Image]:
    """Open an image without decoding it. Errors of the image inside the block are raised as ImageError."""
    with readable(name), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        yield image


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Raise every error of an image library inside the block as ImageError, with the reason on one line."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        # Its own text has the address of a buffer, which differs from run to run.
        raise ImageError(
            f"{name}: cannot be read as an image (none of the formats {', '.join(FORMATS)})"
        ) from error
    except Exception as error:  # damaged files make the decoders raise almost anything
        raise ImageError(f"{name}: cannot be read as an image ({reason(error)})") from error


def is_image(head: bytes) -> bool:
    """Return whether a file that begins with `head` (4 KiB) is in a format that is read here."""
    if head.startswith(NPY):
        return True
    try:
        with Image.open(io.BytesIO(head), formats=FORMATS):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # the format was recognized, and its header goes on after `head`
        return True


def image_size(sample: Sample) -> tuple[int, int]:
    """Read (height, width) of an image from its header, as it is looked at. Raises ImageError if it cannot be."""
    if sample.data.startswith(NPY):
        height, width = read_bands(sample, RGB).shape[:2]
        return height, width
    with open_image(sample.data, sample.name) as image:
        return _turned(image.size[::-1], orientation(image, sample.data))


def decode_image(sample: Sample, size: Size, box: Box | None = None, *, reading: Reading = RGB) -> np.ndarray:
    """Decode an image and resize it to `size`, bicubic with antialias; return (channels, height, width) uint8.

    With `box`, or that of the sample, only this part of the image is resized; else the rule of `reading` fits it
    to the size. Raises ImageError that names the image if it cannot be read, if its bands are not those of
    `reading`, or if it has too many pixels before or after resizing (Pillow's limits for decompression bombs).
    """
    box = box or sample.box
    if sample.data.startswith(NPY) or reading.channels not in (1, 3):
        return _decode_bands(sample, size, box, reading)
    with open_image(sample.data, sample.name) as image:
        turn = orientation(image, sample.data)
        whole = _turned(image.size[::-1], turn)
        target = target_size(size, whole)
        part = box or _part(whole, target, reading.resize)
        fitted = _fitted(part, target) if reading.resize == "pad" and box is None else target
        margin = 1 if reading.scaled else DRAFT_MARGIN
        ratio = _draft(image, part, fitted, margin) if reading.scaled or box else 1.0
        _check_bands(image, sample.name)
        pixels = image if turn == 1 else ImageOps.exif_transpose(image)
        colors = _in_bytes(pixels, reading, sample.name).convert("L" if reading.channels == 1 else "RGB")
        top, left, height, width = part
        resized = _resize(colors, (ratio * top, ratio * left, ratio * height, ratio * width), fitted)
    return _centered(np.asarray(resized), target)


def read_bands(sample: Sample, reading: Reading) -> np.ndarray:
    """Read an image with any number of bands, or an array file: (height, width, bands) uint8 at its own size.

    Raises ImageError if the bands are not the `channels` of `reading`, or their values have no known range.
    """
    with readable(sample.name):
        values = _values(sample)
    if not values.size or values.dtype.kind not in "buif":
        raise ImageError(f"{sample.name}: {values.shape} of {values.dtype}, expected numbers, a pixel at least")
    bands = reading.channels
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim == 3 and values.shape[2] != bands and values.shape[0] == bands:
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1 and bands == 3:
        values = values.repeat(3, axis=2)
    if values.ndim != 3 or values.shape[2] != bands:
        raise ImageError(
            f"{sample.name}: an array of shape {values.shape}, expected {bands} band(s), first or last: name a "
            "tokenizer for that number of bands (tokenizer_train --bands)"
        )
    return _to_bytes(values, reading.intensity, sample.name)


def load_array(data: bytes) -> np.ndarray:
    """Return the array of a .npy file.

    Raises ValueError for any other file, and for one that claims more values than it has, before there is memory
    for them.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > len(data) - file.tell():
        raise ValueError(f"{len(data):,} bytes for {shape} of {dtype}")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _values(sample: Sample) -> np.ndarray:
    """Return the values of an array file, a TIFF with any bands, or a picture in its own bands."""
    if sample.data.startswith(NPY):
        return load_array(sample.data)
    if sample.data[:4] in (b"II*\0", b"MM\0*"):
        with tifffile.TiffFile(io.BytesIO(sample.data)) as file:
            values = file.series[0]
            if Image.MAX_IMAGE_PIXELS and values.size > 4 * Image.MAX_IMAGE_PIXELS:  # before they are allocated
                raise Image.DecompressionBombError(f"{values.size:,} values")
            return values.asarray()
    with Image.open(io.BytesIO(sample.data), formats=FORMATS) as image:
        turned = ImageOps.exif_transpose(image)
        return np.asarray(turned.convert("RGB") if turned.mode == "P" else turned)


def _decode_bands(sample: Sample, size: Size, box: Box | None, reading: Reading) -> np.ndarray:
    """Like `decode_image`, band by band."""
    values = read_bands(sample, reading)
    with readable(sample.name):
        whole = values.shape[:2]
        target = target_size(size, whole)
        part = box or _part(whole, target, reading.resize)
        fitted = _fitted(part, target) if reading.resize == "pad" and box is None else target
        bands = [_resize(Image.fromarray(band), part, fitted) for band in np.moveaxis(values, 2, 0)]
    return _centered(np.stack(bands, axis=2), target)


def target_size(size: Size, whole: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of an image of (height, width) `whole` after resizing; at most Pillow's limit."""
    height, width = size(whole) if callable(size) else size
    if Image.MAX_IMAGE_PIXELS and height * width > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{height} x {width} pixels after resizing")
    return height, width


def orientation(image: Image.Image, data: bytes) -> int:
    """Return the orientation 1 to 8 in the EXIF of an opened image; 1 where there is none or it is damaged."""
    # A PNG can have its EXIF behind the pixels, and Pillow decodes all of them to look for it.
    if image.format == "PNG" and b"eXIf" not in data and b"Raw profile type exif" not in data:
        return 1
    if image.format == "TIFF":  # Pillow turns it itself, and gives its sides as they are then
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF does not make a picture unreadable
        return 1
    return value if value in range(1, 9) else 1


def _turned(size: tuple[int, int], turn: int) -> tuple[int, int]:
    """Return (height, width) after applying an orientation; 5 to 8 exchange the sides."""
    return size[::-1] if turn >= 5 else size


def _part(whole: tuple[int, int], target: tuple[int, int], resize: str) -> Box:
    """Return the box of an image that `resize` keeps: its center in the target's aspect ratio, or all of it."""
    height, width = whole
    if resize != "center_crop":
        return 0, 0, height, width
    scale = min(height / target[0], width / target[1])
    kept = scale * target[0], scale * target[1]
    return (height - kept[0]) / 2, (width - kept[1]) / 2, *kept


def _fitted(part: Box, target: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (height, width) within `target` that has the aspect ratio of `part`, at least 1 pixel."""
    scale = min(target[0] / part[2], target[1] / part[3])
    return max(1, min(target[0], round(scale * part[2]))), max(1, min(target[1], round(scale * part[3])))


def _draft(image: Image.Image, part: Box, size: tuple[int, int], margin: int) -> float:
    """Let a large JPEG be decoded at a half, a quarter or an eighth of its size, if that suffices for its `part`.

    It does if both sides of the part then still have `margin` times the pixels of `size` (height, width). Returns
    the size of decoded pixels relative to those of the file.
    """
    spare = min(part[2] / size[0], part[3] / size[1]) / margin
    if image.format not in ("JPEG", "MPO") or spare < 2:
        return 1.0
    width, divisor = image.width, min(8, int(spare))
    drafted = image.draft(None, (width // divisor, image.height // divisor))  # rounded down to a power of two
    return drafted[1][2] / width if drafted else 1.0


def _check_bands(image: Image.Image, name: str) -> None:
    """Raise ImageError for a TIFF with bands that are neither colors nor alpha, which would be dropped."""
    tags = getattr(image, "tag_v2", {})
    samples = tags.get(SAMPLES_PER_PIXEL, 1)
    extra = [kind for kind in np.atleast_1d(tags.get(EXTRA_SAMPLES, ())).tolist() if kind not in ALPHA]
    if extra or (samples == 2 and image.mode != "LA"):
        raise ImageError(
            f"{name}: a TIFF of {samples} bands, expected gray or RGB: name a tokenizer for {samples} bands "
            "(tokenizer_train --bands)"
        )


def _in_bytes(image: Image.Image, reading: Reading, name: str) -> Image.Image:
    """Return an image of one channel as bytes, by its range of values; other images are bytes already."""
    if reading.intensity is None and not image.mode.startswith(("I", "F")):  # others are bytes
        return image
    values = np.asarray(image.convert("RGB") if image.mode in ("P", "1", "CMYK") else image)
    return Image.fromarray(_to_bytes(values, reading.intensity, name))


def _to_bytes(values: np.ndarray, intensity: tuple[float, float] | None, name: str) -> np.ndarray:
    """Map `intensity`, or the range of 8- or 16-bit integers, linearly to 0 .. 255, rounded and clipped."""
    if values.dtype == bool:
        values = values * np.uint8(255)
    if intensity is None and values.dtype == np.uint8:
        return values
    if intensity is None and values.dtype.kind == "u" and values.dtype.itemsize == 2:
        intensity = 0, 65535
    if intensity is None:
        raise ImageError(
            f"{name}: values of type {values.dtype}, which have no fixed range: say which values are black and "
            f"white, for example --intensity {values.min():g} {values.max():g}"
        )
    low, high = intensity
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)


def _resize(image: Image.Image, part: Box, size: tuple[int, int]) -> Image.Image:
    """Resize the box `part` of an image to (height, width), bicubic with antialias."""
    top, left, height, width = part
    right, lower = min(left + width, image.width), min(top + height, image.height)  # a draft rounds sides up
    return image.resize(size[::-1], Image.Resampling.BICUBIC, (left, top, right, lower))


def _centered(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return pixels (h, w) or (h, w, channels) as (channels, height, width), filled up to `size` with black."""
    pixels = np.atleast_3d(pixels).transpose(2, 0, 1)
    if pixels.shape[1:] == size:
        return np.ascontiguousarray(pixels)
    filled = np.zeros((len(pixels), *size), np.uint8)
    top, left = ((side - own) // 2 for side, own in zip(size, pixels.shape[1:], strict=True))
    filled[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return filled


def fit_short_side(size: tuple[int, int], short_side: int, multiple: int) -> tuple[int, int]:
    """Return (height, width) of an image of `size` (height, width) resized to a short side of `short_side` pixels.

    The long side keeps the aspect ratio, rounded to the nearest multiple of `multiple`, up if there are two.
    `short_side` must be such a multiple.
    """
    unit = 2 * min(size) * multiple
    height, width = ((2 * side * short_side + unit // 2) // unit * multiple for side in size)
    return height, width
