"""Write a split from one process: images are staged shard by shard, and published when all of them are there."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seitpp.files import remove_folder
from seitpp.store.layout import StoreError
from seitpp.store.publish import build, place
from seitpp.store.samples import Columns, check_samples, no_samples
from seitpp.store.spec import SplitSpec
from seitpp.store.staging import staged_shards, write_staged


class StoreWriter:
    """Writes one split; nothing is visible before the with-block ends, and nothing remains if it fails.

    Into an existing store it adds a split, encoded with the table that the store has. For several processes, or
    to continue after an interruption, see SplitStaging; the bytes are the same.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codebook: np.ndarray,
        grid: tuple[int, int] | None,
        codec: str = "ans",
        split: str = "train",
        class_names: Sequence[str] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """path: folder of the store, new, empty, or a store without this split.

        codebook: (K, D) floats. grid: (height, width), or None where every image has its own.
        class_names: one distinct string a class. tokenizer: what made the ids, any mapping that JSON can hold,
        kept verbatim. columns: what else each image has, {name: "string", "binary" or "int64"}.
        Without class_names or tokenizer, those of an existing store are taken.
        Raises StoreError if these are out of bounds or do not agree with the existing store.
        """
        self._spec = SplitSpec(
            path,
            codebook=codebook,
            grid=grid,
            codec=codec,
            split=split,
            class_names=class_names,
            tokenizer=tokenizer,
            columns=columns,
        )
        self._spec.adopt(self._spec.existing())
        self.path = self._spec.path
        self._folder: Path | None = None
        self._shards = self._rows = 0
        self._waiting = no_samples(self._spec)

    def __enter__(self) -> "StoreWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}-", dir=self.path.parent))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self._waiting.ids:
                    self._stage(len(self._waiting.ids))
                store = build(self._spec, self._folder, list(staged_shards(self._folder).values()))
                place(self._spec, self._folder, store)
        finally:
            remove_folder(self._folder)

    def add(self, ids: np.ndarray, label: int, columns: Mapping[str, Any] | None = None) -> None:
        """Append one image. ids: (H, W) integers in 0 .. K - 1. columns: a value for each that was declared.

        Raises StoreError for anything else; the image is then not taken, and the with-block can go on.
        """
        others = {name: [value] for name, value in (columns or {}).items()}
        self.add_batch(np.asarray(ids)[None], np.asarray(label)[None], others)

    def add_batch(
        self,
        ids: np.ndarray | Sequence[np.ndarray],
        labels: np.ndarray | Sequence[int],
        columns: Columns | None = None,
    ) -> None:
        """Append N images. ids: (N, H, W) integers in 0 .. K - 1. labels: (N,) integers, each of a class.

        Where every image has its own grid, ids may also be N arrays (h, w). columns: N values for each that was
        declared. Raises StoreError for anything else; the batch is then not taken, and the with-block can go on.
        """
        if self._folder is None:
            raise StoreError('not open: use the writer as "with StoreWriter(...) as writer:"')
        images = check_samples(self._spec, ids, labels, columns, first=self._rows)
        self._rows += len(images.ids)
        self._waiting.extend(images)
        while len(self._waiting.ids) >= self._spec.shard_images:
            self._stage(self._spec.shard_images)

    def _stage(self, n: int) -> None:
        write_staged(self._spec, self._folder, self._shards, self._waiting.take(n))
        self._shards += 1
