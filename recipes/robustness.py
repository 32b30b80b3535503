"""Measure how robust a classifier is to corruptions, other images of its classes, and attacks on the pixels.

    accelerate launch recipes/robustness.py
    accelerate launch recipes/robustness.py --checkpoint RUN --data imagenet --split val \
        --tokenizer tokenizer.safetensors --imagenet-r imagenet-r --imagenet-v2 imagenetv2-matched-frequency
    accelerate launch recipes/robustness.py --checkpoint PIXELS --data imagenet --split val
    accelerate launch recipes/robustness.py --checkpoint RUN --data imagenet --split val \
        --tokenizer tokenizer.safetensors --suite attacks --attack standard
    accelerate launch recipes/robustness.py --checkpoint RUN --data imagenet --split val \
        --tokenizer tokenizer.safetensors --out runs/robustness --resume

Images are corrupted and attacked before they are tokenized. A model that was fine-tuned on pixels takes the same
command without --tokenizer. Suite corruptions: the 15 of ImageNet-C and gaussian_blur at 5 severities, with mCE,
or with --imagenet-c images that are corrupted already. Suite shift: the sets that flags name. Suite attacks: PGD
and AutoAttack with straight-through gradients, Square, which sees none, and PGD through a softmax relaxation.
Without arguments a small classifier of the embedded digits, trained into the cache on first use, is evaluated, in
minutes on a CPU. To corrupt ImageNet's 50,000 images takes 16 CPU hours; no accuracy was measured there. The SeiT
papers report robustness, but no severities, bounds or steps. docs/results.md has what was measured on the digits.
The recipe reads images and a model, and writes config.json, metrics.jsonl (each finished row; --resume goes on
after them), result.json and corrupted.png into --out. It trains nothing else. It needs pip install
"seitpp[robustness]".
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from accelerate.utils import tqdm

from downstream.robustness.attacks import QUERIES
from downstream.robustness.classifiers import check_differentiable
from downstream.robustness.corruptions import (
    ALEXNET,
    CORRUPTIONS,
    SEVERITIES,
    CorruptedImages,
    Corruption,
    check_corruptible,
    mean_corruption_error,
)
from downstream.robustness.evaluation import (
    AttackSettings,
    CleanTokens,
    Rows,
    attack_by_auto_attack,
    attack_by_pgd,
    attack_row,
    score,
)
from downstream.robustness.extra import RobustnessError, load_extra
from downstream.robustness.opening import Opened, limit_to, open_clean, open_model
from downstream.robustness.pictures import corrupted_rows
from downstream.robustness.sets import NUMBERED, TITLES, list_corrupted, map_classes, open_set
from seitpp import plots
from seitpp.data.dataset import Chosen
from seitpp.engine.config import RunConfig
from seitpp.engine.evaluate import ClassMap
from seitpp.engine.findings import withstood
from seitpp.engine.inputs import open_once
from seitpp.engine.report import Report, Table
from seitpp.engine.run import Run
from seitpp.images.batches import ImageDataset
from seitpp.images.sources import open_source
from seitpp.recipe import run_recipe
from seitpp.tokenizers import Kind

Suite = Literal["corruptions", "shift", "attacks"]
PAPERS = CORRUPTIONS[:16]  # those of mCE, and gaussian_blur, which the papers have


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of an evaluation of robustness: the model, the images and what is done to them."""

    precision: Literal["no", "bf16", "fp16"] = "no"  # As attacks compute, so that all figures are of one model.
    resume: bool = False  # Go on after the finished rows of the run in --out, or start it if there is none.
    checkpoint: str | None = None  # Folder of a run, or a model file. None, and no --data: one of the digits.
    ema: bool = True  # Evaluate the moving average of the weights if the run has one.
    data: str | None = None  # Clean images, as for recipes/tokenize_images.py. None: the embedded digits.
    split: str | None = "validation"  # Split of --data. None: all of it.
    skip_errors: bool = False  # Leave out images of --data that cannot be read, and list them in OUT/skipped.txt.
    labels: str | None = None  # File with the labels of --data, as for recipes/tokenize_images.py.
    tokenizer: str | None = None  # Tokenizer of the model: a file or a folder. None: the model takes pixels.
    # Kind of the tokenizer, only needed where its files do not show it (cosmos).
    tokenizer_kind: Kind | None = None
    suite: tuple[Suite, ...] = ("corruptions", "shift", "attacks")  # What to evaluate.
    corruptions: tuple[Corruption, ...] = PAPERS  # mCE needs the first 15.
    imagenet_c: str | None = None  # Folder of ImageNet-C: its images are evaluated, and none are corrupted.
    imagenet_r: str | None = None  # Folder of ImageNet-R.
    imagenet_a: str | None = None  # Folder of ImageNet-A.
    imagenet_sketch: str | None = None  # Folder of ImageNet-Sketch.
    imagenet_v2: str | None = None  # Folder of one of the three sets of ImageNet-V2.
    eps: tuple[float, ...] = (1, 2, 4, 8)  # Largest change of a pixel value by an attack, of 255.
    # PGD alone ("pgd"); or AutoAttack as well, with apgd-ce, apgd-t, Square, and in "standard" fab-t.
    attack: Literal["pgd", "custom", "standard"] = "custom"
    attack_images: int = 1000  # Number of images that are attacked, evenly spread over the clean ones.
    square_queries: int = QUERIES  # Queries of Square for an image.
    workers: int | None = None  # Processes that read and corrupt, per evaluating one. None: by the CPU cores.


