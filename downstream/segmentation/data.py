"""Datasets of images with label maps: batches of tokens for training, whole images for evaluation."""

import io
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from seitpp.errors import UserError
from seitpp.images.annotated import AnnotatedSource, decode_annotation
from seitpp.images.decode import Size, decode_image
from seitpp.store import TokenStore
from seitpp.tensors import to_device

ANNOTATION = "annotation"  # column of a store: the bytes of a PNG; 0 is ignored, v is class v - 1 (as in ADE20K)
IGNORED = 255  # label of pixels that neither the loss nor the metric counts


class AnnotationError(UserError):
    """Raised for a store without label maps, and for a label map that is unreadable or has an unnamed class."""


class Segmented(NamedTuple):
    """A batch of images from a store with the class of every pixel, at p x p pixels per token.

    `indices` (B,) int64 are positions in the split. `ids` (B, H, W) uint16 are token ids, padded with 0 below and
    to the right of images smaller than the largest one. `grids` (B, 2) int64 hold the height and width of each
    image in tokens. `labels` (B, p H, p W) uint8 hold classes, and 255 for ignored pixels and padding.
    """

    indices: Tensor
    ids: Tensor
    grids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Segmented":
        """Return the batch on `device`; the copy is asynchronous."""
        return Segmented(*(to_device(tensor, device) for tensor in self))


class SegmentedTokens(Dataset):
    """A torch dataset over a store with label maps; it loads whole batches through `__getitems__`.

    `pixels_per_token` is the number p of pixels along one side of a token. Label maps whose size is not p times
    the token grid are resized with nearest-neighbor interpolation. Raises AnnotationError if the store has no
    binary column `annotation`, or fewer than two classes with names.
    """

    def __init__(self, store: TokenStore, pixels_per_token: int):
        if store.columns.get(ANNOTATION) != "binary":
            names = ", ".join(f"{name} ({kind})" for name, kind in store.columns.items()) or "none"
            raise AnnotationError(
                f"{store.path}: split {store.split!r} has no label maps: expected a binary column {ANNOTATION!r}, "
                f"got the columns {names}; tokenize images that have annotations"
            )
        if store.class_names is None:
            raise AnnotationError(
                f"{store.path}: no class names, expected one for each class of the label maps; write the store "
                "with them"
            )
        if len(store.class_names) < 2:
            raise AnnotationError(
                f"{store.path}: the class {store.class_names[0]!r} alone, expected 2 or more: any prediction "
                "would be right; write it again, with --background-class if 0 is the background in its masks"
            )
        self.store, self.pixels_per_token = store, pixels_per_token
        self._annotations = store.column(ANNOTATION)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process opens the store again; pickling the column would copy all of its bytes.
        return SegmentedTokens, (self.store, self.pixels_per_token)

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> Segmented:
        """Load images of any sizes as one batch. Raises AnnotationError naming an image with a bad label map."""
        grids = self.store.grids[indices]
        height, width = grids.max(axis=0).tolist()
        p = self.pixels_per_token
        ids = np.zeros((len(indices), height, width), np.uint16)
        labels = np.full((len(indices), p * height, p * width), IGNORED, np.uint8)
        for row, (index, (h, w)) in enumerate(zip(indices, grids.tolist(), strict=True)):
            ids[row, :h, :w] = self.store[index][0]
            labels[row, : p * h, : p * w] = self._labels(index, (p * h, p * w))
        return Segmented(*map(torch.from_numpy, (np.asarray(indices, dtype=np.int64), ids, grids, labels)))

    def annotation(self, index: int) -> np.ndarray:
        """Return the label map of image `index` at its own size: (h, w) uint8, 255 where a pixel is ignored.

        Raises AnnotationError if the label map is bad.
        """
        return self._labels(index, None)

    def _labels(self, index: int, size: tuple[int, int] | None) -> np.ndarray:
        """Return the label map resized to `size` (height, width), or at its own size if `size` is None."""
        where = f"{self.store.path}: split {self.store.split!r}, the annotation of image {index}"
        try:
            with Image.open(io.BytesIO(self._annotations[index])) as image:
                values = np.asarray(image if size is None else image.resize(size[::-1], Image.Resampling.NEAREST))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise AnnotationError(f"{where} cannot be read ({error}); write the store again") from error
        if values.ndim != 2 or values.dtype != np.uint8:
            raise AnnotationError(
                f"{where} has {values.shape} values of {values.dtype}, expected (height, width) of 8 bits: write "
                "the store again with a gray or palette PNG"
            )
        classes = len(self.store.class_names)
        if values.max() > classes:
            raise AnnotationError(
                f"{where} has the value {values.max()}, expected 0 (ignored) to {classes}, one for each class "
                "name: write the store again with all class names"
            )
        return _labels_of(values)


class WholeImage(NamedTuple):
    """One image with its labels at full size.

    `inputs` are token ids (1, H, W) uint16 or pixels (1, 3, h, w) uint8. `labels` (1, h, w) uint8 have the size of
    the annotation, and 255 where a pixel is ignored.
    """

    inputs: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "WholeImage":
        """Return the image on `device`; the copy is asynchronous."""
        return WholeImage(*(to_device(tensor, device) for tensor in self))


class WholeTokens(Dataset):
    """The images of a store with label maps, loaded one at a time: `__getitems__` takes a list of one index."""

    def __init__(self, images: SegmentedTokens):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> WholeImage:
        (index,) = indices
        return _whole(self.images.store[index][0], self.images.annotation(index))


class WholePixels(Dataset):
    """Images with masks, resized to `size` and loaded one at a time like those of WholeTokens."""

    def __init__(self, source: AnnotatedSource, size: Size):
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> WholeImage:
        (index,) = indices
        sample = self.source.read(index)
        return _whole(decode_image(sample, self.size), decode_labels(sample.annotation, sample.name))


def decode_labels(annotation: bytes, name: str) -> np.ndarray:
    """Decode an annotation's PNG file to labels (h, w) uint8, 255 where a pixel is ignored.

    Raises ImageError naming the file `name` if it is not a PNG with one channel of classes.
    """
    return _labels_of(decode_annotation(annotation, name).astype(np.uint8))


def _labels_of(values: np.ndarray) -> np.ndarray:
    """Map the uint8 values of an annotation to labels: v becomes v - 1, and 0 wraps around to IGNORED."""
    return values - np.uint8(1)


def _whole(inputs: np.ndarray, labels: np.ndarray) -> WholeImage:
    return WholeImage(*(torch.from_numpy(array).unsqueeze(0) for array in (inputs, labels)))
