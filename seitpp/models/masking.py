"""Which patches are hidden in a step, and which of those the encoder never sees."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from seitpp.augment.keyed import Keys


class MaskPlan(NamedTuple):
    """`kept` (B, L - dropped) int64: the patches that enter the encoder; `hidden` (B, L) bool: those masked, and
    `predicted` (B, masked) int64: the same as indices, equally many in each image.
    """

    kept: Tensor
    hidden: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class MaskRatio:
    """The law of the share of patches that are hidden: a normal distribution cut to [`lowest`, `highest`].

    The share `lowest` is dropped from the encoder, whatever the draw.
    """

    mean: float
    deviation: float
    lowest: float
    highest: float

    def ratio(self, seed: int, step: int) -> float:
        """The share hidden in a step, one for the whole batch, by the inverse CDF."""
        normal = NormalDist(self.mean, self.deviation)
        low, high = normal.cdf(self.lowest), normal.cdf(self.highest)
        u = Keys(seed, 0, torch.tensor([step])).uniform("mask_ratio", 1).item()
        return min(max(normal.inv_cdf(low + (high - low) * u), self.lowest), self.highest)

    def counts(self, num_patches: int, ratio: float) -> tuple[int, int]:
        """(dropped, masked) patches of an image: ceil(L * lowest), always the same, and ceil(L * ratio)."""
        return math.ceil(num_patches * self.lowest), math.ceil(num_patches * ratio)


MASK_RATIOS = {
    "seitpp": MaskRatio(mean=0.45, deviation=0.25, lowest=0.4, highest=1.0),  # SeiT++ release
    "mage": MaskRatio(mean=0.55, deviation=0.25, lowest=0.5, highest=1.0),  # Li et al., arXiv 2211.09117
    "mae": MaskRatio(mean=0.75, deviation=0.25, lowest=0.75, highest=0.75),  # He et al., arXiv 2111.06377: fixed
}


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
    predicted = order[:, :num_masked].contiguous()
    hidden = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, predicted, True)
    return MaskPlan(kept=order[:, num_dropped:], hidden=hidden, predicted=predicted)


def hidden_tokens(plan: MaskPlan, grid: tuple[int, int]) -> Tensor:
    """The hidden patches of a plan as a token mask: (B, L) -> (B, H, W) bool."""
    height, width = grid
    side = round((height * width / plan.hidden.shape[1]) ** 0.5)
    patches = plan.hidden.view(-1, height // side, width // side)
    return patches.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)


def fill_hidden(logits: Tensor, ids: Tensor, plan: MaskPlan) -> Tensor:
    """Ids (B, H, W) with the model's most likely code in every hidden place."""
    return torch.where(hidden_tokens(plan, ids.shape[-2:]), logits.argmax(dim=1), ids)
