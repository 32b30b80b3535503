"""Count the tokens of staged shards, make the code table from the counts, and encode shards of the store."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from seitpp import codec as codecs
from seitpp.codec import Codec
from seitpp.errors import refusing
from seitpp.files import naming, new_file, read_json
from seitpp.store import layout
from seitpp.store.fingerprint import shard_fingerprint
from seitpp.store.labels import read_labels
from seitpp.store.layout import StoreError
from seitpp.store.shards import column_array, read_shard, write_shard
from seitpp.store.spec import SplitSpec

# The code table is made from the counts of so many first images: those of a larger split are encoded while others
# are still tokenized. All of ImageNet-1k are counted.
TABLE_IMAGES = 2**21
# A codec with a learned table learns from at most so many images, and tokens.
LEARNED_IMAGES, LEARNED_TOKENS = 2**13, 2**26
# So many tokens are counted at once.
COUNTED = 2**20


class Table(NamedTuple):
    """What all shards of a store are encoded with: `counts` of the values of each digit, and `learned` tables."""

    counts: list[list[int]]
    learned: list[bytes] | None

    @classmethod
    def of_store(cls, root: Path, document: dict[str, Any]) -> "Table":
        """Read the table of an existing store."""
        return cls(layout.counts_of(document), layout.read_tables(root, document))

    @classmethod
    def of_first(cls, spec: SplitSpec, staged: Sequence[Path]) -> "Table":
        """Make the table of a new store from the first staged shards of its first split.

        Raises StoreError if they have no images.
        """
        rows, counts = 0, [np.zeros(size, np.int64) for size in spec.books.sizes]
        for path in staged:
            batch = read_shard(path)
            rows += len(batch)
            for planes in _some(spec, batch):
                for digit, plane in zip(counts, planes, strict=True):
                    digit += np.bincount(plane, minlength=len(digit))
        if not rows:
            raise StoreError(
                f"{spec.path}: split {spec.split!r} has no images from which to make the code table, those of the "
                f"first {len(staged)} staged shards; add at least one"
            )
        return cls([digit.tolist() for digit in counts], _learned(spec, staged, rows))

    def codec(self, spec: SplitSpec) -> Codec:
        """Build the codec of a split."""
        return codecs.build_digits(spec.codec, spec.books.sizes, self.counts, grid=spec.grid, tables=self.learned)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        learned = None if self.learned is None else [table.hex() for table in self.learned]
        return {"counts": self.counts, "learned": learned}

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Read what `to_json` returned from a file of a staging folder. Raises StoreError if it is damaged."""
        content = read_json(path, StoreError, "a code table; remove its folder to begin anew")
        with refusing(StoreError, f"{path}: damaged", "a code table; remove its folder to begin anew"):
            learned = content["learned"]
            return cls(content["counts"], None if learned is None else list(map(bytes.fromhex, learned)))


class Encoded(NamedTuple):
    """What tokens.json and the files of `datasets` say of an encoded shard."""

    rows: int
    payload_bytes: int
    tokens: int
    largest_label: int  # -1 without labels
    num_labeled: int
    bytes: int
    sha256: str
    fingerprint: str

    @property
    def entry(self) -> dict[str, Any]:
        """The entry of the file in tokens.json."""
        return {"bytes": self.bytes, "sha256": self.sha256}

    @classmethod
    def read(cls, path: Path) -> "Encoded":
        """Read the facts of a shard from a file of a staging folder. Raises StoreError if it is damaged."""
        content = read_json(path, StoreError, "the facts of a shard; remove its folder to begin anew")
        with refusing(StoreError, f"{path}: damaged", "the facts of a shard; remove its folder to begin anew"):
            return cls(**{name: content[name] for name in cls._fields})


class Encoding(NamedTuple):
    """What `encode` does, in this process or another one: staged shards become the shard `target`."""

    spec: SplitSpec
    table: Table
    staged: list[Path]
    target: Path


def encode(task: Encoding) -> Encoded:
    """Encode the images of staged shards into one shard of the store; without images, no file is written."""
    spec, codec = task.spec, task.table.codec(task.spec)
    batches = [batch for path in task.staged if len(batch := read_shard(path))]
    if not batches:
        return Encoded(0, 0, 0, -1, 0, 0, "", "")
    payloads: list[bytes] = []
    tokens = 0
    for batch in batches:
        for ids in batch.column("tokens"):
            planes = _planes(spec, ids.as_buffer())
            tokens += planes.size
            payloads.append(codec.encode(planes.ravel()))
    schema, others = batches[0].schema, batches[0].columns[1:]
    if len(batches) > 1:
        others = [pa.concat_arrays([batch.column(name) for batch in batches]) for name in schema.names[1:]]
    batch = pa.record_batch([column_array(payloads, pa.binary(), "tokens"), *others], schema)
    with naming(task.target), new_file(task.target) as file:
        write_shard(file, batch)
    labels, entry = read_labels(batch), layout.file_entry(task.target)
    return Encoded(
        rows=len(batch),
        payload_bytes=sum(map(len, payloads)),
        tokens=tokens,
        largest_label=labels.largest(),
        num_labeled=int(labels.known.sum()),
        fingerprint=shard_fingerprint(task.target),
        **entry,
    )


def code_counts(spec: SplitSpec, staged: Path) -> Int64[np.ndarray, " codes"]:
    """Count how often each code of the one table occurs in a staged shard."""
    counts = np.zeros(spec.books.rows, np.int64)
    for planes in _some(spec, read_shard(staged)):
        counts += np.bincount(spec.books.joined(planes), minlength=len(counts))
    return counts


def _some(spec: SplitSpec, batch: pa.RecordBatch) -> Iterator[np.ndarray]:
    """Yield the digits of a staged shard in few parts (Q, n): an image at a time, or many tokens of one digit."""
    if _one_digit(spec):
        _, offsets, data = batch.column("tokens").buffers()
        size = int(np.frombuffer(offsets, np.int32)[len(batch)]) if len(batch) else 0
        parts = (data[start : min(start + 2 * COUNTED, size)] for start in range(0, size, 2 * COUNTED))
    else:
        parts = (ids.as_buffer() for ids in batch.column("tokens"))
    return (_planes(spec, part) for part in parts)


def _one_digit(spec: SplitSpec) -> bool:
    staged = spec.renumbering.staged if spec.renumbering else spec.books
    return staged.digits == 1


def _planes(spec: SplitSpec, staged: pa.Buffer | bytes) -> np.ndarray:
    """Return the digits (Q, tokens) of staged tokens, of the codes that are kept."""
    ids, renumbering = np.frombuffer(staged, "<u2"), spec.renumbering
    if renumbering is None:
        return ids.reshape(spec.books.digits, -1)
    return renumbering.planes(ids.reshape(renumbering.staged.digits, -1))


def _learned(spec: SplitSpec, staged: Sequence[Path], rows: int) -> list[bytes] | None:
    """Return the table of each digit that the codec learns from evenly spaced images; None if it has none."""
    if spec.codec != codecs.ContextCodec.name:
        return None
    tokens = (ids for path in staged for ids in read_shard(path).column("tokens"))
    images = min(LEARNED_IMAGES, max(1, LEARNED_TOKENS // math.prod(spec.grid)))
    chosen = islice(tokens, 0, None, -(-rows // images))
    grids = np.stack([_planes(spec, ids.as_buffer()).reshape(-1, *spec.grid) for ids in chosen])
    return [
        codecs.ContextCodec.learn(grids[:, digit], table).table
        for digit, table in enumerate(spec.books.digit_tables())
    ]
