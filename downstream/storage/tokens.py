"""Token stores of a training set, and the parts of pictures that such tokens are of."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from seitpp.augment import Keys
from seitpp.augment.maps import crop_ratio, random_resized_boxes
from seitpp.data.dataset import MicroBatch
from seitpp.files import new_folder
from seitpp.images.batches import DecodedImages
from seitpp.images.decode import Box, ImageError
from seitpp.images.sources import ImageSource
from seitpp.store import StoreWriter
from seitpp.tokenizers import Tokenizer
from seitpp.tokenizers.encoding import encode

BATCH = 64  # images that are tokenized at once


@dataclass(frozen=True)
class SameBoxes:
    """The random resized crops of tokens, of pictures: the same parts of an image, whatever its pixels.

    `grid` and `size` are height and width in tokens, of an image and of its crop; `scale` is the range of areas.
    """

    seed: int
    grid: tuple[int, int]
    size: tuple[int, int]
    scale: tuple[float, float]

    def __call__(self, batch: MicroBatch, sizes: list[tuple[int, int]]) -> list[Box]:
        """Return a box (top, left, height, width) for each image, `sizes` (height, width); all in pixels."""
        keys = Keys(self.seed, batch.epoch, batch.draws())
        boxes = random_resized_boxes(keys, self.grid, self.scale, ratio=crop_ratio(self.size))
        return in_pixels(boxes, self.grid, sizes)


@dataclass(frozen=True)
class CentralWindows:
    """The central window of tokens, of pictures: `size` of a `grid`, height and width in tokens."""

    grid: tuple[int, int]
    size: tuple[int, int]

    def __call__(self, indices: list[int], sizes: list[tuple[int, int]]) -> list[Box]:
        """Return a box (top, left, height, width) for each image, `sizes` (height, width); all in pixels."""
        corner = [(whole - part) // 2 for whole, part in zip(self.grid, self.size, strict=True)]
        return in_pixels(torch.tensor([[*corner, *self.size]] * len(sizes)), self.grid, sizes)


def in_pixels(boxes: Tensor, grid: tuple[int, int], sizes: list[tuple[int, int]]) -> list[Box]:
    """Return boxes (n, 4) in tokens of a grid as boxes in pixels of images of `sizes` (height, width)."""
    units = torch.tensor(sizes).double() / torch.tensor(grid)
    return [tuple(box) for box in (boxes * units.repeat(1, 2)).tolist()]


def tokenize(path: Path, source: ImageSource, *, tokenizer: Tokenizer, device: torch.device) -> None:
    """Write a new store of the images of a source; it is there when it is whole.

    Raises ImageError for an image that cannot be read.
    """
    images = DecodedImages(source, tokenizer.spec.image_size)
    facts = {"class_names": source.class_names, "tokenizer": tokenizer.description()}
    books = tokenizer.books.to_books()
    with new_folder(path) as made, StoreWriter(made, codebook=books, grid=tokenizer.spec.grid, **facts) as writer:
        for start in tqdm(range(0, len(source), BATCH), desc=path.name, unit="batch"):
            decoded = images.__getitems__(list(range(start, min(start + BATCH, len(source)))))
            if decoded.errors:
                raise ImageError(f"{decoded.errors[0]}; repair or remove it")
            labels = np.array([record.label for record in decoded.kept])
            writer.add_batch(np.stack(encode(tokenizer, decoded, device)), labels)
