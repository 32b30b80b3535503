"""Fingerprints of what a store holds, which do not depend on how a version of pyarrow or `datasets` writes it.

The fingerprint of a split is in its state.json, where `datasets` keeps its own; that of a store covers those of
its splits, the codebook, the code table and the class names. docs/format.md is the normative description.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from seitpp.files import read_json
from seitpp.store import layout
from seitpp.store.layout import StoreError
from seitpp.store.shards import read_shard

LARGE = 2**22  # images of a split whose shards are fingerprinted one by one


def split_fingerprint(shards: Sequence[Path]) -> str:
    """Return the SHA-256 of the columns of all shards of a split, in this order.

    Of a split of more than 2^22 images it is that of the fingerprints of its shards: several processes find these.
    """
    if len(shards) > 1 and sum(len(read_shard(path)) for path in shards) > LARGE:
        return joined_fingerprint(map(shard_fingerprint, shards))
    digest = hashlib.sha256()
    for path in shards:
        _add_shard(digest, path)
    return digest.hexdigest()


def shard_fingerprint(path: Path) -> str:
    """Return the SHA-256 of the columns of one shard."""
    digest = hashlib.sha256()
    _add_shard(digest, path)
    return digest.hexdigest()


def joined_fingerprint(fingerprints: Iterable[str]) -> str:
    """Return the fingerprint of a large split from those of its shards."""
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


def _add_shard(digest: Any, path: Path) -> None:
    batch = read_shard(path)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        digest.update(f"{name} {column.type} {len(column)}\n".encode())
        _add(digest, column)


def _add(digest: Any, column: pa.Array) -> None:
    """Add which values are there, and these: the sizes of lists and strings, then what is in them, little-endian.

    What lies in the buffers of a missing value, and where a buffer begins, is left to the writer.
    """
    from pyarrow import compute  # here and in grow.py, since every command would wait for it

    digest.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    values = column.drop_null()
    if pa.types.is_list(column.type):
        digest.update(_integers(compute.list_value_length(values)))
        _add(digest, values.flatten())
    elif pa.types.is_binary(column.type) or pa.types.is_string(column.type):
        digest.update(_integers(compute.binary_length(values)))
        for value in values:
            digest.update(value.as_buffer())
    elif pa.types.is_integer(column.type):
        digest.update(_integers(values))
    else:  # a column of another program
        digest.update(repr(values.to_pylist()).encode())


def _integers(values: pa.Array) -> bytes:
    return values.to_numpy(zero_copy_only=False).astype("<i8").tobytes()


def store_fingerprint(root: Path, document: dict[str, Any], splits: Iterable[str] | None = None) -> str:
    """Return the fingerprint of some splits of the store `root`, whose tokens.json is `document`; of all if None.

    It is the checksum of tokens.json where a state.json has no such fingerprint: seitpp wrote it before there were
    any, it is being replaced, or that split was not copied. Raises StoreError for a damaged state.json or
    codebook.
    """
    splits = {split: _recorded(root, document, split) for split in splits or document["splits"]}
    if not all(splits.values()):
        return document["checksum"]
    tables = [
        [*table.shape, hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()]
        for table in layout.read_books(root, document).tables
    ]
    content = {
        "codebook": tables if "digits" in document else tables[0],
        **{key: document[key] for key in layout.ADDED_KEYS if key in document},
        "grid": document["grid"],
        "codec": document["codec"],
        "table": document["files"].get(layout.TABLE, {}).get("sha256"),
        "class_names": document["class_names"],
        "splits": splits,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _recorded(root: Path, document: dict[str, Any], split: str) -> str | None:
    name = f"{split}/{layout.STATE}"
    if name not in document["files"] or not (root / name).is_file():
        return None
    if (root / name).stat().st_size > layout.MAX_DOCUMENT_BYTES:
        raise StoreError(f"{root / name}: expected at most {layout.MAX_DOCUMENT_BYTES} bytes; copy it again")
    recorded = read_json(root / name, StoreError, "the state of a data set; copy it again").get("_fingerprint")
    return recorded if isinstance(recorded, str) and layout.SHA256.fullmatch(recorded) else None
