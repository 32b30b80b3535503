"""The box of an image that the loader decodes, for models on pixels: a random resized crop, or the center."""

from dataclasses import dataclass

import torch

from seitpp.augment.keyed import Keys
from seitpp.augment.maps import crop_ratio, random_resized_boxes
from seitpp.data.dataset import MicroBatch
from seitpp.images.decode import Box

CENTER = 7 / 8  # of the short side: 224 of 256 pixels, the usual evaluation of ImageNet


@dataclass(frozen=True)
class RandomBoxes:
    """The boxes of a random resized crop; they depend on seed, epoch and image index, not on the process.

    `size` is the height and width to which a crop is resized, `scale` the range of its area as a fraction of the
    image.
    """

    seed: int
    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)

    def __call__(self, batch: MicroBatch, sizes: list[tuple[int, int]]) -> list[Box]:
        """Return a box (top, left, height, width) for each image, `sizes` (height, width); all in pixels."""
        keys = Keys(self.seed, batch.epoch, torch.tensor(batch))
        return random_resized_boxes(keys, torch.tensor(sizes), self.scale, ratio=crop_ratio(self.size)).tolist()


@dataclass(frozen=True)
class CentralBoxes:
    """The box at the center of each image, to be resized to `size` (height, width) in pixels.

    It is the part of the image that remains if it is resized, with the same aspect ratio, until it just covers 8/7
    of `size` (for a square: its short side is 8/7 of the side), and the central `size` pixels are cropped; both
    rounded as in torchvision's Resize and CenterCrop.
    """

    size: tuple[int, int]

    def __call__(self, indices: list[int], sizes: list[tuple[int, int]]) -> list[Box]:
        """Return a box (top, left, height, width) for each image, `sizes` (height, width); all in pixels."""
        return [self._box(*size) for size in sizes]

    def _box(self, height: int, width: int) -> Box:
        covered = [int(side / CENTER) for side in self.size]
        if height * covered[1] <= width * covered[0]:  # the height decides
            rows, columns = covered[0], int(covered[0] * width / height)
        else:
            rows, columns = int(covered[1] * height / width), covered[1]
        top, left = round((rows - self.size[0]) / 2), round((columns - self.size[1]) / 2)
        down, across = height / rows, width / columns
        return top * down, left * across, self.size[0] * down, self.size[1] * across
