"""Crops of maps (B, C, H, W) and of grids of ids: pure functions on batches, with random numbers per image."""

import math

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from seitpp.augment.keyed import Keys
from seitpp.codebook import full_precision

CUBIC_A = -0.75  # the bicubic kernel of torch's and OpenCV's interpolation
CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop
CROP_RATIO = (
    3 / 4,
    4 / 3,
)  # range of width / height of a crop for a square, as in torchvision's RandomResizedCrop

Sides = int | tuple[int, int]  # the side of a square, or height and width


def both_sides(size: Sides) -> tuple[int, int]:
    """Return height and width: those given, or twice the side of a square."""
    return (size, size) if isinstance(size, int) else size


def crop_ratio(size: Sides) -> tuple[float, float]:
    """Return the range of width / height of random crops that are resized to `size`.

    It lies around the ratio of `size`, so that on average a crop is not stretched; a square has `CROP_RATIO`.
    """
    height, width = both_sides(size)
    aspect = width / height
    return CROP_RATIO[0] * aspect, CROP_RATIO[1] * aspect


def crop_resize(
    maps: Float[Tensor, "batch channels height width"],
    boxes: Int64[Tensor, "batch 4"],
    size: Sides,
    *,
    grids: Int64[Tensor, "batch 2"] | None = None,
) -> Float[Tensor, "batch channels out_height out_width"]:
    """Cut a box (top, left, height, width in cells) from each map and resize it bicubically to `size`.

    A = -0.75, half-pixel centers, no antialias, edges clamped inside the box (SeiT, Token-RRC), so it equals
    `F.interpolate(map[:, top:top+height, left:left+width], size, mode="bicubic")`. It is computed as two batched
    matrix products, with four weights per row; the result is channels-last in memory, as maps from `embed` are.

    `grids` are the height and width of the valid part of padded maps. A box that starts in it may extend beyond
    it: the scale is that of the whole box, and the edge of the valid part is repeated. Autocast is off in here:
    half precision would change the ids of the result.
    """
    inside = boxes[:, 2:] if grids is None else torch.minimum(boxes[:, 2:], grids - boxes[:, :2])
    height, width = both_sides(size)
    rows = _resize_weights(boxes[:, 0], boxes[:, 2], inside[:, 0], maps.shape[2], height).to(maps.dtype)
    columns = _resize_weights(boxes[:, 1], boxes[:, 3], inside[:, 1], maps.shape[3], width).to(maps.dtype)
    batch, channels, _, cells = maps.shape
    with full_precision(maps.device):
        # All columns and channels of an image in one matrix: one product per column would take four times as long.
        lines = rows @ maps.permute(0, 2, 3, 1).flatten(2)
        lines = lines.view(batch, height, cells, channels)
        return (columns.unsqueeze(1) @ lines).permute(0, 3, 1, 2)


def _resize_weights(start: Tensor, length: Tensor, inside: Tensor, cells: int, size: int) -> Tensor:
    """(B, size, cells) fp32: bicubic weights along one axis, for the (B,) start and length of each box and the
    (B,) part of the length that is inside its map.
    """
    start, length, inside = (values.view(-1, 1, 1) for values in (start, length, inside))
    out = torch.arange(size, device=start.device).view(1, -1, 1)
    # The center of an output cell is (out + 0.5) * length / size - 0.5, here as an integer multiple of
    # 1 / (2 * size): exact without float64, which not every device has.
    halves = (2 * out + 1) * length - size
    first = halves.div(2 * size, rounding_mode="floor")
    offset = (halves - first * (2 * size)).float() / (2 * size)
    line = torch.arange(cells, device=start.device)
    weights = torch.zeros(len(start), size, cells, device=start.device)
    for tap, weight in zip(range(-1, 3), _cubic_weights(offset), strict=True):
        # Taps that are clamped to the same edge cell are added in a fixed order; scatter_add does not guarantee
        # one, which could change ids.
        cell = torch.minimum((first + tap).clamp(min=0), inside - 1) + start
        weights = weights + torch.where(line == cell, weight, 0.0)
    return weights


