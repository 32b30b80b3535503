"""Evaluate a segmenter on tokens or images with annotations: mIoU, aAcc, mAcc, a table of classes, pictures.

    accelerate launch recipes/evaluate_segmentation.py --checkpoint runs/segment_ade20k-scenes
    accelerate launch recipes/evaluate_segmentation.py published --checkpoint RUN --store ade20k-tokens
    accelerate launch recipes/evaluate_segmentation.py published --checkpoint RUN --store ade20k-tokens \\
        --scales 0.75 1 1.25 --flip ADAPT
    accelerate launch recipes/evaluate_segmentation.py published --checkpoint RUN --data ADEChallengeData2016 \\
        --tokenizer vitvqgan.ckpt

Needs `pip install "seitpp[segmentation]"`. The checkpoint is a run of recipes/segment_ade20k.py or its model file.
With --data and --tokenizer, whole images are tokenized and then predicted in windows of tokens;
docs/segmentation.md says how their masks are read. Flip testing needs a trained TokenAdapt to mirror the tokens.
Every image is counted exactly once on any number of processes. On the default data, the synthetic scenes, an
evaluation takes seconds.
Writes config.json, result.json, per_class.csv, pictures.png and report.html into --out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from downstream.segmentation.data import SegmentedTokens, WholeImage, WholePixels, WholeTokens
from downstream.segmentation.default import FEW_SCENES, SCENES, default_scenes
from downstream.segmentation.mmseg import load_mmseg
from downstream.segmentation.sources import mask_rules
from seitpp import TokenStore, plots, tokenizers
from seitpp.books import Books
from seitpp.engine.config import RunConfig
from seitpp.engine.findings import segmented
from seitpp.engine.inputs import embedded, open_once, readable
from seitpp.engine.report import Report
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.annotated import SHORT_SIDE, open_annotated
from seitpp.images.decode import fit_short_side
from seitpp.images.masks import Layout
from seitpp.models.weights.pretrained import model_file
from seitpp.recipe import run_recipe
from seitpp.tokenizers import Kind, Tokenizer

if TYPE_CHECKING:  # needs the optional mmsegmentation
    from downstream.segmentation.model import SavedSegmenter

REPORT_IMAGES = 6  # number of images in the report


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of an evaluation."""

    checkpoint: str | None = None  # a run's folder, or a model file
    store: str | None = None  # a token store with annotations; without store and data: the scenes
    data: str | None = None  # a folder of images with masks
    tokenizer: str | None = None  # tokenizes the data; with a store it decodes the tokens for the report
    # Only with data: the arrangement of the folder, and which value of its masks is which class.
    layout: Layout | None = None
    classes: str | None = None
    ignore_label: tuple[int, ...] = ()
    background_class: bool = False
    # Kind of the tokenizer, only needed where its files do not show it (cosmos).
    tokenizer_kind: Kind | None = None
    skip_errors: bool = False  # only with data: leave out images that cannot be read; OUT/skipped.txt has them
    split: str = "validation"  # of the store or of the data
    short_side: int | None = None  # only with data: in pixels after the resize; None: that of the training
    sliding_window: int | None = None  # in tokens; None: the size of the training crops
    stride: int | None = None  # in tokens; None: two thirds of the window
    scales: tuple[float, ...] = (1.0,)  # more than one: multi-scale testing
    flip: str | None = None  # the TokenAdapt for flip testing: a run or a file; None: no flips
    workers: int | None = None  # data loading processes, per evaluating process; None: by the CPU cores


PRESETS = {"published": Config()}
PRESETS["scenes"] = replace(PRESETS["published"], preset="scenes", precision="no", workers=0)
PRESETS["smoke"] = replace(PRESETS["scenes"], preset="smoke")


def main(config: Config) -> None:
    load_mmseg()
    # Only these modules need the optional mmsegmentation, whose absence load_mmseg reports in one line.
    from downstream.segmentation.evaluation import count_pixels
    from downstream.segmentation.model import load_segmenter
    from downstream.segmentation.prediction import open_predictor

    # 1. Run: output folder and processes.
    if config.checkpoint is None:
        raise UserError("got no --checkpoint, expected a run's folder or a model file: name the one to evaluate")
    run = Run("evaluate_segmentation", config)

    # 2. Model and data, which must have the same codebook and classes.
    saved = load_segmenter(model_file(Path(config.checkpoint)))
    data = open_images(config, run, saved.short_side) if config.data else open_tokens(config, run, saved)
    check_classes(saved.class_names, data, config.checkpoint)
    predictor = open_predictor(
        saved,
        data.codebook,
        lookup=data.lookup,
        names=(config.checkpoint, data.path),
        device=run.device,
        window=config.sliding_window,
        stride=config.stride,
        scales=config.scales,
        flip=config.flip,
    )
    run.start()
    run.describe(data.about, model=predictor.model)

    # 3. Prediction and pixel counts of all images.
    def predict(image: WholeImage) -> Tensor:
        return predictor(data.ids(image.inputs), image.labels.shape[1:])

    score = count_pixels(
        predict, data.dataset, saved.class_names, accelerator=run.accelerator, workers=run.workers
    )

    # 4. Results: metrics, a table of the classes, and then pictures.
    run.print(score.table())
    result = score.summary()
    if run.is_main:
        score.write_csv(run.out / "per_class.csv")
    run.finish(result)
    if run.is_main:
        pictures = pictures_of(data, predict, num_classes=len(saved.class_names), device=run.device)
        shown = [plots.segmented_pictures(run.out, pictures)]
        classes = score.per_class()
        said = segmented(result, saved.class_names, classes["IoU"])
        table = plots.class_table(saved.class_names, classes)
        run.report(Report("Segmentation of images, evaluated", said, shown, [table]))


