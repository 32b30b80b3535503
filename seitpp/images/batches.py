"""Batches of images that are decoded by the workers of a data loader, with one size or a size for each."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seitpp.images.annotated import AnnotatedSample, smallest_png
from seitpp.images.decode import Box, ImageError, Sample, Size, decode_image, image_size
from seitpp.images.sources import ImageSource
from seitpp.tensors import to_device


class Pixels(NamedTuple):
    """A batch of images: `indices` (B,) int64 in the source, `images` (B, 3, H, W) uint8, `labels` (B,) int64."""

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

    With `boxes`, each image is first cropped to the box that this function returns for it.
    """

    def __init__(self, source: ImageSource, size: tuple[int, int], boxes: Boxes | None = None):
        self.source, self.size, self.boxes = source, size, boxes

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> Pixels:
        samples = [self.source.read(index) for index in indices]
        boxes = self.boxes(indices, list(map(image_size, samples))) if self.boxes else [None] * len(samples)
        images = [decode_image(sample, self.size, box) for sample, box in zip(samples, boxes, strict=True)]
        labels = torch.tensor([sample.label for sample in samples])
        return Pixels(torch.tensor(indices), torch.from_numpy(np.stack(images)), labels)


class ImageRecord(NamedTuple):
    """What the store keeps of an image besides its tokens, and the size of its annotation file in bytes."""

    label: int
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
    """A torch dataset of decoded and resized images of a source; errors of images are returned, not raised."""

    def __init__(self, source: ImageSource, size: Size):
        self.source, self.size = source, size

    def __getitems__(self, indices: list[int]) -> DecodedBatch:
        images, kept, errors = [], [], []
        for index in indices:
            try:
                sample = self.source.read(index)
                images.append(decode_image(sample, self.size))
            except ImageError as error:
                errors.append(str(error))
            else:
                kept.append(_record(sample))
        pixels = np.concatenate([np.empty(0, np.uint8), *(image.ravel() for image in images)])
        return DecodedBatch(torch.from_numpy(pixels), [image.shape[1:] for image in images], kept, errors)


def _record(sample: Sample | AnnotatedSample) -> ImageRecord:
    """Return the record of a sample, with its annotation as the smallest PNG."""
    record = ImageRecord(sample.label, sample.name, len(sample.data))
    if isinstance(sample, AnnotatedSample):
        return record._replace(annotation=smallest_png(sample.annotation), annotation_bytes=len(sample.annotation))
    return record
