"""Evaluate a segmenter on a token store with annotations, or on images: mIoU, aAcc, mAcc, every class, pictures.

    accelerate launch recipes/evaluate_segmentation.py --checkpoint runs/segment_ade20k-scenes
    accelerate launch recipes/evaluate_segmentation.py published --checkpoint RUN --store ade20k-tokens
    accelerate launch recipes/evaluate_segmentation.py published --checkpoint RUN --store ade20k-tokens \\
        --scales 0.75 1 1.25 --flip ADAPT
    accelerate launch recipes/evaluate_segmentation.py published --checkpoint RUN --data ADEChallengeData2016 \\
        --tokenizer vitvqgan.ckpt

Needs `pip install "seitpp[segmentation]"`. A checkpoint is a run of recipes/segment_ade20k.py or its model file.
With --data and --tokenizer the way is pixels -> tokens -> windows of tokens -> pixels. A flip is a mirror image of
the tokens, which only a trained TokenAdapt knows. Every image counts once on any number of processes; on the
scenes, the default, it takes seconds.
Writes config.json, result.json, per_class.csv, pictures.png and report.html into --out. Trains nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from downstream.segmentation.data import SegmentedTokens
from downstream.segmentation.default import FEW_SCENES, SCENES, default_scenes
from downstream.segmentation.mmseg import load_mmseg
from seitpp import TokenStore, plots, tokenizers
from seitpp.engine.config import RunConfig
from seitpp.engine.inputs import check_codebook, embedded, open_tokenadapt
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.annotated import AnnotatedSource
from seitpp.images.decode import fit_short_side
from seitpp.models.weights.pretrained import model_file
from seitpp.recipe import run_recipe
from seitpp.tokenizers import Tokenizer

SHOWN = 6  # images of the report


@dataclass(frozen=True)
class Config(RunConfig):
    """What to evaluate, on what, and how."""

    checkpoint: str | None = None  # a run's folder, or a model file
    store: str | None = None  # a token store with annotations; the scenes where neither store nor data is named
    data: str | None = None  # images and annotations in the layout of ADE-20k
    tokenizer: str | None = None  # makes tokens of the data; with a store it decodes tokens for the report
    split: str = "validation"  # of the store or of the data
    short_side: int = 512  # of the data, in pixels
    sliding_window: int | None = None  # in tokens; None: that of the training
    stride: int | None = None  # in tokens; None: two thirds of the window
    scales: tuple[float, ...] = (1.0,)  # more than one: multi-scale testing
    flip: str | None = None  # flip testing through this TokenAdapt, as recipes/finetune.py takes it
    workers: int = 8


PRESETS = {"published": Config()}
PRESETS["scenes"] = replace(PRESETS["published"], preset="scenes", precision="no", workers=0)
PRESETS["smoke"] = replace(PRESETS["scenes"], preset="smoke", short_side=64)


def main(config: Config) -> None:
    load_mmseg()
    from downstream.segmentation.evaluation import WholeImage, count_pixels, mirror_whole, stride_of
    from downstream.segmentation.inference import predict_labels, slide_logits, view_scores
    from downstream.segmentation.model import load_segmenter
    from downstream.segmentation.view import TokenAdaptMirror

    # 1. Run: the output folder and the launch.
    if config.checkpoint is None:
        raise UserError("nothing to evaluate: name a run's folder or a model file with --checkpoint")
    run = Run("evaluate_segmentation", config)

    # 2. Model and data, which must agree in codebook and classes.
    saved = load_segmenter(model_file(Path(config.checkpoint)))
    model = saved.model.to(run.device)
    data = open_images(config, run) if config.data else open_tokens(config, run, saved.patch)
    if saved.codebook:
        check_codebook(data.codebook, data.path, saved.codebook, config.checkpoint)
    check_classes(saved.class_names, data, config.checkpoint)
    codebook = torch.from_numpy(data.codebook).to(run.device)
    window = config.sliding_window or saved.window[0]
    windows = window, stride_of(window, config.stride), saved.patch
    mirror = None
    if config.flip:
        adapt = open_tokenadapt(config.flip, data.codebook, data.path)
        mirror = mirror_whole(
            TokenAdaptMirror(codebook, window, adapt).to(run.device), codebook, window, data.lookup
        )
    run.start()
    run.describe(f"{len(data.dataset):,} images of {data.path}", model=model)

    # 3. Every pixel of every image once.
    def predict(image: WholeImage) -> Tensor:
        ids = data.ids(image.inputs)
        if config.scales == (1.0,) and mirror is None:
            scores = slide_logits(model, model.backbone.from_ids(ids, codebook), *windows)
        else:
            scores = view_scores(model, ids, codebook, *windows, config.scales, mirror, data.lookup)
        return predict_labels(scores, image.labels.shape[1:])

    score = count_pixels(predict, data.dataset, saved.class_names, run.accelerator, config.workers)

    # 4. Proof: figures, a table by class, and pictures.
    run.print(score.table())
    result = score.summary()
    if run.is_main:
        score.write_csv(run.out / "per_class.csv")
        pictures = pictures_of(data, predict, len(saved.class_names), run.device)
        plots.write_segmentation_report(
            run.out,
            result=result,
            class_names=saved.class_names,
            per_class=score.per_class(),
            pictures=pictures,
        )
    run.finish(result)


def pictures_of(
    data: "Data", predict: Callable[[NamedTuple], Tensor], classes: int, device: torch.device
) -> dict[str, list[Tensor]]:
    """Rows of pictures (3, h, w) of the first images: what they show, truth, prediction, errors."""
    colors = plots.class_colors(classes)
    rows = {data.shown: [], "truth": [], "prediction": [], "errors": []}
    for index in range(min(SHOWN, len(data.dataset))):
        image = data.dataset.__getitems__([index]).to(device)
        truth, found = image.labels[0].cpu(), predict(image)[0].cpu()
        painted = plots.paint_classes(truth, colors), plots.paint_classes(found, colors)
        pictures = data.picture(image.inputs).cpu(), *painted, plots.paint_errors(found, truth)
        for row, picture in zip(rows.values(), pictures, strict=True):
            row.append(picture)
    return rows


class Data(NamedTuple):
    """Images of a store or of a folder."""

    dataset: Dataset
    ids: Callable[[Tensor], Tensor]  # of the inputs of an image, (1, H, W)
    picture: Callable[[Tensor], Tensor]  # of the inputs of an image, (3, h, w) in [0, 1]
    shown: str  # what that picture is
    codebook: np.ndarray
    lookup: str
    class_names: list[str]
    path: str


def open_tokens(config: Config, run: Run, patch: int) -> Data:
    """Tokens and annotations of the named store, or of the scenes."""
    from downstream.segmentation.evaluation import WholeTokens

    path, file = config.store, config.tokenizer
    if path is None:
        scenes = embedded(run, partial(default_scenes, FEW_SCENES if config.preset == "smoke" else SCENES))
        path, file = scenes.store, file or scenes.tokenizer
    store = TokenStore(path, config.split, verify=run.accelerator.is_local_main_process)
    decode = partial(decoded, tokenizers.load(file)) if file else painted(store.codebook)
    shown = "decoded tokens" if file else "codes"
    dataset = WholeTokens(SegmentedTokens(store, patch))
    return Data(
        dataset, lambda ids: ids, decode, shown, store.codebook, store.lookup, store.class_names, str(store.path)
    )


def decoded(tokenizer: Tokenizer, ids: Tensor) -> Tensor:
    """The image (3, h, w) of ids (1, H, W)."""
    patch = tokenizer.spec.patch
    with tokenizer.at_size((patch * ids.shape[1], patch * ids.shape[2])):
        return tokenizer.decode(ids.cpu().long())[0]


def painted(codebook: np.ndarray) -> Callable[[Tensor], Tensor]:
    """Codes in colors, for a store whose tokenizer is not named."""
    return lambda ids: plots.paint_codes(ids.cpu().long(), torch.from_numpy(codebook))[0]


def open_images(config: Config, run: Run) -> Data:
    """Images and annotations of a folder, through a tokenizer."""
    from downstream.segmentation.evaluation import WholePixels

    if config.store or config.tokenizer is None:
        raise UserError("--data goes with --tokenizer, which makes tokens of it, and without --store")
    tokenizer = tokenizers.load(config.tokenizer).to(run.device).eval()
    source = AnnotatedSource(config.data, config.split)

    def ids(images: Tensor) -> Tensor:
        with tokenizer.at_size(tuple(images.shape[2:])):
            return tokenizer.encode(images / 255)

    size = partial(fit_short_side, short_side=config.short_side, multiple=tokenizer.side_multiple)
    codebook = tokenizer.codebook.detach().cpu().numpy()
    return Data(
        WholePixels(source, size),
        ids,
        lambda images: images[0] / 255,
        "image",
        codebook,
        tokenizer.spec.lookup,
        source.class_names,
        config.data,
    )


def check_classes(known: list[str], data: Data, checkpoint: str) -> None:
    """Raise UserError unless the annotations have the classes that the segmenter knows, in their order."""
    if data.class_names != known:
        pairs = zip(known, data.class_names, strict=False)
        different = next((f"{name!r}, not {other!r}" for name, other in pairs if name != other), "more or fewer")
        raise UserError(
            f"{data.path} has {len(data.class_names)} classes, {checkpoint} knows {len(known)}, the first that "
            f"differs is {different}: expected the same classes in the same order"
        )


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="scenes")
