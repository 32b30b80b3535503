"""Read and write one shard: an Arrow IPC stream with a single record batch."""

import os
import struct
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
    """Memory-map a shard and return its record batch. Raises StoreError if the file is not a valid shard.

    Its buffers are those of the file: a compressed batch, which could fill the memory, is refused as it is.
    """
    try:
        with pa.memory_map(str(path)) as file:
            messages = list(pa.ipc.MessageReader.open_stream(file))
            if [message.type for message in messages] != ["schema", "record batch"]:
                raise ValueError("expected a schema and one record batch")
            if _is_compressed(messages[1].metadata.to_pybytes()):
                raise ValueError("its record batch is compressed")
            batch = pa.ipc.read_record_batch(messages[1], pa.ipc.read_schema(messages[0]))
        batch.validate()
    except (pa.ArrowException, ValueError, OSError, struct.error) as error:
        raise StoreError(f"{path}: no shard of a token store ({error}); copy it again") from error
    return batch


def _is_compressed(metadata: bytes) -> bool:
    """Return whether the record batch described by an Arrow message's metadata has compressed buffers.

    The metadata are a flatbuffer: a table begins with the distance to the list of places of its fields. Field 2
    of a Message is the RecordBatch, whose field 3 is the compression (Arrow's Message.fbs).
    """
    (message,) = struct.unpack_from("<I", metadata)
    place = _place(metadata, message, 2)
    (distance,) = struct.unpack_from("<I", metadata, place)
    return _place(metadata, place + distance, 3) != 0


def _place(metadata: bytes, table: int, field: int) -> int:
    """Return where a field of a table is, 0 if the table does not have it."""
    (distance,) = struct.unpack_from("<i", metadata, table)
    places = table - distance
    (size,) = struct.unpack_from("<H", metadata, places)
    if size <= 4 + 2 * field:
        return 0
    (offset,) = struct.unpack_from("<H", metadata, places + 4 + 2 * field)
    return table + offset if offset else 0


def column_array(values: Sequence[Any] | Shaped[np.ndarray, " values"], kind: pa.DataType, name: str) -> pa.Array:
    """Convert the values of column `name` to an Arrow array. Raises StoreError if they exceed one shard."""
    array = pa.array(values, kind)
    if isinstance(array, pa.ChunkedArray):
        raise StoreError(
            f"column {name!r}: {array.nbytes} bytes in {len(values)} images of a shard, expected less than 2^31; "
            "keep such large values in files of their own"
        )
    return array
