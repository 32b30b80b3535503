"""The box of an image that the loader decodes, for models on pixels: a random resized crop, or the center."""

from dataclasses import dataclass

import torch

from seitpp.augment.keyed import Keys
from seitpp.augment.maps import random_resized_boxes
from seitpp.data.dataset import MicroBatch
from seitpp.images.decode import Box

CENTER = 7 / 8  # of the short side: 224 of 256 pixels, the usual evaluation of ImageNet


@dataclass(frozen=True)
class RandomBoxes:
    """The boxes of a random resized crop; they depend on seed, epoch and image index, not on the process.

    `scale` is the range of the crop's area as a fraction of the image.
    """

    seed: int
    scale: tuple[float, float] = (0.08, 1.0)

    def __call__(self, batch: MicroBatch, sizes: list[tuple[int, int]]) -> list[Box]:
        """Return a box (top, left, height, width) for each image, `sizes` (height, width); all in pixels."""
        keys = Keys(self.seed, batch.epoch, torch.tensor(batch))
        return random_resized_boxes(keys, torch.tensor(sizes), self.scale).tolist()


@dataclass(frozen=True)
class CentralBoxes:
    """The box at the center of each image, to be resized to `size` x `size` pixels.

    It is the part of the image that remains if its short side is resized to 8/7 of `size`, with the same aspect
    ratio, and the central `size` x `size` pixels are cropped; both rounded as in torchvision's Resize and
    CenterCrop.
    """

    size: int

    def __call__(self, indices: list[int], sizes: list[tuple[int, int]]) -> list[Box]:
        """Return a box (top, left, height, width) for each image, `sizes` (height, width); all in pixels."""
        return [self._box(*size) for size in sizes]

    def _box(self, height: int, width: int) -> Box:
        short = int(self.size / CENTER)
        rows, columns = (int(short * side / min(height, width)) for side in (height, width))
        top, left = round((rows - self.size) / 2), round((columns - self.size) / 2)
        down, across = height / rows, width / columns
        return top * down, left * across, self.size * down, self.size * across
