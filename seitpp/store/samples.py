"""Samples to be written: they are checked, collected, and converted to the columns of a shard."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Integer

from seitpp.store import layout
from seitpp.store.labels import Label, check_labels
from seitpp.store.layout import StoreError
from seitpp.store.shards import ARROW_TYPES, column_array
from seitpp.store.spec import SplitSpec

# {name: values} with one value per image.
Columns = Mapping[str, Sequence[Any] | np.ndarray]


class Samples(NamedTuple):
    """Checked images: their ids as little-endian uint16, labels as values of their column, additional columns."""

    ids: list[Integer[np.ndarray, "*digits height width"]]
    labels: list[Any]
    columns: dict[str, list[Any]]

    def extend(self, other: "Samples") -> None:
        """Append the images of `other`."""
        self.ids.extend(other.ids)
        self.labels.extend(other.labels)
        for name, values in self.columns.items():
            values.extend(other.columns[name])

    def take(self, n: int) -> "Samples":
        """Remove and return the first `n` images."""
        taken = Samples(self.ids[:n], self.labels[:n], {name: values[:n] for name, values in self.columns.items()})
        for values in (self.ids, self.labels, *self.columns.values()):
            del values[:n]
        return taken


def no_samples(spec: SplitSpec) -> Samples:
    """Return an empty collection of samples."""
    return Samples([], [], {name: [] for name in spec.columns})


def check_samples(
    spec: SplitSpec,
    ids: Integer[np.ndarray, "images *digits height width"] | Sequence[Integer[np.ndarray, "..."]],
    labels: Integer[np.ndarray, " images"] | Sequence[Label],
    *,
    columns: Columns | None,
    first: int,
) -> Samples:
    """Copy the images and check them against `spec`. `first` is the index of the first image, for messages.

    A sequence of ids holds one array per image, if each image has its own grid. Raises StoreError for other shapes
    and dtypes, and for ids or labels out of range.
    """
    if spec.grid is None:
        chosen = [_check_ids(spec, np.asarray(image)[None], first + i)[0] for i, image in enumerate(ids)]
    else:
        chosen = list(_check_ids(spec, np.asarray(ids), first))
    num_classes = len(spec.class_names) if spec.class_names else None
    return Samples(
        chosen,
        check_labels(labels, len(chosen), num_classes, multi_label=spec.multi_label, first=first),
        _check_columns(spec, columns or {}, len(chosen), first),
    )


def make_batch(spec: SplitSpec, images: Samples) -> pa.RecordBatch:
    """Convert images to the columns of a staged shard, with two bytes per token. Raises StoreError if too long."""
    schema = spec.features().arrow_schema
    sides = {name: [image.shape[axis] for image in images.ids] for name, axis in (("height", -2), ("width", -1))}
    values = {
        "tokens": [image.tobytes() for image in images.ids],
        "label": images.labels,
        **sides,
        **images.columns,
    }
    return pa.record_batch([column_array(values[field.name], field.type, field.name) for field in schema], schema)


def _check_ids(spec: SplitSpec, ids: np.ndarray, first: int) -> np.ndarray:
    """Check ids (N, h, w), or (N, Q, h, w) of Q digits, of one grid and return them as little-endian uint16."""
    digits = spec.books.digits
    planes = ids if digits > 1 else ids[:, None]
    shape, expected = ids.shape[1:], (*spec.books.planes, *(spec.grid or ("height", "width")))
    sides = list(planes.shape[2:])
    valid = layout.is_grid(sides) if spec.grid is None else sides == spec.grid
    if planes.ndim != 4 or planes.shape[1] != digits or not valid or ids.dtype.kind not in "iu":
        expected = str(expected).replace("'", "")
        raise StoreError(f"ids from image {first}: got {ids.dtype} {shape}, expected integers {expected}")
    if problem := spec.books.problem(planes):
        raise StoreError(f"image {first + problem[0]}: {problem[1]}")
    return ids.astype("<u2")


def _check_columns(spec: SplitSpec, columns: Columns, n: int, first: int) -> dict[str, list[Any]]:
    if set(columns) != set(spec.columns):
        raise StoreError(f"columns from image {first}: got {sorted(columns)}, expected {sorted(spec.columns)}")
    checked = {}
    for name, kind in spec.columns.items():
        values = columns[name].tolist() if isinstance(columns[name], np.ndarray) else list(columns[name])
        if len(values) != n:
            raise StoreError(f"column {name!r} from image {first}: got {len(values)} values, expected {n}")
        try:
            array = pa.array(values, ARROW_TYPES[kind], from_pandas=False)
        except (pa.ArrowException, UnicodeEncodeError, TypeError, OverflowError) as error:
            raise StoreError(f"column {name!r} from image {first}: expected {kind} values ({error})") from error
        if array.null_count:
            raise StoreError(f"column {name!r} from image {first}: got None, expected {kind} values")
        checked[name] = values
    return checked
