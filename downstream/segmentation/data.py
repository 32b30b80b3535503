"""From a store with label maps to batches of tokens and labels, image by image of its own size."""

import io
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from seitpp.errors import UserError
from seitpp.store import TokenStore

COLUMN = "annotation"  # the bytes of a PNG: 0 is ignored, v is class v - 1 (ADE20K's convention)
IGNORED = 255


class AnnotationError(UserError):
    """A store without label maps, or a label map that cannot be read or has a class without a name."""


class Segmented(NamedTuple):
    """Some images of a store and the classes of their pixels, p pixels a token side.

    `indices` (B,) int64 in the split; `ids` (B, H, W) uint16, 0 below and to the right of a smaller grid; `grids`
    (B, 2) int64, height and width of each image's own; `labels` (B, p H, p W) uint8, the class, or 255 where a
    pixel is ignored or outside its image.
    """

    indices: Tensor
    ids: Tensor
    grids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Segmented":
        """The same batch on another device; the copy does not wait for it."""
        return Segmented(*(tensor.to(device, non_blocking=True) for tensor in self))


class SegmentedTokens(Dataset):
    """A store with label maps as a torch dataset that is asked for whole batches.

    `patch` is the number of pixels p along one side of a token. A label map of another size than p times the grid
    is resized by nearest. Raises AnnotationError if the store has no column `annotation` of bytes, or no names of
    classes.
    """

    def __init__(self, store: TokenStore, patch: int):
        if store.columns.get(COLUMN) != "binary":
            names = ", ".join(f"{name} ({kind})" for name, kind in store.columns.items()) or "none"
            raise AnnotationError(
                f"{store.path}: split {store.split!r} has no label maps: expected a binary column {COLUMN!r}, got "
                f"the columns {names}; tokenize images that have annotations"
            )
        if store.class_names is None:
            raise AnnotationError(
                f"{store.path}: no class names, expected one for each class of the label maps; write the store "
                "with them"
            )
        self.store, self.patch = store, patch
        self._annotations = store.column(COLUMN)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker opens the store again: the column would take every byte along.
        return SegmentedTokens, (self.store, self.patch)

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> Segmented:
        """Images of any sizes as one batch. Raises AnnotationError naming an image whose label map is bad."""
        grids = self.store.grids[indices]
        height, width = grids.max(axis=0).tolist()
        ids = np.zeros((len(indices), height, width), np.uint16)
        labels = np.full((len(indices), self.patch * height, self.patch * width), IGNORED, np.uint8)
        for row, (index, (h, w)) in enumerate(zip(indices, grids.tolist(), strict=True)):
            ids[row, :h, :w] = self.store[index][0]
            size = self.patch * h, self.patch * w
            labels[row, : size[0], : size[1]] = self._labels(index, size)
        return Segmented(*map(torch.from_numpy, (np.asarray(indices, dtype=np.int64), ids, grids, labels)))

    def annotation(self, index: int) -> np.ndarray:
        """The label map of image `index` at its own size: (h, w) uint8, 255 where a pixel is ignored.

        Raises AnnotationError if it is bad.
        """
        return self._labels(index, None)

    def _labels(self, index: int, size: tuple[int, int] | None) -> np.ndarray:
        """The label map at `size` (height, width), by nearest, or at its own."""
        where = f"{self.store.path}: split {self.store.split!r}, the annotation of image {index}"
        try:
            with Image.open(io.BytesIO(self._annotations[index])) as image:
                values = np.asarray(image if size is None else image.resize(size[::-1], Image.Resampling.NEAREST))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise AnnotationError(f"{where} cannot be read ({error}); write the store again") from error
        if values.ndim != 2 or values.dtype != np.uint8:
            raise AnnotationError(
                f"{where} has {values.shape} values of {values.dtype}, expected (height, width) of 8 bits: a gray "
                "or palette PNG"
            )
        classes = len(self.store.class_names)
        if values.max() > classes:
            raise AnnotationError(
                f"{where} has the value {values.max()}, expected 0 (ignored) to {classes}, one for each class name"
            )
        return values - np.uint8(1)  # 0 becomes 255
