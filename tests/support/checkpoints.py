"""Checkpoints as other people's training leaves them."""

from pathlib import Path

import torch

from seitpp.tokenizers import ViTVQGAN


def lightning_file(tokenizer: ViTVQGAN, path: Path) -> Path:
    """A checkpoint as training leaves it: more tensors than the tokenizer's, optimizer state."""
    state = {**tokenizer.state_dict(), "loss.perceptual.weight": torch.zeros(2), "loss.logit": torch.zeros(())}
    optimizers = [{"state": {0: {"step": 3, "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]}]
    torch.save({"epoch": 1, "global_step": 10, "state_dict": state, "optimizer_states": optimizers}, path)
    return path
