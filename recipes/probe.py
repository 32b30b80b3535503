"""Probe the frozen encoder of a pre-training run: linear probe and weighted k-NN, top-1 in percent.

    accelerate launch recipes/probe.py --checkpoint runs/mtm_pretrain-digits
    accelerate launch recipes/probe.py --checkpoint runs/mtm_pretrain-published --store imagenet-tokens

Features are the cls output and the mean of the patch outputs, side by side, of the central window that the model
was trained on. Seconds on the digits; about 5 GB of features for ViT-B on ImageNet-1k, its time is not measured.
Reads the model.safetensors of a run and a token store with a train and a validation split; writes config.json and
result.json into --out. Trains nothing but the linear probe.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from seitpp import TokenStore
from seitpp.augment import EvalView
from seitpp.engine.config import run_recipe
from seitpp.engine.evaluate import probe
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.models import MTM, load_mtm
from seitpp.tokens.codebook import codebook_fingerprint
from seitpp.tokens.digits import digits


@dataclass(frozen=True)
class Config:
    """What to probe, on which store."""

    checkpoint: str | None = None  # a run's folder or its model.safetensors
    store: str | None = None  # a token store; the embedded digits where none is named
    out: str | None = None  # runs/probe-PRESET where none is named
    overwrite: bool = False
    preset: str = "published"
    seed: int = 0
    precision: Literal["no", "bf16"] = "bf16"


PRESETS = {"published": Config()}
PRESETS["digits"] = replace(PRESETS["published"], preset="digits", precision="no")
PRESETS["smoke"] = replace(PRESETS["digits"], preset="smoke")


def main(config: Config) -> None:
    # 1. Run.
    if config.checkpoint is None:
        raise UserError("nothing to probe: name a run's folder with --checkpoint")
    run = Run(
        f"probe-{config.preset}",
        asdict(config),
        out=config.out,
        resume=False,
        overwrite=config.overwrite,
        seed=config.seed,
        precision=config.precision,
    )

    # 2. Data and model, which must agree on codebook and grid.
    store = config.store
    if store is None:
        with run.accelerator.main_process_first():
            store = digits().store
    train, validation = (TokenStore(store, split, verify=run.is_main) for split in ("train", "validation"))
    path = Path(config.checkpoint)
    model, codebook = load_mtm(path / "model.safetensors" if path.is_dir() else path)
    check_tokens(model, codebook, train, config.checkpoint)
    run.start()

    # 3. Probe.
    result = probe(model.encoder, train, validation, EvalView(model.encoder.patch_embed.img_size), run.accelerator)
    for name, value in result.items():
        run.print(f"{name:20} {value:6.2f} % of {len(validation):,} images")
    run.finish(result)


def check_tokens(model: MTM, codebook: str, store: TokenStore, checkpoint: str) -> None:
    """Raise UserError unless the store's ids mean what the model learned, on a grid that holds its window."""
    found = codebook_fingerprint(store.codebook)
    if found != codebook:
        raise UserError(
            f"codebook {found[:16]} of {store.path} is not the codebook {codebook[:16]} that {checkpoint} "
            "was trained on: name the store of its tokenizer"
        )
    window = model.encoder.patch_embed.img_size
    if store.grid is None:
        raise UserError(
            f"{store.path}: its images have grids of their own, expected one grid: tokenize to one size"
        )
    if window[0] > store.grid[0] or window[1] > store.grid[1]:
        raise UserError(f"grid {store.grid} of {store.path} is smaller than the {window} tokens of {checkpoint}")


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
