"""Optimizers with the parameter groups of the published recipes."""

import torch
from timm.optim import param_groups_weight_decay
from torch import nn


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over the trained parameters; biases, norms and other 1-D tensors are not decayed.

    The learning rate is written into the groups before every update (`Run.update`), so none is given here.
    """
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(param_groups_weight_decay(model, weight_decay), lr=0.0, betas=betas, fused=fused)
