"""The properties common to all images of a split, checked and compared with the target store."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int32, Integer

from seitpp import codec as codecs
from seitpp.books import Books, BooksError
from seitpp.files import locked
from seitpp.store import layout as layouts
from seitpp.store.layout import StoreError
from seitpp.store.shards import ARROW_TYPES

if TYPE_CHECKING:
    from datasets import Features

# Upper limits of a staged shard: a process writes one at a time and loses at most this one when it is killed.
SHARD_TOKENS = 2**22
SHARD_IMAGES = 2**12
# Of so many staged shards, each becomes a shard of the store; of more, each GROUP of them does.
FEW_SHARDS, GROUP = 2**10, 2**4

OWN_COLUMNS = ("tokens", "label", "height", "width")


class Renumbering(NamedTuple):
    """The removal of codes after staging; the new id of a removed code is -1."""

    staged: Books
    new_ids: Int32[np.ndarray, " codes"]
    kept: Books

    def planes(self, planes: Integer[np.ndarray, "digits tokens"]) -> Int32[np.ndarray, "new_digits tokens"]:
        """Return the digits of the new ids of staged tokens."""
        return self.kept.split(self.new_ids[self.staged.joined(planes)])


class SplitSpec:
    """The path of a split and the properties common to all its images.

    Attributes: path; split; books, the tables of the codebook; grid [H, W], or None if each image has its own;
    layout, None or "sequence"; codec, its name; class_names (list or None); tokenizer (dict or None); columns
    {name: kind}; renumbering, None unless codes were removed after staging; multi_label, whether images have lists
    of classes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codebook: Books | Float[np.ndarray, "codes dim"],
        grid: tuple[int, int] | None,
        layout: str | None = None,
        codec: str,
        split: str,
        class_names: Sequence[str] | None,
        tokenizer: Mapping[str, Any] | None,
        columns: Mapping[str, str] | None,
        multi_label: bool,
    ) -> None:
        """The arguments are those of StoreWriter. Raises StoreError if one is invalid."""
        self.path = Path(path).resolve()
        self.split = split
        try:
            self.books = Books.of(codebook)
        except BooksError as error:
            raise StoreError(str(error)) from error
        self.grid = None if grid is None else list(map(int, grid))
        self.layout = layout
        self.codec = codec
        self.class_names = None if class_names is None else list(class_names)
        # Converted to JSON and back, so that it equals what a later split reads.
        self.tokenizer = json.loads(json.dumps(tokenizer, allow_nan=False))
        self.columns = dict(columns or {})
        self.multi_label = multi_label
        self.renumbering: Renumbering | None = None
        self._check()

    @property
    def shard_images(self) -> int:
        """The number of images in every staged shard but the last, whatever the number of processes."""
        if self.grid is None:
            return SHARD_IMAGES
        return min(SHARD_IMAGES, max(1, SHARD_TOKENS // (self.grid[0] * self.grid[1] * self.books.digits)))

    def groups(self, staged: int) -> list[range]:
        """Return which of `staged` staged shards each shard of the store has: several in a large store.

        Annotations could be too long for one column of so many.
        """
        size = GROUP if staged > FEW_SHARDS and self.grid and "binary" not in self.columns.values() else 1
        return [range(start, min(start + size, staged)) for start in range(0, staged, size)]

    def keep(self, codes: Integer[np.ndarray, " kept"], tokenizer: Mapping[str, Any] | None) -> "SplitSpec":
        """Return the spec of the same staged images with only the codes with ids `codes`, in this order.

        Raises StoreError where a code is the rows of several tables.
        """
        (table, *others), kept = self.books.tables, copy(self)
        if others:
            raise StoreError(f"codes of {len(others) + 1} tables: cannot keep some, expected one table; keep all")
        kept.books, kept.tokenizer = Books.of(table[codes]), json.loads(json.dumps(tokenizer, allow_nan=False))
        new_ids = np.full(len(table), -1, np.int32)  # every codec refuses -1
        new_ids[codes] = np.arange(len(codes))
        kept.renumbering = Renumbering(self.books, new_ids, kept.books)
        return kept

    def features(self) -> "Features":
        """Return the columns of a shard as features of the `datasets` library."""
        from datasets import ClassLabel, Features, List, Value  # takes a second, and reading does not need it

        one = ClassLabel(names=self.class_names) if self.class_names else Value("int64")
        label = List(one) if self.multi_label else one
        sides = {} if self.grid else {"height": Value("int32"), "width": Value("int32")}
        others = {name: Value(kind) for name, kind in self.columns.items()}
        return Features({"tokens": Value("binary"), "label": label, **sides, **others})

    def identity(self) -> dict[str, Any]:
        """Return what must be equal when an interrupted split is continued, as JSON values."""
        return {
            "grid": self.grid,
            **({"layout": self.layout} if self.layout else {}),
            "codec": self.codec,
            "codebook": describe(self.books),
            "class_names": self.class_names,
            "tokenizer": self.tokenizer,
            "columns": self.columns,
            "multi_label": self.multi_label,
        }

    def existing(self, replace_left: bool = False) -> dict[str, Any] | None:
        """Read tokens.json of the target store; None if there is no store yet.

        With `replace_left`, a folder of the split that tokens.json does not list is no error: the caller replaces
        it. Raises StoreError if the split cannot be added.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return None
        if not (self.path / layouts.DOCUMENT).exists():
            raise StoreError(f"{self.path}: not empty and no token store; choose another folder")
        store = layouts.read_document(self.path)
        if self.split in store["splits"]:
            raise StoreError(
                f"{self.path}: has a split {self.split!r} already; nothing is overwritten, choose another"
            )
        if len(store["splits"]) >= layouts.MAX_SPLITS:
            raise StoreError(
                f"{self.path}: has {layouts.MAX_SPLITS} splits already; write the others into another store"
            )
        if (self.path / self.split).exists() and not replace_left:
            raise StoreError(f"{self.path / self.split}: left by an interrupted writer; remove it to go on")
        self._check_agreement(store)
        return store

    def locked(self) -> AbstractContextManager[None]:
        """Hold the lock of the target store during a block: from reading its tokens.json to the last rename."""
        return store_lock(self.path)

    def adopt(self, store: dict[str, Any] | None) -> None:
        """Copy class names and tokenizer from tokens.json of a `store`, if they were not given and it exists."""
        if store is not None:
            self.class_names = self.class_names or store["class_names"]
            self.tokenizer = self.tokenizer or store["tokenizer"]

    def _check(self) -> None:
        if self.books.dim > layouts.MAX_CODE_DIM:
            raise StoreError(f"codebook: got vectors of {self.books.dim}, expected at most {layouts.MAX_CODE_DIM}")
        if (numbers := sum(table.size for table in self.books.tables)) > layouts.MAX_CODEBOOK_NUMBERS:
            raise StoreError(
                f"codebook: got {numbers} numbers, expected at most {layouts.MAX_CODEBOOK_NUMBERS}; "
                "take fewer or shorter codes"
            )
        if self.layout not in (None, layouts.SEQUENCE) or (self.layout and (self.grid or [0])[0] != 1):
            raise StoreError(
                f"layout: got {self.layout!r} and the grid {self.grid}, expected none, or {layouts.SEQUENCE!r} "
                "and the grid (1, length)"
            )
        if self.grid is not None and not layouts.is_grid(self.grid):
            raise StoreError(f"grid: got {self.grid}, expected (height, width), 1 .. {codecs.MAX_TOKENS} tokens")
        if self.grid is not None and self.grid[0] * self.grid[1] * self.books.digits > codecs.MAX_TOKENS:
            raise StoreError(
                f"grid: got {self.grid} of {self.books.digits} digits, expected at most {codecs.MAX_TOKENS} in all"
            )
        if self.codec not in codecs.CODECS:
            raise StoreError(f"codec: got {self.codec!r}, expected one of {', '.join(codecs.CODECS)}")
        if self.codec == codecs.ContextCodec.name and self.grid is None:
            raise StoreError(
                f"codec {self.codec!r}: got no grid, expected one grid for all images; take another codec"
            )
        if not layouts.SPLIT_NAME.fullmatch(self.split):
            raise StoreError(f"split: got {self.split!r}, expected letters, digits and underscores")
        if self.class_names is not None and not layouts.is_class_names(self.class_names):
            raise StoreError(f"class_names: got {self.class_names}, expected at least one string, each once")
        for name, kind in self.columns.items():
            if name in OWN_COLUMNS or not name.isidentifier() or kind not in ARROW_TYPES:
                raise StoreError(
                    f"columns: got {name!r}: {kind!r}, expected an identifier other than {', '.join(OWN_COLUMNS)} "
                    f"and one of the kinds {', '.join(ARROW_TYPES)}"
                )

    def _check_agreement(self, store: dict[str, Any]) -> None:
        given = {
            "grid": self.grid,
            "layout": self.layout,
            "codec": self.codec,
            "codebook": describe(self.books),
            "multi_label": self.multi_label,
        }
        stored = {
            "grid": store["grid"],
            "layout": store.get("layout"),
            "codec": store["codec"]["name"],
            "codebook": describe(layouts.read_books(self.path, store)),
            "multi_label": layouts.is_multi_label(store),
        }
        for key, value in (("class_names", self.class_names), ("tokenizer", self.tokenizer)):
            if value is not None:
                given[key], stored[key] = value, store[key]
        for key, value in given.items():
            if value != stored[key]:
                raise StoreError(f"{self.path}: its {key} is {stored[key]}, got {value}; choose another store")


def store_lock(path: Path) -> AbstractContextManager[None]:
    """Hold the lock of the store at `path` during a block; the file lies beside it, since it may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return locked(path.parent / f".{path.name}.lock")


def describe(books: Books) -> str:
    """Return the shapes and fingerprints of the tables of a codebook, short enough for a message."""
    tables = (f"{table.shape} {hashlib.sha256(table.tobytes()).hexdigest()[:12]}" for table in books.tables)
    return f"{'' if books.digits == 1 else books.combine + ' '}{', '.join(tables)}"


def check_inventory(inventory: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return an inventory as JSON values. Raises StoreError if it is too large for tokens.json."""
    text = json.dumps(inventory, allow_nan=False)
    if len(text) > layouts.MAX_INVENTORY_BYTES:
        raise StoreError(
            f"inventory: {len(text)} bytes of JSON, expected at most {layouts.MAX_INVENTORY_BYTES}; "
            "give counts instead of names"
        )
    return json.loads(text)
