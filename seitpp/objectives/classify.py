"""The loss of supervised training: cross-entropy against mixed, smoothed labels."""

import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from seitpp.augment.mix import SoftLabels


def soft_label_loss(
    logits: Float[Tensor, "batch classes"], targets: SoftLabels, smoothing: float
) -> Float[Tensor, ""]:
    """Return the cross-entropy with mixed and smoothed labels, averaged over the batch, in nats.

    It equals the cross-entropy with a dense target (batch, classes), which is never built.
    """
    own, other = (
        F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        for labels in (targets.labels, targets.others)
    )
    return (targets.weight * own + (1 - targets.weight) * other).mean()


def top1_accuracy(logits: Float[Tensor, "batch classes"], labels: Integer[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Return the fraction of images whose most likely class is the label, in [0, 1]."""
    return (logits.argmax(dim=1) == labels).float().mean()
