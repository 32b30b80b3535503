"""One shard: an Arrow IPC stream of a single record batch, written durably, read memory-mapped."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from seitpp.store.layout import StoreError

# Other columns that a split may have: what each kind is in Arrow and in Python.
ARROW_TYPES = {"string": pa.string(), "binary": pa.binary(), "int64": pa.int64()}


def write_shard(file: BinaryIO, batch: pa.RecordBatch) -> None:
    """Write `batch` into an open new file and sync it."""
    with pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    file.flush()
    os.fsync(file.fileno())


def read_shard(path: Path) -> pa.RecordBatch:
    """The batch of a shard as it lies on disk, its buffers within the file. Raises StoreError for another file."""
    try:
        (batch,) = pa.ipc.open_stream(pa.memory_map(str(path)))
        batch.validate()
    except (pa.ArrowException, ValueError, OSError) as error:
        raise StoreError(f"{path}: no shard of a token store ({error}); copy it again") from error
    return batch


def column_array(values: Sequence[Any] | np.ndarray, kind: pa.DataType, name: str) -> pa.Array:
    """An Arrow array. Raises StoreError if the `values`, those of column `name`, are too long for one shard."""
    array = pa.array(values, kind)
    if isinstance(array, pa.ChunkedArray):
        raise StoreError(
            f"column {name!r}: {array.nbytes} bytes in {len(values)} images of a shard, expected less than 2^31; "
            "keep such large values in files of their own"
        )
    return array
