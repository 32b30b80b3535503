"""Write a split of a store: spool ids, count codes, encode with the exact table, publish by renames."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import safetensors.numpy
from datasets import ClassLabel, Features, Value

from seitpp import codec as codecs
from seitpp.files import sync
from seitpp.store import layout
from seitpp.store.layout import StoreError

SHARD_TOKENS = 2**26
SHARD_ROWS = 2**16


class StoreWriter:
    """Writes one split; nothing is visible before the with-block ends, and nothing remains if it fails.

    Into an existing store it adds a split, encoded with the table that the store has.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codebook: np.ndarray,
        grid: tuple[int, int],
        codec: str = "ans",
        split: str = "train",
        class_names: Sequence[str] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
    ) -> None:
        """path: folder of the store, new, empty, or a store without this split.

        codebook: (K, D) floats. grid: (height, width). class_names: one distinct string a class.
        tokenizer: what made the ids, any mapping that JSON can hold, kept verbatim.
        Without class_names or tokenizer, those of an existing store are taken.
        Raises StoreError if these are out of bounds or do not agree with the existing store.
        """
        self.path = Path(path).resolve()
        self._codebook = np.asarray(codebook, dtype=np.float32)
        self._grid = list(map(int, grid))
        self._codec = codec
        self._split = split
        self._class_names = None if class_names is None else list(class_names)
        # Through JSON and back, so that it equals what a later split reads.
        self._tokenizer = json.loads(json.dumps(tokenizer, allow_nan=False))
        self._check_arguments()
        store = self._existing()
        if store and self._class_names is None:
            self._class_names = store["class_names"]
        self._spools: tuple[BinaryIO, BinaryIO] | None = None
        self._rows = 0
        self._num_classes = len(self._class_names or [])
        self._counts = np.zeros(len(self._codebook), np.int64)

    def __enter__(self) -> "StoreWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f".{self.path.name}-", dir=self.path.parent))
        self._spools = ((self._staging / "ids").open("w+b"), (self._staging / "labels").open("w+b"))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            for spool in self._spools:
                spool.close()
            shutil.rmtree(self._staging)

    def add(self, ids: np.ndarray, label: int) -> None:
        """Append one image. ids: (H, W) integers in 0 .. K - 1. Raises StoreError for anything else."""
        self.add_batch(np.asarray(ids)[None], np.asarray(label)[None])

    def add_batch(self, ids: np.ndarray, labels: np.ndarray) -> None:
        """Append N images. ids: (N, H, W) integers in 0 .. K - 1. labels: (N,) integers, each of a class.

        Raises StoreError for anything else; the batch is then not taken, and the with-block can go on.
        """
        if self._spools is None:
            raise StoreError('not open: use the writer as "with StoreWriter(...) as writer:"')
        ids, labels = np.asarray(ids), np.asarray(labels)
        self._check_batch(ids, labels)
        ids, labels = ids.astype("<u2"), labels.astype("<i8")
        for spool, array in zip(self._spools, (ids, labels), strict=True):
            spool.write(array.tobytes())
        self._counts += np.bincount(ids.ravel(), minlength=len(self._counts))
        self._rows += len(ids)
        if self._class_names is None and len(labels):
            self._num_classes = max(self._num_classes, int(labels.max()) + 1)

    def _check_arguments(self) -> None:
        codebook = self._codebook
        if codebook.ndim != 2 or not np.isfinite(codebook).all():
            raise StoreError(f"codebook: got shape {codebook.shape}, expected (codes, dimension), all finite")
        if not (1 <= len(codebook) <= codecs.MAX_CODES and 1 <= codebook.shape[1] <= layout.MAX_CODE_DIM):
            raise StoreError(
                f"codebook: got shape {codebook.shape}, expected 1 .. {codecs.MAX_CODES} codes "
                f"of dimension 1 .. {layout.MAX_CODE_DIM}"
            )
        if not layout.is_grid(self._grid):
            raise StoreError(f"grid: got {self._grid}, expected (height, width), 1 .. {codecs.MAX_TOKENS} tokens")
        if self._codec not in codecs.CODECS:
            raise StoreError(f"codec: got {self._codec!r}, expected one of {', '.join(codecs.CODECS)}")
        if not layout.SPLIT_NAME.fullmatch(self._split):
            raise StoreError(f"split: got {self._split!r}, expected letters, digits and underscores")
        if self._class_names is not None and not layout.is_class_names(self._class_names):
            raise StoreError(f"class_names: got {self._class_names}, expected at least one string, each once")

    def _existing(self) -> dict[str, Any] | None:
        """tokens.json of the store that the split goes to, if there is one. Raises StoreError if it cannot."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return None
        if not (self.path / layout.DOCUMENT).exists():
            raise StoreError(f"{self.path}: not empty and no token store; choose another folder")
        store = layout.read_document(self.path)
        if self._split in store["splits"]:
            raise StoreError(f"{self.path}: has a split {self._split!r} already; nothing is overwritten")
        if (self.path / self._split).exists():
            raise StoreError(f"{self.path / self._split}: left by an interrupted writer; remove it to go on")
        self._check_agreement(store)
        return store

    def _check_agreement(self, store: dict[str, Any]) -> None:
        given = {
            "grid": self._grid,
            "codec": self._codec,
            "codebook": _describe(self._codebook),
        }
        there = {
            "grid": store["grid"],
            "codec": store["codec"]["name"],
            "codebook": _describe(layout.read_codebook(self.path, store)),
        }
        for key, value in (("class_names", self._class_names), ("tokenizer", self._tokenizer)):
            if value is not None:
                given[key], there[key] = value, store[key]
        for key, value in given.items():
            if value != there[key]:
                raise StoreError(f"{self.path}: its {key} is {there[key]}, got {value}; a store has one {key}")

    def _check_batch(self, ids: np.ndarray, labels: np.ndarray) -> None:
        if ids.ndim != 3 or list(ids.shape[1:]) != self._grid or ids.dtype.kind not in "iu":
            raise StoreError(
                f"ids from image {self._rows}: got {ids.dtype} {ids.shape[1:]}, "
                f"expected integers {tuple(self._grid)}"
            )
        if labels.shape != ids.shape[:1] or labels.dtype.kind not in "iu":
            raise StoreError(
                f"labels from image {self._rows}: got {labels.dtype} {labels.shape}, "
                f"expected integers {ids.shape[:1]}"
            )
        num_codes = len(self._codebook)
        wrong = ((ids < 0) | (ids >= num_codes)).any(axis=(1, 2))
        if wrong.any():
            image, values = self._rows + int(wrong.argmax()), ids[wrong.argmax()]
            raise StoreError(
                f"image {image}: ids {values.min()} .. {values.max()}, but the codebook has {num_codes} codes"
            )
        classes = len(self._class_names) if self._class_names else 2**63 - 1
        wrong = (labels < 0) | (labels >= classes)
        if wrong.any():
            image, value = self._rows + int(wrong.argmax()), labels[wrong.argmax()]
            raise StoreError(f"image {image}: label {value}, expected 0 .. {classes - 1}")

    def _publish(self) -> None:
        if not self._rows:
            raise StoreError(f"{self.path}: split {self._split!r} has no images; add at least one")
        # Read again: another split may have been published since.
        store = self._existing()
        made = self._staging / "store"
        made.mkdir()
        self._build(made, store)
        if store is None:
            # Onto nothing or onto an empty folder: fails if somebody filled it meanwhile.
            made.rename(self.path)
            sync(self.path.parent)
        else:
            self._add_to(store, made)

    def _build(self, made: Path, store: dict[str, Any] | None) -> None:
        """Put the new files, synced, into the folder `made`, and a tokens.json of the whole store."""
        document = store or {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            "grid": self._grid,
            "num_codes": len(self._codebook),
            "code_dim": self._codebook.shape[1],
            "codec": {"name": self._codec, "counts": self._counts.tolist()},
            "tokenizer": self._tokenizer,
            "class_names": self._class_names,
            "splits": {},
            "files": {},
        }
        (made / self._split).mkdir()
        payload_bytes = self._write_shards(made, document["codec"]["counts"])
        split = {"rows": self._rows, "payload_bytes": payload_bytes, "num_classes": self._num_classes}
        document = {**document, "splits": {**document["splits"], self._split: split}}
        if store is None:
            data = safetensors.numpy.save({"codebook": self._codebook})
            layout.write_file(made / layout.CODEBOOK, data)
        splits = json.dumps({"splits": list(document["splits"])})
        layout.write_file(made / layout.DATASET_DICT, splits.encode())
        layout.write_file(made / layout.CARD, layout.card(document).encode())
        files = (path for path in sorted(made.rglob("*")) if path.is_file())
        entries = {path.relative_to(made).as_posix(): layout.file_entry(path) for path in files}
        document["files"] = {**document["files"], **entries}
        layout.write_document(made, document)
        sync(made / self._split)
        sync(made)

    def _write_shards(self, made: Path, counts: list[int]) -> int:
        """Encode the spooled images into the split's folder; the number of payload bytes."""
        codec = codecs.build(self._codec, len(self._codebook), counts)
        label = ClassLabel(names=self._class_names) if self._class_names else Value("int64")
        features = Features({"tokens": Value("binary"), "label": label})
        rows = min(SHARD_ROWS, max(1, SHARD_TOKENS // (self._grid[0] * self._grid[1])))
        total = -(-self._rows // rows)
        names = [layout.shard_name(self._split, index, total) for index in range(total)]
        size = 0
        for name, (ids, labels) in zip(names, self._spooled(rows), strict=True):
            payloads = [codec.encode(image) for image in ids]
            size += sum(map(len, payloads))
            columns = [pa.array(payloads, pa.binary()), pa.array(labels, pa.int64())]
            _write_shard(made / name, pa.record_batch(columns, schema=features.arrow_schema))
        folder = made / self._split
        layout.write_file(folder / layout.DATASET_INFO, json.dumps({"features": features.to_dict()}).encode())
        layout.write_file(folder / layout.STATE, json.dumps(_state(self._split, folder)).encode())
        return size

    def _spooled(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What was added, `rows` images at a time: ids (n, H * W) uint16, labels (n,) int64."""
        tokens = self._grid[0] * self._grid[1]
        for spool in self._spools:
            spool.seek(0)
        for start in range(0, self._rows, rows):
            n = min(rows, self._rows - start)
            ids = np.frombuffer(self._spools[0].read(2 * n * tokens), "<u2")
            yield ids.reshape(n, tokens), np.frombuffer(self._spools[1].read(8 * n), "<i8")

    def _add_to(self, store: dict[str, Any], made: Path) -> None:
        """Publish into an existing store such that it can be read after every single rename."""
        kept = {name: entry for name, entry in store["files"].items() if name not in layout.DERIVED}
        withdrawn = made / "withdrawn"
        withdrawn.mkdir()
        layout.write_document(withdrawn, {**store, "files": kept})
        (withdrawn / layout.DOCUMENT).replace(self.path / layout.DOCUMENT)
        sync(self.path)
        (made / self._split).rename(self.path / self._split)
        for name in layout.DERIVED:
            (made / name).replace(self.path / name)
        sync(self.path)
        (made / layout.DOCUMENT).replace(self.path / layout.DOCUMENT)
        sync(self.path)


def _write_shard(path: Path, batch: pa.RecordBatch) -> None:
    with path.open("wb") as file:
        with pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


def _state(split: str, folder: Path) -> dict[str, Any]:
    """state.json of `datasets`; its fingerprint is made of the shards, so that caches know them apart."""
    shards = sorted(folder.glob("*.arrow"))
    hashes = "".join(layout.file_entry(shard)["sha256"] for shard in shards)
    return {
        "_data_files": [{"filename": shard.name} for shard in shards],
        "_fingerprint": _fingerprint(hashes.encode()),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }


def _describe(codebook: np.ndarray) -> str:
    return f"{codebook.shape} {_fingerprint(codebook.tobytes())}"


def _fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