PRESETS = {"published": Config()}
PRESETS["digits"] = replace(
    PRESETS["published"], preset="digits", eps=(2, 8), attack_images=64, square_queries=500, workers=0
)
PRESETS["smoke"] = replace(
    PRESETS["digits"],
    preset="smoke",
    corruptions=("gaussian_noise", "fog"),
    eps=(8,),
    attack="pgd",
    attack_images=16,
)


def main(config: Config) -> None:
    # 1. Run, model and clean images.
    check_settings(config)
    run = Run("robustness", config)
    opened = open_model(config, run)
    source = open_clean(config, run, opened.reading)
    clean, classes = opened.read(source), opened.classes_of(source, config.data or "the digits")
    check_suites(config, run, opened)
    sets = open_sets(config, run, opened)
    run.start()
    run.describe(
        f"{len(clean):,} images of {opened.size[0]} x {opened.size[1]} pixels", model=opened.evaluated.model
    )
    rows, tokens = Rows(run), CleanTokens()

    # 2. Clean images. Their tokens are not kept on disk, so a resumed run tokenizes them again.
    result: dict[str, Any] = score(opened.evaluated, clean, classes, see=tokens.keep)
    run.print(f"clean {result['top1']:6.2f} % of {result['images']:,} images")

    # 3. Corruptions, on the fly or from a folder.
    if "corruptions" in config.suite and config.imagenet_c:
        result["imagenet_c"] = of_corruptions(run, corrupted_already(config, run, opened, rows=rows))
    elif "corruptions" in config.suite:
        scores = corrupted_now(config, opened, clean, classes=classes, tokens=tokens, rows=rows)
        result["corruptions"] = of_corruptions(run, scores)

    # 4. Other images of the classes.
    for name, (images, among) in sets.items():
        result[name] = rows.get(name, partial(score, opened.evaluated, images, among))
        run.print(f"{TITLES[name]} {result[name]['top1']:6.2f} % of {result[name]['images']:,} images")

    # 5. Attacks.
    if "attacks" in config.suite:
        result["attacks"] = attacked(config, run, opened, clean=clean, classes=classes, rows=rows)

    # 6. Results, and then a picture.
    run.finish(result)
    if not run.is_main:
        return
    shown = []
    if "corruptions" in config.suite and not config.imagenet_c:
        where = {"seed": config.seed, "device": run.device}
        pictures = corrupted_rows(clean, opened.evaluated.classifier, config.corruptions, **where)
        plots.picture_grid(pictures, run.out / "corrupted.png")
        text = "The same images under each corruption."
        shown.append(plots.shown_rows(pictures, run.out / "corrupted.png", "Corrupted images", text=text))
    run.report(Report("Robustness of a classifier", withstood(result), shown, tables_of(result)))


def tables_of(result: dict[str, Any]) -> list[Table]:
    """Return the tables of corruptions and of attacks for the report, in percent."""
    tables = []
    if found := result.get("corruptions") or result.get("imagenet_c"):
        rows = [[name, *(row["top1"] for row in values.values())] for name, values in found["table"].items()]
        severities = [f"severity {number}" for number in next(iter(found["table"].values()))]
        tables.append(Table("Accuracy under corruptions (%)", ("corruption", *severities), rows))
    bounds = {bound: row for bound, row in result.get("attacks", {}).items() if bound != "images"}
    rows = [[bound, name, value] for bound, row in bounds.items() for name, value in row["correct"].items()]
    return [*tables, Table("Accuracy under attacks (%)", ("largest change", "attack", "right"), rows)]


def check_settings(config: Config) -> None:
    """Raise RobustnessError for settings that contradict each other."""
    sets = [name for name in (*TITLES, "imagenet_c") if getattr(config, name)]
    if sets and config.data is None:
        flag = sets[0].replace("_", "-")
        raise RobustnessError(f"--{flag} without --data: name the clean images of the model's classes, too")
    if config.data is None and (config.labels or config.tokenizer):
        flag = "labels" if config.labels else "tokenizer"
        raise RobustnessError(f"--{flag} is for --data: name the images, or leave it out")
    for name in sets:
        needs: Suite = "corruptions" if name == "imagenet_c" else "shift"
        if needs not in config.suite:
            flag = name.replace("_", "-")
            raise RobustnessError(
                f"--{flag} belongs to suite {needs}, got --suite {' '.join(config.suite)}: add it"
            )
    if config.suite == ("shift",) and not sets:
        raise RobustnessError("--suite shift without a set: name its folder, for example with --imagenet-r")


