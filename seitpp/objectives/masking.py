"""Which patches are hidden in a step, and which of those the encoder never sees."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from seitpp.augment.keyed import Keys
from seitpp.models.mtm import MaskPlan

# The law of the mask ratio (SeiT++ release): a normal distribution cut to [LOWEST, HIGHEST].
MEAN, DEVIATION, LOWEST, HIGHEST = 0.45, 0.25, 0.4, 1.0


def mask_ratio(seed: int, step: int) -> float:
    """The share of patches hidden in a step, one for the whole batch: a truncated normal, by its inverse CDF."""
    law = NormalDist(MEAN, DEVIATION)
    low, high = law.cdf(LOWEST), law.cdf(HIGHEST)
    u = Keys(seed, 0, torch.tensor([step])).uniform("mask_ratio", 1).item()
    return min(max(law.inv_cdf(low + (high - low) * u), LOWEST), HIGHEST)


def mask_counts(num_patches: int, ratio: float) -> tuple[int, int]:
    """(dropped, masked) patches of an image: ceil(L * 0.4), always the same, and ceil(L * ratio)."""
    return math.ceil(num_patches * LOWEST), math.ceil(num_patches * ratio)


def mask_plan(noise: Tensor, num_dropped: int, num_masked: int) -> MaskPlan:
    """Order each image's patches by `noise` (B, L): the first `num_dropped` never enter the encoder, the first
    `num_masked` are hidden (SeiT++ release). Raises ValueError unless 0 <= dropped <= masked <= L.
    """
    patches = noise.shape[1]
    if not 0 <= num_dropped <= num_masked <= patches:
        raise ValueError(
            f"{num_dropped} dropped and {num_masked} masked of {patches} patches: "
            "expected 0 <= dropped <= masked <= L"
        )
    order = noise.argsort(dim=1, stable=True)
    hidden = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, order[:, :num_masked], True)
    return MaskPlan(kept=order[:, num_dropped:], hidden=hidden)
