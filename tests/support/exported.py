"""Folders of runs that have ended, without their training."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import mtm_pretrain
import torch
from support.models import tiny_mtm
from torch import nn

from seitpp.engine.run import Run
from seitpp.models.weights.pretrained import save_pretrained

TRAINED = {"payload_bytes_per_image": 44.062, "images_per_second": 1234.4, "steps": 22, "git_commit": "c0ffee"}


def finished(folder: Path, module: ModuleType, result: dict, **settings: object) -> Path:
    """The folder of a run that has ended, as the engine writes it; in result.json the given figures on top."""
    run = Run(module.__name__, replace(module.PRESETS["smoke"], out=str(folder), **settings))
    run.start()
    run.finish({})
    replace_json(folder / "result.json", recipe=module.__name__, **TRAINED, **result)
    return folder


def replace_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@torch.no_grad()
def with_noise(model: nn.Module) -> nn.Module:
    """No parameter at a value that a new model has, too."""
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def pretrained(folder: Path) -> Path:
    """A run of mtm_pretrain, whose loss is that of chance."""
    torch.manual_seed(0)
    finished(folder, mtm_pretrain, {"linear_probe_top1": 68.25, "knn_top1_untrained": 47.5, "loss": 4.1589})
    model = with_noise(tiny_mtm(grid=(6, 8), decoder_width=48, decoder_heads=3))
    save_pretrained(folder / "model.safetensors", model, "ab" * 32)
    return folder
