"""Additional columns of a split, read from disk on access."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
from jaxtyping import Integer

from seitpp.store.layout import StoreError
from seitpp.store.shards import ARROW_TYPES, ShardFile


class Column:
    """One column of a split as a sequence; `kind` is "string", "binary" or "int64". It stays on disk."""

    def __init__(
        self,
        name: str,
        kind: str,
        shards: Sequence[pa.RecordBatch],
        *,
        files: Sequence[ShardFile],
        starts: list[int],
        folder: Path,
    ):
        """Open a column. `starts` holds the index of the first image of each shard; `folder` is for messages.

        Raises StoreError if the column of a shard is missing, has nulls, or is of another kind.
        """
        self.name, self.kind = name, kind
        self._folder, self._files, self._starts = folder, files, starts
        self._length = starts[-1] + len(shards[-1])
        fields = [shard.schema.get_field_index(name) for shard in shards]  # -1: none, or two
        arrays = [shard.column(i) if i >= 0 else None for shard, i in zip(shards, fields, strict=True)]
        for number, array in enumerate(arrays):
            if array is None or array.type != ARROW_TYPES[kind] or array.null_count:
                raise StoreError(
                    f"{folder}: column {name!r} of shard {number}: expected {kind} values without nulls; "
                    "copy the shards again"
                )
        self._parts = [_Numbers(array) if kind == "int64" else _Bytes(array) for array in arrays]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex | Sequence[int] | Integer[np.ndarray, " images"]) -> Any:
        """Return a str, bytes or int for one index; for N indices a list of these, or (N,) int64.

        Raises IndexError, and StoreError for a string that is not valid UTF-8.
        """
        if not isinstance(index, Sequence | np.ndarray):
            return self._value(index)
        values = [self._value(i) for i in index]
        return np.array(values, np.int64) if self.kind == "int64" else values

    def _value(self, index: SupportsIndex) -> str | bytes | int:
        position = range(self._length)[index]
        shard = bisect_right(self._starts, position) - 1
        self._files[shard].check()
        value = self._parts[shard][position - self._starts[shard]]
        if self.kind != "string":
            return value
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise StoreError(
                f"{self._folder}: column {self.name!r}, image {position}: {error}; copy it again"
            ) from error


class _Numbers:
    def __init__(self, array: pa.Array):
        self._numbers = array.to_numpy()

    def __getitem__(self, row: int) -> int:
        return int(self._numbers[row])


class _Bytes:
    """Variable-length values, sliced here because Arrow does not check the bounds of damaged offsets."""

    def __init__(self, array: pa.Array):
        _, offsets, data = array.buffers()
        self._offsets = np.frombuffer(offsets, np.int32, len(array) + 1)
        self._data = memoryview(data or b"")

    def __getitem__(self, row: int) -> bytes:
        return bytes(self._data[self._offsets[row] : self._offsets[row + 1]])
