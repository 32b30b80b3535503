"""Read one split of a store: its shards are memory-mapped, its ids decoded on demand."""

import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64, Integer, UInt8, UInt16

from seitpp import codec as codecs
from seitpp.codec.base import check_counts
from seitpp.files import read_json
from seitpp.store import layout
from seitpp.store.bucket import is_bucket
from seitpp.store.columns import Column
from seitpp.store.fingerprint import store_fingerprint
from seitpp.store.hub import pull
from seitpp.store.labels import Label, Labels, is_label_column, read_labels
from seitpp.store.layout import StoreError
from seitpp.store.remote import KEPT_OPEN, Remote
from seitpp.store.shards import ARROW_TYPES, ShardFile, read_shard
from seitpp.store.spec import OWN_COLUMNS

# Prefix of a hub id: without it, a mistyped path never reaches the network.
HUB = "hf://"


class Shard(NamedTuple):
    """The buffers of one memory-mapped shard: the payload of image i is data[offsets[i] : offsets[i + 1]]."""

    name: str
    file: ShardFile
    batch: pa.RecordBatch
    offsets: Int32[np.ndarray, " offsets"]
    data: memoryview
    labels: Labels
    # Height and width of each image, if each has its own grid.
    sides: tuple[Int32[np.ndarray, " images"], Int32[np.ndarray, " images"]] | None


