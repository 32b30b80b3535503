"""Predict the classes of new pictures, or with a segmenter the class of every pixel.

    accelerate launch recipes/predict.py --checkpoint runs/finetune-digits
    accelerate launch recipes/predict.py --checkpoint RUN --data photos --tokenizer tokens-tokenizer.safetensors
    accelerate launch --multi_gpu --num_processes 8 recipes/predict.py --checkpoint RUN --data photos \\
        --tokenizer tokens-tokenizer.safetensors
    accelerate launch recipes/predict.py --checkpoint runs/segment_ade20k-published --data photos \\
        --tokenizer vitvqgan.ckpt

--checkpoint is the folder of a run of finetune, seit_train or segment_ade20k, or a model file; one that was fine-
tuned on pixels takes no --tokenizer. --data is whatever tokenize_images reads: labels are not needed. Pictures
are read as those of the run's store were. The recipe writes OUT/predictions.csv: name, class and probability of
the five most likely classes, the most likely first; for a model of several classes an image, each has a
probability of its own. For a segmenter it writes OUT/labels/NAME.png at the picture's own size, a palette PNG
whose value v is class v, with OUT/legend.png and OUT/classes.txt. Without --data, the held-out digits are
classified, in seconds. A picture that cannot be read stops it; with --skip-errors it is listed in
OUT/skipped.txt. Speed on a GPU is not measured.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object

from downstream.segmentation.mmseg import load_mmseg
from seitpp import files
from seitpp.engine.config import PictureConfig
from seitpp.engine.inputs import reading_of_run
from seitpp.engine.pictures import Pictures, finish, open_data, open_pictures
from seitpp.engine.report import Report
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.annotated import SHORT_SIDE
from seitpp.images.sources import ImageSource
from seitpp.models import MTM, Loaded, load_pretrained
from seitpp.models.weights.pretrained import model_file
from seitpp.recipe import run_recipe
from seitpp.tensors import header_keys
from seitpp.tokenizers import Tokenizer

TOP = 5  # classes of a picture


PRESETS = {"published": PictureConfig()}
PRESETS["digits"] = replace(PRESETS["published"], preset="digits", precision="no", workers=0)
PRESETS["smoke"] = replace(PRESETS["digits"], preset="smoke")


def main(config: PictureConfig) -> None:
    # 1. Run: the output folder and the processes.
    run = Run("predict", config)

    # 2. Pictures, and the model with its tokenizer.
    source, tokenizer = open_data(config, run)
    segments = "segmenter" in header_keys(model_file(Path(config.checkpoint), config.ema))
    write = (open_segmenter if segments else open_classifier)(run, source, tokenizer)
    run.start()
    run.describe(f"{len(source):,} pictures; left out: {source.left_out}")

    # 3. Predictions, each process for its part of the pictures.
    finish(run, write(), len(source))
    if run.is_main:
        written = "labels, one map a picture" if segments else "predictions.csv"
        run.report(Report("Pictures, predicted", [f"The predictions are in {written}."]))


def open_classifier(run: Run, source: ImageSource, tokenizer: Tokenizer | None) -> Callable[[], list[str]]:
    """Return a function that writes OUT/predictions.csv and returns a line for each unreadable picture."""
    config = run.config
    saved = load_pretrained(config.checkpoint, config.ema)
    if isinstance(saved.model, MTM):
        raise UserError(f"{config.checkpoint} has no classification head: fine-tune it with recipes/finetune.py")
    return partial(write_table, open_pictures(source, saved, tokenizer=tokenizer, run=run), saved, run)


def write_table(pictures: Pictures, saved: Loaded, run: Run) -> list[str]:
    """Write OUT/predictions.csv; return a line for each picture of this process that could not be read."""
    table = gather_object(list(rows(pictures, saved, run)))
    if run.is_main:
        best = min(TOP, saved.model.num_classes)
        more = [f"{column}_{place}" for place in range(2, best + 1) for column in ("class", "probability")]
        files.replace_csv(run.out / "predictions.csv", ["name", "class", "probability", *more], table)
        for name, title, probability, *_ in table[:TOP]:
            print(f"{name}: {title} {probability}")
        print(f"{len(table):,} pictures in {run.out / 'predictions.csv'}")
    return pictures.errors


@torch.no_grad()
def rows(pictures: Pictures, saved: Loaded, run: Run) -> Iterator[list[str]]:
    """Yield the row of each picture of this process: its name, then its likeliest classes and probabilities."""
    model = saved.model.to(run.device).eval()
    classes = saved.class_names or [str(number) for number in range(model.num_classes)]
    for names, inputs in pictures:
        with run.accelerator.autocast():
            logits = model(inputs).float()
        probabilities = logits.sigmoid() if saved.multi_label else logits.softmax(dim=1)
        best = probabilities.topk(min(TOP, len(classes)), dim=1)
        for name, numbers, values in zip(names, best.indices.tolist(), best.values.tolist(), strict=True):
            cells = [[classes[number], f"{value:.4f}"] for number, value in zip(numbers, values, strict=True)]
            yield [name, *(cell for pair in cells for cell in pair)]


def open_segmenter(run: Run, source: ImageSource, tokenizer: Tokenizer | None) -> Callable[[], list[str]]:
    """Return a function that writes OUT/labels/NAME.png and returns a line for each unreadable picture."""
    load_mmseg()
    # These modules import the optional mmsegmentation; without it, load_mmseg has raised an error of one line.
    from downstream.segmentation.model import load_segmenter
    from downstream.segmentation.prediction import open_predictor, write_label_maps

    config = run.config
    if tokenizer is None:
        raise UserError(f"{config.checkpoint} is a segmenter of tokens: name its tokenizer with --tokenizer")
    saved = load_segmenter(model_file(Path(config.checkpoint), config.ema))
    predictor = open_predictor(
        saved,
        tokenizer.books.to_books().only_table("segmentation"),
        lookup=tokenizer.spec.lookup,
        names=(config.checkpoint, config.tokenizer or "the digits"),
        device=run.device,
    )
    return partial(
        write_label_maps,
        predictor,
        source,
        run.out,
        tokenizer=tokenizer,
        reading=reading_of_run(config.checkpoint, tokenizer.spec.channels),
        short_side=saved.short_side or SHORT_SIDE,
        skip_errors=config.skip_errors,
        rank=run.accelerator.process_index,
        ranks=run.accelerator.num_processes,
    )


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
