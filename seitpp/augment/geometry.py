"""Flips, affine maps and crops that are drawn once and replayed on maps of any size: pixels and vectors alike.

A `Geometry` is free of the size of what it is applied to, so the same one acts on an image (256 -> 224 pixels) and
on a space of half a token a cell (64 -> 56). Drawn by keys, one draw an image. The affine map is kornia's (tests
compare the two) in a closed form, which launches fewer kernels in a step and compiles without a break.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seitpp.augment.keyed import Keys
from seitpp.augment.maps import crop_resize, random_resized_boxes, same_boxes
from seitpp.codebook import full_precision


class Geometry(NamedTuple):
    """What happens to each of B square images: a mirror, then an affine map, then a crop.

    `flipped` (B,) bool; `matrices` (B, 3, 3) float32 from source to destination, columns x, y, 1 about the center
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

    `flip` is the probability of a mirror, `affine` that of the chain rotate, translate x, translate y, shear x,
    shear y, and `part` that of each of its parts: up to +-`degrees`, +-`shift` of the side and 0 to `shear`
    degrees (as in the release, to one side only), all uniform. `scale` is that of `random_resized_boxes` on the
    grid; None takes the central window without a resize. The share `identity` of the images gets no mirror, no
    affine map and the central window.
    """
    coins = keys.uniform("geometry coins", 8)
    changed = coins[:, 0] >= identity
    chain = changed & (coins[:, 1] < affine)
    parts = chain.unsqueeze(1) & (coins[:, 2:7] < part)
    amounts = keys.uniform("geometry amounts", 5)
    angle = torch.where(parts[:, 0], (2 * amounts[:, 0] - 1) * degrees, 0.0)
    shifts = torch.where(parts[:, 1:3], (2 * amounts[:, 1:3] - 1) * shift, 0.0)
    shears = torch.where(parts[:, 3:], amounts[:, 3:] * shear, 0.0)
    start = (grid - crop) // 2
    boxes = same_boxes(keys.indices, (start, start, crop, crop))
    if scale is not None:
        boxes = torch.where(changed.unsqueeze(1), random_resized_boxes(keys, (grid, grid), scale), boxes)
    return Geometry(changed & (coins[:, 7] < flip), affine_matrices(angle, shifts, shears), boxes, grid, crop)


def affine_matrices(angle: Tensor, shifts: Tensor, shears: Tensor) -> Tensor:
    """Rotate, then translate, then shear: `angle` (B,) and `shears` (B, 2) x and y in degrees, `shifts` (B, 2) x
    and y -> (B, 3, 3) from source to destination, about the center. Rows go down, so angles turn with the clock.
    """
    radians, tangents = angle * (math.pi / 180), (shears * (math.pi / 180)).tan()
    cos, sin, one, zero = radians.cos(), radians.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    x, y = tangents.unbind(dim=1)
    rotated = [[cos, -sin, shifts[:, 0]], [sin, cos, shifts[:, 1]]]
    shear = [[one, -x], [-y, 1 + x * y]]
    rows = [[a * first + b * second for first, second in zip(*rotated, strict=True)] for a, b in shear]
    return torch.stack([number for row in (*rows, [zero, zero, one]) for number in row], dim=1).view(-1, 3, 3)


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
        maps = torch.where(geometry.flipped.view(-1, 1, 1, 1), maps.flip(3), maps)
        return crop_resize(_warp(maps, geometry.matrices), geometry.boxes * cells, geometry.crop * cells)


def _warp(maps: Tensor, matrices: Tensor) -> Tensor:
    """Bilinear, zeros outside: maps (B, C, S, S), matrices (B, 3, 3) as in `Geometry`."""
    side = maps.shape[-1]
    (a, b, x), (c, d, y) = (row.unbind(dim=1) for row in matrices[:, :2].unbind(dim=1))
    # torch samples the source for each cell of the destination, and counts half sides between the outermost cells.
    determinant, half = a * d - b * c, 2 * side / (side - 1)
    inverse = [d, -b, (b * y - d * x) * half, -c, a, (c * x - a * y) * half]
    theta = (torch.stack(inverse, dim=1) / determinant.unsqueeze(1)).view(-1, 2, 3)
    places = F.affine_grid(theta, list(maps.shape), align_corners=True)
    warped = F.grid_sample(maps, places, padding_mode="zeros", align_corners=True)
    still = (matrices == torch.eye(3, device=matrices.device)).flatten(1).all(dim=1)
    return torch.where(still.view(-1, 1, 1, 1), maps, warped)
