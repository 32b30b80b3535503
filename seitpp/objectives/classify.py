"""The loss of supervised training against mixed, smoothed labels: one class an image, or several."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from seitpp.augment.mix import Labels, SoftLabels

UNKNOWN = 255  # in every place of the row of an image without a label


def soft_label_loss(
    logits: Float[Tensor, "batch classes"],
    targets: SoftLabels,
    smoothing: float,
    *,
    class_weights: Float32[Tensor, " classes"] | None = None,
) -> Float[Tensor, ""]:
    """Return the loss with mixed and smoothed labels, averaged over the batch, in nats.

    With one class an image it is the cross-entropy, and equals that with a dense target (batch, classes), which is
    never built; `class_weights` multiply the loss of an image by the weight of its class. With several classes it
    is the binary cross-entropy, averaged over the classes; an image whose labels are unknown, or mixed with
    unknown ones, counts 0. `class_weights` multiply the terms of the classes that an image has.
    """
    if targets.labels.ndim == 2:
        return _binary_loss(logits, targets, smoothing, class_weights)
    own, other = (
        _cross_entropy(logits, labels, smoothing, class_weights) for labels in (targets.labels, targets.others)
    )
    return (targets.weight * own + (1 - targets.weight) * other).mean()


def _cross_entropy(
    logits: Tensor, labels: Int64[Tensor, " batch"], smoothing: float, class_weights: Tensor | None
) -> Tensor:
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return losses if class_weights is None else losses * class_weights[labels]


def _binary_loss(
    logits: Tensor, targets: SoftLabels, smoothing: float, class_weights: Tensor | None
) -> Float[Tensor, ""]:
    dense = targets.dense(logits.shape[1], smoothing)
    losses = F.binary_cross_entropy_with_logits(
        logits.float(), dense, reduction="none", pos_weight=class_weights
    ).mean(dim=1)
    known = (targets.labels[:, 0] != UNKNOWN) & (targets.others[:, 0] != UNKNOWN)
    # Also the mean over the whole batch, so that the mean of equal parts of a batch is that of the batch.
    return torch.where(known, losses, 0.0).mean()


def top1_accuracy(logits: Float[Tensor, "batch classes"], labels: Labels) -> Float[Tensor, ""]:
    """Return the fraction of images whose most likely class is their label, or one of their labels, in [0, 1]."""
    likely = logits.argmax(dim=1)
    hits = labels.gather(1, likely.unsqueeze(1)).squeeze(1) == 1 if labels.ndim == 2 else likely == labels
    return hits.float().mean()
