"""Adversarial perturbations of images in [0, 1], at most eps in every value (L-infinity): PGD and AutoAttack.

Both attack a module that maps images (B, C, height, width) to logits (B, classes).
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.robustness.extra import load_extra

PGD_STEPS, PGD_STEP = 20, 1 / 4  # the length of a step is a fraction of eps
# Published settings of AutoAttack: target classes, and queries of Square.
TARGETS, QUERIES = 9, 5000
AutoAttackParts = Literal["custom", "standard"]
# The parts of AutoAttack that follow gradients; Square, which sees logits alone, is run on its own.
WHITE_BOX = {"custom": ("apgd-ce", "apgd-t"), "standard": ("apgd-ce", "apgd-t", "fab-t")}
DLR_CLASSES = 4  # of fewer, the loss of apgd-t is not defined


def pgd(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, start: Tensor) -> Tensor:
    """Return the images after 20 steps of eps / 4 along the sign of the gradient of the cross-entropy.

    `start`, in [0, 1) with the shape of the images, chooses the first point of the cube around each image. The
    gradient of an image does not depend on the others, so neither does its result.
    """
    low, high = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    moved = images + eps * (2 * start - 1)
    for _ in range(PGD_STEPS):
        moved = torch.minimum(torch.maximum(moved, low), high).requires_grad_()
        loss = F.cross_entropy(model(moved), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = moved.detach() + PGD_STEP * eps * gradient.sign()
    return torch.minimum(torch.maximum(moved, low), high)


class Attacked(NamedTuple):
    """Attacked images (B, C, height, width), unchanged where nothing was found, and `robust` (B,) bool."""

    images: Tensor
    robust: Tensor


def white_box(parts: AutoAttackParts, classes: int) -> tuple[str, ...]:
    """Return the parts of AutoAttack that follow gradients and are defined for this number of classes."""
    return tuple(name for name in WHITE_BOX[parts] if name != "apgd-t" or classes >= DLR_CLASSES)


def auto_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    parts: tuple[str, ...],
    seed: int,
    queries: int = QUERIES,
) -> Attacked:
    """Run parts of AutoAttack one after the other, each on the images that are still classified correctly.

    The settings are those of its standard version, with fewer target classes where there are fewer classes. The
    random numbers depend on the seed and on the images; torch's global generator is left as it was.
    """
    device = images.device
    with torch.no_grad():
        logits = model(images)
    correct = logits.argmax(dim=1) == labels
    if not correct.any():
        return Attacked(images, correct)
    attack = load_extra("pyautoattack").AutoAttack(
        model, norm="Linf", eps=eps, version="custom", attacks=list(parts), seed=seed, device=device
    )
    targets = min(TARGETS, logits.shape[1] - 1)
    attack.apgd.n_restarts, attack.apgd_targeted.n_target_classes = 1, targets
    attack.fab.n_restarts, attack.fab.n_target_classes = 1, targets
    attack.square.n_queries = queries
    attack.logger.disabled = True  # what it warns about, gradients that are masked, is what is measured here
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        moved, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    with torch.no_grad():
        return Attacked(moved, model(moved).argmax(dim=1) == labels)
