"""CutMix and Mixup of maps with soft labels: sampled per image, with partners by position in the batch."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor, nn

from seitpp.augment.keyed import Keys
from seitpp.errors import UserError


class PairingError(UserError):
    """Raised if the number of images in a batch is no multiple of 4, so that they cannot be paired for mixing."""


def partners(indices: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
    """Return the position in the batch of each image's partner: its own position xor 2.

    So partners are on the same process, and their positions are both even or both odd. Raises PairingError if the
    batch is no multiple of 4.
    """
    if len(indices) % 4:
        raise PairingError(
            f"a batch of {len(indices)} images on one process cannot be paired for mixing, expected a multiple "
            "of 4: change the batch size, the number of processes or the accumulation"
        )
    return torch.arange(len(indices), device=indices.device) ^ 2


# The labels of a batch: one class an image; or 1 for each class of an image, 0 for others, 255 where unknown.
Labels = Int64[Tensor, " batch"] | UInt8[Tensor, "batch classes"]


class SoftLabels(NamedTuple):
    """The labels of mixed images: `labels` with `weight` in [0, 1], `others` with 1 - `weight`.

    Both are classes, or both are rows of several classes, as in `Labels`.
    """

    labels: Labels
    others: Labels
    weight: Float32[Tensor, " batch"]

    def dense(self, num_classes: int, smoothing: float = 0.0) -> Float32[Tensor, "batch {num_classes}"]:
        """Return the labels as targets in [0, 1]; the fraction `smoothing` is spread evenly over all classes."""
        own, other = (
            (labels if labels.ndim == 2 else F.one_hot(labels, num_classes)).float() for labels in self[:2]
        )
        mixed = other + self.weight.unsqueeze(1) * (own - other)
        return mixed * (1 - smoothing) + smoothing / num_classes


def cutmix(
    maps: Float[Tensor, "batch dim height width"], keys: Keys, alpha: float
) -> tuple[Float[Tensor, "batch dim height width"], Float32[Tensor, " batch"]]:
    """Replace a box of each map by that of its partner (CutMix); return the maps and the weight of the own label.

    The box covers 1 - lambda of the map, lambda ~ Beta(alpha, alpha), before it is clipped at the borders; its
    center is uniform. Of a sequence, a map of height 1, it is a part. The weight is exactly the fraction of the
    tokens outside the box. Raises PairingError.
    """
    return _blend(maps, keys, _outside_box(keys, alpha, maps.shape[2:]))


def mixup(
    maps: Float[Tensor, "batch dim height width"], keys: Keys, alpha: float
) -> tuple[Float[Tensor, "batch dim height width"], Float32[Tensor, " batch"]]:
    """Return lambda * map + (1 - lambda) * partner's map (Mixup), and lambda, the weight of the own label.

    lambda ~ Beta(alpha, alpha). Raises PairingError.
    """
    return _blend(maps, keys, _ratio(keys, alpha))


def _blend(maps: Tensor, keys: Keys, own: Tensor) -> tuple[Tensor, Tensor]:
    """Maps with the weight `own` (B, H or 1, W or 1), mixed with their partners; and the mean weight (B,)."""
    # Exact where the weight is 0 or 1, and takes a third of the time of torch.where on a CPU.
    mixed = torch.lerp(maps[partners(keys.indices)], maps, own.unsqueeze(1).to(maps.dtype))
    return mixed, own.mean(dim=(1, 2))


def _outside_box(keys: Keys, alpha: float, grid: tuple[int, int]) -> Tensor:
    """(B, H, W) float32: 0 for the tokens inside the box of CutMix, 1 for all others."""
    draws = keys.uniform("cutmix", 4)
    area = 1 - _beta(draws[:, :2], alpha)
    scales = (torch.ones_like(area), area) if grid[0] == 1 else (area.sqrt(), area.sqrt())
    inside = []
    for draw, length, scale in zip(draws[:, 2:].unbind(dim=1), grid, scales, strict=True):
        side, center = (scale * length).long(), (draw * length).long()
        offset = torch.arange(length, device=draw.device) - (center - side // 2).unsqueeze(1)
        inside.append((offset >= 0) & (offset < side.unsqueeze(1)))
    return 1 - (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).float()


def _ratio(keys: Keys, alpha: float) -> Tensor:
    """(B, 1, 1) float32: lambda of Mixup."""
    return _beta(keys.uniform("mixup", 2), alpha).view(-1, 1, 1)


def _beta(draws: Tensor, alpha: float) -> Tensor:
    """Draws (B, 2) in [0, 1) -> (B,) float32 of Beta(alpha, alpha), exact for any alpha > 0.

    It is (1 + t / sqrt(1 + t^2)) / 2 for t = sqrt((1 - s) / s) cos(2 pi v), s = (1 - u)^(1 / alpha): a scaled
    variate of Student's t with 2 alpha degrees of freedom (Bailey, "Polar generation of random variates with the
    t-distribution", 1994). The quotient is avoided, since it could overflow in float32.
    """
    log_s = torch.log1p(-draws[:, 0]) / alpha
    s, rest = log_s.exp(), -torch.expm1(log_s)
    cosine = (2 * math.pi * draws[:, 1]).cos()
    return 0.5 + 0.5 * rest.sqrt() * cosine / (s + rest * cosine.square()).sqrt()


class Mix(nn.Module):
    """CutMix, Mixup, or one of the two per image with probability 1/2; an alpha of 0 turns that method off."""

    def __init__(self, cutmix: float = 1.0, mixup: float = 0.0):
        super().__init__()
        self.cutmix, self.mixup = cutmix, mixup

    def forward(
        self, maps: Float[Tensor, "batch dim height width"], labels: Labels, keys: Keys
    ) -> tuple[Float[Tensor, "batch dim height width"], SoftLabels]:
        """Return the mixed maps and their labels; `keys` are those of the same images.

        Raises PairingError if a method is on and the batch is no multiple of 4.
        """
        if not self.cutmix and not self.mixup:
            return maps, SoftLabels(labels, labels, torch.ones_like(keys.indices, dtype=torch.float32))
        mixed, weight = self._mix(maps, keys)
        return mixed, SoftLabels(labels, labels[partners(keys.indices)], weight)

    def _mix(self, maps: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        if not self.mixup:
            return cutmix(maps, keys, self.cutmix)
        if not self.cutmix:
            return mixup(maps, keys, self.mixup)
        cut = keys.uniform("mix", 1).unsqueeze(2) < 0.5
        box, ratio = _outside_box(keys, self.cutmix, maps.shape[2:]), _ratio(keys, self.mixup)
        return _blend(maps, keys, torch.where(cut, box, ratio))

    def extra_repr(self) -> str:
        return f"cutmix={self.cutmix}, mixup={self.mixup}"
