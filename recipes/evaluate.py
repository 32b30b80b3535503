"""Evaluate a classifier on a token store or on images: top-1, top-5, balanced and per-class accuracy, confusions.

    accelerate launch recipes/evaluate.py --checkpoint runs/seit_train-digits
    accelerate launch recipes/evaluate.py --checkpoint runs/seit_train-published --store imagenet-tokens
    accelerate launch recipes/evaluate.py --checkpoint base.pth --store imagenet-tokens
    accelerate launch recipes/evaluate.py --checkpoint RUN --data imagenet --split val \
        --labels LOC_val_solution.csv --tokenizer tokenizer.safetensors
    accelerate launch recipes/evaluate.py --checkpoint RUN --store imagenet-tokens --classes names.txt

--checkpoint is the folder of a run, a model file of this project, or an official checkpoint of SeiT or SeiT++.
With --data and --tokenizer the images are tokenized, and the central window of the tokens is classified. A model
that was fine-tuned on pixels takes --data alone. On any number of processes every image counts exactly once. The
digits take seconds. Classes are found by name: images of some of the model's classes, in any order, are evaluated
among these alone, and --classes leaves out all images and predictions of other classes.
Images with several classes are judged by mAP, the mean average precision of the classes that occur.
The recipe writes config.json, result.json, per_class.csv, and except for mAP confusion.csv and confusion.png into
--out. It trains nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from seitpp import TokenStore, files, plots, tokenizers
from seitpp.augment import CentralBoxes, EvalPixelView, EvalView
from seitpp.augment.maps import both_sides
from seitpp.codebook import Codebook
from seitpp.data.dataset import TokenDataset
from seitpp.data.digits import digits
from seitpp.engine.config import RunConfig
from seitpp.engine.confusion import Confusions
from seitpp.engine.evaluate import ClassMap, Predictions, class_map, class_precisions, mean_of_known, predict
from seitpp.engine.findings import classified
from seitpp.engine.inputs import check_codes, embedded, open_once, readable, reading_of_run, require_labels
from seitpp.engine.report import Report, Table, plot
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.batches import ImageDataset, Pixels
from seitpp.images.decode import RGB, Reading
from seitpp.images.labels import LabelRules, read_class_names
from seitpp.images.sources import ImageSource, open_source
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
    split: str | None = "validation"  # Split of the store or of the images. None: all of --data.
    # Central window in tokens: the side of a square, or height and width. None: as in the model's own run.
    eval_window: int | tuple[int, int] | None = None
    skip_errors: bool = False  # Leave out images of --data that cannot be read, and list them in OUT/skipped.txt.
    labels: str | None = None  # File with the labels of --data, as for recipes/tokenize_images.py.
    # File with one class name a line, or a store: only these are evaluated. None: all classes of the images.
    classes: str | None = None
    workers: int | None = None  # Processes that read batches, per evaluating one. None: by the CPU cores.


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
    classes = evaluated_classes(config, saved, data)
    names = classes.names if classes else class_names(saved, data)
    run.start()
    run.describe(
        f"{len(data.dataset):,} images; {len(names):,} of {saved.model.num_classes:,} classes of the model",
        model=saved.model,
    )

    # 3. Every image exactly once: scores, and tables of the classes.
    where = {"inputs": data.inputs, "accelerator": run.accelerator, "workers": run.workers, "classes": classes}
    if data.multi_label:
        precisions = class_precisions(saved.model, data.dataset, **where)
        result, images = {"mAP": mean_of_known(precisions)}, len(data.dataset)
    else:
        predictions = predict(saved.model, data.dataset, **where)
        check_labels(predictions, len(names), config.checkpoint)
        result, images = predictions.accuracies(), len(predictions.labels)

    # 4. Results, and then a picture.
    for name, value in result.items():
        run.print(f"{name} {value:6.2f} % of {images:,} images")
    if run.is_main and data.multi_label:
        percent = ["" if isnan(value) else f"{100 * value:.2f}" for value in precisions.tolist()]
        rows = zip(names, percent, strict=True)
        files.replace_csv(run.out / "per_class.csv", ["class", "average_precision"], rows)
    elif run.is_main:
        pairs = predictions.labels.numpy(), predictions.ranked[:, 0].numpy()
        found = Confusions.count(*pairs, len(names))
        write_tables(run.out, found, names)
    run.finish(result, {"images": images, "classes": len(names)})
    if run.is_main:
        said = classified(result, images=images, classes=len(names))
        if data.multi_label:
            columns = ("class", "average precision (%)")
            known = [None if isnan(value) else 100 * value for value in precisions.tolist()]
            rows = list(zip(names, known, strict=True))
            shown = []
        else:
            columns, rows = ("class", "images", "right (%)", "mostly taken for"), of_classes(found, names)
            plots.confusion(found, names, run.out / "confusion.png")
            shown = [
                plot(run.out / "confusion.png", "Confusions", "How often images of a class are taken for each.")
            ]
        run.report(Report("Classifier, evaluated", said, shown, [Table("Classes", columns, rows)]))


class Data(NamedTuple):
    """A dataset, the function that turns its batch into the input of the model, and its classes."""

    dataset: Dataset
    inputs: Callable[[Any], Tensor]
    class_names: list[str] | None
    multi_label: bool  # whether images have several classes


def open_data(config: Config, run: Run, saved: Loaded) -> Data:
    """Open the token store, the images with their tokenizer, or images alone if the model takes pixels."""
    kind = input_kind(saved.model)
    if kind == "pixels":
        if not config.data or config.tokenizer:
            raise UserError(f"{config.checkpoint} takes pixels: name images with --data and leave --tokenizer out")
        return pixels(config, run, input_size(saved.model) or saved.window)
    if config.labels and not config.data:
        raise UserError(f"--labels {config.labels} is for --data: leave it out, a store has its own labels")
    if (config.data is None) != (config.tokenizer is None) or (config.data and config.store):
        raise UserError(
            f"{config.checkpoint} takes tokens: expected --store, or --data and --tokenizer, got "
            f"--store {config.store} --data {config.data} --tokenizer {config.tokenizer}"
        )
    tokens = tokenized if config.data else stored
    dataset, ids, codebook, grid, class_names, multi_label = tokens(config, run)
    source = config.tokenizer or config.store or "the embedded digits"
    check_codes(codebook.to_books(), source=source, saved=saved, checkpoint=config.checkpoint)
    size = input_size(saved.model)
    window = both_sides(config.eval_window or saved.window or size or grid)
    maps = {"codebook": codebook, "size": size} if kind == "maps" else {}
    view = EvalView(window, **maps).to(run.device)
    return Data(dataset, lambda batch: view(ids(batch)), class_names, multi_label)


def pixels(config: Config, run: Run, size: tuple[int, int]) -> Data:
    """Open the images of --data; each is cropped to its center (`CentralBoxes`)."""
    source = labeled_images(config, run, RGB)
    view = EvalPixelView().to(run.device)
    dataset = ImageDataset(source, size, CentralBoxes(size))
    return Data(dataset, lambda batch: view(batch.images), source.class_names, source.labels.multi_label)


def labeled_images(config: Config, run: Run, reading: Reading) -> ImageSource:
    """Open the images of --data, with --skip-errors the readable ones. Raises UserError if one has no label."""
    rules = LabelRules(file=config.labels)
    source = open_once(run.accelerator, partial(open_source, config.data, config.split, rules))
    require_labels(source, "evaluate", config.data)
    return readable(source, run, reading=reading)


def tokenized(config: Config, run: Run) -> tuple:
    """Open the images of --data with their tokenizer; return what `stored` does."""
    tokenizer = tokenizers.load(config.tokenizer, config.tokenizer_kind).to(run.device).eval()
    spec = tokenizer.spec
    reading = reading_of_run(config.checkpoint, spec.channels)
    source = labeled_images(config, run, reading)
    dataset = ImageDataset(source, spec.image_size, reading=reading)

    def ids(batch: Pixels) -> Tensor:
        return tokenizer.encode(batch.images.float() / 255)

    return dataset, ids, tokenizer.books, spec.grid, source.class_names, source.labels.multi_label


def stored(config: Config, run: Run) -> tuple:
    """Open --store, or the embedded digits: (dataset, batch -> ids, codebook, grid, class names, multi-label)."""
    path = config.store
    if path is None:
        path = embedded(run, digits).store
    store = TokenStore(path, config.split, verify=run.accelerator.is_local_main_process)
    store.require_classes("evaluate")
    codebook, dataset = Codebook.of(store.books), TokenDataset(store)
    return dataset, lambda batch: batch.ids, codebook, store.grid, store.class_names, store.multi_label


def evaluated_classes(config: Config, saved: Loaded, data: Data) -> ClassMap | None:
    """Return the classes to evaluate, None if they are exactly those of the model.

    Raises UserError if they cannot be found among the classes of the model.
    """
    known, names, number = saved.class_names, data.class_names, saved.model.num_classes
    if known is None:
        if config.classes or (names and len(names) != number):
            what = f"--classes {config.classes}" if config.classes else f"images of {len(names):,} classes"
            raise UserError(
                f"{config.checkpoint} has {number:,} classes without names, got {what}: name images of exactly "
                "its classes, or a run on a store with class names"
            )
        return None
    chosen = read_class_names(config.classes) if config.classes else None
    if chosen is None and names in (None, known):
        return None
    return class_map(known, names or known, chosen, model=config.checkpoint)


def class_names(saved: Loaded, data: Data) -> list[str]:
    """Return the names of the model's classes, its numbers if nobody knows them."""
    return data.class_names or saved.class_names or [str(label) for label in range(saved.model.num_classes)]


