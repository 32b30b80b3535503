"""Masks of segmentation sets: which value, or color, of a mask is which class."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from seitpp.errors import refusing
from seitpp.images.class_lists import LARGEST, ClassList, Color
from seitpp.images.decode import ImageError, load_array, open_image

Layout = Literal["ade20k", "voc", "cityscapes", "pairs"]
# Stored label maps are bytes, and one of their values marks ignored pixels.
MAX_CLASSES = 255
# Formats that keep every value; a mask in another one has values that nobody drew.
LOSSLESS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
LOSSY_TIFF = {"jpeg", "tiff_jpeg", "webp"}
# Positions in a PNG file of the bit depth and of the color type, and two color types.
DEPTH, COLOR = 24, 25
GRAY, PALETTE = 0, 3
BITS_PER_SAMPLE = 258  # tag of a TIFF


@dataclass(frozen=True)
class MaskRules:
    """What a user says about a set with masks; None, () and False leave it to the set.

    `layout` is how its folder is arranged (None: it is recognized). `classes` is a file of class names, see
    `read_classes`. `ignore_label` are the values of pixels without a class. `background_class` says that value 0
    is a class, that of the first name.
    """

    layout: Layout | None = None
    classes: str | None = None
    ignore_label: tuple[int, ...] = ()
    background_class: bool = False


@dataclass(frozen=True)
class MaskClasses:
    """Which value of a mask is which class.

    Value `values[c]` is class c, called `names[c]`; a value of `ignored` is no class; any other value is an error.
    With `colors`, masks are colored, and the value of color `colors[i]` is i.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignored: tuple[int, ...]
    colors: tuple[Color, ...] | None = None

    def labels(self, data: bytes, name: str) -> np.ndarray:
        """Decode the mask file called `name` to a label map (h, w) uint8: 0 is ignored, v is class v - 1.

        Raises ImageError that names the file for a mask that cannot be read and for a value without a class.
        """
        values = decode_mask(data, name, colored=self.colors is not None)
        low, table = _table(self)
        places = values.astype(np.int64) - low
        inside = (places >= 0) & (places < len(table))
        labels = np.where(inside, table[places.clip(0, len(table) - 1)], -1)
        if labels.min(initial=0) < 0:
            row, column = np.unravel_index(labels.argmin(), labels.shape)
            self._refuse(int(values[row, column]), f"{name}: row {row}, column {column}")
        return labels.astype(np.uint8)

    def _refuse(self, value: int, where: str) -> None:
        if self.colors is not None:
            raise ImageError(
                f"{where} has the color {' '.join(map(str, _color(value)))}, expected one of the "
                f"{len(self.colors)} colors of --classes; add it there"
            )
        ignored = f", or {_ranges(self.ignored)} (ignored)" if self.ignored else ""
        raise ImageError(
            f"{where} has the value {value}, expected a class, {_ranges(self.values)}{ignored}; name it in "
            f"--classes, or add it to --ignore-label"
        )

    def __str__(self) -> str:
        shown = [f"{value} {name}" for value, name in zip(self.values, self.names, strict=True)]
        if len(shown) > 4:
            shown[2:-1] = [".."]
        what = "value, by the line of its color," if self.colors else "value"
        return f"{what} and class of a pixel: {', '.join(shown)}; ignored: {_ranges(self.ignored) or 'none'}"


def mask_classes(
    listed: ClassList, rules: MaskRules, *, first: int | None = None, ignored: tuple[int, ...] = ()
) -> MaskClasses:
    """Combine class names with what the user says about masks and with the layout's own rule.

    `first`, the value of the first name where the file has no numbers, and `ignored` are the layout's (None: the
    layout does not say it). Raises ImageError if nothing says whether value 0 is a class, or if the classes are
    fewer than 2 or more than 255.
    """
    ignored = rules.ignore_label or tuple(value for value in ignored if value or not rules.background_class)
    if rules.background_class and 0 in rules.ignore_label:
        raise ImageError("got --background-class and --ignore-label 0: value 0 is a class or ignored, not both")
    if max(map(abs, ignored), default=0) >= LARGEST:
        raise ImageError(f"got --ignore-label {_ranges(ignored)}, expected values below {LARGEST:,}; correct it")
    values = listed.values or (tuple(range(len(listed.names))) if listed.colors else None)
    if values is None:
        start = _first(listed, rules, first)
        values = tuple(range(start, start + len(listed.names)))
    elif rules.background_class and 0 not in values:
        raise ImageError(f"got --background-class, but no class of {listed.file} has the value 0; add it there")
    kept = [(value, name) for value, name in zip(values, listed.names, strict=True) if value not in ignored]
    if len(kept) > MAX_CLASSES:
        raise ImageError(f"{listed.file}: {len(kept)} classes, expected at most {MAX_CLASSES}; merge some")
    if len(kept) < 2:
        raise ImageError(
            f"{listed.file}: {len(kept)} classes, expected at least 2 beside ignored values: if 0 is the "
            "background, it is a class, too; name it first and pass --background-class"
        )
    values, names = zip(*kept, strict=True)
    return MaskClasses(names, values, tuple(sorted(set(ignored))), listed.colors)


