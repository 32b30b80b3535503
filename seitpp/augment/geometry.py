"""Flips, affine maps and crops that are drawn once and replayed on maps of any size: pixels and vectors alike.

A `Geometry` is free of the size of what it is applied to, so the same one acts on an image (256 -> 224 pixels) and
on a space of half a token a cell (64 -> 56). Drawn by keys, one draw an image; applied with kornia's functions.
"""

import math
from typing import NamedTuple

import torch
from kornia.geometry.transform import get_affine_matrix2d, hflip, warp_affine
from torch import Tensor

from seitpp.augment.keyed import Keys
from seitpp.augment.maps import crop_resize, random_resized_boxes
from seitpp.tokenizers.base import full_precision


class Geometry(NamedTuple):
    """What happens to each of B square images: a mirror, then an affine map, then a crop.

    `flipped` (B,) bool; `matrices` (B, 3, 3) float32 from source to destination, columns x, y, 1 about the centre
    in units of the side; `boxes` (B, 4) int64 = top, left, height, width in tokens of a grid of `grid` x `grid`,
    each resized to `crop` x `crop` tokens.
    """

    flipped: Tensor
    matrices: Tensor
    boxes: Tensor
    grid: int
    crop: int


def random_geometry(
    keys: Keys,
    grid: int,
    crop: int,
    *,
    flip: float = 0.5,
    affine: float = 0.5,
    part: float = 0.5,
    degrees: float = 30.0,
    shift: float = 0.2,
    shear: float = 15.0,
    scale: tuple[float, float] | None = (0.2, 1.0),
    identity: float = 0.0,
) -> Geometry:
    """One draw for each image of `keys`; the defaults are SeiT++'s (TokenAdapt), but for `scale`: ours.

    `flip` is the probability of a mirror, `affine` that of the chain shear x, shear y, rotate, translate x,
    translate y, and `part` that of each of its parts: up to +-`degrees`, +-`shift` of the side and +-`shear`
    degrees, all uniform. `scale` is that of `random_resized_boxes` on the grid; None takes the central window
    without a resize. The share `identity` of the images gets no mirror, no affine map and the central window.
    """
    coins = keys.uniform("geometry coins", 8)
    changed = coins[:, 0] >= identity
    chain = changed & (coins[:, 1] < affine)
    parts = chain.unsqueeze(1) & (coins[:, 2:7] < part)
    strengths = coins.new_tensor([degrees, shift, shift, shear, shear])
    amounts = torch.where(parts, (2 * keys.uniform("geometry amounts", 5) - 1) * strengths, 0.0)
    boxes = _central_boxes(keys.indices, grid, crop)
    if scale is not None:
        boxes = torch.where(changed.unsqueeze(1), random_resized_boxes(keys, (grid, grid), scale), boxes)
    return Geometry(changed & (coins[:, 7] < flip), _matrices(amounts), boxes, grid, crop)


def _matrices(amounts: Tensor) -> Tensor:
    """(B, 5) degrees, shift x, shift y, degrees of shear x and y -> (B, 3, 3)."""
    angle, shifts, shears = amounts[:, 0], amounts[:, 1:3], amounts[:, 3:] * (math.pi / 180)
    centre, scale = torch.zeros_like(shifts), torch.ones_like(shifts)
    with full_precision(amounts.device):  # 8 bits of an angle would be cells apart at the rim
        return get_affine_matrix2d(shifts, centre, scale, angle, shears[:, 0], shears[:, 1])


def _central_boxes(indices: Tensor, grid: int, crop: int) -> Tensor:
    start = (grid - crop) // 2
    return indices.new_tensor([start, start, crop, crop]).expand(len(indices), 4)


def apply_geometry(maps: Tensor, geometry: Geometry) -> Tensor:
    """Replay `geometry` on maps (B, C, S, S) of any float dtype -> (B, C, S', S') float32, S' = S crop / grid.

    S is a multiple of the grid. The affine map is bilinear and fills with zeros, the crop bicubic (it can
    overshoot: clamp images). An image whose affine map is the identity and whose box is of the size of the crop is
    copied bit by bit. Raises ValueError for maps of another shape.
    """
    height, width = maps.shape[-2:]
    if height != width or width % geometry.grid:
        raise ValueError(f"maps of {height} x {width}: expected a square, a multiple of {geometry.grid} cells")
    cells = width // geometry.grid
    with full_precision(maps.device):
        maps = maps.float()
        maps = torch.where(geometry.flipped.view(-1, 1, 1, 1), hflip(maps), maps)
        return crop_resize(_warp(maps, geometry.matrices), geometry.boxes * cells, geometry.crop * cells)


def _warp(maps: Tensor, matrices: Tensor) -> Tensor:
    side = maps.shape[-1]
    warped = warp_affine(maps, _pixel_matrices(matrices, side), (side, side), align_corners=True)
    still = (matrices == torch.eye(3, device=matrices.device)).flatten(1).all(dim=1)
    return torch.where(still.view(-1, 1, 1, 1), maps, warped)


def _pixel_matrices(matrices: Tensor, side: int) -> Tensor:
    """(B, 3, 3) about the centre in units of the side -> (B, 2, 3) in pixels, from the centre of the first."""
    centre = (side - 1) / 2
    linear, shift = matrices[:, :2, :2], matrices[:, :2, 2:]
    return torch.cat([linear, side * shift + centre - centre * linear.sum(dim=2, keepdim=True)], dim=2)