def check_labels(predictions: Predictions, classes: int, checkpoint: str) -> None:
    """Raise UserError if an image has a class that the model does not have."""
    largest = int(predictions.labels.max())
    if largest >= classes:
        raise UserError(
            f"an image has class {largest}, expected 0 to {classes - 1}, the classes of {checkpoint}: name images "
            "of its classes"
        )


def of_classes(found: Confusions, names: list[str]) -> list[tuple[str, int, float | None, str | None]]:
    """Return for each class name, images, the percentage of right ones, and what most of the others are."""
    columns = (column.tolist() for column in (found.images_of, found.correct_of, found.taken_for))
    return [
        (name, images, 100 * correct / images if images else None, names[taken] if taken >= 0 else None)
        for name, images, correct, taken in zip(names, *columns, strict=True)
    ]


def write_tables(folder: Path, found: Confusions, names: list[str]) -> None:
    """Write per_class.csv, one line per class, and confusion.csv, one per pair of label and prediction."""
    classes = [
        [name, images, "" if percent is None else f"{percent:.2f}", taken or ""]
        for name, images, percent, taken in of_classes(found, names)
    ]
    files.replace_csv(folder / "per_class.csv", ["class", "images", "top1", "mostly_taken_for"], classes)
    pairs = zip(found.labels.tolist(), found.predictions.tolist(), found.images.tolist(), strict=True)
    rows = [[names[label], names[predicted], images] for label, predicted, images in pairs]
    files.replace_csv(folder / "confusion.csv", ["label", "predicted", "images"], rows)


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
