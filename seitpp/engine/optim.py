"""Optimizers with the parameter groups of the published recipes."""

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn


def adamw(
    model: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """AdamW over the trained parameters; biases, norms, other 1-D tensors and what the model itself excludes
    (`no_weight_decay`, as in timm) are not decayed.

    `layer_decay` lowers the rate of each layer by this factor from the one above it, the stem's most. The learning
    rate is written into the groups before every update (`Run.update`), so none is given here.
    """
    excluded = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if layer_decay == 1.0:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=excluded)
    else:
        groups = param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=excluded, layer_decay=layer_decay
        )
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
