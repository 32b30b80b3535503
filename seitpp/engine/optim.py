"""Optimizers with the parameter groups of the published recipes."""

from typing import Any

import torch
from timm.optim import Lamb, param_groups_layer_decay, param_groups_weight_decay
from torch import nn


def adamw(
    model: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """AdamW over the groups of `parameter_groups`.

    The learning rate is written into the groups before every update (`Run.update`), so none is given here.
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
