"""Memory of a training step per image: `python tests/bench/memory.py` prints the table of docs/running.md.

The memory is computed, not measured: no GPU is needed, and it takes half a minute on a CPU. "Saved" is what the
forward pass keeps for the backward pass. The last columns are the images at a time that a run would choose on an
empty GPU, from the peak memory of a step.
"""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import timm
import torch
from torch import nn

from downstream.segmentation.mmseg import load_mmseg
from seitpp.engine.accumulation import USABLE
from seitpp.engine.inputs import classifier_trial
from seitpp.engine.memory import Footprint, Trial, footprint, state_bytes
from seitpp.models import MTM, TokenAdapt
from seitpp.objectives import MASK_RATIOS, VQTraining
from seitpp.objectives.adapt import tokenizer_pair
from seitpp.tokenizers import TokenizerSpec, ViTVQGAN
from seitpp.tokenizers.transformer import TransformerShape

RECIPES = Path(__file__).parents[2] / "recipes"
CARDS = (16, 24, 40, 80)  # GB, taken as GiB
CONTEXT = 2**29  # bytes of a GPU that CUDA itself takes
HEADER = f"| model | saved, MiB an image | checkpointed | {' | '.join(f'{gb} GB' for gb in CARDS)} |"


class Case(NamedTuple):
    """A row of the table: its name, a training step, the model, and the other modules of the step."""

    name: str
    trial: Trial
    model: nn.Module
    beside: tuple[nn.Module, ...] = ()


def zeros_loss(recipe: str) -> Callable:
    """Load the training step on zeros of a recipe, from which its memory is computed."""
    return runpy.run_path(str(RECIPES / f"{recipe}.py"))["zeros_loss"]


def cases() -> Iterator[Case]:
    """Create the published models, in the sizes of the published presets."""
    mtm, adapt, vqgan = map(zeros_loss, ("mtm_pretrain", "tokenadapt_train", "tokenizer_train"))
    mask_ratio = MASK_RATIOS["seitpp"]
    for size in ("base", "small"):
        loss = mtm((28, 28), mask_ratio.counts(196, mask_ratio.highest), 0.5)
        yield Case(f"mtm_pretrain, mtm_vit_{size}", loss, MTM(f"mtm_vit_{size}"), (TokenAdapt(),))
    loss = classifier_trial(torch.zeros(32, 28, 28))
    for name in ("seit_vit_base", "seit_vit_small", "seit_resnet50", "seit_resnet18"):
        sizes = {"img_size": 28, "in_chans": 32, "num_classes": 1000}
        yield Case(f"seit_train, {name}", loss, timm.create_model(name, **sizes))
    model = timm.create_model("mtm_vit_base", img_size=28, in_chans=32, num_codes=391, num_classes=1000)
    loss = classifier_trial(torch.zeros(28, 28, dtype=torch.long), 0.5)
    yield Case("finetune, mtm_vit_base", loss, model, (TokenAdapt(),))
    loss = classifier_trial(torch.zeros(3, 224, 224))
    yield Case("finetune pixels, ViT-B/16", loss, timm.create_model("vit_base_patch16_224", global_pool="avg"))
    yield Case("segment_ade20k, mtm_vit_base", *segmenter())
    shape = TransformerShape(768, 12, 12, 3072)
    tokenizer = ViTVQGAN(TokenizerSpec("vit_vqgan", (256, 256), 8, num_codes=8192, code_dim=32), shape, shape)
    pair = tokenizer_pair(tokenizer.eval(), 256, 28)
    yield Case("tokenadapt_train", adapt, TokenAdapt(num_codes=8192), tuple(pair))
    yield Case("tokenizer_train, ViT-VQGAN base", vqgan, VQTraining(tokenizer))


def segmenter() -> tuple[Trial, nn.Module]:
    """Create UPerNet on windows of 64 x 64 tokens of 8 pixels, and its training step."""
    load_mmseg()
    from downstream.segmentation.backbone import TokenViT
    from downstream.segmentation.model import build_segmenter

    backbone = TokenViT("mtm_vit_base", img_size=64, in_chans=32, num_codes=391)
    source = SimpleNamespace(cells=1, pixels_per_token=8, tokenizer=None)
    loss = zeros_loss("segment_ade20k")(source, 64)
    return loss, build_segmenter(backbone, 150)


def images_at_a_time(case: Case, memory: Footprint, gib: int) -> int:
    """Return how many images fit on an otherwise empty GPU; from 4 on a multiple of 4."""
    modules = (case.model, *case.beside)
    weights = sum(t.numel() * t.element_size() for module in modules for t in module.state_dict().values())
    room = USABLE * (gib * 2**30 - CONTEXT - weights) - state_bytes(case.model, 1) - memory.fixed
    images = max(0, int(room // memory.peak))
    return images // 4 * 4 if images >= 4 else images


def row(case: Case) -> str:
    """Return the line of the table for a case, in bf16."""
    memory = footprint(case.trial, "bf16", case.model, *case.beside)
    checkpointed = ""
    vit = case.model.backbone.vit if hasattr(case.model, "backbone") else case.model
    if hasattr(vit, "set_grad_checkpointing"):
        vit.set_grad_checkpointing(True)
        saved = footprint(case.trial, "bf16", case.model, *case.beside).saved
        checkpointed = f"{saved / 2**20:.1f}"
    fit = " | ".join(f"{images_at_a_time(case, memory, gib):,}" for gib in CARDS)
    return f"| {case.name} | {memory.saved / 2**20:.1f} | {checkpointed} | {fit} |"


def main() -> None:
    print(HEADER)
    print("|---|---|---|" + "---|" * len(CARDS))
    for case in cases():
        print(row(case), flush=True)


if __name__ == "__main__":
    main()