class TokenStore:
    """One split of a store, as a sequence of (ids, label): a label is a class, a tuple of classes, or None.

    The ids of an image are (H, W), or (Q, H, W) where a token has Q digits.

    Attributes: path; split; splits, the names of all splits; grid (H, W), or None if every image has its own;
    layout, "grid", or "sequence" for tokens without rows and columns, whose grid is (1, length); books, what the
    digits of a token mean; num_codes K, the number of rows of all tables; digit_counts, for each digit the (K_q,)
    int64 counts of its values in the first 2^21 images of the split that was written first; codec; class_names
    (list or None); num_classes; multi_label, whether images have tuples of classes; num_labeled, the number of
    images that have a label; labels (N,) int64; grids (N, 2) int64; columns {name: kind} of the additional
    columns; column_names, those of all columns; payload_bytes of the split; tokenizer (dict or None), the
    description of the tokenizer; inventory (dict or None), what was read for the split and what was left out;
    fingerprint, 64 hex digits, equal for equal content of the split, and checksum, that of tokens.json, equal for
    equal files.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        verify: bool = True,
        *,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """Open the store in the folder `path`, "hf://owner/name" of the Hugging Face hub, or s3://, gs://, az://.

        A store of the hub is downloaded into the user's cache first. Of one in a bucket a shard is copied into the
        folder `cache` when it is first read, and verified; without `cache`, into the user's. Nothing is decoded,
        and the shards stay on disk. With `verify`, the SHA-256 of every file is compared, except for the shards of
        other splits; without it, only sizes and structure are checked, those of a shard when it is first read, and
        a damaged image is detected when it is read.
        Raises StoreError if this is not a store, has no such split, or is damaged.
        """
        if is_bucket(path):
            self._open_split(Remote.open(str(path), cache), split, False)
            return
        hub = str(path).startswith(HUB)
        self._open_split((pull(str(path).removeprefix(HUB)) if hub else Path(path)).resolve(), split, verify)

    @classmethod
    def _opened_again(cls, place: Path | Remote, split: str) -> "TokenStore":
        """Open a store in another process: the files have been verified, and those of a bucket are there."""
        store = cls.__new__(cls)
        store._open_split(place, split, False)
        return store

    def _open_split(self, place: Path | Remote, split: str, verify: bool) -> None:
        self._remote = place if isinstance(place, Remote) else None
        self.path = place.folder if isinstance(place, Remote) else place
        self.split = split
        if not self.path.is_dir():
            raise StoreError(
                f"{self.path}: no such folder; give the folder of a store, hf://owner/name, or the URL of a bucket"
            )
        self._document = document = layout.read_document(self.path)
        self.splits = list(document["splits"])
        if split not in self.splits:
            raise StoreError(f"{self.path}: no split {split!r}, it has {', '.join(self.splits)}")
        shards = layout.shard_names(document, split)
        own = self._own_files()
        if self._remote:
            own = [name for name in own if not name.endswith(".arrow")]
            self._remote.fetch(document, own)
        layout.check_files(self.path, document["files"], own, checksums=verify)
        self._set_fields(document)
        self._names, self._opened = shards, {}
        # The number of images of each shard. Where it is not recorded, or all is verified, all shards are opened.
        self._rows = self._recorded_rows(document["splits"][split]["rows"])
        opened = range(len(shards)) if verify or not self._rows else ()
        rows = [len(self._shard(number).batch) for number in opened] or self._rows
        # Index of the first image of each shard.
        self._starts = np.cumsum([0, *rows[:-1]]).tolist()
        self._length = self._starts[-1] + rows[-1]
        self.column_names = self._shard(0).batch.schema.names
        self.columns = _other_columns(self._shard(0).batch.schema)
        if len(self._opened) == len(shards):
            self._check_split(document["splits"][split])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore._opened_again, (self._remote or self.path, self.split)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[UInt16[np.ndarray, "*digits height width"], Label]:
        """Return the ids and the label of image `index`. Raises IndexError, and StoreError if it is damaged."""
        position = range(self._length)[index]
        shard, row = self._locate(position)
        shard.file.check()
        sides = self.grid or _sides(shard, row)
        return self._decode(position).reshape(*self.books.planes, *sides), shard.labels.label(row)

    def ids(
        self, indices: Sequence[int] | Integer[np.ndarray, " images"]
    ) -> UInt16[np.ndarray, "images *digits height width"]:
        """Return the ids of images with the same grid.

        Raises IndexError, and StoreError if an image is damaged, the grids differ, or there are too many tokens.
        """
        every = range(self._length)
        positions = [every[index] for index in indices]
        height, width = self.grid or self._common_grid(positions)
        self._check_intact(positions)
        tokens = self.books.digits * height * width
        if len(positions) * tokens > layout.FREE_TOKENS:
            size = sum(map(self._payload_size, positions))
            layout.check_tokens(f"ids of {len(positions)} images", len(positions) * tokens, size)
        ids = np.empty((len(positions), tokens), np.uint16)
        for row, position in zip(ids, positions, strict=True):
            row[:] = self._decode(position)
        return ids.reshape(len(ids), *self.books.planes, height, width)

    @property
    def codebook(self) -> Float32[np.ndarray, "codes dim"]:
        """The codebook (K, D). Raises StoreError where the codes are rows of several tables; see `books`."""
        if len(self.books.tables) > 1:
            raise StoreError(
                f"{self.path}: a token is {self.books.digits} rows of as many tables, expected one codebook; "
                "read its books"
            )
        return self.books.tables[0]

    @property
    def counts(self) -> Int64[np.ndarray, " codes"]:
        """How often each code occurs in the first 2^21 images of the split that was written first.

        Raises StoreError where tokens have several digits, whose counts are `digit_counts`.
        """
        if self.books.digits > 1:
            raise StoreError(f"{self.path}: tokens have {self.books.digits} digits, whose counts are digit_counts")
        return self.digit_counts[0]

    @cached_property
    def labels(self) -> Int64[np.ndarray, " images"]:
        """The classes of all images, -1 where there is no label, read on first access.

        Raises StoreError if images have several classes.
        """
        self._require_one_class()
        return np.concatenate([shard.labels.values for shard in self._intact()])

    def labels_of(self, indices: Sequence[int] | Integer[np.ndarray, " images"]) -> Int64[np.ndarray, " images"]:
        """Return the classes of some images, -1 where there is no label; `labels` has those of all.

        Raises IndexError, and StoreError if images have several classes.
        """
        self._require_one_class()
        every = range(self._length)
        positions = [every[index] for index in indices]
        self._check_intact(positions)
        located = map(self._locate, positions)
        return np.array([shard.labels.values[row] for shard, row in located], np.int64)

    def multi_hot(
        self, indices: Sequence[int] | Integer[np.ndarray, " images"]
    ) -> UInt8[np.ndarray, "images classes"]:
        """Return rows that are 1 for each class of an image and 0 for others, or 255 where there is no label.

        Raises IndexError, and StoreError if there are too many classes.
        """
        self._check_classes("rows of zeros and ones")
        every = range(self._length)
        positions = [every[index] for index in indices]
        self._check_intact(positions)
        hot = np.empty((len(positions), self.num_classes), np.uint8)
        for row, position in zip(hot, positions, strict=True):
            shard, number = self._locate(position)
            row[:] = shard.labels.multi_hot(number, self.num_classes)
        return hot

    def require_classes(self, purpose: str) -> None:
        """Raise StoreError unless every image of the split has a label, of not too many classes, for `purpose`."""
        self._check_classes(purpose)
        missing = len(self) - self.num_labeled
        if missing or not self.num_classes:
            without = f"{missing:,} of {len(self):,} images" if missing else "all images"
            raise StoreError(
                f"{purpose} needs classes: {without} of split {self.split!r} of {self.path} have none; tokenize "
                "them with labels, or take what needs none, as pre-training by mtm_pretrain"
            )

    @property
    def shard_rows(self) -> Int64[np.ndarray, " shards"]:
        """The number of images of each shard."""
        return np.diff([*self._starts, self._length])

    @property
    def payload_sizes(self) -> Int64[np.ndarray, " images"]:
        """The number of bytes of each image's encoded ids."""
        return np.concatenate([np.diff(shard.offsets.astype(np.int64)) for shard in self._intact()])

    @cached_property
    def grids(self) -> Int64[np.ndarray, "images 2"]:
        """The height and width of each image in tokens, read on first access."""
        if self.grid is not None:
            return np.broadcast_to(np.array(self.grid), (self._length, 2))
        return np.concatenate([np.stack(shard.sides, axis=1) for shard in self._intact()]).astype(np.int64)

    @property
    def is_remote(self) -> bool:
        """Whether the store is in a bucket."""
        return self._remote is not None

    def prefetch(self, shards: Iterable[int]) -> None:
        """Copy shards of a store in a bucket in the background, before they are read."""
        if self._remote:
            self._remote.prefetch(self._document, [self._names[shard] for shard in shards])

    def column(self, name: str) -> Column:
        """Return the column `name` of `columns`. Raises StoreError if there is none, or if it is damaged."""
        if name not in self.columns:
            names = ", ".join(self.columns) or "none"
            raise StoreError(f"{self.path}: split {self.split!r} has no column {name!r}, it has {names}")
        shards = self._intact()
        batches, files = [shard.batch for shard in shards], [shard.file for shard in shards]
        folder = self.path / self.split
        return Column(name, self.columns[name], batches, files=files, starts=self._starts, folder=folder)

    @property
    def lookup(self) -> str:
        """The distance by which the tokenizer finds the nearest code: "cosine" or "euclidean".

        It is "cosine", as in the released data sets, if the store does not describe its tokenizer.
        """
        return ((self.tokenizer or {}).get("spec") or {}).get("lookup", "cosine")

    def verify(self) -> None:
        """Compare the checksum of every file and decode every image of all splits.

        Raises StoreError naming the first damaged file or image.
        """
        files, place = self._document["files"], self._remote or self.path
        for name in files:
            if self._remote:
                self._remote.fetch(self._document, [name])
            layout.check_files(self.path, files, [name], checksums=True)
        for split in self.splits:
            store = self if split == self.split else TokenStore._opened_again(place, split)
            for position in range(len(store)):
                store[position]

    def _set_fields(self, document: dict[str, Any]) -> None:
        self.grid = None if document["grid"] is None else tuple(document["grid"])
        self.layout = document.get("layout", "grid")
        self.num_codes = document["num_codes"]
        self.class_names = document["class_names"]
        largest = max(split["num_classes"] for split in document["splits"].values())
        self.num_classes = len(self.class_names) if self.class_names else largest
        self.tokenizer = document["tokenizer"]
        self.checksum = document["checksum"]
        self.fingerprint = store_fingerprint(self.path, document, [self.split])
        entry = document["splits"][self.split]
        self.payload_bytes = entry["payload_bytes"]
        self.num_labeled = entry.get("num_labeled", entry["rows"])
        self.multi_label = layout.is_multi_label(document)
        self.inventory = entry.get("inventory")
        name, sizes, counts = document["codec"]["name"], layout.sizes_of(document), layout.counts_of(document)
        tables = layout.read_tables(self.path, document)
        try:
            self.digit_counts = tuple(map(check_counts, counts, sizes))
            self.codec = codecs.build_digits(name, sizes, self.digit_counts, grid=self.grid, tables=tables)
        except ValueError as error:
            raise StoreError(f"{self.path / layout.DOCUMENT}: {error}") from error
        self.books = layout.read_books(self.path, document)

    def _own_files(self) -> list[str]:
        """List the files of the store without those of other splits."""
        others = {split for split in self.splits if split != self.split}
        return [name for name in self._document["files"] if name.partition("/")[0] not in others]

    def _check_split(self, expected: dict[str, int]) -> None:
        shards = [self._shard(number) for number in range(len(self._names))]
        size = sum(int(shard.offsets[-1]) - int(shard.offsets[0]) for shard in shards)
        if (len(self), size) != (expected["rows"], expected["payload_bytes"]):
            raise StoreError(
                f"{self.path / self.split}: {len(self)} images of {size} bytes, "
                f"expected {expected['rows']} of {expected['payload_bytes']}; copy the split again"
            )
        tokens = len(self) * math.prod(self.grid) if self.grid else sum(map(_tokens, shards))
        layout.check_tokens(self.path / self.split, tokens * self.books.digits, size)
        labeled = sum(int(shard.labels.known.sum()) for shard in shards)
        if labeled != self.num_labeled:
            raise StoreError(
                f"{self.path / self.split}: {labeled} images have a label, expected {self.num_labeled}; "
                "copy the split again"
            )

    def _require_one_class(self) -> None:
        if self.multi_label:
            raise StoreError(f"{self.path}: its images have several classes each, expected one; use another store")

    def _check_classes(self, purpose: str) -> None:
        if self.num_classes > layout.MAX_CLASSES:
            raise StoreError(
                f"{purpose}: {self.num_classes} classes in {self.path}, expected at most {layout.MAX_CLASSES}"
            )

    def _check_intact(self, positions: Sequence[int]) -> None:
        """Raise StoreError if a file of these images was cut since it was opened."""
        for number in np.unique(np.searchsorted(self._starts, positions, side="right")).tolist():
            self._shard(number - 1).file.check()

    def _intact(self) -> list[Shard]:
        shards = [self._shard(number) for number in range(len(self._names))]
        for shard in shards:
            shard.file.check()
        return shards

    def _shard(self, number: int) -> Shard:
        """Return a shard, opened when it is first asked for. Raises StoreError if it is damaged."""
        shard = self._opened.pop(number, None) or self._open(number)
        self._opened[number] = shard  # the last one
        if self._remote and len(self._opened) > KEPT_OPEN:
            del self._opened[next(iter(self._opened))]
        return shard

    def _open(self, number: int) -> Shard:
        name = self._names[number]
        path, classes_below = self.path / name, self.num_classes
        if self._remote:
            self._remote.fetch(self._document, [name])
        shard = _open_shard(path, name, grid=self.grid, multi_label=self.multi_label)
        if self._rows and len(shard.batch) != self._rows[number]:
            raise StoreError(f"{path}: {len(shard.batch)} images, expected {self._rows[number]}; copy it again")
        classes = shard.labels.classes()
        low, high = classes.min(initial=2**63 - 1), classes.max(initial=-1)
        if classes.size and not 0 <= low <= high < classes_below:
            raise StoreError(f"{path}: labels {low} .. {high}, expected 0 .. {classes_below - 1}; copy it again")
        tokens = len(shard.batch) * math.prod(self.grid) if self.grid else _tokens(shard)
        layout.check_tokens(path, tokens * self.books.digits, int(shard.offsets[-1]) - int(shard.offsets[0]))
        return shard

    def _recorded_rows(self, rows: int) -> list[int] | None:
        """Return the number of images of each shard, None if state.json does not have them.

        Raises StoreError if they cannot be those of `rows` images.
        """
        name = f"{self.split}/{layout.STATE}"
        if name not in self._document["files"]:  # it is being replaced
            return None
        recorded = read_json(self.path / name, StoreError, "the state of a data set; copy it again")
        found = recorded.get(layout.SHARD_ROWS)
        if found is not None and not layout.is_shard_rows(found, len(self._names), rows):
            whole = isinstance(found, list) and all(type(number) is int for number in found)
            got = f"{sum(found)} images in {len(found)} shards" if whole else "no list of numbers of images"
            raise StoreError(
                f"{self.path / name}: {got}, expected {rows} in {len(self._names)}; copy the split again"
            )
        return found

    def _common_grid(self, positions: list[int]) -> tuple[int, int]:
        grids = {_sides(*self._locate(position)) for position in positions}
        if len(grids) > 1:
            raise StoreError(
                f"ids of {len(positions)} images: got the grids {', '.join(map(str, sorted(grids)[:3]))}, "
                "expected equal ones; read the images one by one"
            )
        return grids.pop() if grids else (0, 0)

    def _locate(self, position: int) -> tuple[Shard, int]:
        number = bisect_right(self._starts, position) - 1
        return self._shard(number), position - self._starts[number]

    def _payload_size(self, position: int) -> int:
        shard, row = self._locate(position)
        return int(shard.offsets[row + 1]) - int(shard.offsets[row])

    def _decode(self, position: int) -> np.ndarray:
        shard, row = self._locate(position)
        height, width = self.grid or _sides(shard, row)
        payload = shard.data[shard.offsets[row] : shard.offsets[row + 1]]
        try:
            return self.codec.decode(payload, self.books.digits * height * width)
        except codecs.CodecError as error:
            raise StoreError(
                f"split {self.split!r}, image {position} ({self.path / shard.name}): {error}; copy the shard again"
            ) from error


