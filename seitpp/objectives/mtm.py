"""The loss of masked token modeling from the logits of all tokens.

In training, `models.MTM` computes the same loss from the logits of hidden tokens only, which saves memory.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from seitpp.models.masking import MaskPlan, hidden_tokens, likeliest, over_digits


def masked_token_loss(
    logits: Float[Tensor, "batch codes height width"],
    ids: Int64[Tensor, "batch *digits height width"],
    plan: MaskPlan,
    *,
    sizes: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over the hidden tokens of the batch, in nats.

    Each patch has the same number of tokens, so this equals the mean over the tokens of a patch, then over the
    hidden patches (SeiT++ release). Each image of a step has the same number of hidden patches, so the mean of the
    losses of equal parts of a batch is the loss of the batch. Where tokens have several digits, `sizes` has the
    number of values of each (see `likeliest`), and the loss of a token is the mean over its digits.
    """
    hidden = hidden_tokens(plan, ids.shape[-2:])
    return (token_losses(logits, ids, sizes) * hidden).sum() / hidden.sum()


def token_losses(
    logits: Float[Tensor, "batch codes height width"],
    ids: Int64[Tensor, "batch *digits height width"],
    sizes: Sequence[int] | None = None,
) -> Float[Tensor, "batch height width"]:
    """Return the cross-entropy of each token in nats, of several digits the mean; `sizes` as in `likeliest`."""
    if ids.ndim == 3:
        return F.cross_entropy(logits.float(), ids, reduction="none")
    parts = zip(logits.float().split(list(sizes), dim=1), ids.unbind(dim=1), strict=True)
    return torch.stack([F.cross_entropy(part, plane, reduction="none") for part, plane in parts]).mean(dim=0)


def masked_token_accuracy(
    logits: Float[Tensor, "batch codes height width"],
    ids: Int64[Tensor, "batch *digits height width"],
    plan: MaskPlan,
    *,
    sizes: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """Return the fraction in [0, 1] of hidden tokens, or of their digits, whose likeliest code is the true one."""
    hidden = over_digits(hidden_tokens(plan, ids.shape[-2:]), ids).expand_as(ids)
    correct = (likeliest(logits, sizes) == ids) & hidden
    return correct.sum() / hidden.sum()
