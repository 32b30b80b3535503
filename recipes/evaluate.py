"""Evaluate a classifier on a token store or on images: top-1, top-5, per-class accuracy, confusion matrix.

    accelerate launch recipes/evaluate.py --checkpoint runs/seit_train-digits
    accelerate launch recipes/evaluate.py --checkpoint runs/seit_train-published --store imagenet-tokens
    accelerate launch recipes/evaluate.py --checkpoint base.pth --store imagenet-tokens
    accelerate launch recipes/evaluate.py --checkpoint RUN --data imagenet/val --tokenizer tokenizer.safetensors

--checkpoint is the folder of a run, a model file of this project, or an official checkpoint of SeiT or SeiT++.
With --data and --tokenizer the images are tokenized, and the central window of the tokens is classified. A model
that was fine-tuned on pixels takes --data alone. On any number of processes every image counts exactly once. The
digits take seconds.
The recipe writes config.json, result.json, per_class.csv, confusion.csv and confusion.png into --out. It trains
nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from seitpp import TokenStore, files, plots, tokenizers
from seitpp.augment import CentralBoxes, EvalPixelView, EvalView
from seitpp.data.dataset import TokenDataset
from seitpp.data.digits import digits
from seitpp.engine.config import RunConfig
from seitpp.engine.evaluate import predict
from seitpp.engine.inputs import check_codes, embedded
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.batches import ImageDataset, Pixels
from seitpp.images.sources import open_source
from seitpp.models import MTM, Loaded, input_kind, input_size, load_pretrained
from seitpp.recipe import run_recipe
from seitpp.tokenizers import Kind


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of an evaluation: the model and the data."""

    checkpoint: str | None = None  # Folder of a run, or a model file; always needed.
    ema: bool = True  # Evaluate the moving average of the weights if the run has one.
    store: str | None = None  # Folder of a token store. None, and no --data: the embedded digits.
    data: str | None = None  # Images to evaluate on, as for recipes/tokenize_images.py.
    tokenizer: str | None = None  # Tokenizer for --data: a file or a folder. None: the model must take pixels.
    # Kind of the tokenizer, only needed where its files do not show it (cosmos).
    tokenizer_kind: Kind | None = None
    split: str = "validation"  # Split of the store or of the images.
    eval_window: int | None = None  # Side of the central window in tokens. None: as in the model's own run.
    workers: int = 8  # Number of processes that read batches, per evaluating process.


PRESETS = {"published": Config()}
PRESETS["digits"] = replace(PRESETS["published"], preset="digits", precision="no", workers=0)
PRESETS["smoke"] = replace(PRESETS["digits"], preset="smoke")


def main(config: Config) -> None:
    # 1. Run: the output folder and the processes.
    if config.checkpoint is None:
        raise UserError("nothing to evaluate: name a run's folder or a model file with --checkpoint")
    run = Run("evaluate", config)

    # 2. Model and data, which must have the same codebook and the same classes.
    saved = load_pretrained(config.checkpoint, config.ema)
    if isinstance(saved.model, MTM):
        raise UserError(
            f"{config.checkpoint} has no classification head: fine-tune it first, with recipes/finetune.py"
        )
    data = open_data(config, run, saved)
    check_classes(saved, data, config.checkpoint)
    run.start()
    run.describe(f"{len(data.dataset):,} images", model=saved.model)

    # 3. Predictions for every image, exactly once.
    predictions = predict(
        saved.model, data.dataset, inputs=data.inputs, accelerator=run.accelerator, workers=config.workers
    )

    # 4. Results: accuracies, a table of the classes, and the confusion matrix.
    result = predictions.accuracies()
    for name, value in result.items():
        run.print(f"{name} {value:6.2f} % of {len(predictions.labels):,} images")
    if run.is_main:
        counts = predictions.confusion(saved.model.num_classes).cpu()
        names = data.class_names or [str(label) for label in range(len(counts))]
        write_tables(run.out, counts, names)
        plots.confusion(counts, names, run.out / "confusion.png")
    run.finish(result)


class Data(NamedTuple):
    """A dataset, the function that turns its batch into the input of the model, and the class names if known."""

    dataset: Dataset
    inputs: Callable[[Any], Tensor]
    class_names: list[str] | None