def pictures_of(
    data: "Data", predict: Callable[[WholeImage], Tensor], *, num_classes: int, device: torch.device
) -> dict[str, list[Tensor]]:
    """Return rows of pictures (3, h, w) of the first images: the image, truth, prediction and errors."""
    colors = plots.class_colors(num_classes)
    rows = {data.picture_name: [], "truth": [], "prediction": [], "errors": []}
    for index in range(min(REPORT_IMAGES, len(data.dataset))):
        image = data.dataset.__getitems__([index]).to(device)
        truth, prediction = image.labels[0].cpu(), predict(image)[0].cpu()
        painted = plots.paint_classes(truth, colors), plots.paint_classes(prediction, colors)
        pictures = data.picture(image.inputs).cpu(), *painted, plots.paint_errors(prediction, truth)
        for row, picture in zip(rows.values(), pictures, strict=True):
            row.append(picture)
    return rows


class Data(NamedTuple):
    """The images to evaluate, from a store or a folder, and how to show them."""

    dataset: Dataset
    ids: Callable[[Tensor], Tensor]  # inputs of an image -> ids (1, H, W)
    picture: Callable[[Tensor], Tensor]  # inputs of an image -> (3, h, w) in [0, 1]
    picture_name: str  # title of that picture in the report
    codebook: np.ndarray
    lookup: str
    class_names: list[str]
    path: str
    about: str  # the path, and how masks are read


def open_tokens(config: Config, run: Run, saved: "SavedSegmenter") -> Data:
    """Open the tokens and annotations of the store, by default of the scenes."""
    mask_rules(config)
    path, file = config.store, config.tokenizer
    if path is None:
        scenes = embedded(run, partial(default_scenes, FEW_SCENES if config.preset == "smoke" else SCENES))
        path, file = scenes.store, file or scenes.tokenizer
    store = TokenStore(path, config.split, verify=run.accelerator.is_local_main_process)
    decode = partial(decoded, tokenizers.load(file, config.tokenizer_kind)) if file else painted(store.books)
    return Data(
        dataset=WholeTokens(SegmentedTokens(store, saved.pixels_per_token)),
        ids=lambda ids: ids,
        picture=decode,
        picture_name="decoded tokens" if file else "codes",
        codebook=store.books.only_table("segmentation"),
        lookup=store.lookup,
        class_names=store.class_names,
        path=str(store.path),
        about=f"{len(store):,} images of {store.path}",
    )


def decoded(tokenizer: Tokenizer, ids: Tensor) -> Tensor:
    """Decode ids (1, H, W) to an image (3, h, w)."""
    pixels_per_token = tokenizer.spec.patch
    with tokenizer.at_size((pixels_per_token * ids.shape[1], pixels_per_token * ids.shape[2])):
        return tokenizer.decode(ids.cpu().long())[0]


def painted(books: Books) -> Callable[[Tensor], Tensor]:
    """Return a function that shows each code in its own color, for a store without a tokenizer file."""
    return lambda ids: plots.paint_codes(ids.cpu().long(), books)[0]


def open_images(config: Config, run: Run, trained_side: int | None) -> Data:
    """Open the images and masks of a folder, with the tokenizer for them; they get the size of the training."""
    if config.store or config.tokenizer is None:
        wrong = "with --store" if config.store else "without --tokenizer"
        raise UserError(f"got --data {wrong}, expected --data with --tokenizer and without --store")
    tokenizer = tokenizers.load(config.tokenizer, config.tokenizer_kind).to(run.device).eval()
    opened = open_once(run.accelerator, partial(open_annotated, config.data, config.split, mask_rules(config)))
    source = readable(opened, run)
    short_side = config.short_side or trained_side or SHORT_SIDE

    def ids(images: Tensor) -> Tensor:
        with tokenizer.at_size(tuple(images.shape[2:])):
            return tokenizer.encode(images / 255)

    size = partial(fit_short_side, short_side=short_side, multiple=tokenizer.side_multiple)
    return Data(
        dataset=WholePixels(source, size),
        ids=ids,
        picture=lambda images: images[0] / 255,
        picture_name="image",
        codebook=tokenizer.books.to_books().only_table("segmentation"),
        lookup=tokenizer.spec.lookup,
        class_names=source.class_names,
        path=config.data,
        about=str(source),
    )


def check_classes(expected: list[str], data: Data, checkpoint: str) -> None:
    """Raise UserError unless the annotations have the classes of the segmenter in the same order."""
    if data.class_names != expected:
        pairs = zip(expected, data.class_names, strict=False)
        difference = next((f"{name!r}, not {other!r}" for name, other in pairs if name != other), "in number")
        raise UserError(
            f"{data.path}: got {len(data.class_names)} classes, expected the {len(expected)} of {checkpoint} in "
            f"the same order, but they differ: {difference}; evaluate on data with the classes of the training"
        )


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="scenes")
