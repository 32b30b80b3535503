"""Images with masks (label maps) in the layouts of ADE-20k, Pascal VOC and Cityscapes, and in pairs of folders."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from seitpp.images.class_lists import ClassList, read_classes
from seitpp.images.decode import ImageError, Sample, image_size, open_image
from seitpp.images.labels import Labels
from seitpp.images.layouts import Listing, find_layout, list_files, split_names
from seitpp.images.masks import (
    COLOR,
    DEPTH,
    GRAY,
    PALETTE,
    MaskClasses,
    MaskRules,
    decode_mask,
    mask_classes,
)

# Default short side of the images in pixels: training on ADE-20k usually takes crops of 512 pixels.
SHORT_SIDE = 512
NAMED_FILES = 3  # files that a message about many names


class AnnotatedSample(NamedTuple):
    """An encoded image, like `Sample`, with its label map.

    `label` is the class that covers most of the image, None if all pixels are ignored. `annotation` is a PNG file
    of one channel: 0 is ignored, v is class v - 1. `mask_bytes` is the size of the mask file as it came.
    """

    data: bytes
    name: str
    label: int | None
    annotation: bytes
    mask_bytes: int
    box: None = None


class AnnotatedSource:
    """Images with masks, sorted by name. `classes` says which value of a mask is which class.

    `class_names` are those of the classes. An image without a mask, or a mask without an image, is an error only
    when it is read, see `check_pairs`.
    """

    def __init__(self, listing: Listing, classes: MaskClasses):
        self.listing, self.classes, self.class_names = listing, classes, list(classes.names)
        self.labels, self.left_out = Labels([], self.class_names, "label maps"), listing.left_out
        self.names = sorted({*listing.images, *listing.masks})

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> AnnotatedSample:
        """Read image `index`. Raises ImageError that names the file if the image or its mask is invalid."""
        listing, name = self.listing, self.names[index]
        image, mask = listing.images.get(name), listing.masks.get(name)
        if image is None:
            raise ImageError(f"{mask}: a mask without image, expected {listing.expected_image(name)}; add it")
        if mask is None:
            raise ImageError(f"{image}: an image without mask, expected {listing.expected_mask(name)}; add it")
        data, file = _read(image), _read(mask)
        labels = self.classes.labels(file, str(mask))
        _check_size(labels.shape, data, image=image, mask=mask)
        counts = np.bincount(labels.ravel(), minlength=2)[1:]
        label = int(counts.argmax()) if counts.any() else None
        annotation = file if _is_label_map(file, labels) else _png(Image.fromarray(labels), compress_level=1)
        return AnnotatedSample(
            data, image.relative_to(listing.image_folder).as_posix(), label, annotation, len(file)
        )

    def check_pairs(self) -> None:
        """Raise ImageError that counts and names the files if an image has no mask or a mask has no image."""
        images, masks = self.listing.images, self.listing.masks
        parts = []
        for files, others, what in (
            (images, masks, "images without mask"),
            (masks, images, "masks without image"),
        ):
            alone = [str(files[name]) for name in self.names if name in files and name not in others]
            if alone:
                parts.append(f"{what}: {len(alone)} ({_few(alone)})")
        if parts:
            pairs = len(images.keys() & masks.keys())
            raise ImageError(
                f"{', '.join(parts)}, beside {pairs} pairs; add or remove files (tokenize_images.py leaves them "
                "out with --skip-errors)"
            )

    def hold_out(self, every: int) -> tuple["AnnotatedSource", "AnnotatedSource"]:
        """Return the other images, and every `every`-th. Raises ImageError if there are fewer than `every`."""
        if len(self) < every:
            raise ImageError(
                f"{len(self)} images in {self.listing.image_folder}: expected at least {every}, of which every "
                f"{every}th is held out"
            )
        chosen = range(every - 1, len(self), every)
        return self.subset(index for index in range(len(self)) if index not in chosen), self.subset(chosen)

    def subset(self, indices: Iterable[int]) -> "AnnotatedSource":
        """Return some of the images, by their indices."""
        names = {self.names[index] for index in indices}
        kept = [{name: file for name, file in files.items() if name in names} for files in self.listing[1:3]]
        return AnnotatedSource(self.listing._replace(images=kept[0], masks=kept[1]), self.classes)

    def __str__(self) -> str:
        return (
            f"{len(self):,} images with masks, {self.listing.image_folder}, layout {self.listing.layout}; "
            f"{len(self.class_names)} classes; {self.classes}; left out: {self.left_out}"
        )


def open_annotated(data: str | Path, split: str | None, rules: MaskRules | None = None) -> AnnotatedSource:
    """Open the images and masks of the folder `data`, or only those of its split `split`.

    `split` is the set's own name or one of train, validation and test, which also mean training, val, valid and
    testing. `rules` are what the user says about the masks. Raises ImageError for a folder of no known layout, a
    split that it does not have, class names that are missing or unreadable, and where nothing says whether value 0
    of a mask is a class.
    """
    rules = rules or MaskRules()
    listing = list_files(Path(data), split, rules.layout)
    if not listing.images.keys() & listing.masks.keys():
        images, masks = (_few(map(str, files.values())) or "none" for files in (listing.images, listing.masks))
        raise ImageError(
            f"{listing.image_folder}: no image has a mask of its name: images {images}; masks {masks} below "
            f"{listing.mask_folder}; check folder and split"
        )
    return AnnotatedSource(listing, _classes_of(listing, rules))


def open_annotated_splits(data: str | Path, rules: MaskRules | None = None) -> dict[str, AnnotatedSource]:
    """Open all splits of the folder `data`, train first, under the names that a store gives them.

    Raises ImageError if it has none, and like `open_annotated`.
    """
    names = split_names(Path(data), (rules or MaskRules()).layout)
    if not names:
        raise ImageError(f"{data}: images with masks without splits; leave out --splits")
    order = sorted(names, key=lambda split: (split != "train", split))
    return {split: open_annotated(data, names[split], rules) for split in order}


def has_annotations(folder: str | Path) -> bool:
    """Return whether `folder` has images and masks in one of the layouts."""
    return find_layout(Path(folder)) is not None


def _classes_of(listing: Listing, rules: MaskRules) -> MaskClasses:
    """Return which value is which class; where that rests on numbers that nobody wrote, check the masks."""
    if rules.classes:
        own = listing.layout in (
            "voc",
            "cityscapes",
        )  # they say what 0 and 255 are, whatever the classes are called
        first, ignored = (listing.first, listing.ignored) if own else (None, ())
        listed = read_classes(rules.classes)
    else:
        first, ignored, listed = listing.first, listing.ignored, listing.classes
    if listed is None:
        raise ImageError(
            f"{listing.mask_folder}: no class names, expected --classes FILE with a name a line, or an "
            "objectInfo*.txt of ADE-20k beside the folders"
        )
    classes = mask_classes(listed, rules, first=first, ignored=ignored)
    counted = listed.values is None and listed.colors is None and classes.values[0] == 1
    if counted and (rules.classes or 0 not in rules.ignore_label):
        _check_last(listing, classes, listed)
    return classes


def _check_last(listing: Listing, classes: MaskClasses, listed: ClassList) -> None:
    """Raise ImageError if masks have the value 0, but not the last one of names that count from 1.

    Then 0 may be the first of the names, which would shift all classes by one.
    """
    last, masks, zeros = classes.values[-1], 0, False
    for path in listing.every_mask():
        try:
            values = decode_mask(_read(path), str(path))
        except ImageError:  # it is named when it is read as a part of the set
            continue
        masks, zeros = masks + 1, zeros or bool((values == 0).any())
        if (values == last).any():
            return
    if zeros:
        raise ImageError(
            f"{listed.file}: {len(listed.names)} names, but no value {last} in {masks} masks that have 0; if 0 is "
            "the first name, pass --background-class; if it is no class, pass --ignore-label 0, and write the "
            "numbers before the names of --classes (1 NAME)"
        )


def decode_annotation(data: bytes, name: str) -> np.ndarray:
    """Decode a stored annotation to values (h, w): PNG, gray of 8 or 16 bits, or the indices of a palette.

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
    return min([*original, _png(palette, optimize=True), _png(gray, optimize=True)], key=len)


def _png(image: Image.Image, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def _is_label_map(file: bytes, labels: np.ndarray) -> bool:
    """Return whether a mask file is a PNG of 8 bits that has the values of `labels` already."""
    if not file.startswith(b"\x89PNG") or file[DEPTH] != 8 or file[COLOR] not in (GRAY, PALETTE):
        return False
    return np.array_equal(decode_annotation(file, "mask"), labels)


def _check_size(size: tuple[int, int], data: bytes, *, image: Path, mask: Path) -> None:
    """Raise ImageError unless a mask has the size of its image as a viewer shows it, turned by its EXIF."""
    upright = image_size(Sample(data, str(image), None))
    if size != upright:
        turned = "; its EXIF turns the image, turn the mask" if size == upright[::-1] else "; resize it"
        raise ImageError(f"{mask}: {_by(size)} pixels, but its image has {_by(upright)} (height x width){turned}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _few(names: Iterable[str]) -> str:
    """Return the first of many names."""
    names = list(names)
    return ", ".join([*names[:NAMED_FILES], *([".."] if len(names) > NAMED_FILES else [])])
