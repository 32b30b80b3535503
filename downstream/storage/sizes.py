"""The bytes of a stored training set, counted by listing its files."""

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from seitpp.store import layout
from seitpp.store.shards import read_shard


class Sizes(NamedTuple):
    """The bytes of all files of a stored set, by what they are for; `metadata` is what nothing else claims.

    Of encoded pictures, `payload` are whole files with the framing of their format: `framing` of these bytes are
    what pictures of one color, of the same sizes, would take.
    """

    payload: int
    offsets: int
    labels: int
    codebook: int
    codec_table: int
    metadata: int
    framing: int = 0

    @property
    def total(self) -> int:
        """The bytes of all files."""
        return sum(self[:6])


def listed(folder: Path) -> dict[str, int]:
    """Return the size in bytes of each file below a folder, or of a file, by its name in it."""
    paths = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder.parent).as_posix(): path.stat().st_size for path in paths}


def buffers(column: pa.Array) -> tuple[int, int]:
    """Return the bytes of the offsets and of the values of a column; numbers have no offsets."""
    _, *parts = (0 if buffer is None else buffer.size for buffer in column.buffers())
    return (parts[0], parts[1]) if len(parts) == 2 else (0, parts[0])


def store_sizes(store: Path) -> Sizes:
    """Return the sizes of a token store."""
    files = listed(store)
    offsets, payload, labels = 0, 0, 0
    for path in sorted(store.rglob("*.arrow")):
        for column in read_shard(path).columns:
            found = buffers(column)
            if pa.types.is_binary(column.type):
                offsets, payload = offsets + found[0], payload + found[1]
            else:
                labels += sum(found)
    codebook, table = (files.get(f"{store.name}/{name}", 0) for name in (layout.CODEBOOK, layout.TABLE))
    return Sizes(
        payload,
        offsets,
        labels,
        codebook,
        table,
        metadata=sum(files.values()) - payload - offsets - labels - codebook - table,
    )