def _sides(shard: Shard, row: int) -> tuple[int, int]:
    heights, widths = shard.sides
    return int(heights[row]), int(widths[row])


def _tokens(shard: Shard) -> int:
    heights, widths = shard.sides
    return int(heights.astype(np.int64) @ widths.astype(np.int64))


def _open_shard(path: Path, name: str, *, grid: tuple[int, int] | None, multi_label: bool) -> Shard:
    file, batch = ShardFile.of(path), read_shard(path)
    _require_column(path, batch, "tokens", pa.binary())
    _require_labels(path, batch, multi_label)
    for column in ("height", "width") if grid is None else ():
        _require_column(path, batch, column, pa.int32())
    sides = None if grid else (batch.column("height").to_numpy(), batch.column("width").to_numpy())
    if sides and not _valid_grids(*sides):
        raise StoreError(f"{path}: a grid outside 1 .. {codecs.MAX_TOKENS} tokens; copy it again")
    if not len(batch):
        raise StoreError(f"{path}: no images; copy it again")
    _, offsets, data = batch.column("tokens").buffers()
    offsets = np.frombuffer(offsets, np.int32, len(batch) + 1)
    if not (offsets[1:] > offsets[:-1]).all():
        raise StoreError(
            f"{path}: payloads that overlap or are empty, expected one after the other; copy it again"
        )
    try:
        labels = read_labels(batch)
    except StoreError as error:
        raise StoreError(f"{path}: {error}; copy it again") from error
    return Shard(name, file, batch, offsets, memoryview(data or b""), labels, sides)


