"""Evaluate the frozen encoder of a pre-training run by linear probing and weighted k-NN: top-1 in percent.

    accelerate launch recipes/probe.py --checkpoint runs/mtm_pretrain-digits
    accelerate launch recipes/probe.py --checkpoint runs/mtm_pretrain-published --store imagenet-tokens

The features are the output of the cls token concatenated with the mean output of the patches, for the central
window of the size that the model was trained on. The digits take seconds. For ViT-B on ImageNet-1k the features
take about 5 GB; the time is not measured.
The recipe reads the model.safetensors of a run and a token store whose images have one label each, of at least two
classes; images without a label are left out, and of a store with the split train alone every 20th image is held
out. It writes config.json and result.json into --out, and trains nothing but the linear probe.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from seitpp.augment import EvalView
from seitpp.data.dataset import TokenDataset
from seitpp.engine.config import RunConfig
from seitpp.engine.findings import probed
from seitpp.engine.inputs import check_codebook, describe_store, open_stores, store_facts
from seitpp.engine.probe import labeled_sets, probe
from seitpp.engine.report import Report
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.models import load_mtm
from seitpp.recipe import run_recipe


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a probe: the encoder and the store."""

    checkpoint: str | None = None  # Folder of a run of mtm_pretrain, or its model.safetensors; always needed.
    store: str | None = None  # Folder of a token store. None: the embedded digits.
    workers: int | None = None  # Processes that read batches, per evaluating one. None: by the CPU cores.


PRESETS = {"published": Config()}
PRESETS["digits"] = replace(PRESETS["published"], preset="digits", precision="no", workers=0)
PRESETS["smoke"] = replace(PRESETS["digits"], preset="smoke")


def main(config: Config) -> None:
    # 1. Run.
    if config.checkpoint is None:
        raise UserError("nothing to probe: name a run's folder with --checkpoint")
    run = Run("probe", config)

    # 2. Data and model: the same codebook, and a grid that is large enough for the model.
    train, validation = open_stores(run, config.store)
    path = Path(config.checkpoint)
    model, codebook, *_ = load_mtm(path / "model.safetensors" if path.is_dir() else path)
    check_codebook(train.books, source=str(train.path), expected=codebook, checkpoint=config.checkpoint)
    window = model.encoder.patch_embed.img_size
    if window[0] > train.grid[0] or window[1] > train.grid[1]:
        raise UserError(
            f"{train.path}: got the grid {train.grid}, expected at least the {window} tokens that "
            f"{config.checkpoint} takes: name a store with larger grids"
        )
    images = labeled_sets(TokenDataset(train), TokenDataset(validation))
    run.start()
    run.describe(describe_store(train, config), model=model.encoder)

    # 3. Probe, on the images that have a label.
    result = probe(
        model.encoder,
        train=images[0],
        validation=images[1],
        num_classes=train.num_classes,
        view=EvalView(window),
        accelerator=run.accelerator,
        workers=run.workers,
    )
    for name, value in result.items():
        run.print(f"{name:20} {value:6.2f} % of {len(images[1]):,} images")
    run.finish(result, store_facts(train, validation, config))
    if run.is_main:
        said = probed(result, images=len(images[1]), classes=train.num_classes)
        run.report(Report("Frozen encoder, probed", said))


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
