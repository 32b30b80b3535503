"""Optimizers with the parameter groups of the published recipes, and schedules as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim import Lamb, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from seitpp.data.dataset import BatchOrder
from seitpp.engine.config import TrainConfig


def adamw(
    model: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """AdamW over the groups of `parameter_groups`.

    The learning rate is written into the groups before every update (`Training.update`), so none is given here.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay, layer_decay), lr=0.0, betas=betas, fused=True)


def lamb(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> Lamb:
    """LAMB over the same groups (You et al., arXiv 1904.00962), with the eps of DeiT III.

    The update of each weight is scaled by the weight's own norm, but not that of the weights that are not decayed.
    So a head that begins near 0 hardly moves: give it the usual deviation of 0.02. Gradients are clipped by the
    run, not here.
    """
    groups = parameter_groups(model, weight_decay, layer_decay)
    for group in groups:
        group["step"] = torch.zeros(())  # timm counts updates here, and a checkpoint looks for it
    return Lamb(groups, lr=0.0, eps=1e-8, max_grad_norm=None)


OPTIMIZERS = {"adamw": adamw, "lamb": lamb}


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """The trained parameters in groups; biases, norms, other 1-D tensors and what the model itself excludes
    (`no_weight_decay`, as in timm) are not decayed.

    `layer_decay` lowers the rate of each layer by this factor from the one above it, the stem's most.
    """
    excluded = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if layer_decay == 1.0:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=excluded)
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=excluded, layer_decay=layer_decay)


@dataclass(frozen=True)
class Schedule:
    """When what happens in a training: `order` says which images an update sees, the durations are in updates, and
    `lr` is the learning rate of each.
    """

    order: BatchOrder
    steps: int
    warmup_steps: int
    checkpoint_steps: int
    evaluation_steps: int
    peak_lr: float
    warmup_lr: float = 0.0  # of the first update
    min_lr: float = 0.0  # after the last one
    decay: Literal["cosine", "linear"] = "cosine"

    @classmethod
    def from_config(
        cls,
        config: TrainConfig,
        order: BatchOrder,
        lr_batch: int = 256,
        scaling: Literal["linear", "sqrt"] = "linear",
    ) -> "Schedule":
        """Durations in epochs become updates of `order`; `base_lr`, the rate for a batch of `lr_batch`, is scaled
        to the batch of the run, linearly or by its square root.
        """
        batches = config.batch_size / lr_batch
        return cls(
            order,
            steps=order.steps(config.epochs),
            warmup_steps=order.steps(config.warmup_epochs),
            checkpoint_steps=max(1, order.steps(config.checkpoint_epochs)),
            evaluation_steps=max(1, order.steps(getattr(config, "evaluation_epochs", 0))),
            peak_lr=config.base_lr * (batches if scaling == "linear" else batches**0.5),
            warmup_lr=getattr(config, "warmup_lr", 0.0),
            min_lr=getattr(config, "min_lr", 0.0),
        )

    def lr(self, step: int) -> float:
        """The learning rate of update number `step`, 0 the first: linear warm-up, then the decay."""
        if self.decay == "linear":
            return warmup_linear(step, self.steps, self.warmup_steps, self.peak_lr)
        return warmup_cosine(step, self.steps, self.warmup_steps, self.peak_lr, self.warmup_lr, self.min_lr)

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of {self.order.batch_size} images, {self.order.steps_per_epoch} an epoch, "
            f"peak lr {self.peak_lr:.2e}"
        )


def warmup_cosine(
    step: int, steps: int, warmup: int, peak: float, start: float = 0.0, final: float = 0.0
) -> float:
    """The rate of the update number `step` (0 the first) of `steps`: linear from `start` to `peak` over `warmup`
    updates, then half a cosine down to `final`.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_linear(step: int, steps: int, warmup: int, peak: float) -> float:
    """The rate of update number `step` (0 the first) of `steps`: linear from 0 to `peak` over `warmup` updates,
    then linear to 0.
    """
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / (steps - warmup)