def _cubic_weights(offset: Tensor) -> list[Tensor]:
    """The weights of the four cells around a point that is `offset` in [0, 1) beyond the second cell."""
    second, third = (((CUBIC_A + 2) * d - (CUBIC_A + 3)) * d * d + 1 for d in (offset, 1 - offset))
    # The kernel at a distance of 1 to 2 cells, in a form without cancellation.
    first, fourth = (CUBIC_A * d * (1 - d).square() for d in (offset, 1 - offset))
    return [first, second, third, fourth]


def random_resized_boxes(
    keys: Keys,
    grid: tuple[int, int] | Int64[Tensor, "batch 2"],
    scale: tuple[float, float],
    *,
    ratio: tuple[float, float] = CROP_RATIO,
) -> Int64[Tensor, "batch 4"]:
    """Sample a box (top, left, height, width) for the random resized crop of each image.

    `grid` is the height and width of all images, or of each image. The area is uniform in `scale` (fractions of
    the grid), the logarithm of width / height uniform between the logarithms of `ratio`; sides are rounded to
    cells. As in torchvision's RandomResizedCrop, the first of ten attempts that fits is used, else the largest
    centered box of an allowed ratio.
    """
    draws = keys.uniform("random_resized_boxes", CROP_ATTEMPTS * 4).view(-1, CROP_ATTEMPTS, 4)
    if isinstance(grid, Tensor):
        height, width = grid.to(draws.dtype).split(1, dim=1)
    else:
        height, width = (draws.new_full((1, 1), side) for side in grid)  # created on the device, without a sync
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * draws[..., 1]).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    top = (draws[..., 2] * (height - h + 1)).trunc()
    left = (draws[..., 3] * (width - w + 1)).trunc()
    boxes = torch.stack([top, left, h, w], dim=-1)
    first = fits.int().argmax(dim=1).view(-1, 1, 1).expand(-1, 1, 4)
    chosen = torch.where(
        fits.any(dim=1).view(-1, 1, 1), boxes.gather(1, first), _largest_box(height, width, ratio)
    )
    return chosen.squeeze(1).long()


def _largest_box(height: Tensor, width: Tensor, ratio: tuple[float, float]) -> Tensor:
    h = torch.minimum(height, (width / ratio[0]).round())
    w = torch.minimum(width, (height * ratio[1]).round())
    return torch.stack([(height - h) // 2, (width - w) // 2, h, w], dim=-1)


def same_boxes(indices: Int64[Tensor, " batch"], box: tuple[int, int, int, int]) -> Int64[Tensor, "batch 4"]:
    """Repeat one box (top, left, height, width) for each image.

    The result is created on the device of `indices`: a copy from the CPU would be a sync in every step.
    """
    return torch.stack([torch.full_like(indices, number) for number in box], dim=1)


def center_window(
    ids: Shaped[Tensor, "*batch height width"], size: tuple[int, int]
) -> Shaped[Tensor, "*batch {size[0]} {size[1]}"]:
    """Return the central window of ids (B, H, W) or maps (B, C, H, W), without a resize (SeiT release)."""
    top, left = (ids.shape[-2] - size[0]) // 2, (ids.shape[-1] - size[1]) // 2
    return ids[..., top : top + size[0], left : left + size[1]]


def random_flip(
    maps: Shaped[Tensor, "batch channels height width"], keys: Keys, probability: float
) -> Shaped[Tensor, "batch channels height width"]:
    """Mirror each map from left to right with this probability: its cells change places, not what they show.

    That is not what a tokenizer makes of the mirrored image (SeiT++, Figure 3): it is for comparison.
    """
    if not probability:
        return maps
    flipped = keys.uniform("random_flip", 1) < probability
    return torch.where(flipped.view(-1, 1, 1, 1), maps.flip(3), maps)


def random_window(
    ids: Shaped[Tensor, "batch height width *vector"], keys: Keys, size: Sides
) -> Shaped[Tensor, "batch out_height out_width *vector"]:
    """Return a random window of each grid of ids or vectors, without a resize (SeiT, simple crop)."""
    starts = keys.uniform("random_window", 2).unbind(dim=1)
    rows, columns = (
        (start * (cells - side + 1)).long().unsqueeze(1) + torch.arange(side, device=ids.device)
        for start, cells, side in zip(starts, ids.shape[1:3], both_sides(size), strict=True)
    )
    batch = torch.arange(len(ids), device=ids.device).view(-1, 1, 1)
    return ids[batch, rows.unsqueeze(2), columns.unsqueeze(1)]
