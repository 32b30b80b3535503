"""Fit a small tokenizer to the images of a source, where no other tokenizer is named."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from seitpp.images.decode import ImageError, Reading, Sample, decode_image, image_size
from seitpp.images.sources import ImageSource
from seitpp.tokenizers.base import TokenizerError
from seitpp.tokenizers.patch_kmeans import PatchKMeans

SIZES = ((256, 8), (128, 8), (64, 4), (32, 2))  # side of the images and of a patch, in pixels
MOST_IMAGES = 1000

Made = TypeVar("Made")


def fit_to_source(source: ImageSource, *, reading: Reading, skip_errors: bool) -> PatchKMeans:
    """Fit a PatchKMeans to at most 1,000 evenly spaced images; their median short side decides on its image size.

    Raises ImageError for an unreadable image unless `skip_errors`, and TokenizerError if none can be read.
    """
    chosen = range(0, len(source), -(-len(source) // MOST_IMAGES))
    opened = tqdm(chosen, desc="sizes of images", unit="image", delay=2.0, disable=None)
    sides = [min(size) for size in _each(source, opened, image_size, skip_errors=skip_errors)]
    if not sides:
        raise TokenizerError(f"none of {len(chosen):,} images can be read to fit a tokenizer: check the images")
    median = np.median(sides)
    side, patch = next(size for size in SIZES if size[0] <= median or size == SIZES[-1])

    def decode(sample: Sample) -> Tensor:
        return torch.from_numpy(decode_image(sample, (side, side), reading=reading))[None]

    shown = tqdm(chosen, desc=f"fitting a tokenizer at {side} pixels", unit="image")
    return PatchKMeans.fit_to_images(
        _each(source, shown, decode, skip_errors=skip_errors), image_size=side, patch=patch
    )


def _each(
    source: ImageSource, indices: Iterable[int], make: Callable[[Sample], Made], *, skip_errors: bool
) -> Iterator[Made]:
    """Yield what `make` makes of each image, with `skip_errors` of each readable one; else raise ImageError."""
    for index in indices:
        try:
            yield make(source.read(index))
        except ImageError:
            if not skip_errors:
                raise
