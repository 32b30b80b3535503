"""Read a split of a store: memory-mapped shards, ids decoded on demand."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from seitpp import codec as codecs
from seitpp.store import layout
from seitpp.store.layout import StoreError


class Shard(NamedTuple):
    """The buffers of one shard as they lie on disk: payload i is data[offsets[i] : offsets[i + 1]]."""

    name: str
    offsets: np.ndarray
    data: memoryview
    labels: np.ndarray


class TokenStore:
    """One split of a store, as a sequence of (ids, label).

    Attributes: path; split; splits (names of all); grid (H, W); num_codes K; codebook (K, D) float32;
    counts (K,) int64, how often each code occurs in the codec's table; codec; class_names (list or None);
    num_classes; labels (N,) int64; payload_bytes of the split; tokenizer (dict or None), what made the ids;
    fingerprint (64 hex digits), the same for the same content.
    """

    def __init__(self, path: str | os.PathLike[str], split: str = "train", verify: bool = True) -> None:
        """Open the store in folder `path`; nothing is decoded, and the shards stay on disk.

        verify: compare the SHA-256 of every file but the shards of other splits. Without it, sizes and structure
        only; a damaged image is then found when it is read.
        Raises StoreError if this is no store, has no such split, or is damaged.
        """
        self.path = Path(path).resolve()
        self.split = split
        if not self.path.is_dir():
            raise StoreError(f"{self.path}: no such folder")
        self._document = document = layout.read_document(self.path)
        self.splits = list(document["splits"])
        if split not in self.splits:
            raise StoreError(f"{self.path}: no split {split!r}, it has {', '.join(self.splits)}")
        shards = layout.shard_names(document, split)
        layout.check_files(self.path, document["files"], self._own_files(), checksums=verify)
        self._set_fields(document)
        self._shards = [_open_shard(self.path, name) for name in shards]
        self.labels = np.concatenate([shard.labels for shard in self._shards])
        # First image of each shard.
        self._starts = np.cumsum([0, *(len(shard.labels) for shard in self._shards[:-1])]).tolist()
        self._check_split(document["splits"][split])

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker opens the same folder again: the maps are shared, and what was verified stays so.
        return TokenStore, (self.path, self.split, False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Image `index`: ids (H, W) uint16, label. Raises IndexError, and StoreError if it is damaged."""
        position = range(len(self))[index]
        return self._decode(position).reshape(self.grid), int(self.labels[position])

    def ids(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(N, H, W) uint16 ids of N images. Raises IndexError, and StoreError if one of them is damaged."""
        positions = range(len(self))
        ids = np.empty((len(indices), self.grid[0] * self.grid[1]), np.uint16)
        for row, index in zip(ids, indices, strict=True):
            row[:] = self._decode(positions[index])
        return ids.reshape(-1, *self.grid)

    def verify(self) -> None:
        """Compare the checksum of every file and decode every image of all splits.

        Raises StoreError naming the first damaged file or image.
        """
        files = self._document["files"]
        layout.check_files(self.path, files, files, checksums=True)
        for split in self.splits:
            store = self if split == self.split else TokenStore(self.path, split, verify=False)
            for position in range(len(store)):
                store._decode(position)

    def _set_fields(self, document: dict[str, Any]) -> None:
        self.grid = tuple(document["grid"])
        self.num_codes = document["num_codes"]
        self.class_names = document["class_names"]
        largest = max(split["num_classes"] for split in document["splits"].values())
        self.num_classes = len(self.class_names) if self.class_names else largest
        self.tokenizer = document["tokenizer"]
        self.fingerprint = document["checksum"]
        self.payload_bytes = document["splits"][self.split]["payload_bytes"]
        table = document["codec"]
        try:
            self.codec = codecs.build(table["name"], self.num_codes, table["counts"])
        except ValueError as error:
            raise StoreError(f"{self.path / layout.DOCUMENT}: {error}") from error
        self.counts = np.asarray(table["counts"], np.int64)
        self.codebook = layout.read_codebook(self.path, document)

    def _own_files(self) -> list[str]:
        """Every listed file but those of other splits."""
        others = tuple(f"{split}/" for split in self.splits if split != self.split)
        return [name for name in self._document["files"] if not name.startswith(others)]

    def _check_split(self, expected: dict[str, int]) -> None:
        size = sum(int(shard.offsets[-1]) - int(shard.offsets[0]) for shard in self._shards)
        if (len(self), size) != (expected["rows"], expected["payload_bytes"]):
            raise StoreError(
                f"{self.path / self.split}: {len(self)} images of {size} bytes, "
                f"expected {expected['rows']} of {expected['payload_bytes']}; copy the split again"
            )
        if not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            raise StoreError(
                f"{self.path / self.split}: labels {self.labels.min()} .. {self.labels.max()}, "
                f"expected 0 .. {self.num_classes - 1}; copy the split again"
            )

    def _decode(self, position: int) -> np.ndarray:
        number = bisect_right(self._starts, position) - 1
        shard, row = self._shards[number], position - self._starts[number]
        payload = shard.data[shard.offsets[row] : shard.offsets[row + 1]]
        try:
            return self.codec.decode(payload, self.grid[0] * self.grid[1])
        except codecs.CodecError as error:
            raise StoreError(
                f"split {self.split!r}, image {position} ({self.path / shard.name}): {error}; copy the shard again"
            ) from error


def _open_shard(root: Path, name: str) -> Shard:
    try:
        (batch,) = pa.ipc.open_stream(pa.memory_map(str(root / name)))
        batch.validate()
        tokens, labels = batch.column("tokens"), batch.column("label")
        _, offsets, data = tokens.buffers()
        offsets = np.frombuffer(offsets, np.int32, len(tokens) + 1)
        shard = Shard(name, offsets, memoryview(data), labels.to_numpy())
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        raise StoreError(f"{root / name}: no shard of a token store ({error}); copy it again") from error
    if tokens.type != pa.binary() or labels.type != pa.int64() or tokens.null_count:
        raise StoreError(f"{root / name}: expected binary tokens and int64 labels without nulls; copy it again")
    return shard
