"""The properties common to all images of a split, checked and compared with the target store."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Features, List, Value
from jaxtyping import Float, Float32, Int32, Integer

from seitpp import codec as codecs
from seitpp.files import locked
from seitpp.store import layout
from seitpp.store.layout import StoreError
from seitpp.store.shards import ARROW_TYPES

# Upper limits of a shard: a process writes one at a time and loses at most this one when it is killed.
SHARD_TOKENS = 2**22
SHARD_IMAGES = 2**12

OWN_COLUMNS = ("tokens", "label", "height", "width")


class SplitSpec:
    """The path of a split and the properties common to all its images.

    Attributes: path; split; codebook (K, D) float32; grid [H, W], or None if each image has its own; codec, its
    name; class_names (list or None); tokenizer (dict or None); columns {name: kind}; new_ids, None or (staged K,)
    int32: if codes were removed after staging, the new id of each staged one, -1 for a removed code; multi_label,
    whether images have lists of classes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codebook: Float[np.ndarray, "codes dim"],
        grid: tuple[int, int] | None,
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
        self.codebook = np.asarray(codebook, dtype=np.float32)
        self.grid = None if grid is None else list(map(int, grid))
        self.codec = codec
        self.class_names = None if class_names is None else list(class_names)
        # Converted to JSON and back, so that it equals what a later split reads.
        self.tokenizer = json.loads(json.dumps(tokenizer, allow_nan=False))
        self.columns = dict(columns or {})
        self.multi_label = multi_label
        self.new_ids: Int32[np.ndarray, " codes"] | None = None
        self._check()

    @property
    def shard_images(self) -> int:
        """The number of images in every shard but the last; it does not depend on the number of processes."""
        if self.grid is None:
            return SHARD_IMAGES
        return min(SHARD_IMAGES, max(1, SHARD_TOKENS // (self.grid[0] * self.grid[1])))

    def keep(self, codes: Integer[np.ndarray, " kept"], tokenizer: Mapping[str, Any] | None) -> "SplitSpec":
        """Return the spec of the same staged images with only the codes with ids `codes`, in this order."""
        kept = copy(self)
        kept.codebook, kept.tokenizer = self.codebook[codes], json.loads(json.dumps(tokenizer, allow_nan=False))
        kept.new_ids = np.full(len(self.codebook), -1, np.int32)  # every codec refuses -1
        kept.new_ids[codes] = np.arange(len(codes))
        return kept

    def features(self) -> Features:
        """Return the columns of a shard as features of the `datasets` library."""
        one = ClassLabel(names=self.class_names) if self.class_names else Value("int64")
        label = List(one) if self.multi_label else one
        sides = {} if self.grid else {"height": Value("int32"), "width": Value("int32")}
        others = {name: Value(kind) for name, kind in self.columns.items()}
        return Features({"tokens": Value("binary"), "label": label, **sides, **others})

    def identity(self) -> dict[str, Any]:
        """Return what must be equal when an interrupted split is continued, as JSON values."""
        return {
            "grid": self.grid,
            "codec": self.codec,
            "codebook": describe(self.codebook),
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
        if not (self.path / layout.DOCUMENT).exists():
            raise StoreError(f"{self.path}: not empty and no token store; choose another folder")
        store = layout.read_document(self.path)
        if self.split in store["splits"]:
            raise StoreError(
                f"{self.path}: has a split {self.split!r} already; nothing is overwritten, choose another"
            )
        if len(store["splits"]) >= layout.MAX_SPLITS:
            raise StoreError(
                f"{self.path}: has {layout.MAX_SPLITS} splits already; write the others into another store"
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
        codebook = self.codebook
        if codebook.ndim != 2 or not np.isfinite(codebook).all():
            raise StoreError(f"codebook: got shape {codebook.shape}, expected (codes, dimension), all finite")
        if not (1 <= len(codebook) <= codecs.MAX_CODES and 1 <= codebook.shape[1] <= layout.MAX_CODE_DIM):
            raise StoreError(
                f"codebook: got shape {codebook.shape}, expected 1 .. {codecs.MAX_CODES} codes "
                f"of dimension 1 .. {layout.MAX_CODE_DIM}"
            )
        if codebook.size > layout.MAX_CODEBOOK_NUMBERS:
            raise StoreError(
                f"codebook: got {codebook.size} numbers, expected at most {layout.MAX_CODEBOOK_NUMBERS}; "
                "take fewer or shorter codes"
            )
        if self.grid is not None and not layout.is_grid(self.grid):
            raise StoreError(f"grid: got {self.grid}, expected (height, width), 1 .. {codecs.MAX_TOKENS} tokens")
        if self.codec not in codecs.CODECS:
            raise StoreError(f"codec: got {self.codec!r}, expected one of {', '.join(codecs.CODECS)}")
        if self.codec == codecs.ContextCodec.name and self.grid is None:
            raise StoreError(
                f"codec {self.codec!r}: got no grid, expected one grid for all images; take another codec"
            )
        if not layout.SPLIT_NAME.fullmatch(self.split):
            raise StoreError(f"split: got {self.split!r}, expected letters, digits and underscores")
        if self.class_names is not None and not layout.is_class_names(self.class_names):
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
            "codec": self.codec,
            "codebook": describe(self.codebook),
            "multi_label": self.multi_label,
        }
        stored = {
            "grid": store["grid"],
            "codec": store["codec"]["name"],
            "codebook": describe(layout.read_codebook(self.path, store)),
            "multi_label": layout.is_multi_label(store),
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


def describe(codebook: Float32[np.ndarray, "codes dim"]) -> str:
    """Return the shape and fingerprint of a codebook, short enough for a message."""
    return f"{codebook.shape} {hashlib.sha256(codebook.tobytes()).hexdigest()[:12]}"


def check_inventory(inventory: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return an inventory as JSON values. Raises StoreError if it is too large for tokens.json."""
    text = json.dumps(inventory, allow_nan=False)
    if len(text) > layout.MAX_INVENTORY_BYTES:
        raise StoreError(
            f"inventory: {len(text)} bytes of JSON, expected at most {layout.MAX_INVENTORY_BYTES}; "
            "give counts instead of names"
        )
    return json.loads(text)
