"""Optimizers with the parameter groups of the published recipes, and schedules as functions of the step alone."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim import Lamb, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from seitpp.data.order import BatchOrder
from seitpp.engine.config import TrainConfig


def adamw(
    model: nn.Module, weight_decay: float, *, betas: tuple[float, float] = (0.9, 0.999), layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """Create AdamW over the groups of `parameter_groups`.

    It has no learning rate yet: `Training.update` writes it into the groups before every update.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay, layer_decay), lr=0.0, betas=betas, fused=True)


def lamb(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> Lamb:
    """Create LAMB (You et al., arXiv 1904.00962) over the same groups, with the eps of DeiT III.

    LAMB scales the update of each weight by the norm of the weight, except for weights without decay. A head that
    is initialized near 0 therefore learns very slowly: initialize it with the usual standard deviation of 0.02.
    The run clips the gradients, LAMB does not.
    """
    groups = parameter_groups(model, weight_decay, layer_decay)
    for group in groups:
        group["step"] = torch.zeros(())  # timm's counter of updates: a checkpoint restores it into this tensor
    return Lamb(groups, lr=0.0, eps=1e-8, max_grad_norm=None)


OPTIMIZERS = {"adamw": adamw, "lamb": lamb}


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Divide the trainable parameters into groups with and without weight decay, as timm does.

    Biases, norms, other 1-D tensors and those that the model excludes (`no_weight_decay`) have none. `layer_decay`
    multiplies the learning rate of each layer relative to the layer above it, so the stem has the lowest.
    """
    excluded = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if layer_decay == 1.0:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=excluded)
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=excluded, layer_decay=layer_decay)


@dataclass(frozen=True)
class Schedule:
    """The schedule of a training: the images of each update (`order`), its learning rate (`lr`), and when
    checkpoints and evaluations are due. Durations are in updates.
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
        *,
        lr_batch: int = 256,
        scaling: Literal["linear", "sqrt"] = "linear",
    ) -> "Schedule":
        """Create the schedule of a config, whose durations are in epochs.

        The config's `base_lr` is the rate for a global batch of `lr_batch` images. It is scaled by the ratio of
        the run's global batch to `lr_batch`, or by its square root.
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

    def is_evaluated(self, step: int) -> bool:
        """Return whether an evaluation is due after `step` updates."""
        return step % self.evaluation_steps == 0

    def lr(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0: linear warmup, then the decay."""
        durations = {"steps": self.steps, "warmup": self.warmup_steps, "peak": self.peak_lr}
        if self.decay == "linear":
            return warmup_linear(step, **durations)
        return warmup_cosine(step, **durations, start=self.warmup_lr, final=self.min_lr)

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of {self.order.batch_size} images, {self.order.steps_per_epoch} per epoch, "
            f"peak lr {self.peak_lr:.2e}"
        )


def warmup_cosine(
    step: int, *, steps: int, warmup: int, peak: float, start: float = 0.0, final: float = 0.0
) -> float:
    """Return the learning rate of update `step` of `steps`, counted from 0.

    It rises linearly from `start` to `peak` over `warmup` updates, then falls by half a cosine to `final`.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_linear(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Return the learning rate of update `step` of `steps`, counted from 0.

    It rises linearly from 0 to `peak` over `warmup` updates, then falls linearly to 0.
    """
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / (steps - warmup)
