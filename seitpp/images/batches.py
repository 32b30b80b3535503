"""Batches of images that are decoded by the workers of a data loader, with one size or a size for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seitpp.errors import escaped
from seitpp.images.annotated import AnnotatedSample, smallest_png
from seitpp.images.decode import RGB, Box, ImageError, Reading, Sample, Size, decode_image, image_size
from seitpp.images.sources import ImageSource
from seitpp.store.labels import Label
from seitpp.tensors import to_device


class Pixels(NamedTuple):
    """A batch of images: `indices` (B,) int64 in the source, `images` (B, C, H, W) uint8, and `labels`.

    Labels are classes (B,) int64, -1 where unknown; or, if images have several, (B, classes) uint8 with 1 for each
    class of an image, and a row of 255 where they are unknown.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Pixels":
        """Copy the batch to a device, without waiting for the copy if the memory is pinned."""
        return Pixels(*(to_device(tensor, device) for tensor in self))


# A function from the indices and the sizes (height, width) of images to the box to crop from each. A training
# loader passes the indices as a `MicroBatch`, which has the epoch.
Boxes = Callable[[list[int], list[tuple[int, int]]], list[Box]]


class ImageDataset(Dataset):
    """A torch dataset of the images of a source, read in whole batches and resized to `size` (height, width).

    With `boxes`, each image is first cropped to the box that this function returns for it; else `reading` says how
    it is fitted to the size.
    """

    def __init__(
        self, source: ImageSource, size: tuple[int, int], boxes: Boxes | None = None, *, reading: Reading = RGB
    ):
        self.source, self.size, self.boxes, self.reading = source, size, boxes, reading

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> Pixels:
        samples = [self.source.read(index) for index in indices]
        boxes = self.boxes(indices, list(map(image_size, samples))) if self.boxes else [None] * len(samples)
        images = [
            decode_image(sample, self.size, box, reading=self.reading)
            for sample, box in zip(samples, boxes, strict=True)
        ]
        labels = self._labels([sample.label for sample in samples])
        return Pixels(torch.tensor(indices), torch.from_numpy(np.stack(images)), labels)

    def _labels(self, labels: list[Label]) -> Tensor:
        if not self.source.labels.multi_label:
            return torch.tensor([-1 if label is None else label for label in labels], dtype=torch.int64)
        rows = torch.zeros(len(labels), len(self.source.class_names), dtype=torch.uint8)
        for row, classes in zip(rows, labels, strict=True):
            if classes is None:
                row.fill_(255)
            else:
                row[list(classes)] = 1
        return rows


def already_a_batch(batch: Any) -> Any:
    """Return the batch unchanged, as `collate_fn` of a loader whose dataset returns whole batches."""
    return batch


class ImageRecord(NamedTuple):
    """What the store keeps of an image besides its tokens, and the size of its annotation file in bytes.

    `file_name` is text of one line (`escaped`).
    """

    label: Label
    file_name: str
    source_bytes: int
    annotation: bytes = b""
    annotation_bytes: int = 0


class DecodedBatch(NamedTuple):
    """A batch of decoded images; `errors` has one message for each image that could not be read."""

    pixels: torch.Tensor  # uint8, all images one after another; a worker sends one tensor without a copy
    sizes: list[tuple[int, int]]  # (height, width)
    kept: list[ImageRecord]
    errors: list[str]


class DecodedImages(Dataset):
    """A torch dataset of decoded and resized images of a source; errors of images are returned, not raised.

    With `boxes`, each image is first cropped to the box that this function returns for it; else `reading` says how
    it is fitted to the size.
    """

    def __init__(self, source: ImageSource, size: Size, *, reading: Reading = RGB, boxes: Boxes | None = None):
        self.source, self.size, self.reading, self.boxes = source, size, reading, boxes

    def __getitems__(self, indices: list[int]) -> DecodedBatch:
        images, kept, errors = [], [], []
        for index in indices:
            try:
                sample = self.source.read(index)
                box = self.boxes([index], [image_size(sample)])[0] if self.boxes else None
                images.append(decode_image(sample, self.size, box, reading=self.reading))
            except ImageError as error:
                errors.append(str(error))
            else:
                kept.append(_record(sample))
        pixels = np.concatenate([np.empty(0, np.uint8), *(image.ravel() for image in images)])
        return DecodedBatch(torch.from_numpy(pixels), [image.shape[1:] for image in images], kept, errors)


def _record(sample: Sample | AnnotatedSample) -> ImageRecord:
    """Return the record of a sample, with its annotation as the smallest PNG."""
    record = ImageRecord(sample.label, escaped(sample.name), len(sample.data))
    if isinstance(sample, AnnotatedSample):
        return record._replace(annotation=smallest_png(sample.annotation), annotation_bytes=sample.mask_bytes)
    return record
