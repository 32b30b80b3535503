"""Batches of decoded images, made by a loader's workers: all of one size, or each of its own."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seitpp.images.annotated import AnnotatedSample, smallest_png
from seitpp.images.decode import Box, ImageError, Sample, Size, decode_image, image_size
from seitpp.images.sources import ImageSource


class Pixels(NamedTuple):
    """Decoded images: `indices` (B,) int64 in the source, `images` (B, 3, height, width) uint8, `labels` (B,)."""

    indices: Tensor
    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Pixels":
        """The same batch on another device; the copy does not wait for it."""
        return Pixels(*(tensor.to(device, non_blocking=True) for tensor in self))


# The part of each image that is seen, of its index and its (height, width); the indices of a training loader are a
# `MicroBatch`, which knows the epoch.
Boxes = Callable[[list[int], list[tuple[int, int]]], list[Box]]


class ImageDataset(Dataset):
    """A source as a torch dataset that makes whole batches, every image resized to `size` (height, width).

    Of each image only the part that `boxes` names is resized, or all of it where there are none.
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
    """What is kept of an image beside its tokens, and the bytes of its annotation's file."""

    label: int
    file_name: str
    source_bytes: int
    annotation: bytes = b""
    annotation_bytes: int = 0


class DecodedBatch(NamedTuple):
    """A batch of readable images; `errors` says which were not readable."""

    pixels: torch.Tensor  # uint8, image after image; one tensor, which a worker hands over without a copy
    sizes: list[tuple[int, int]]  # (height, width)
    kept: list[ImageRecord]
    errors: list[str]


class DecodedImages(Dataset):
    """Images of a source, decoded and resized; an unreadable one is reported, not raised, by a worker."""

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
                kept.append(_keep(sample))
        pixels = np.concatenate([np.empty(0, np.uint8), *(image.ravel() for image in images)])
        return DecodedBatch(torch.from_numpy(pixels), [image.shape[1:] for image in images], kept, errors)


def _keep(sample: Sample | AnnotatedSample) -> ImageRecord:
    """What the store keeps of a sample, its annotation as small as it can be."""
    kept = ImageRecord(sample.label, sample.name, len(sample.data))
    if isinstance(sample, AnnotatedSample):
        return kept._replace(annotation=smallest_png(sample.annotation), annotation_bytes=len(sample.annotation))
    return kept
