"""Random masks for masked token modeling: which patches are hidden, and which of those the encoder never sees."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from seitpp.augment.keyed import Keys

# Of so few patches, all would be masked in many steps. The published images have 196, of which that is rare.
FEW_PATCHES = 16


class MaskPlan(NamedTuple):
    """The masks of a batch.

    `kept` are the indices of the patches that enter the encoder, `hidden` is true for each masked patch, and
    `predicted` are the indices of the masked patches, equally many in each image.
    """

    kept: Int64[Tensor, "batch kept"]
    hidden: Bool[Tensor, "batch patches"]
    predicted: Int64[Tensor, "batch masked"]


@dataclass(frozen=True, kw_only=True)
class MaskRatio:
    """The distribution of the mask ratio: a normal distribution truncated to [`lowest`, `highest`].

    The fraction `lowest` of the patches is always dropped from the encoder, whatever ratio is drawn.
    """

    mean: float
    deviation: float
    lowest: float
    highest: float

    def ratio(self, seed: int, step: int) -> float:
        """Draw the mask ratio of a step, one for the whole batch, by the inverse CDF."""
        normal = NormalDist(self.mean, self.deviation)
        low, high = normal.cdf(self.lowest), normal.cdf(self.highest)
        u = Keys(seed, 0, torch.tensor([step])).uniform("mask_ratio", 1).item()
        return min(max(normal.inv_cdf(low + (high - low) * u), self.lowest), self.highest)

    def counts(self, num_patches: int, ratio: float) -> tuple[int, int]:
        """Return how many patches of an image are dropped, ceil(L * lowest), and masked, ceil(L * ratio).

        Of fewer than 16 patches, one is always seen.
        """
        counts = math.ceil(num_patches * self.lowest), math.ceil(num_patches * ratio)
        most = num_patches if num_patches >= FEW_PATCHES else num_patches - 1
        return min(counts[0], most), min(counts[1], most)


MASK_RATIOS = {
    "seitpp": MaskRatio(mean=0.45, deviation=0.25, lowest=0.4, highest=1.0),  # SeiT++ release
    "mage": MaskRatio(mean=0.55, deviation=0.25, lowest=0.5, highest=1.0),  # Li et al., arXiv 2211.09117
    "mae": MaskRatio(mean=0.75, deviation=0.25, lowest=0.75, highest=0.75),  # He et al., arXiv 2111.06377: fixed
}


def mask_plan(noise: Float[Tensor, "batch patches"], num_dropped: int, num_masked: int) -> MaskPlan:
    """Build the masks of a batch from random `noise`, as the SeiT++ release does.

    The patches of each image are sorted by noise. The first `num_dropped` do not enter the encoder, the first
    `num_masked` are hidden. Raises ValueError unless 0 <= dropped <= masked <= patches.
    """
    patches = noise.shape[1]
    if not 0 <= num_dropped <= num_masked <= patches:
        raise ValueError(
            f"mask plan: got {num_dropped} dropped and {num_masked} masked of {patches} patches, "
            "expected 0 <= dropped <= masked <= patches"
        )
    order = noise.argsort(dim=1, stable=True)
    predicted = order[:, :num_masked].contiguous()
    hidden = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, predicted, True)
    return MaskPlan(kept=order[:, num_dropped:], hidden=hidden, predicted=predicted)


def hidden_tokens(plan: MaskPlan, grid: tuple[int, int]) -> Bool[Tensor, "batch {grid[0]} {grid[1]}"]:
    """Return the mask of hidden tokens, which are all tokens of the hidden patches; `grid` is (H, W) in tokens.

    The patches are squares, or of a sequence (H = 1) equal parts.
    """
    (height, width), patches = grid, plan.hidden.shape[1]
    side = round((height * width / patches) ** 0.5) if height > 1 else 1
    part = side if height > 1 else width // patches
    hidden = plan.hidden.view(-1, height // side, width // part)
    return hidden.repeat_interleave(side, dim=1).repeat_interleave(part, dim=2)


def fill_hidden(
    logits: Float[Tensor, "batch codes height width"],
    ids: Int64[Tensor, "batch *digits height width"],
    plan: MaskPlan,
    *,
    sizes: Sequence[int] | None = None,
) -> Int64[Tensor, "batch *digits height width"]:
    """Replace each hidden token of `ids` by the model's most likely code; `sizes` as in `likeliest`."""
    return torch.where(over_digits(hidden_tokens(plan, ids.shape[-2:]), ids), likeliest(logits, sizes), ids)


def likeliest(
    logits: Float[Tensor, "batch codes height width"], sizes: Sequence[int] | None = None
) -> Int64[Tensor, "batch *digits height width"]:
    """Return the most likely ids.

    Where tokens have several digits, `sizes` has the number of values of each: the logits of the values of digit 0
    come first, then those of digit 1, and so on.
    """
    if sizes is None or len(sizes) == 1:
        return logits.argmax(dim=1)
    return torch.stack([part.argmax(dim=1) for part in logits.split(list(sizes), dim=1)], dim=1)


def over_digits(
    tokens: Shaped[Tensor, "batch height width"], ids: Int64[Tensor, "batch *digits height width"]
) -> Shaped[Tensor, "batch *one height width"]:
    """Return what holds for tokens in a shape that is broadcast over the digits of `ids`."""
    return tokens.unsqueeze(1) if ids.ndim == 4 else tokens
