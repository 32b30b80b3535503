"""Some images of a split, used as a split of their own, and the images that are held out for validation."""

from collections.abc import Iterable, Sequence
from functools import cached_property, partial

import numpy as np

from seitpp.errors import UserError
from seitpp.store import TokenStore

HELD_OUT = 20  # every 20th image is held out: the last ones of a sorted set would all be of one class
KNOWN = 1024  # images whose lists of classes are looked at together

# What all images of a store have in common.
SHARED = (
    *("path", "splits", "grid", "layout", "num_codes", "books", "digit_counts", "codec", "class_names"),
    "num_classes",
    *("multi_label", "tokenizer", "inventory", "fingerprint"),
)


class Selection(TokenStore):
    """Some images of an open `store`, in the order of `indices` (n,) int64, as a store that copies nothing.

    `split` is the name under which they are used, and `rule` says in words how they were chosen. `fingerprint` and
    `counts` are those of the whole store. The additional columns of the store are not offered.
    """

    def __init__(self, store: TokenStore, indices: np.ndarray, *, split: str, rule: str) -> None:
        self._store, self._indices, self.split, self.rule = store, indices, split, rule
        for name in SHARED:
            setattr(self, name, getattr(store, name))
        self.columns = {}
        self.payload_bytes = int(store.payload_sizes[indices].sum())
        self.num_labeled = self._count_labeled()

    def __reduce__(self):
        return partial(Selection, self._store, self._indices, split=self.split, rule=self.rule), ()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int):
        """Return the ids and the label of image `index` of the selection, as TokenStore does."""
        return self._store[int(self._indices[range(len(self))[index]])]

    def ids(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the ids of images of the selection, as TokenStore does."""
        return self._store.ids(self._positions(indices))

    @cached_property
    def labels(self) -> np.ndarray:
        """The classes of the images of the selection, as those of TokenStore."""
        return self._store.labels[self._indices]

    def labels_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the classes of images of the selection, as TokenStore does."""
        return self._store.labels_of(self._positions(indices))

    def multi_hot(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return rows of 0 and 1 for images of the selection, as TokenStore does."""
        return self._store.multi_hot(self._positions(indices))

    @property
    def shard_rows(self) -> np.ndarray:
        """How many images of the selection lie in each shard of the store."""
        return np.diff(np.searchsorted(self._indices, np.cumsum(self._store.shard_rows)), prepend=0)

    @property
    def payload_sizes(self) -> np.ndarray:
        """The number of bytes of each image's encoded ids."""
        return self._store.payload_sizes[self._indices]

    @cached_property
    def grids(self) -> np.ndarray:
        """The height and width of each image in tokens."""
        return self._store.grids[self._indices]

    def verify(self) -> None:
        """Compare and decode the whole store, as TokenStore does."""
        self._store.verify()

    @property
    def is_remote(self) -> bool:
        """Whether the store is in a bucket."""
        return self._store.is_remote

    def prefetch(self, shards: Iterable[int]) -> None:
        """Copy shards of a store in a bucket in the background."""
        self._store.prefetch(shards)

    def _positions(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._indices[np.asarray(indices, np.int64)]

    def _count_labeled(self) -> int:
        if self._store.num_labeled == len(self._store):
            return len(self)
        if not self.multi_label:
            return int((self.labels >= 0).sum())
        parts = np.split(np.arange(len(self)), range(KNOWN, len(self), KNOWN))
        return sum(int((self.multi_hot(part) < 2).any(axis=1).sum()) for part in parts)


def set_aside(store: TokenStore, every: int = HELD_OUT) -> tuple[Selection, Selection]:
    """Split a store into (the other images, every `every`-th image), by position.

    They are called "train" and "validation". Raises UserError if the store has fewer than `every` images.
    """
    if len(store) < every:
        raise UserError(
            f"{store.path}: {len(store)} images and no split 'validation': expected at least {every} images, of "
            f"which every {every}th is held out, or a split 'validation' (tokenize_images --split validation)"
        )
    chosen = np.arange(every - 1, len(store), every)
    others = np.setdiff1d(np.arange(len(store)), chosen)
    rule = f"{store.path.name} has no split 'validation': every {every}th image of its split 'train' is held out"
    return tuple(
        Selection(store, indices, split=split, rule=f"{rule}, {len(chosen):,} of {len(store):,}")
        for split, indices in (("train", others), ("validation", chosen))
    )
