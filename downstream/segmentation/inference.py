"""Prediction of the class of every pixel: sliding windows of tokens with logits averaged at pixel resolution.

Published: windows of 64 tokens with a stride of 43; at 8 pixels per token, 512 pixels with a stride of 341.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, Shaped, UInt8
from torch import Tensor

from downstream.segmentation.backbone import TokenViT
from downstream.segmentation.model import TokenSegmenter
from seitpp.codebook import embed

WINDOWS = 4  # windows per forward pass (for a batch of more than 4 images: one window of each)
CLASSES = 16  # classes whose logits are resized together


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Return window positions along a side of `size` >= `window`: multiples of `stride`, the last at the end."""
    steps = -(-(size - window) // stride)
    return [min(step * stride, size - window) for step in range(steps + 1)]


@torch.no_grad()
def slide_logits(
    model: TokenSegmenter,
    inputs: Shaped[Tensor, "batch *dim height width"],
    *,
    window: int,
    stride: int,
    pixels_per_token: int,
) -> Float[Tensor, "batch classes image_height image_width"]:
    """Compute logits at pixel resolution (float32), averaged over all windows that contain a pixel.

    `model` is a segmenter in eval mode. `inputs` are what its backbone takes: ids (B, H, W), maps (B, D, H, W), or
    pixels (B, 3, h, w), all images of one size. `window` and `stride` are in cells of `inputs`, and
    `pixels_per_token` is the number of pixels along one side of a cell (1 if the inputs are pixels). The logits of
    a window are resized to pixels bilinearly. An image smaller than the window is padded by repeating its last row
    and column, and the padding is cut off again. The largest tensor in memory is the result.
    """
    images, height, width = len(inputs), *inputs.shape[-2:]
    inputs = _padded(inputs, window)
    rows, columns = (window_starts(side, window, stride) for side in inputs.shape[-2:])
    size = [pixels_per_token * side for side in inputs.shape[-2:]]
    total = torch.zeros(images, model.num_classes, *size, device=inputs.device)
    counts = torch.zeros(*size, device=inputs.device)
    corners = list(product(rows, columns))
    windows_at_once = max(1, WINDOWS // images)
    for first in range(0, len(corners), windows_at_once):
        chosen = corners[first : first + windows_at_once]
        windows = torch.cat([inputs[..., y : y + window, x : x + window] for y, x in chosen])
        parts = model(windows, mode="tensor").float().split(images)
        for (y, x), part in zip(chosen, parts, strict=True):
            y, x, side = pixels_per_token * y, pixels_per_token * x, pixels_per_token * window
            total[..., y : y + side, x : x + side] += _resized(part, (side, side))
            counts[y : y + side, x : x + side] += 1
    return total.div_(counts)[..., : pixels_per_token * height, : pixels_per_token * width]


@torch.no_grad()
def view_scores(
    model: TokenSegmenter,
    ids: Integer[Tensor, "batch height width"],
    codebook: Float[Tensor, "codes dim"],
    *,
    window: int,
    stride: int,
    pixels_per_token: int,
    scales: Sequence[float] = (1.0,),
    mirror: Callable[[Tensor], Tensor] | None = None,
    lookup: str = "cosine",
) -> Float[Tensor, "batch classes image_height image_width"]:
    """Compute class probabilities averaged over several views of an image (multi-scale and flip testing).

    For a scale other than 1 the map of token vectors is resized bicubically to the nearest whole number of tokens.
    `mirror` takes the map (B, D, h, w) of an image and returns the map of the mirrored image. Mirroring an image
    changes its tokens, not only their order, so this needs a TokenAdapt; without `mirror` nothing is flipped.
    `lookup` is that of the tokenizer, see `nearest`. The other arguments are those of `slide_logits`, which is
    enough for a test on one scale.
    """
    size, total, views = [pixels_per_token * side for side in ids.shape[-2:]], 0, 0
    for inputs, mirrored in _views(model.backbone, ids, codebook, scales, mirror, lookup):
        logits = slide_logits(model, inputs, window=window, stride=stride, pixels_per_token=pixels_per_token)
        total += _resized(logits.flip(-1) if mirrored else logits, size).softmax(dim=1)
        views += 1
    return total.div_(views)


def predict_labels(
    logits: Float[Tensor, "batch classes height width"], size: tuple[int, int]
) -> UInt8[Tensor, "batch {size[0]} {size[1]}"]:
    """Return the most likely class of every pixel of an image of `size` (height, width).

    Logits, or probabilities, are resized bilinearly for a few classes at a time, so that a large annotation needs
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


def _padded(inputs: Tensor, window: int) -> Tensor:
    """Repeat the last row and column of (..., H, W) until both sides are at least `window`."""
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
    """Yield the backbone's inputs for each view, and whether the view is mirrored."""
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


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=False)
