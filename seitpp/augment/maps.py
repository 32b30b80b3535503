"""Augmentations of maps (B, C, H, W): pure batch functions, one draw an image, no loop over samples."""

import math

import torch
from torch import Tensor

from seitpp.augment.keyed import Keys

CUBIC_A = -0.75  # the bicubic kernel of torch's and OpenCV's interpolation
CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop


def crop_resize(maps: Tensor, boxes: Tensor, size: int, grids: Tensor | None = None) -> Tensor:
    """Cut a box from each map and resize it bicubically to size x size.

    `maps` (B, C, H, W) float, `boxes` (B, 4) int64 = top, left, height, width in cells ->
    (B, C, size, size). A = -0.75, half-pixel centres, no antialias, edges clamped inside the box
    (SeiT, Token-RRC), so it equals `F.interpolate(map[:, top:top+height, left:left+width], size,
    mode="bicubic")`. Both directions are linear maps with four weights a row, applied as two batched
    matrix products; the result is channels-last in memory, as maps from `embed` are.

    With `grids` (B, 2) int64, the height and width of the real part of each map, a box that begins there may
    reach beyond it: its scale is that of the whole box, and the edge of the real part is repeated.
    """
    inside = boxes[:, 2:] if grids is None else torch.minimum(boxes[:, 2:], grids - boxes[:, :2])
    rows = _resize_weights(boxes[:, 0], boxes[:, 2], inside[:, 0], maps.shape[2], size).to(maps.dtype)
    columns = _resize_weights(boxes[:, 1], boxes[:, 3], inside[:, 1], maps.shape[3], size).to(maps.dtype)
    batch, channels, _, width = maps.shape
    # All columns and channels of an image are one matrix: as many small products would take four times as long.
    lines = rows @ maps.permute(0, 2, 3, 1).flatten(2)
    lines = lines.view(batch, size, width, channels)
    return (columns.unsqueeze(1) @ lines).permute(0, 3, 1, 2)


def _resize_weights(start: Tensor, length: Tensor, inside: Tensor, cells: int, size: int) -> Tensor:
    """(B,) start and length of each box along one axis, and how much of it is inside its map ->
    (B, size, cells) bicubic weights, fp32.
    """
    start, length, inside = (numbers.view(-1, 1, 1) for numbers in (start, length, inside))
    out = torch.arange(size, device=start.device).view(1, -1, 1)
    centre = (out + 0.5) * (length.double() / size) - 0.5
    taps = centre.floor() + torch.arange(-1, 3, device=start.device)
    cell = torch.minimum(taps.clamp(min=0).long(), inside - 1) + start
    weights = torch.zeros(len(start), size, cells, device=start.device)
    return weights.scatter_add_(2, cell, _cubic(centre - taps).float())


def _cubic(distance: Tensor) -> Tensor:
    d = distance.abs()
    inner = ((CUBIC_A + 2) * d - (CUBIC_A + 3)) * d * d + 1
    outer = ((d - 5) * d + 8) * d * CUBIC_A - 4 * CUBIC_A
    return torch.where(d <= 1, inner, torch.where(d < 2, outer, 0.0))


def random_resized_boxes(
    keys: Keys,
    grid: tuple[int, int] | Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Boxes of a random resized crop: (B, 4) int64 = top, left, height, width inside `grid`.

    `grid` is the height and width of all images, or (B, 2) int64, those of each. The area is uniform in `scale`
    (shares of the grid), the logarithm of width / height uniform in the logarithms of `ratio`; sides are rounded
    to cells. As in torchvision's RandomResizedCrop, the first of ten attempts that fits is taken, else the largest
    centred box of an allowed ratio.
    """
    draws = keys.uniform("random_resized_boxes", CROP_ATTEMPTS * 4).double().view(-1, CROP_ATTEMPTS, 4)
    if isinstance(grid, Tensor):
        height, width = grid.double().split(1, dim=1)
    else:
        height, width = (draws.new_full((1, 1), side) for side in grid)  # made on the device: nothing to wait for
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


def centre_window(ids: Tensor, size: tuple[int, int]) -> Tensor:
    """The central window of ids (B, H, W) or maps (B, C, H, W), without a resize (SeiT release)."""
    top, left = (ids.shape[-2] - size[0]) // 2, (ids.shape[-1] - size[1]) // 2
    return ids[..., top : top + size[0], left : left + size[1]]


def random_window(ids: Tensor, keys: Keys, size: int) -> Tensor:
    """One window of each grid, without a resize (SeiT, simple crop): ids (B, H, W) -> (B, size, size)."""
    line = torch.arange(size, device=ids.device)
    top, left = keys.uniform("random_window", 2).unbind(dim=1)
    rows = (top * (ids.shape[1] - size + 1)).long().unsqueeze(1) + line
    columns = (left * (ids.shape[2] - size + 1)).long().unsqueeze(1) + line
    batch = torch.arange(len(ids), device=ids.device).view(-1, 1, 1)
    return ids[batch, rows.unsqueeze(2), columns.unsqueeze(1)]
