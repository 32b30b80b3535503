"""Random flips, affine transforms and crops that are sampled once and applied to maps of any size.

A `Geometry` does not depend on the size of the maps, so the same one applies to images (256 -> 224 pixels) and to
feature maps with 2 x 2 cells per token (64 -> 56). It is sampled per image. The affine transform equals kornia's
(tests compare the two), in a closed form that launches fewer kernels and compiles without a graph break.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from seitpp.augment.keyed import Keys
from seitpp.augment.maps import crop_resize, random_resized_boxes, same_boxes
from seitpp.codebook import full_precision


class Geometry(NamedTuple):
    """The transforms of a batch of square images: horizontal flip, then affine transform, then resized crop.

    `matrices` map source to destination coordinates (x, y, 1), relative to the center, in units of the side.
    `boxes` are top, left, height, width in tokens of a grid of `grid` x `grid`, each resized to `crop` x `crop`
    tokens.
    """

    flipped: Bool[Tensor, " batch"]
    matrices: Float32[Tensor, "batch 3 3"]
    boxes: Int64[Tensor, "batch 4"]
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
    """Sample a geometry for each image of `keys`. The defaults are SeiT++'s (TokenAdapt), except our `scale`.

    `flip` is the probability of a horizontal flip and `affine` that of the chain rotate, translate x, translate y,
    shear x, shear y. Each part of the chain is applied with probability `part`, its amount uniform in
    +-`degrees`, +-`shift` (a fraction of the side) and 0 .. `shear` degrees (positive only, as in the release).
    `scale` is that of `random_resized_boxes` on the grid; with None the crop is the central window, not resized.
    A fraction `identity` of the images gets no flip, no affine transform and the central window.
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


def affine_matrices(
    angle: Float[Tensor, " batch"], shifts: Float[Tensor, "batch 2"], shears: Float[Tensor, "batch 2"]
) -> Float[Tensor, "batch 3 3"]:
    """Return the matrices (source to destination, about the center) that rotate, then translate, then shear.

    `angle` and `shears` (x, y) are in degrees, `shifts` (x, y) in units of the side. y points down, so a positive
    angle rotates clockwise.
    """
    radians, tangents = angle * (math.pi / 180), (shears * (math.pi / 180)).tan()
    cos, sin, one, zero = radians.cos(), radians.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    x, y = tangents.unbind(dim=1)
    rotated = [[cos, -sin, shifts[:, 0]], [sin, cos, shifts[:, 1]]]
    shear = [[one, -x], [-y, 1 + x * y]]
    rows = [[a * first + b * second for first, second in zip(*rotated, strict=True)] for a, b in shear]
    return torch.stack([number for row in (*rows, [zero, zero, one]) for number in row], dim=1).view(-1, 3, 3)


def apply_geometry(
    maps: Float[Tensor, "batch channels height width"], geometry: Geometry
) -> Float32[Tensor, "batch channels size size"]:
    """Apply `geometry` to square maps with side S, a multiple of the grid; the result has side S * crop / grid.

    The affine transform is bilinear with zeros outside, the crop bicubic (it can overshoot: clamp images). An
    image whose affine transform is the identity and whose box has the size of the crop is copied bit by bit.
    Raises ValueError if the maps are not square or their side is no multiple of the grid.
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
    # grid_sample needs the inverse, destination to source, in units of half the distance of the outermost cells.
    determinant, half = a * d - b * c, 2 * side / (side - 1)
    inverse = [d, -b, (b * y - d * x) * half, -c, a, (c * x - a * y) * half]
    theta = (torch.stack(inverse, dim=1) / determinant.unsqueeze(1)).view(-1, 2, 3)
    points = F.affine_grid(theta, list(maps.shape), align_corners=True)
    warped = F.grid_sample(maps, points, padding_mode="zeros", align_corners=True)
    unchanged = (matrices == torch.eye(3, device=matrices.device)).flatten(1).all(dim=1)
    return torch.where(unchanged.view(-1, 1, 1, 1), maps, warped)