def open_data(config: Config, run: Run, saved: Loaded) -> Data:
    """Open the token store, the images with their tokenizer, or images alone if the model takes pixels."""
    kind = input_kind(saved.model)
    if kind == "pixels":
        if not config.data or config.tokenizer:
            raise UserError(f"{config.checkpoint} takes pixels: name images with --data and leave --tokenizer out")
        return pixels(config, run, input_size(saved.model)[0])
    if (config.data is None) != (config.tokenizer is None) or (config.data and config.store):
        raise UserError(
            f"{config.checkpoint} takes tokens: expected --store, or --data and --tokenizer, got "
            f"--store {config.store} --data {config.data} --tokenizer {config.tokenizer}"
        )
    tokens = tokenized if config.data else stored
    dataset, ids, codebook, grid, class_names = tokens(config, run)
    source = config.tokenizer or config.store or "the embedded digits"
    check_codes(codebook.numpy(), source=source, saved=saved, checkpoint=config.checkpoint)
    size = input_size(saved.model)
    window = (config.eval_window, config.eval_window) if config.eval_window else saved.window or size or grid
    maps = {"codebook": codebook, "size": size and size[0]} if kind == "maps" else {}
    view = EvalView(window, **maps).to(run.device)
    return Data(dataset, lambda batch: view(ids(batch)), class_names)


def pixels(config: Config, run: Run, size: int) -> Data:
    """Open the images of --data; each is cropped to its center (`CentralBoxes`)."""
    source = open_source(config.data, config.split)
    view = EvalPixelView().to(run.device)
    dataset = ImageDataset(source, (size, size), CentralBoxes(size))
    return Data(dataset, lambda batch: view(batch.images), source.class_names)


def tokenized(config: Config, run: Run) -> tuple:
    """Open the images of --data with their tokenizer: (dataset, batch -> ids, codebook, grid, class names)."""
    source = open_source(config.data, config.split)
    tokenizer = tokenizers.load(config.tokenizer, config.tokenizer_kind).to(run.device).eval()
    spec, codebook = tokenizer.spec, tokenizer.codebook.detach().cpu()
    dataset = ImageDataset(source, spec.image_size)

    def ids(batch: Pixels) -> Tensor:
        return tokenizer.encode(batch.images.float() / 255)

    return dataset, ids, codebook, spec.grid, source.class_names


def stored(config: Config, run: Run) -> tuple:
    """Open --store, or the embedded digits: (dataset, batch -> ids, codebook, grid, class names)."""
    path = config.store
    if path is None:
        path = embedded(run, digits).store
    store = TokenStore(path, config.split, verify=run.accelerator.is_local_main_process)
    codebook = torch.from_numpy(store.codebook)
    return TokenDataset(store), lambda batch: batch.ids, codebook, store.grid, store.class_names


def check_classes(saved: Loaded, data: Data, checkpoint: str) -> None:
    """Raise UserError if the images have other classes than the model, or the same in another order."""
    classes, names = saved.model.num_classes, data.class_names
    if names and len(names) != classes:
        raise UserError(
            f"the images have {len(names)} classes, expected the {classes} of {checkpoint}: name its data set"
        )
    if names and saved.class_names and names != saved.class_names:
        pairs = zip(names, saved.class_names, strict=True)
        label, name, expected = next((label, *pair) for label, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"class {label} of the images is {name!r}, expected {expected!r} as in {checkpoint}: name images with "
            "the same classes in the same order"
        )


def write_tables(folder: Path, counts: Tensor, names: list[str]) -> None:
    """Write per_class.csv, one line per class, and confusion.csv, one per occurring pair of label and prediction.

    `counts` is the confusion matrix (classes, classes): rows are labels, columns are predictions.
    """
    classes = []
    for label, row in enumerate(counts):
        wrong = row.clone()
        wrong[label] = 0
        images, correct = int(row.sum()), int(row[label])
        percent = f"{100 * correct / images:.2f}" if images else ""
        classes.append([names[label], images, percent, names[int(wrong.argmax())] if wrong.any() else ""])
    files.replace_csv(folder / "per_class.csv", ["class", "images", "top1", "mostly_taken_for"], classes)
    pairs = [
        [names[label], names[predicted], int(counts[label, predicted])]
        for label, predicted in counts.nonzero().tolist()
    ]
    files.replace_csv(folder / "confusion.csv", ["label", "predicted", "images"], pairs)


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
