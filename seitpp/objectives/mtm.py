"""The loss of masked token modeling, of logits that are all there. In training `models.MTM` computes the same of
hidden tokens only, so that they never are.
"""

import torch.nn.functional as F
from torch import Tensor

from seitpp.models.masking import MaskPlan, hidden_tokens


def masked_token_loss(logits: Tensor, ids: Tensor, plan: MaskPlan) -> Tensor:
    """Mean cross-entropy over the hidden tokens of the batch, in nats.

    `logits` (B, K, H, W), `ids` (B, H, W) int64 -> (). All patches have the same number of tokens, so this is
    the mean over a patch's tokens, then over the hidden patches of the batch (SeiT++ release). All images
    of a step have the same number of hidden patches, so the mean over equal shares of a batch is its mean.
    """
    losses = F.cross_entropy(logits.float(), ids, reduction="none")
    hidden = hidden_tokens(plan, ids.shape[-2:])
    return (losses * hidden).sum() / hidden.sum()


def masked_token_accuracy(logits: Tensor, ids: Tensor, plan: MaskPlan) -> Tensor:
    """The fraction of the hidden tokens whose most likely code is the true one, in [0, 1] -> ()."""
    hidden = hidden_tokens(plan, ids.shape[-2:])
    correct = (logits.argmax(dim=1) == ids) & hidden
    return correct.sum() / hidden.sum()
