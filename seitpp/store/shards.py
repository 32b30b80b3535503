"""Read and write one shard: an Arrow IPC stream with a single record batch."""

import os
import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from seitpp.store.layout import StoreError

# The kinds of additional columns and their Arrow types.
ARROW_TYPES = {"string": pa.string(), "binary": pa.binary(), "int64": pa.int64()}

MAX_SHARD_ROWS = 2**24
# Columns with all that they nest, and entries of their metadata.
MAX_PARTS = 2**12
# Of the description of the columns (with the class names), and of the places of their buffers.
MAX_SCHEMA_BYTES, MAX_PLACES_BYTES = 2**27, 2**20
# Arrow's types whose field 1 is a string or a list: Timestamp and Union (Schema.fbs).
TYPES_WITH_LISTS = (10, 14)


class ShardFile(NamedTuple):
    """The file behind a memory map, as it was when it was opened."""

    path: str
    device: int
    inode: int
    size: int

    @classmethod
    def of(cls, path: Path) -> "ShardFile":
        """Describe the file at `path`."""
        now = path.stat()
        return cls(str(path), now.st_dev, now.st_ino, now.st_size)

    def check(self) -> None:
        """Raise StoreError if the file was cut: the system ends a process that reads what is no longer there.

        A file that was renamed or replaced since then is still the one that is mapped.
        """
        try:
            now = os.stat(self.path)  # noqa: PTH116 (for each image, and half the time of a Path)
        except OSError:
            return
        if now.st_size < self.size and (now.st_dev, now.st_ino) == (self.device, self.inode):
            raise StoreError(
                f"{self.path}: cut to {now.st_size} bytes while it was open, expected {self.size}; copy it again"
            )


def write_shard(file: BinaryIO, batch: pa.RecordBatch) -> None:
    """Write `batch` into an open new file and sync the file."""
    with pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    file.flush()
    os.fsync(file.fileno())


def read_shard(path: Path) -> pa.RecordBatch:
    """Memory-map a shard and return its record batch. Raises StoreError if the file is not a valid shard.

    Its buffers are those of the file: a compressed batch, which could fill the memory, is refused as it is, and so
    is a description of columns that is larger in memory than in the file.
    """
    try:
        with pa.memory_map(str(path)) as file:
            messages = list(islice(pa.ipc.MessageReader.open_stream(file), 3))
            if [message.type for message in messages] != ["schema", "record batch"]:
                raise ValueError("expected a schema and one record batch")
            limits = (MAX_SCHEMA_BYTES, MAX_PLACES_BYTES)
            for message, limit in zip(messages, limits, strict=True):
                if message.metadata.size > limit:
                    raise ValueError(f"a description of {message.metadata.size} bytes, expected at most {limit}")
            _check_schema(messages[0].metadata)
            if _is_compressed(messages[1].metadata):
                raise ValueError("its record batch is compressed")
            batch = pa.ipc.read_record_batch(messages[1], pa.ipc.read_schema(messages[0]))
        if len(batch) > MAX_SHARD_ROWS:
            raise ValueError(f"{len(batch)} images, expected at most {MAX_SHARD_ROWS}")
        batch.validate()
    except Exception as error:  # types that Python code has registered with Arrow can raise any exception
        raise StoreError(f"{path}: no shard of a token store ({error}); copy it again") from error
    return batch


# The metadata of an Arrow message are a flatbuffer, which Arrow has checked when it read the message. A table
# begins with the distance to the list of places of its fields. Field 2 of a Message is the Schema or RecordBatch
# (Arrow's Message.fbs and Schema.fbs).


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Return whether the buffers of a record batch are compressed: field 3."""
    return _place(metadata, _follow(metadata, *struct.unpack_from("<I", metadata), 2), 3) != 0


def _check_schema(metadata: pa.Buffer) -> None:
    """Raise ValueError for too many columns, and for strings that take more bytes than there are.

    In a flatbuffer, any number of columns and entries can be one and the same place. A Schema has fields (1) and
    metadata (2); a Field a name (0), a type (2: which, 3: its table), children (5) and metadata (6).
    """
    schema = _follow(metadata, *struct.unpack_from("<I", metadata), 2)
    waiting, parts, size = [(schema, 1, 2)], 0, 0
    while waiting:
        table, children, pairs = waiting.pop()
        if table != schema:
            size += _count(metadata, table, 0)
            place = _place(metadata, table, 2)
            if place and struct.unpack_from("<B", metadata, place)[0] in TYPES_WITH_LISTS:
                size += 4 * _count(metadata, _follow(metadata, table, 3), 1)
        parts += _count(metadata, table, children) + _count(metadata, table, pairs)
        if parts > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} columns and entries of metadata")
        size += sum(_count(metadata, pair, n) for pair in _tables(metadata, table, pairs) for n in (0, 1))
        if size > metadata.size:
            raise ValueError(f"columns described by more bytes than the {metadata.size} that there are")
        waiting += [(child, 5, 6) for child in _tables(metadata, table, children)]


def _follow(metadata: pa.Buffer, table: int, field: int) -> int:
    """Return where the table or list is that is a field of a table."""
    place = _place(metadata, table, field)
    return place + struct.unpack_from("<I", metadata, place)[0]


def _count(metadata: pa.Buffer, table: int, field: int) -> int:
    """Return the length of a string or list that is a field of a table, 0 if the table does not have it."""
    if not _place(metadata, table, field):
        return 0
    return struct.unpack_from("<I", metadata, _follow(metadata, table, field))[0]


def _tables(metadata: pa.Buffer, table: int, field: int) -> Iterator[int]:
    """Yield where each table is of a list of tables that is a field of a table."""
    for number in range(_count(metadata, table, field)):
        place = _follow(metadata, table, field) + 4 + 4 * number
        yield place + struct.unpack_from("<I", metadata, place)[0]


def _place(metadata: pa.Buffer, table: int, field: int) -> int:
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
