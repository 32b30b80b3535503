"""Labels of images: one class, several classes, or unknown; how they are checked and how they lie in a shard."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int32, Int64, Integer, UInt8

from seitpp.store.layout import StoreError

# A class, several classes (perhaps none), or unknown.
Label = int | tuple[int, ...] | None

MISSING = -1  # the class of an image without a label, in columns and arrays of one class per image
UNKNOWN = 255  # the whole multi-hot row of an image without a label

ADVICE = "give -1 or None where the label is not known"


class Labels(NamedTuple):
    """The labels of a shard, memory-mapped.

    `values` are one class per image, or the classes of all images one after the other: those of image i are then
    values[offsets[i] : offsets[i + 1]], in ascending order, and `valid` says which images have a list.
    """

    values: Int64[np.ndarray, " classes"]
    offsets: Int32[np.ndarray, " offsets"] | None = None
    valid: Bool[np.ndarray, " images"] | None = None

    @property
    def known(self) -> Bool[np.ndarray, " images"]:
        """Whether each image has a label."""
        return self.values != MISSING if self.valid is None else self.valid

    def is_known(self, row: int) -> bool:
        """Return whether the image in this row of the shard has a label."""
        return bool(self.values[row] != MISSING if self.valid is None else self.valid[row])

    def label(self, row: int) -> Label:
        """Return the label of the image in this row of the shard."""
        if not self.is_known(row):
            return None
        if self.offsets is None:
            return int(self.values[row])
        return tuple(self.values[self.offsets[row] : self.offsets[row + 1]].tolist())

    def classes(self) -> Int64[np.ndarray, " classes"]:
        """Return the classes that occur, each as often as it does."""
        return self.values[self.known] if self.offsets is None else self.values

    def largest(self) -> int:
        """Return the largest class; -1 if there is none."""
        return int(self.values.max(initial=MISSING))

    def multi_hot(self, row: int, num_classes: int) -> UInt8[np.ndarray, " classes"]:
        """Return 1 for each class of an image and 0 for the others, or 255 for all if they are not known."""
        if not self.is_known(row):
            return np.full(num_classes, UNKNOWN, np.uint8)
        hot = np.zeros(num_classes, np.uint8)
        hot[self.values[row] if self.offsets is None else self.values[slice(*self.offsets[row : row + 2])]] = 1
        return hot


def is_label_column(kind: pa.DataType, multi_label: bool) -> bool:
    """Return whether a column "label" of the Arrow type `kind` holds one class per image, or lists of classes."""
    if multi_label:
        return pa.types.is_list(kind) and kind.value_type == pa.int64()
    return kind == pa.int64()


def read_labels(batch: pa.RecordBatch) -> Labels:
    """Return the labels of a shard. Raises StoreError for damaged lists."""
    column = batch.column("label")
    if not pa.types.is_list(column.type):
        return Labels(column.to_numpy())
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
    labels = Labels(values, offsets, column.is_valid().to_numpy(zero_copy_only=False))
    if not _are_sets(labels):
        raise StoreError("lists of labels are damaged, expected different classes in ascending order")
    return labels


def _are_sets(labels: Labels) -> bool:
    """Return whether offsets are in order and the classes of each image ascend; Arrow checks neither."""
    values, offsets = labels.values, labels.offsets
    lengths = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(values) or (lengths < 0).any() or lengths[~labels.known].any():
        return False
    ascends = values[1:] > values[:-1]
    starts = offsets[(offsets > 0) & (offsets < len(values))]
    ascends[starts - 1] = True  # from one image to the next
    return bool(ascends.all())


def check_labels(
    labels: Integer[np.ndarray, " images"] | Sequence[Label],
    n: int,
    num_classes: int | None,
    *,
    multi_label: bool,
    first: int,
) -> list[Any]:
    """Return the labels of n images as the values of a column: classes with -1 for None, or lists and None.

    `num_classes` is None if any class is allowed; `first` is the index of the first image, for messages. Raises
    StoreError for labels of another kind or number, and for classes out of range.
    """
    if len(labels) != n:
        raise StoreError(f"labels from image {first}: got {len(labels)}, expected {n}, one per image")
    check = _check_sets if multi_label else _check_classes
    return check(labels, num_classes or 2**63 - 1, first)


def _check_classes(labels: np.ndarray | Sequence[Label], num_classes: int, first: int) -> list[int]:
    if not isinstance(labels, np.ndarray):
        for image, label in enumerate(labels, first):
            if isinstance(label, tuple):
                raise StoreError(f"image {image}: label {label}, expected one class; write with multi_label=True")
        labels = np.asarray([MISSING if label is None else label for label in labels])
    if not labels.size:
        return []
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise StoreError(
            f"labels from image {first}: got {labels.dtype} {labels.shape}, expected integers {labels.shape[:1]}; "
            f"{ADVICE}"
        )
    wrong = (labels < MISSING) | (labels >= num_classes)
    if wrong.any():
        image, value = first + int(wrong.argmax()), labels[wrong.argmax()]
        raise StoreError(f"image {image}: label {value}, expected 0 .. {num_classes - 1}; {ADVICE}")
    return labels.tolist()


def _check_sets(labels: Sequence[Label], num_classes: int, first: int) -> list[list[int] | None]:
    checked = []
    for image, label in enumerate(labels, first):
        try:
            classes = None if label is None else sorted({operator.index(one) for one in label})
        except TypeError as error:
            raise StoreError(
                f"image {image}: label {label!r}, expected a tuple of classes, or None where it is not known"
            ) from error
        if classes and not 0 <= classes[0] <= classes[-1] < num_classes:
            raise StoreError(f"image {image}: labels {label}, expected 0 .. {num_classes - 1}")
        checked.append(classes)
    return checked