def _first(listed: ClassList, rules: MaskRules, first: int | None) -> int:
    """Return the value of the first name of a list without numbers."""
    if rules.background_class:
        return 0
    if 0 in rules.ignore_label:
        return 1
    if first is not None:
        return first
    if rules.ignore_label:
        return 0
    raise ImageError(
        f"{listed.file}: {len(listed.names)} names without numbers do not say what value 0 of a mask is: pass "
        "--background-class if it is the first name, or --ignore-label 0 if it is none and 1 is the first name"
    )


def decode_mask(data: bytes, name: str, *, colored: bool = False) -> np.ndarray:
    """Decode a mask file to its values (h, w): of one channel, the indices of a palette, or with `colored` R G B.

    A colored pixel has the value 65536 R + 256 G + B. The file is an image without loss of 1, 8, 16 or 32 bits,
    or a .npy array of integers. Raises ImageError that names the file for all others, whose values would be
    ambiguous.
    """
    if name.lower().endswith(".npy"):
        return _decode_array(data, name)
    with open_image(data, name) as image:
        kind, mode, bits = image.format, image.mode, _bits(image, data)
        lossy = kind not in LOSSLESS or image.info.get("compression") in LOSSY_TIFF
        opaque = mode != "RGBA" or image.getextrema()[3] == (255, 255)
        if colored and mode in ("RGB", "RGBA", "P") and not lossy and opaque:
            red, green, blue = np.asarray(image.convert("RGB"), np.int64).transpose(2, 0, 1)
            return 65536 * red + 256 * green + blue
        values = np.asarray(image)
    if lossy:
        raise ImageError(
            f"{name}: {kind}, expected a mask without loss: {', '.join(LOSSLESS)} or .npy; convert it"
        )
    if colored or values.ndim != 2 or values.dtype.kind not in "bui" or bits in (2, 4):
        wanted = "colors (RGB)" if colored else "one channel of integers or a palette"
        colors = " or name the colors of its classes in --classes" if mode in ("RGB", "RGBA") else ""
        raise ImageError(
            f"{name}: {kind} of {bits} bits with {len(image.getbands())} channels ({mode}), expected {wanted}, "
            f"1, 8 or 16 bits; convert it{colors}"
        )
    return values


def _decode_array(data: bytes, name: str) -> np.ndarray:
    with refusing(ImageError, f"{name}: cannot be read as an array", "what numpy.save writes"):
        values = load_array(data)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "bui" or not values.size:
        raise ImageError(f"{name}: {values.shape} of {values.dtype}, expected (height, width) of integers")
    return values


def _bits(image: Image.Image, data: bytes) -> int:
    """Return the bits of a gray value as the file has them: Pillow scales 2 and 4 bits up to 8."""
    if image.format == "PNG":
        return 8 if data[COLOR] == PALETTE else data[DEPTH]
    if image.format == "TIFF" and image.mode != "P":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    return {"1": 1, "I;16": 16, "I": 32, "F": 32}.get(image.mode, 8)


@lru_cache(maxsize=8)
def _table(classes: MaskClasses) -> tuple[int, np.ndarray]:
    """Return (low, table): value low + i of a mask is label table[i], or -1 if it is none."""
    values = classes.values, classes.ignored
    if classes.colors is not None:
        codes = [65536 * red + 256 * green + blue for red, green, blue in classes.colors]
        values = [[codes[line] for line in lines if 0 <= line < len(codes)] for lines in values]
    known = [*values[0], *values[1]]
    low = min(known)
    table = np.full(max(known) - low + 1, -1, np.int16)
    table[np.array(values[1], np.int64) - low] = 0
    table[np.array(values[0], np.int64) - low] = np.arange(1, len(values[0]) + 1)
    return low, table


def _color(value: int) -> Color:
    return value >> 16, value >> 8 & 255, value & 255


def _ranges(values: Iterable[int]) -> str:
    """Return values in few words: 0 to 3, 7, 255."""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and parts[-1][-1] == value - 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
