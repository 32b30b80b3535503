"""Write a split with one process: images are staged shard by shard and published together at the end."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from seitpp.books import Books
from seitpp.files import remove_folder
from seitpp.store.labels import Label
from seitpp.store.layout import StoreError
from seitpp.store.publish import Content, build, place
from seitpp.store.samples import Columns, check_samples, no_samples
from seitpp.store.spec import SplitSpec, check_inventory
from seitpp.store.staging import staged_shards, write_staged


class StoreWriter:
    """A context manager that writes one split, published when the with-block ends and discarded if it fails.

    A split of an existing store is encoded with the code table of this store. For several processes, or to
    continue after an interruption, see SplitStaging, which writes the same bytes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codebook: Books | Float[np.ndarray, "codes dim"],
        grid: tuple[int, int] | None,
        layout: str | None = None,
        codec: str = "ans",
        split: str = "train",
        class_names: Sequence[str] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
        multi_label: bool = False,
        inventory: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare to write the split `split` into the folder `path`: new, empty, or a store without this split.

        codebook: finite, (K, D), or the books of tokens with several digits. grid: (height, width) in tokens, or
        None if every image has its own. layout: "sequence" for tokens without rows and columns, whose grid is
        (1, length). class_names: one
        distinct string per class. tokenizer: a description of the tokenizer, any mapping that JSON can represent,
        stored verbatim. columns: additional columns, {name: "string", "binary" or "int64"}. multi_label: whether
        an image has a tuple of classes instead of one. inventory: any mapping that JSON can represent, which says
        what was read and what was left out.
        If class_names or tokenizer are not given, those of an existing store are used.
        Raises StoreError for invalid arguments and for arguments that differ from the existing store.
        """
        self._spec = SplitSpec(
            path,
            codebook=codebook,
            grid=grid,
            layout=layout,
            codec=codec,
            split=split,
            class_names=class_names,
            tokenizer=tokenizer,
            columns=columns,
            multi_label=multi_label,
        )
        self._inventory = check_inventory(inventory)
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
                staged = list(staged_shards(self._folder).values())
                contents = [
                    Content([staged[shard] for shard in group]) for group in self._spec.groups(len(staged))
                ]
                with self._spec.locked():
                    store = build(self._spec, self._folder, contents, inventory=self._inventory)
                    place(self._spec, self._folder, store)
        finally:
            remove_folder(self._folder)

    def add(
        self,
        ids: Integer[np.ndarray, "*digits height width"],
        label: Label,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one image with ids in 0 .. K - 1, or digits of tokens, and one value for each declared column.

        `label` is a class; a tuple of classes if the split is multi-label; or None (also -1) if it is not known.
        Raises StoreError for invalid values; the image is then not added, and the with-block can continue.
        """
        batches = {name: [value] for name, value in (columns or {}).items()}
        one = not self._spec.multi_label and label is not None and not isinstance(label, tuple)
        labels = np.asarray(label)[None] if one else [label]
        self.add_batch(np.asarray(ids)[None], labels, batches)

    def add_batch(
        self,
        ids: Integer[np.ndarray, "images *digits height width"] | Sequence[Integer[np.ndarray, "..."]],
        labels: Integer[np.ndarray, " images"] | Sequence[Label],
        columns: Columns | None = None,
    ) -> None:
        """Append images with ids in 0 .. K - 1, one label each, and one value each for every declared column.

        Labels are those of `add`, or an array of classes with -1 where one is not known.
        If every image has its own grid, ids may be a sequence with one array per image. Raises StoreError for
        invalid values; the batch is then not added, and the with-block can continue.
        """
        if self._folder is None:
            raise StoreError('not open: use the writer as "with StoreWriter(...) as writer:"')
        samples = check_samples(self._spec, ids, labels, columns=columns, first=self._rows)
        self._rows += len(samples.ids)
        self._waiting.extend(samples)
        while len(self._waiting.ids) >= self._spec.shard_images:
            self._stage(self._spec.shard_images)

    def _stage(self, n: int) -> None:
        write_staged(self._spec, self._folder, shard=self._shards, samples=self._waiting.take(n))
        self._shards += 1
