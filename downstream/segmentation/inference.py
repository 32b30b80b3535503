"""From tokens to the class of every pixel: windows of tokens whose logits are averaged as pixels.

Published: windows of 64 tokens a stride of 43 apart, at 8 pixels a token those of 512 pixels 341 apart.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.segmentation.backbone import TokenViT
from downstream.segmentation.model import TokenSegmenter
from seitpp.codebook import embed

WINDOWS = 4  # that go through the network at once, or one of each image
CLASSES = 16  # whose logits are resized at once


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of `size` >= `window`: every `stride`, the last at the end."""
    steps = -(-(size - window) // stride)
    return [min(step * stride, size - window) for step in range(steps + 1)]


@torch.no_grad()
def slide_logits(model: TokenSegmenter, inputs: Tensor, window: int, stride: int, patch: int) -> Tensor:
    """The mean over all windows that see a pixel, of logits raised to pixels (bilinear): (B, classes, p H, p W).

    `model` is a segmenter in eval mode; `inputs` what its backbone takes: ids (B, H, W) or maps (B, D, H, W) of
    images of one size; `window` and `stride` count their cells, `patch` the pixels p along one side of a cell
    (for a backbone of pixels: 1). An image smaller than the window is continued by its border cells, and what
    lies outside it is cut off. Float32; the largest tensor is the one returned.
    """
    images, height, width = len(inputs), *inputs.shape[-2:]
    inputs = _continued(inputs, window)
    rows, columns = (window_starts(side, window, stride) for side in inputs.shape[-2:])
    size = [patch * side for side in inputs.shape[-2:]]
    total = torch.zeros(images, model.num_classes, *size, device=inputs.device)
    seen = torch.zeros(*size, device=inputs.device)
    places = list(product(rows, columns))
    together = max(1, WINDOWS // images)
    for first in range(0, len(places), together):
        chosen = places[first : first + together]
        windows = torch.cat([inputs[..., y : y + window, x : x + window] for y, x in chosen])
        parts = model(windows, mode="tensor").float().split(images)
        for (y, x), part in zip(chosen, parts, strict=True):
            y, x, side = patch * y, patch * x, patch * window
            total[..., y : y + side, x : x + side] += _resized(part, (side, side))
            seen[y : y + side, x : x + side] += 1
    return total.div_(seen)[..., : patch * height, : patch * width]


@torch.no_grad()
def view_scores(
    model: TokenSegmenter,
    ids: Tensor,
    codebook: Tensor,
    window: int,
    stride: int,
    patch: int,
    scales: Sequence[float] = (1.0,),
    mirror: Callable[[Tensor], Tensor] | None = None,
    lookup: str = "cosine",
) -> Tensor:
    """Probabilities, the mean over the views of an image (multi-scale and flip testing): (B, classes, p H, p W).

    `ids` (B, H, W) of any integer dtype, `codebook` (K, D). A scale other than 1 resizes the map bicubically to
    the nearest whole number of tokens. `mirror` gives the map (B, D, h, w) of the mirrored image for the map of
    an image; mirrored tokens are other tokens, which is what TokenAdapt knows, so without it nothing is flipped.
    `lookup` is the tokenizer's, as in `nearest`.
    The other arguments are those of `slide_logits`, which is all that a test on one scale needs.
    """
    size, total, views = (patch * ids.shape[-2], patch * ids.shape[-1]), 0, 0
    for inputs, mirrored in _views(model.backbone, ids, codebook, scales, mirror, lookup):
        logits = slide_logits(model, inputs, window, stride, patch)
        total += _resized(logits.flip(-1) if mirrored else logits, size).softmax(dim=1)
        views += 1
    return total.div_(views)


def predict_labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The likeliest class of every pixel of `size` (height, width): logits (B, classes, h, w) -> (B, *size) uint8.

    Logits, or probabilities, are resized (bilinear) a few classes at a time, so that a large annotation takes
    little memory.
    """
    best = labels = None
    for first, part in zip(range(0, logits.shape[1], CLASSES), logits.split(CLASSES, dim=1), strict=True):
        value, index = _resized(part, size).max(dim=1)
        if best is None:
            best, labels = value, index
        else:
            labels = torch.where(value > best, index + first, labels)
            best = torch.maximum(value, best)
    return labels.to(torch.uint8)


def _continued(inputs: Tensor, window: int) -> Tensor:
    """(..., H, W) with sides of at least `window`: below and to the right, the last row and column again."""
    for dim in (-2, -1):
        size = inputs.shape[dim]
        if size < window:
            inputs = inputs.index_select(dim, torch.arange(window, device=inputs.device).clamp(max=size - 1))
    return inputs


def _views(
    backbone: TokenViT,
    ids: Tensor,
    codebook: Tensor,
    scales: Sequence[float],
    mirror: Callable | None,
    lookup: str,
) -> Iterator[tuple[Tensor, bool]]:
    """What the backbone takes of each view, and whether it is mirrored."""
    maps = embed(ids, codebook)
    for scale in scales:
        scaled = maps if scale == 1 else _scaled(maps, scale)
        yield (
            backbone.from_ids(ids, codebook) if scale == 1 else backbone.from_maps(scaled, codebook, lookup),
            False,
        )
        if mirror:
            yield backbone.from_maps(mirror(scaled), codebook, lookup), True


def _scaled(maps: Tensor, scale: float) -> Tensor:
    size = [max(1, round(scale * side)) for side in maps.shape[-2:]]
    return F.interpolate(maps, size, mode="bicubic", align_corners=False)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
