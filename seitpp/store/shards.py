"""Read and write one shard: an Arrow IPC stream with a single record batch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from seitpp.store.layout import StoreError

# The kinds of additional columns and their Arrow types.
ARROW_TYPES = {"string": pa.string(), "binary": pa.binary(), "int64": pa.int64()}


def write_shard(file: BinaryIO, batch: pa.RecordBatch) -> None:
    """Write `batch` into an open new file and sync the file."""
    with pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    file.flush()
    os.fsync(file.fileno())


def read_shard(path: Path) -> pa.RecordBatch:
    """Memory-map a shard and return its record batch. Raises StoreError if the file is not a valid shard."""
    try:
        (batch,) = pa.ipc.open_stream(pa.memory_map(str(path)))
        batch.validate()
    except (pa.ArrowException, ValueError, OSError) as error:
        raise StoreError(f"{path}: no shard of a token store ({error}); copy it again") from error
    return batch


def column_array(values: Sequence[Any] | Shaped[np.ndarray, " values"], kind: pa.DataType, name: str) -> pa.Array:
    """Convert the values of column `name` to an Arrow array. Raises StoreError if they exceed one shard."""
    array = pa.array(values, kind)
    if isinstance(array, pa.ChunkedArray):
        raise StoreError(
            f"column {name!r}: {array.nbytes} bytes in {len(values)} images of a shard, expected less than 2^31; "
            "keep such large values in files of their own"
        )
    return array
