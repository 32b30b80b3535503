"""The loss of supervised training: cross-entropy against mixed, smoothed labels."""

import torch.nn.functional as F
from torch import Tensor

from seitpp.augment.mix import SoftLabels


def soft_label_loss(logits: Tensor, targets: SoftLabels, smoothing: float) -> Tensor:
    """Cross-entropy of `logits` (B, classes), averaged over the batch, in nats -> ().

    Equal to the cross-entropy with the dense (B, classes) target of `targets`, which is never built.
    """
    own, other = (
        F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        for labels in (targets.labels, targets.others)
    )
    return (targets.weight * own + (1 - targets.weight) * other).mean()


def top1_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The fraction of images whose most likely class is the label, in [0, 1] -> ()."""
    return (logits.argmax(dim=1) == labels).float().mean()
