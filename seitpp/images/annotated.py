"""Images with annotations (label maps) in the folder layout of ADE-20k, and compact PNG annotations."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from seitpp.images.decode import ImageError, open_image
from seitpp.images.inventory import LeftOut
from seitpp.images.labels import Labels

JPEG, PNG = {".jpg", ".jpeg"}, {".png"}
# Default short side of the images in pixels: training on ADE-20k usually takes crops of 512 pixels.
SHORT_SIDE = 512
# Annotation values are bytes, and one of them marks ignored pixels.
MAX_CLASSES = 255
# Positions in a PNG file of the bit depth and of the color type, and two color types.
DEPTH, COLOR = 24, 25
GRAY, PALETTE = 0, 3


class AnnotatedSample(NamedTuple):
    """An encoded image, like `Sample`, with the bytes of its annotation file."""

    data: bytes
    name: str
    label: int
    annotation: bytes


def has_annotations(folder: str | Path) -> bool:
    """Return whether `folder` has images/SPLIT/ and annotations/SPLIT/ for at least one split."""
    images, annotations = (
        {path.name for path in Path(folder, name).glob("*") if path.is_dir()} for name in ("images", "annotations")
    )
    return bool(images & annotations)


class AnnotatedSource:
    """Images FOLDER/images/SPLIT/NAME.jpg with annotations FOLDER/annotations/SPLIT/NAME.png, sorted by name.

    In an annotation, value 0 is ignored and value v is class v - 1 (reduce_zero_label of mmsegmentation). The
    label of an image is its most frequent class, 0 if all pixels are ignored. Without `split`, it has all splits.
    An image without annotation, or an annotation without image, is an error only when it is read. Raises
    ImageError if there are no images or no class names.
    """

    def __init__(self, folder: str | Path, split: str | None):
        self.class_names = read_class_names(Path(folder))
        self.labels, self.left_out = Labels([], self.class_names, "with label maps"), LeftOut()
        self._folders = [Path(folder, name, split or "") for name in ("images", "annotations")]
        self._images = _by_name(self._folders[0], JPEG)
        self._annotations = _by_name(self._folders[1], PNG)
        if not self._images:
            raise ImageError(f"{self._folders[0]}: no images below it, expected .jpg; check folder and split")
        self._names = sorted({*self._images, *self._annotations})

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> AnnotatedSample:
        """Read image `index`. Raises ImageError that names the file if the image or its annotation is invalid."""
        name = self._names[index]
        image, annotation = self._images.get(name), self._annotations.get(name)
        if image is None:
            raise ImageError(
                f"{annotation}: an annotation without image, expected {self._folders[0] / name}.jpg; add it"
            )
        if annotation is None:
            raise ImageError(
                f"{image}: an image without annotation, expected {self._folders[1] / name}.png; add it"
            )
        data, annotated = _read(image), _read(annotation)
        label = self._label(annotated, annotation, _size(data, image))
        return AnnotatedSample(data, str(image.relative_to(self._folders[0])), label, annotated)

    def _label(self, annotated: bytes, path: Path, size: tuple[int, int]) -> int:
        """Check an annotation and return its most frequent class."""
        values, classes = decode_annotation(annotated, str(path)), len(self.class_names)
        if values.shape != size:
            raise ImageError(f"{path}: {_by(values.shape)} pixels, but its image has {_by(size)} (height x width)")
        if values.max() > classes:
            row, column = np.unravel_index(values.argmax(), values.shape)
            raise ImageError(
                f"{path}: value {values.max()} in row {row}, column {column}, expected the classes 1 to {classes} "
                "or 0 (ignored)"
            )
        counts = np.bincount(values.ravel(), minlength=classes + 1)
        return int(counts[1:].argmax())


def read_class_names(folder: Path) -> list[str]:
    """Read the class names, including synonyms, from the file objectInfo*.txt in the folder.

    Raises ImageError unless there is exactly one such file, in the format of ADE-20k: separated by tabs, with a
    header that includes Idx and Name, followed by the classes 1, 2, ... with distinct names.
    """
    files = sorted(folder.glob("objectInfo*.txt"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "no objectInfo*.txt"
        raise ImageError(
            f"{folder}: {names}, expected one objectInfo*.txt beside images/ and annotations/ with the classes, "
            "as in ADE-20k: separated by tabs, with the columns Idx (1, 2, ..) and Name"
        )
    try:
        lines = files[0].read_text(encoding="utf-8").splitlines()
        header, *rows = ([cell.strip() for cell in line.split("\t")] for line in lines if line.strip())
        numbers, names = zip(
            *((int(row[header.index("Idx")]), row[header.index("Name")]) for row in rows), strict=True
        )
    except (ValueError, IndexError) as error:
        raise ImageError(f"{files[0]}: expected a header and rows with Idx and Name, separated by tabs") from error
    if numbers != tuple(range(1, len(rows) + 1)) or len(set(names)) != len(names) or len(names) > MAX_CLASSES:
        raise ImageError(
            f"{files[0]}: expected at most {MAX_CLASSES} classes, numbered 1, 2, .. in order, all names different"
        )
    return list(names)


def decode_annotation(data: bytes, name: str) -> np.ndarray:
    """Decode a PNG annotation to values (h, w): gray of 8 or 16 bits, or the indices (not colors) of a palette.

    Raises ImageError that names the file for all other formats, whose values would be ambiguous.
    """
    with open_image(data, name) as image:
        values, kind = np.asarray(image), image.format
    if kind != "PNG" or not (data[COLOR] == PALETTE or (data[COLOR] == GRAY and data[DEPTH] >= 8)):
        got = f"PNG of {data[DEPTH]} bits with {len(image.getbands())} channels" if kind == "PNG" else kind
        raise ImageError(
            f"{name}: {got}, expected a PNG with one channel, 8-bit gray or a palette, whose values are classes"
        )
    return values


def smallest_png(data: bytes) -> bytes:
    """Return the smallest PNG of an annotation with values below 256: the original, 8-bit gray, or with a palette.

    All three decode to the same values. In the new palette, the gray level of each entry is its index.
    """
    values = decode_annotation(data, "annotation").astype(np.uint8)
    gray, palette = Image.fromarray(values), Image.fromarray(values)
    palette.putpalette(np.arange(int(values.max()) + 1, dtype=np.uint8).repeat(3).tobytes())
    original = [data] if data[DEPTH] <= 8 else []
    return min([*original, _png(palette), _png(gray)], key=len)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _by_name(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """Return {name: path} of the files below a folder; a name is the relative path without suffix."""
    files: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise ImageError(f"{path}: has the same name as {files[name].name}; remove one of the two")
        files[name] = path
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error


def _size(data: bytes, path: Path) -> tuple[int, int]:
    with open_image(data, str(path)) as image:
        return image.height, image.width


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
