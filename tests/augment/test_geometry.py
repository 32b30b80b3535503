"""Geometry of maps: one draw on any size, identity, agreement with plain resampling, keys and laws."""

import math

import pytest
import torch
import torch.nn.functional as F
from kornia.geometry.transform import get_affine_matrix2d, warp_affine
from scipy import stats

from seitpp.augment import Geometry, Keys, apply_geometry, crop_resize, random_geometry
from seitpp.augment.geometry import affine_matrices

NOTHING = {"flip": 0.0, "affine": 0.0, "scale": None}


def keys(n: int = 32, seed: int = 0) -> Keys:
    return Keys(seed, 0, torch.arange(n))


def smooth_images(n: int, side: int) -> torch.Tensor:
    """Waves of a few periods, seen as the means over the cells of a grid of any size: (n, 3, side, side)."""
    generator = torch.Generator().manual_seed(1)
    phase, period = torch.rand(2, n, 3, 1, 1, generator=generator)
    fine = (torch.arange(256) + 0.5) / 256
    x, y = fine.view(1, -1), fine.view(-1, 1)
    waves = (2 * math.pi * ((1 + period) * x + (2 - period) * y + phase)).sin()
    # Zero towards the rim, so that the filled border is as smooth as the rest.
    window = (math.pi * x).sin() ** 2 * (math.pi * y).sin() ** 2
    return F.avg_pool2d(waves * window, 256 // side)


@pytest.mark.parametrize(
    ("law", "largest", "mean"),
    [
        ({**NOTHING, "flip": 1.0}, 1e-6, 1e-7),
        # A center at W / 2 makes 0.029 and 3.0e-3 of these, shifts in units of W - 1 make 0.032 and 3.5e-3.
        ({**NOTHING, "affine": 1.0, "part": 1.0}, 0.012, 1.5e-3),
        ({**NOTHING, "scale": (0.2, 1.0)}, 0.03, 2.5e-3),
        ({"affine": 1.0}, 0.03, 2.5e-3),
    ],
    ids=["flip", "affine", "crop", "all"],
)
def test_a_draw_is_the_same_map_at_every_size(law: dict, largest: float, mean: float) -> None:
    geometry = random_geometry(keys(12), 32, 28, **law)
    large = apply_geometry(smooth_images(12, 256), geometry)
    small = apply_geometry(smooth_images(12, 64), geometry)
    assert large.shape == (12, 3, 224, 224) and small.shape == (12, 3, 56, 56)
    difference = (F.avg_pool2d(large, 4) - small).abs()
    assert difference.max() < largest and difference.mean() < mean
    moved = (smooth_images(12, 64)[:, :, 4:-4, 4:-4] - small).abs()
    assert moved.mean() > 0.05


def test_nothing_drawn_is_the_identity_bit_by_bit() -> None:
    maps = torch.randn(6, 5, 64, 64)
    same = apply_geometry(maps, random_geometry(keys(6), 32, 32, **NOTHING))
    assert torch.equal(same, maps)
    central = apply_geometry(maps, random_geometry(keys(6), 32, 28, **NOTHING))
    assert torch.equal(central, maps[:, :, 4:60, 4:60])
    geometry = random_geometry(keys(400), 32, 28, identity=0.25)
    still = ~geometry.flipped & (geometry.matrices == torch.eye(3)).all(dim=2).all(dim=1)
    still &= (geometry.boxes == torch.tensor([2, 2, 28, 28])).all(dim=1)
    assert stats.binomtest(int(still.sum()), 400, 0.25).pvalue > 1e-3


def one(angle: float = 0.0, shift: tuple[float, float] = (0.0, 0.0), flipped: bool = False) -> Geometry:
    a = math.radians(angle)
    matrix = [[math.cos(a), -math.sin(a), shift[0]], [math.sin(a), math.cos(a), shift[1]], [0, 0, 1]]
    boxes = torch.tensor([[0, 0, 4, 4]])
    return Geometry(torch.tensor([flipped]), torch.tensor([matrix]), boxes, 4, 4)


def test_exact_values() -> None:
    """A quarter turn, a shift by two of eight cells (x to the right, y down) and a mirror, in this order."""
    maps = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(apply_geometry(maps, one(90)), maps.rot90(-1, (2, 3)), atol=1e-5, rtol=0)
    expected = F.pad(maps, (2, 0, 0, 2))[..., 2:, :8]
    torch.testing.assert_close(apply_geometry(maps, one(shift=(0.25, -0.25))), expected, atol=1e-5, rtol=0)
    mirrored = F.pad(maps.flip(3), (2, 0))[..., :8]
    torch.testing.assert_close(
        apply_geometry(maps, one(shift=(0.25, 0), flipped=True)), mirrored, atol=1e-5, rtol=0
    )


def test_crops_are_boxes_of_whole_tokens() -> None:
    geometry = random_geometry(keys(), 32, 28, flip=0.0, affine=0.0)
    maps = torch.randn(32, 3, 64, 64)
    assert torch.equal(apply_geometry(maps, geometry), crop_resize(maps, geometry.boxes * 2, 56))
    assert len(geometry.boxes.unique(dim=0)) > 20 and (geometry.boxes[:, :2] + geometry.boxes[:, 2:]).max() <= 32


def test_a_draw_belongs_to_the_image_and_not_to_its_batch() -> None:
    maps = torch.randn(8, 3, 16, 16)
    whole = apply_geometry(maps, random_geometry(Keys(3, 1, torch.arange(8)), 8, 7))
    some = torch.tensor([6, 1])
    alone = apply_geometry(maps[some], random_geometry(Keys(3, 1, some), 8, 7))
    torch.testing.assert_close(alone, whole[some], atol=1e-6, rtol=0)
    for other in (Keys(3, 2, some), Keys(4, 1, some)):
        assert not torch.equal(random_geometry(other, 8, 7).boxes, random_geometry(Keys(3, 1, some), 8, 7).boxes)


def test_laws() -> None:
    """Half of the images are mirrored, half get the chain, and of these each part half; amounts are uniform."""
    n = 4000
    geometry = random_geometry(keys(n), 32, 28)
    chain = ~(geometry.matrices == torch.eye(3)).flatten(1).all(dim=1)
    shifted = random_geometry(keys(n), 32, 28, shear=0.0).matrices[:, :2, 2] != 0
    assert stats.binomtest(int(geometry.flipped.sum()), n, 0.5).pvalue > 1e-3
    assert stats.binomtest(int(chain.sum()), n, 0.5 * (1 - 0.5**5)).pvalue > 1e-3
    for part in shifted.T:
        assert stats.binomtest(int(part.sum()), n, 0.25).pvalue > 1e-3
    assert stats.binomtest(int(shifted.all(dim=1).sum()), n, 0.125).pvalue > 1e-3
    unsheared = random_geometry(keys(n), 32, 28, shear=0.0).matrices[:, :2, 2]
    shifts = unsheared[unsheared != 0]
    assert stats.kstest(shifts.numpy(), stats.uniform(-0.2, 0.4).cdf).pvalue > 1e-3
    turned = random_geometry(keys(n), 32, 28, affine=1.0, part=1.0, shift=0.0, shear=0.0).matrices
    angles = torch.atan2(turned[:, 1, 0], turned[:, 0, 0]).rad2deg()
    assert stats.kstest(angles.numpy(), stats.uniform(-30, 60).cdf).pvalue > 1e-3
    sheared = random_geometry(keys(n), 32, 28, affine=1.0, part=1.0, shift=0.0, degrees=0.0).matrices
    for entry in (sheared[:, 0, 1], sheared[:, 1, 0]):  # to one side only, as in the release
        assert stats.kstest(-entry.atan().rad2deg().numpy(), stats.uniform(0, 15).cdf).pvalue > 1e-3
    assert abs(stats.spearmanr(angles[:-1], angles[1:]).statistic) < 0.06
    torch.testing.assert_close(torch.linalg.det(sheared), torch.ones(n))


def test_the_affine_map_is_that_of_kornia_part_by_part() -> None:
    """Rotate, translate, shear: matrices as the product of kornia's, maps as kornia moves them."""
    maps, n = torch.randn(16, 3, 24, 24), 16
    angle, (shifts, shears) = 60 * torch.rand(n) - 30, torch.rand(2, n, 2)
    zero, one = torch.zeros(n, 2), torch.ones(n, 2)
    turned = get_affine_matrix2d(zero, zero, one, angle)
    moved = get_affine_matrix2d(shifts - 0.5, zero, one, torch.zeros(n))
    sheared = get_affine_matrix2d(zero, zero, one, torch.zeros(n), *(15 * shears).deg2rad().unbind(dim=1))
    matrices = affine_matrices(angle, shifts - 0.5, 15 * shears)
    torch.testing.assert_close(matrices, sheared @ moved @ turned)
    center, side = (24 - 1) / 2, 24
    to_pixels = torch.tensor([[side, 0, center], [0, side, center], [0, 0, 1]])
    pixels = to_pixels @ matrices @ to_pixels.inverse()
    expected = warp_affine(maps, pixels[:, :2], (24, 24), align_corners=True)
    flat = Geometry(torch.zeros(n, dtype=torch.bool), matrices, torch.tensor([[0, 0, 24, 24]] * n), 24, 24)
    torch.testing.assert_close(apply_geometry(maps, flat), expected, atol=1e-4, rtol=0)


def test_half_precision_maps_are_moved_in_full() -> None:
    maps, geometry = torch.rand(8, 3, 64, 64), random_geometry(keys(8), 32, 28)
    expected = apply_geometry(maps.bfloat16().float(), geometry)
    with torch.autocast("cpu", torch.bfloat16):
        again = random_geometry(keys(8), 32, 28)
        got = apply_geometry(maps.bfloat16(), again)
    assert torch.equal(again.matrices, geometry.matrices) and torch.equal(got, expected)


def test_maps_of_another_shape_are_refused() -> None:
    geometry = random_geometry(keys(2), 8, 7)
    for shape in ((16, 12), (20, 20)):
        with pytest.raises(
            ValueError, match=rf"maps of {shape[0]} x {shape[1]}: expected a square, a multiple of 8"
        ):
            apply_geometry(torch.zeros(2, 3, *shape), geometry)
