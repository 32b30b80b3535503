"""Evaluation of a segmenter on whole images, one at a time."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from downstream.segmentation.data import WholeImage
from downstream.segmentation.metric import SegmentationScore
from seitpp.codebook import nearest
from seitpp.data.dataset import evaluation_loader
from seitpp.engine.waiting import progress


def stride_of(window: int, stride: int | None) -> int:
    """Return the stride of sliding windows in tokens; by default two thirds of `window` (published: 43 of 64)."""
    return stride or round(window * 2 / 3)


@torch.no_grad()
def count_pixels(
    predict: Callable[[WholeImage], Tensor],
    dataset: Dataset,
    class_names: list[str],
    *,
    accelerator: Accelerator,
    workers: int = 0,
) -> SegmentationScore:
    """Compute the score of a whole dataset of WholeImage; every process returns the same score.

    The images are distributed over the processes and each is counted exactly once. `predict` returns the classes
    (1, h, w) of an image's pixels at the size of its labels. Only the pixel counts are kept, so memory does not
    grow with the number of images.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    score = SegmentationScore(class_names)
    loader = evaluation_loader(dataset, 1, rank=rank, ranks=ranks, workers=workers)
    for image in progress(loader, "evaluating", "image"):
        image = image.to(accelerator.device)
        with accelerator.autocast():
            score.add(predict(image), image.labels)
    score.reduce(accelerator, len(dataset))
    return score


def mirror_whole(
    mirror: Callable[[Tensor, Tensor, Tensor], Tensor], *, codebook: Tensor, window: int, lookup: str
) -> Callable[[Tensor], Tensor]:
    """Return a function that mirrors whole maps (B, D, h, w), given one that mirrors boxes; for `view_scores`.

    `mirror`, a TokenAdaptMirror, takes ids, boxes and grids and returns maps of window x window tokens. `lookup`
    is that of the tokenizer, see `nearest`. The image is mirrored window by window, and the part of a window
    outside the image is cut off.
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