def _require_column(path: Path, batch: pa.RecordBatch, name: str, kind: pa.DataType) -> None:
    fields = batch.schema.get_all_field_indices(name)
    if len(fields) != 1 or batch.schema.field(fields[0]).type != kind or batch.column(fields[0]).null_count:
        raise StoreError(f"{path}: expected a column {name!r} of {kind} without nulls; copy it again")


def _require_labels(path: Path, batch: pa.RecordBatch, multi_label: bool) -> None:
    fields = batch.schema.get_all_field_indices("label")
    if len(fields) != 1 or not is_label_column(batch.schema.field(fields[0]).type, multi_label):
        kind = "lists of int64" if multi_label else "int64"
        raise StoreError(f"{path}: expected a column 'label' of {kind}; copy it again")
    column = batch.column(fields[0])
    # A list is null where the classes are not known; a class is -1 then.
    if (column.values if multi_label else column).null_count:
        raise StoreError(f"{path}: expected a column 'label' of classes that are not null; copy it again")


def _valid_grids(heights: np.ndarray, widths: np.ndarray) -> bool:
    """Return whether all grids are within limits, before anything of their size is allocated."""
    tokens = heights.astype(np.int64) * widths
    return bool((heights >= 1).all() and (widths >= 1).all() and (tokens <= codecs.MAX_TOKENS).all())


def _other_columns(schema: pa.Schema) -> dict[str, str]:
    kinds = {kind: name for name, kind in ARROW_TYPES.items()}
    return {
        field.name: kinds[field.type] for field in schema if field.name not in OWN_COLUMNS and field.type in kinds
    }
