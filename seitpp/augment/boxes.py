"""Which part of an image its loader decodes, for models of pixels: a random resized crop, or the center."""

from dataclasses import dataclass

import torch

from seitpp.augment.keyed import Keys
from seitpp.augment.maps import random_resized_boxes
from seitpp.data.dataset import MicroBatch
from seitpp.images.decode import Box

CENTER = 7 / 8  # of the short side: 224 of 256 pixels, as ImageNet is evaluated


@dataclass(frozen=True)
class RandomBoxes:
    """The boxes of a random resized crop, drawn by seed, epoch and index, whatever process reads the image.

    `scale` is the range of the crop's fraction of the image.
    """

    seed: int
    scale: tuple[float, float] = (0.08, 1.0)

    def __call__(self, batch: MicroBatch, sizes: list[tuple[int, int]]) -> list[Box]:
        """Boxes (top, left, height, width) of images of `sizes` (height, width), in pixels."""
        keys = Keys(self.seed, batch.epoch, torch.tensor(batch))
        return random_resized_boxes(keys, torch.tensor(sizes), self.scale).tolist()


@dataclass(frozen=True)
class CentralBoxes:
    """The center of each image, of which `size` x `size` pixels are made.

    What is left of the image if its short side is resized to 8/7 of `size`, its aspect ratio kept, and the central
    `size` x `size` pixels are cut out, both rounded as torchvision's Resize and CenterCrop do.
    """

    size: int

    def __call__(self, indices: list[int], sizes: list[tuple[int, int]]) -> list[Box]:
        """Boxes (top, left, height, width) of images of `sizes` (height, width), in pixels."""
        return [self._box(*size) for size in sizes]

    def _box(self, height: int, width: int) -> Box:
        short = int(self.size / CENTER)
        rows, columns = (int(short * side / min(height, width)) for side in (height, width))
        top, left = round((rows - self.size) / 2), round((columns - self.size) / 2)
        down, across = height / rows, width / columns
        return top * down, left * across, self.size * down, self.size * across
