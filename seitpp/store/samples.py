"""Samples on their way into a split: checked, collected, and put into the columns of a shard."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from seitpp.store import layout
from seitpp.store.layout import StoreError
from seitpp.store.shards import ARROW_TYPES, column_array
from seitpp.store.spec import SplitSpec

# One sequence a column, each with a value for every image.
Columns = Mapping[str, Sequence[Any] | np.ndarray]


class Samples(NamedTuple):
    """Checked images: ids, each (h, w) little-endian uint16; labels; other columns, a list each."""

    ids: list[np.ndarray]
    labels: list[int]
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
    """To be extended."""
    return Samples([], [], {name: [] for name in spec.columns})


def check_samples(
    spec: SplitSpec,
    ids: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray | Sequence[int],
    columns: Columns | None,
    first: int,
) -> Samples:
    """N images as `spec` wants them, copied. first: number of the first one in its split, for messages.

    ids: (N, H, W) integers; where each image has its own grid, also N arrays (h, w). labels: (N,) integers.
    Raises StoreError for anything else, and for ids without a code and labels without a class.
    """
    if spec.grid is None:
        chosen = [_check_ids(spec, np.asarray(image)[None], first + i)[0] for i, image in enumerate(ids)]
    else:
        chosen = list(_check_ids(spec, np.asarray(ids), first))
    return Samples(
        chosen,
        _check_labels(spec, np.asarray(labels), len(chosen), first),
        _check_columns(spec, columns or {}, len(chosen), first),
    )


def make_batch(spec: SplitSpec, images: Samples) -> pa.RecordBatch:
    """The columns of a shard, the tokens as they are, two bytes each. Raises StoreError if they are too long."""
    schema = spec.features().arrow_schema
    sides = {"height": [image.shape[0] for image in images.ids], "width": [image.shape[1] for image in images.ids]}
    values = {
        "tokens": [image.tobytes() for image in images.ids],
        "label": images.labels,
        **sides,
        **images.columns,
    }
    return pa.record_batch([column_array(values[field.name], field.type, field.name) for field in schema], schema)


def _check_ids(spec: SplitSpec, ids: np.ndarray, first: int) -> np.ndarray:
    """(N, h, w) ids of the same grid as little-endian uint16."""
    sides, expected = ids.shape[1:], tuple(spec.grid or ("height", "width"))
    right = layout.is_grid(list(sides)) if spec.grid is None else list(sides) == spec.grid
    if ids.ndim != 3 or not right or ids.dtype.kind not in "iu":
        expected = str(expected).replace("'", "")
        raise StoreError(f"ids from image {first}: got {ids.dtype} {sides}, expected integers {expected}")
    num_codes = len(spec.codebook)
    wrong = ((ids < 0) | (ids >= num_codes)).any(axis=(1, 2))
    if wrong.any():
        image, values = first + int(wrong.argmax()), ids[wrong.argmax()]
        raise StoreError(
            f"image {image}: ids {values.min()} .. {values.max()}, but the codebook has {num_codes} codes"
        )
    return ids.astype("<u2")


def _check_labels(spec: SplitSpec, labels: np.ndarray, n: int, first: int) -> list[int]:
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        if n == labels.size == 0:
            return []
        raise StoreError(f"labels from image {first}: got {labels.dtype} {labels.shape}, expected integers {(n,)}")
    classes = len(spec.class_names) if spec.class_names else 2**63 - 1
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        image, value = first + int(wrong.argmax()), labels[wrong.argmax()]
        raise StoreError(f"image {image}: label {value}, expected 0 .. {classes - 1}")
    return labels.tolist()


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
