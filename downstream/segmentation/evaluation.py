"""Whole images with their label maps, one at a time, and the count of what a segmenter makes of them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from downstream.segmentation.data import SegmentedTokens
from downstream.segmentation.metric import SegmentationScore
from seitpp.codebook import nearest
from seitpp.data.dataset import evaluation_loader
from seitpp.images.annotated import AnnotatedSource, decode_annotation
from seitpp.images.decode import Size, decode_image


class WholeImage(NamedTuple):
    """One image: `inputs`, ids (1, H, W) uint16 or pixels (1, 3, h, w) uint8, and `labels` (1, h, w) uint8 at the
    size of its own annotation, 255 where a pixel is ignored."""

    inputs: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "WholeImage":
        """The same image on another device; the copy does not wait for it."""
        return WholeImage(*(tensor.to(device, non_blocking=True) for tensor in self))


class WholeTokens(Dataset):
    """The images of a store with label maps, one at a time: a batch is that of a list of one index."""

    def __init__(self, images: SegmentedTokens):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> WholeImage:
        (index,) = indices
        return _whole(self.images.store[index][0], self.images.annotation(index))


class WholePixels(Dataset):
    """The images of a folder in the layout of ADE-20k, resized to `size`, one at a time as in WholeTokens."""

    def __init__(self, source: AnnotatedSource, size: Size):
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> WholeImage:
        (index,) = indices
        sample = self.source.read(index)
        values = decode_annotation(sample.annotation, sample.name).astype(np.uint8)
        return _whole(decode_image(sample, self.size), values - np.uint8(1))


def _whole(inputs: np.ndarray, labels: np.ndarray) -> WholeImage:
    return WholeImage(*(torch.from_numpy(array).unsqueeze(0) for array in (inputs, labels)))


def stride_of(window: int, stride: int | None) -> int:
    """The stride of windows: where None is given two thirds of the window (published: 43 of 64 tokens)."""
    return stride or round(window * 2 / 3)


@torch.no_grad()
def count_pixels(
    predict: Callable[[WholeImage], Tensor],
    dataset: Dataset,
    class_names: list[str],
    accelerator: Accelerator,
    workers: int = 0,
) -> SegmentationScore:
    """The score of a whole dataset of WholeImage, on every process: each counts every n-th image, once.

    `predict` gives the classes (1, h, w) of an image's pixels at the size of its labels. Nothing of an image is
    kept but what it adds to the counts.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    score = SegmentationScore(class_names)
    for image in evaluation_loader(dataset, 1, rank=rank, ranks=ranks, workers=workers):
        image = image.to(accelerator.device)
        with accelerator.autocast():
            score.add(predict(image), image.labels)
    score.reduce(accelerator, len(dataset))
    return score


def mirror_whole(
    mirror: Callable[[Tensor, Tensor, Tensor], Tensor], codebook: Tensor, window: int, lookup: str
) -> Callable:
    """A mirror for `view_scores`, map (B, D, h, w) -> the map of the mirrored image, of one for boxes.

    `mirror`, a TokenAdaptMirror, takes ids, boxes and grids and gives maps of window x window tokens; `lookup` is
    the tokenizer's, as in `nearest`. The image is mirrored window by window; what a window holds beyond its edge
    is cut off.
    """

    def mirrored(maps: Tensor) -> Tensor:
        ids = nearest(maps, codebook, lookup)
        height, width = ids.shape[1:]
        grids = torch.tensor([height, width], device=ids.device).expand(len(ids), 2)
        rows = []
        for top in range(0, height, window):
            boxes = [torch.tensor([top, left, window, window]) for left in range(0, width, window)]
            tiles = [mirror(ids, box.to(ids.device).expand(len(ids), 4), grids) for box in boxes]
            rows.append(torch.cat(tiles[::-1], dim=3))
        return torch.cat(rows, dim=2)[:, :, :height, -width:]

    return mirrored