def open_sets(config: Config, run: Run, opened: Opened) -> dict[str, tuple[ImageDataset, ClassMap]]:
    """Open the sets that are named, each with its own classes among those of the model."""
    sets = {}
    for name in TITLES:
        if folder := getattr(config, name):
            source = open_once(run.accelerator, partial(open_set, name, folder))
            known = {"classes": opened.num_classes, "where": (folder, opened.name), "numbered": name == NUMBERED}
            sets[name] = opened.read(source), map_classes(source.class_names, opened.class_names, **known)
    return sets


def check_suites(config: Config, run: Run, opened: Opened) -> None:
    """Raise RobustnessError for what a suite needs and the model, its images or the installation do not have."""
    if config.imagenet_c:
        folders = open_once(run.accelerator, partial(list_corrupted, config.imagenet_c))
        first = str(folders[0].folder)
        opened.classes_of(open_once(run.accelerator, partial(open_source, first)), first)
    elif "corruptions" in config.suite:
        check_corruptible(opened.size, opened.channels)
    if "attacks" in config.suite:
        load_extra("pyautoattack")
        if opened.evaluated.has_tokens:
            check_differentiable(opened.evaluated.classifier.tokenizer, run.device)


# The top-1 accuracy and the changed tokens of a corruption at a severity.
Scores = dict[tuple[str, int], dict[str, Any]]


def corrupted_now(
    config: Config,
    opened: Opened,
    clean: ImageDataset,
    *,
    classes: ClassMap | None,
    tokens: CleanTokens,
    rows: Rows,
) -> Scores:
    """Corrupt the clean images in every way and evaluate them."""

    def compute(name: Corruption, severity: int) -> dict[str, Any]:
        images = CorruptedImages(clean, name, severity, seed=config.seed)
        values = score(opened.evaluated, images, classes, see=tokens.compare)
        return {**values, **({"tokens_changed": 100 * tokens.fraction()} if opened.evaluated.has_tokens else {})}

    pairs = [(name, severity) for name in config.corruptions for severity in SEVERITIES]
    bar = tqdm(pairs, desc="corruptions", unit="row")
    return {pair: rows.get(f"{pair[0]} {pair[1]}", partial(compute, *pair)) for pair in bar}


def corrupted_already(config: Config, run: Run, opened: Opened, *, rows: Rows) -> Scores:
    """Evaluate the folders of ImageNet-C."""

    def compute(folder: str) -> dict[str, Any]:
        source = open_once(run.accelerator, partial(open_source, folder))
        with opened.read_cropped(source) as images:
            return score(opened.evaluated, images, opened.classes_of(source, folder))

    folders = open_once(run.accelerator, partial(list_corrupted, config.imagenet_c))
    bar = tqdm(folders, desc="ImageNet-C", unit="row")
    return {
        (name, severity): rows.get(f"ImageNet-C {name} {severity}", partial(compute, str(folder)))
        for name, severity, folder in bar
    }


def of_corruptions(run: Run, scores: Scores) -> dict[str, Any]:
    """Return and print the table of corruptions and severities, their mean, and the mCE if all 15 are there."""
    names = dict.fromkeys(name for name, _ in scores)
    table = {
        name: {str(severity): scores[name, severity] for severity in SEVERITIES if (name, severity) in scores}
        for name in names
    }
    for name, values in table.items():
        run.print(f"{name:18}" + " ".join(f"{row['top1']:6.2f}" for row in values.values()))
    errors = {name: [1 - row["top1"] / 100 for row in values.values()] for name, values in table.items()}
    counted = [row["top1"] for name, values in table.items() for row in values.values() if name in ALEXNET]
    found = {
        "mean_top1": float(np.mean(counted)) if counted else None,
        "mCE": mean_corruption_error(errors),
        "table": table,
    }
    run.print(f"mean_top1 {found['mean_top1']}, mCE {found['mCE']}")
    return found


def attacked(
    config: Config,
    run: Run,
    opened: Opened,
    *,
    clean: ImageDataset,
    classes: ClassMap | None,
    rows: Rows,
) -> dict[str, Any]:
    """Attack some of the clean images with every bound; return the percentages of correct images side by side."""
    number = min(config.attack_images, len(clean))
    images = Chosen(clean, np.linspace(0, len(clean) - 1, number).round().astype(int))
    limit_to(opened, classes, run.device)
    found: dict[str, Any] = {"images": number}
    for eps in config.eps:
        bound = f"{eps:g}/255"
        settings = AttackSettings(eps / 255, config.seed, config.square_queries)
        attacks = {"PGD": attack_by_pgd(opened.evaluated, settings)}
        if config.attack != "pgd":
            attacks["AutoAttack"] = attack_by_auto_attack(opened.evaluated, settings, config.attack)
        columns, changed = {}, {}
        for name, attack in attacks.items():
            title = f"{name} {bound}"
            where = {"classes": classes, "title": title}
            row = rows.get(title, partial(attack_row, opened.evaluated, images, attack, **where))
            columns, changed = columns | row["correct"], changed | row["tokens_changed"]
        run.print(f"{bound}: " + ", ".join(f"{name} {percent:.2f}" for name, percent in columns.items()))
        found[bound] = {"correct": columns, **({"tokens_changed": changed} if changed else {})}
    return found


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
