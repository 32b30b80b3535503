"""The loss of masked token modeling from the logits of all tokens.

In training, `models.MTM` computes the same loss from the logits of hidden tokens only, which saves memory.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from seitpp.models.masking import MaskPlan, hidden_tokens


def masked_token_loss(
    logits: Float[Tensor, "batch codes height width"], ids: Int64[Tensor, "batch height width"], plan: MaskPlan
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over the hidden tokens of the batch, in nats.

    Each patch has the same number of tokens, so this equals the mean over the tokens of a patch, then over the
    hidden patches (SeiT++ release). Each image of a step has the same number of hidden patches, so the mean of the
    losses of equal parts of a batch is the loss of the batch.
    """
    losses = F.cross_entropy(logits.float(), ids, reduction="none")
    hidden = hidden_tokens(plan, ids.shape[-2:])
    return (losses * hidden).sum() / hidden.sum()


def masked_token_accuracy(
    logits: Float[Tensor, "batch codes height width"], ids: Int64[Tensor, "batch height width"], plan: MaskPlan
) -> Float[Tensor, ""]:
    """Return the fraction of hidden tokens whose most likely code is the true one, in [0, 1]."""
    hidden = hidden_tokens(plan, ids.shape[-2:])
    correct = (logits.argmax(dim=1) == ids) & hidden
    return correct.sum() / hidden.sum()
