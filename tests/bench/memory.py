"""Memory of a training step per image: `python tests/bench/memory.py` prints the table of docs/running.md.

The memory is computed, not measured: no GPU is needed, and it takes two minutes on a CPU. "Saved" is what the
forward pass keeps for the backward pass. The last columns are the images at a time that a run would choose on an
empty GPU, from the peak memory of a step. With `--check`, each row must be that of the docs within a tenth; the
tests check three of them.
"""

import argparse
import math
import runpy
import sys
from collections.abc import Callable
from functools import partial
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

ROOT = Path(__file__).parents[2]
CARDS = (16, 24, 40, 80)  # GB, taken as GiB
CONTEXT = 2**29  # bytes of a GPU that CUDA itself takes
HEADER = f"| model | saved, MiB an image | checkpointed | {' | '.join(f'{gb} GB' for gb in CARDS)} |"
TOLERANCE = 0.1  # of the table in the docs


class Case(NamedTuple):
    """What a row of the table is about: a training step, the model, and the other modules of the step."""

    trial: Trial
    model: nn.Module
    beside: tuple[nn.Module, ...] = ()


def zeros_loss(recipe: str) -> Callable:
    """Load the training step on zeros of a recipe, from which its memory is computed."""
    return runpy.run_path(str(ROOT / f"recipes/{recipe}.py"))["zeros_loss"]


def pretraining(size: str) -> Case:
    ratio = MASK_RATIOS["seitpp"]
    loss = zeros_loss("mtm_pretrain")((28, 28), ratio.counts(196, ratio.highest), 0.5)
    return Case(loss, MTM(f"mtm_vit_{size}"), (TokenAdapt(),))


def classifier(name: str) -> Case:
    model = timm.create_model(name, img_size=28, in_chans=32, num_classes=1000)
    return Case(classifier_trial(torch.zeros(32, 28, 28)), model)


def finetuning() -> Case:
    model = timm.create_model("mtm_vit_base", img_size=28, in_chans=32, num_codes=391, num_classes=1000)
    return Case(classifier_trial(torch.zeros(28, 28, dtype=torch.long), 0.5), model, (TokenAdapt(),))


def pixels() -> Case:
    model = timm.create_model("vit_base_patch16_224", global_pool="avg")
    return Case(classifier_trial(torch.zeros(3, 224, 224)), model)


def segmenter() -> Case:
    """Create UPerNet on windows of 64 x 64 tokens of 8 pixels, and its training step."""
    load_mmseg()
    from downstream.segmentation.backbone import TokenViT
    from downstream.segmentation.model import build_segmenter

    backbone = TokenViT("mtm_vit_base", img_size=64, in_chans=32, num_codes=391)
    source = SimpleNamespace(cells=1, pixels_per_token=8, tokenizer=None)
    return Case(zeros_loss("segment_ade20k")(source, 64), build_segmenter(backbone, 150))


def vit_vqgan() -> ViTVQGAN:
    shape = TransformerShape(768, 12, 12, 3072)
    return ViTVQGAN(TokenizerSpec("vit_vqgan", (256, 256), 8, num_codes=8192, code_dim=32), shape, shape)


def adapter() -> Case:
    pair = tokenizer_pair(vit_vqgan().eval(), 256, 28)
    return Case(zeros_loss("tokenadapt_train"), TokenAdapt(num_codes=8192), tuple(pair))


# The published models, in the sizes of the published presets; each is made when its row is.
CASES: dict[str, Callable[[], Case]] = {
    **{f"mtm_pretrain, mtm_vit_{size}": partial(pretraining, size) for size in ("base", "small")},
    **{
        f"seit_train, {name}": partial(classifier, name)
        for name in ("seit_vit_base", "seit_vit_small", "seit_resnet50", "seit_resnet18")
    },
    "finetune, mtm_vit_base": finetuning,
    "finetune pixels, ViT-B/16": pixels,
    "segment_ade20k, mtm_vit_base": segmenter,
    "tokenadapt_train": adapter,
    "tokenizer_train, ViT-VQGAN base": lambda: Case(zeros_loss("tokenizer_train"), VQTraining(vit_vqgan())),
}


def images_at_a_time(case: Case, memory: Footprint, gib: int) -> int:
    """Return how many images fit on an otherwise empty GPU; from 4 on a multiple of 4."""
    modules = (case.model, *case.beside)
    weights = sum(t.numel() * t.element_size() for module in modules for t in module.state_dict().values())
    room = USABLE * (gib * 2**30 - CONTEXT - weights) - state_bytes(case.model, 1) - memory.fixed
    images = max(0, int(room // memory.peak))
    return images // 4 * 4 if images >= 4 else images


def footprints(case: Case) -> list[Footprint]:
    """Return the memory of a step in bf16, and with checkpointed activations where the model can have them."""
    found = [footprint(case.trial, "bf16", case.model, *case.beside)]
    vit = case.model.backbone.vit if hasattr(case.model, "backbone") else case.model
    if hasattr(vit, "set_grad_checkpointing"):
        vit.set_grad_checkpointing(True)
        found.append(footprint(case.trial, "bf16", case.model, *case.beside))
    return found


def cells(case: Case, memory: Footprint, checkpointed: Footprint | None = None) -> list[str]:
    """Return what the table says of a case, from its footprints."""
    saved = [f"{found.saved / 2**20:.1f}" if found else "" for found in (memory, checkpointed)]
    return [*saved, *(f"{images_at_a_time(case, memory, gib):,}" for gib in CARDS)]


def documented() -> dict[str, list[str]]:
    """Return the cells of each row of the table in the docs."""
    table = (ROOT / "docs/running.md").read_text().split(HEADER)[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row[1:-1].split("|")] for row in table.splitlines()[2:]]
    return {name: values for name, *values in rows}


def differs(found: list[str], expected: list[str]) -> bool:
    """Return whether a number is not that of the docs within the tolerance, or only one of two cells is empty."""
    pairs = [
        [float(cell.replace(",", "") or "nan") for cell in pair] for pair in zip(found, expected, strict=True)
    ]
    close = [math.isclose(*pair, rel_tol=TOLERANCE) or all(map(math.isnan, pair)) for pair in pairs]
    return not all(close)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, expected = parser.parse_args().check, documented()
    print(HEADER)
    print("|---|---|---|" + "---|" * len(CARDS))
    for name, make in CASES.items():
        case = make()
        found = cells(case, *footprints(case))
        print(f"| {name} | {' | '.join(found)} |", flush=True)
        if check and differs(found, expected[name]):
            sys.exit(f"docs/running.md has {' | '.join(expected[name])}")
    if check:
        print(f"all {len(CASES)} rows are those of docs/running.md within {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
