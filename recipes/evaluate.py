"""Evaluate a classifier on a token store, or on images: top-1, top-5, per-class accuracy, confusions.

    accelerate launch recipes/evaluate.py --checkpoint runs/seit_train-digits
    accelerate launch recipes/evaluate.py --checkpoint runs/seit_train-published --store imagenet-tokens
    accelerate launch recipes/evaluate.py --checkpoint base.pth --store imagenet-tokens
    accelerate launch recipes/evaluate.py --checkpoint RUN --data imagenet/val --tokenizer tokenizer.safetensors

With --data and --tokenizer the way is pixels -> tokens -> central window -> classifier; a model that was
fine-tuned to pixels takes --data alone. A checkpoint is a run's folder, a model file of ours, or an official one
of SeiT or SeiT++. Every image counts once on any number of processes. On the digits it takes seconds.
Writes config.json, result.json, per_class.csv, confusion.csv and confusion.png into --out. Trains nothing.
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


@dataclass(frozen=True)
class Config(RunConfig):
    """What to evaluate, on what."""

    checkpoint: str | None = None  # a run's folder, or a model file
    ema: bool = True  # of a run's folder: the moving average of the weights, where there is one
    store: str | None = None  # a token store; the embedded digits where neither store nor data is named
    data: str | None = None  # images, as recipes/tokenize_images.py takes them
    tokenizer: str | None = None  # makes tokens of the images; without it the model must take pixels
    split: str = "validation"  # of the store or of the data
    eval_window: int | None = None  # side of the central window of tokens; that of the model's own run where None
    workers: int = 8


PRESETS = {"published": Config()}
PRESETS["digits"] = replace(PRESETS["published"], preset="digits", precision="no", workers=0)
PRESETS["smoke"] = replace(PRESETS["digits"], preset="smoke")


def main(config: Config) -> None:
    # 1. Run: the output folder and the launch.
    if config.checkpoint is None:
        raise UserError("nothing to evaluate: name a run's folder or a model file with --checkpoint")
    run = Run("evaluate", config)

    # 2. Model and data, which must agree in codebook and classes.
    saved = load_pretrained(config.checkpoint, config.ema)
    if isinstance(saved.model, MTM):
        raise UserError(f"{config.checkpoint} knows no classes: fine-tune it first, with recipes/finetune.py")
    data = open_data(config, run, saved)
    check_classes(saved, data, config.checkpoint)
    run.start()
    run.describe(f"{len(data.dataset):,} images", model=saved.model)

    # 3. Predictions, every image once.
    found = predict(
        saved.model, data.dataset, inputs=data.inputs, accelerator=run.accelerator, workers=config.workers
    )

    # 4. Proof: accuracies, a table by class, and who is taken for whom.
    result = found.accuracies()
    for name, value in result.items():
        run.print(f"{name} {value:6.2f} % of {len(found.labels):,} images")
    if run.is_main:
        counts = found.confusion(saved.model.num_classes).cpu()
        names = data.class_names or [str(label) for label in range(len(counts))]
        write_tables(run.out, counts, names)
        plots.confusion(counts, names, run.out / "confusion.png")
    run.finish(result)


class Data(NamedTuple):
    """Images, how a batch of them becomes the model's input, and the names of their classes, if they have any."""

    dataset: Dataset
    inputs: Callable[[Any], Tensor]
    class_names: list[str] | None


def open_data(config: Config, run: Run, saved: Loaded) -> Data:
    """A store of tokens, images through a tokenizer, or images as they are where the model takes pixels."""
    kind = input_kind(saved.model)
    if kind == "pixels":
        if not config.data or config.tokenizer:
            raise UserError(f"{config.checkpoint} takes pixels: name images with --data, and no --tokenizer")
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
    """The center of each image of a source, as `CentralBoxes` has it."""
    source = open_source(config.data, config.split)
    view = EvalPixelView().to(run.device)
    dataset = ImageDataset(source, (size, size), CentralBoxes(size))
    return Data(dataset, lambda batch: view(batch.images), source.class_names)


def tokenized(config: Config, run: Run) -> tuple:
    """Images of a source: (dataset, its batch -> ids, codebook, grid, class names)."""
    source = open_source(config.data, config.split)
    tokenizer = tokenizers.load(config.tokenizer).to(run.device).eval()
    spec, codebook = tokenizer.spec, tokenizer.codebook.detach().cpu()
    dataset = ImageDataset(source, spec.image_size)

    def ids(batch: Pixels) -> Tensor:
        return tokenizer.encode(batch.images.float() / 255)

    return dataset, ids, codebook, spec.grid, source.class_names


def stored(config: Config, run: Run) -> tuple:
    """The named store, or the embedded digits: (dataset, its batch -> ids, codebook, grid, class names)."""
    path = config.store
    if path is None:
        path = embedded(run, digits).store
    store = TokenStore(path, config.split, verify=run.accelerator.is_local_main_process)
    codebook = torch.from_numpy(store.codebook)
    return TokenDataset(store), lambda batch: batch.ids, codebook, store.grid, store.class_names


def check_classes(saved: Loaded, data: Data, checkpoint: str) -> None:
    """Raise UserError if the classes of the images are not those that the model knows."""
    classes, names = saved.model.num_classes, data.class_names
    if names and len(names) != classes:
        raise UserError(f"{len(names)} classes of images, {classes} of {checkpoint}: expected the same")
    if names and saved.class_names and names != saved.class_names:
        first = next(pair for pair in zip(saved.class_names, names, strict=True) if pair[0] != pair[1])
        raise UserError(f"class {first[1]!r} of the images is called {first[0]!r} by {checkpoint}: another order?")


def write_tables(folder: Path, counts: Tensor, names: list[str]) -> None:
    """per_class.csv, a line a class; confusion.csv, a line for each pair of label and prediction that occurs."""
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
