"""A training step of masked token modeling against this machine's own large matrix product, in one run.

    python tests/bench/mtm_step.py [--batch 8] [--rounds 5]
    python tests/bench/mtm_step.py --batch 256    # on a GPU: bf16, compiled

A step is the view (without or with TokenAdapt on half of the images, its weights random), forward, loss, backward
and update of the published ViT-B, with a mask ratio of 0.55 and dropout on; ids lie in memory. The first row is
forward, loss and backward alone. Floating-point operations are counted by torch, those of the model forward and
backward. Steps and matrix products of the same precision alternate, and the best round of each counts.
"""

import argparse
import time
from collections.abc import Callable

import torch

from seitpp.augment import Keys, SeitPPView
from seitpp.engine.metrics import count_flops, matmul_rate
from seitpp.engine.optim import adamw
from seitpp.models import MTM, TokenAdapt
from seitpp.objectives import MASK_LAWS, mask_plan, masked_token_loss

STORED, CROP, CODES, PATCHES, RATIO = 32, 28, 391, 196, 0.55


def model_flops() -> int:
    """Of one image, forward and backward."""
    plan = mask_plan(torch.zeros(1, PATCHES, device="meta"), *MASK_LAWS["seitpp"].counts(PATCHES, RATIO))
    return count_flops(MTM(), torch.zeros(1, CROP, CROP, dtype=torch.long, device="meta"), plan)


def training_step(
    device: torch.device, dtype: torch.dtype, batch: int, adapted: float, alone: bool
) -> Callable[[], None]:
    """What is measured, with a model of its own; `alone`: no view and no update."""
    codebook = torch.randn(CODES, 32)
    adapt = TokenAdapt() if adapted else None
    view = SeitPPView(codebook, size=CROP, adapt=adapt, tokenadapt_fraction=adapted).to(device)
    model = MTM().to(device).train()
    optimizer = adamw(model, 0.05, (0.9, 0.95))
    stored = torch.randint(CODES, (batch, STORED, STORED), device=device)
    keys, counts = Keys(0, 0, torch.arange(batch, device=device)), MASK_LAWS["seitpp"].counts(PATCHES, RATIO)
    if device.type == "cuda":
        model.compile()

    def step() -> None:
        ids = stored[:, :CROP, :CROP] if alone else view(stored, keys)
        plan = mask_plan(keys.uniform("mask", PATCHES), *counts)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = masked_token_loss(model(ids, plan), ids, plan)
        loss.backward()
        if not alone:
            optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    flops = model_flops()
    print(f"{flops / 1e9:.1f} GFLOP an image; batch {arguments.batch}, {dtype}, {torch.get_num_threads()} threads")
    print(f"{'step':12} {'images/s':>9} {'matmul, GFLOP/s':>16} {'ratio':>6}")
    for name, adapted, alone in (("model", 0.0, True), ("plain", 0.0, False), ("TokenAdapt", 0.5, False)):
        step = training_step(device, dtype, arguments.batch, adapted, alone)
        step()
        rates, speeds = [], []
        for _ in range(arguments.rounds):
            rates.append(matmul_rate(device, dtype))
            start = time.perf_counter()
            step()
            speeds.append(arguments.batch / (time.perf_counter() - start))
        ratio = max(speeds) * flops / max(rates)
        print(f"{name:12} {max(speeds):9.2f} {max(rates) / 1e9:16.1f} {ratio:6.3f}", flush=True)


if __name__ == "__main__":
    main()
