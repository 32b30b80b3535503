"""Tokenize images into a token store of about one kilobyte per image.

    accelerate launch recipes/tokenize_images.py --data photos --out tokens
    accelerate launch recipes/tokenize_images.py --data photos --tokenizer tokenizer.safetensors --out tokens
    accelerate launch --multi_gpu --num_processes 8 recipes/tokenize_images.py published --data imagenet \\
        --source-split train --tokenizer vitvqgan.ckpt --compact --out imagenet-tokens
    accelerate launch recipes/tokenize_images.py published --data imagenet/val --labels LOC_val_solution.csv \\
        --split validation --tokenizer imagenet-tokens-tokenizer.safetensors --out imagenet-tokens
    accelerate launch recipes/tokenize_images.py --data photos --tokenizer vitvqgan.ckpt --out photos-tokens \\
        --codebook codebook.ckpt
    accelerate launch recipes/tokenize_images.py ade20k --data ADEChallengeData2016 --tokenizer vitvqgan.ckpt \\
        --out ade20k-tokens
    accelerate launch recipes/tokenize_images.py ade20k --data ADEChallengeData2016 --tokenizer vitvqgan.ckpt \\
        --out ade20k-tokens --source-split validation --split validation
    accelerate launch recipes/tokenize_images.py imagenet5m --data imagenet --source-split train \\
        --tokenizer vitvqgan.ckpt --compact --label-maps relabel_imagenet --out imagenet5m-tokens
    accelerate launch recipes/tokenize_images.py --set flowers102 --data flowers-102 --tokenizer vitvqgan.ckpt \\
        --out flowers102-tokens
    accelerate launch recipes/tokenize_images.py published --data photos --tokenizer vitvqgan.ckpt --out tokens \\
        --task 3 --tasks 100  # on any machine, in any order; when all have ended: seitpp finish tokens

The recipe reads a folder of images, Parquet files, webdataset tars, a data set on disk or hf://owner/name. It
says what it took, where the labels are from, and what it left out and why; the card of the store has the same.
Every twentieth image goes to the split validation, unless --hold-out says another number, or a split is named with
--split or --source-split. With --splits, each split of the data becomes one of the store. An image without a label
is stored without one. Where no tokenizer is named, a small one (patch_kmeans) is fitted to some of the images.
A folder with images/ and annotations/ is read as ADE-20k: the store keeps the grid of each image and its
annotation, lossless. If the command is interrupted, the same command continues after the last finished shard and
writes the same bytes, also on another number of processes. With --skip-errors, no unreadable image stops it. With
--compact the store keeps only the codes that its split `train` uses, the most frequent first, as the published
token sets do. With --codebook it keeps the codes of a released codebook in their order, so that official models
accept the ids. The tokenizer with these codes, or the one fitted here, is saved as OUT-tokenizer.safetensors, for
--tokenizer of other commands. With --set, --data is the folder of a fine-grained data set as its authors
distribute it, and both of its splits are written. With --crops N (preset imagenet5m: 5) each image of the split
train becomes N random resized crops, each an image of the store, and any number of processes makes the same ones.
With --task I --tasks N, the command writes its part of the shards, and when all tasks have ended `seitpp finish
OUT` publishes the bytes that one process would have. With --out alone, the embedded digits are tokenized, in
seconds. The speed of `published` and `ade20k` on a GPU is not measured. The recipe trains no model.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch.utils.data import DataLoader

from downstream.finegrained.sets import SetName, differences, read_set
from seitpp import TokenStore, files, tokenizers
from seitpp.augment import Crops, RandomBoxes
from seitpp.data.digits import DigitsSource, digits
from seitpp.engine import peers
from seitpp.engine.config import Choice, settings_table
from seitpp.engine.inputs import open_once
from seitpp.engine.next_steps import block, next_steps
from seitpp.engine.system import loader_workers
from seitpp.errors import UserError, escaped
from seitpp.images.annotated import (
    SHORT_SIDE,
    AnnotatedSource,
    has_annotations,
    open_annotated,
    open_annotated_splits,
)
from seitpp.images.batches import DecodedImages, ImageRecord, already_a_batch
from seitpp.images.decode import Reading, Size, fit_short_side
from seitpp.images.inventory import describe, digest, inventory
from seitpp.images.label_maps import LabelMaps
from seitpp.images.labels import LabelRules, read_class_names
from seitpp.images.layouts import Layout
from seitpp.images.masks import MaskRules
from seitpp.images.sources import ImageSource, hold_out, open_every_split, open_source
from seitpp.images.tables import DatasetSource
from seitpp.recipe import run_recipe
from seitpp.store import SplitStaging, layout
from seitpp.store.bucket import is_bucket
from seitpp.store.outgoing import BucketStaging, Target
from seitpp.store.release import read_codebook
from seitpp.tokenizers import Kind, Tokenizer, TokenizerError
from seitpp.tokenizers.encoding import encode
from seitpp.tokenizers.finishing import finish_split, save_plan, sole_writer
from seitpp.tokenizers.fitting import fit_to_source


@dataclass(frozen=True)
class Config:
    """Settings of tokenization: the images, the tokenizer and the split of the store."""

    # Folder, .parquet or .tar file, hf://owner/name or s3://bucket/folder. None: the embedded digits.
    data: str | None = None
    set: SetName | None = None  # Name of the fine-grained data set in the folder --data. None: other images.
    source_split: str | None = None  # Split of --data to read. None: all of it.
    splits: bool = False  # Read every split of --data, and write each under its own name.
    hold_out: int = 20  # Every how many images one goes to the split validation, where no split is named; 0: none.
    labels: str | None = None  # File with the label of every image by its name: CSV, TSV, words, JSON, JSON lines.
    label_column: str | None = None  # Column of a table with the labels. None: label, or the only one that can be.
    label_key: str | None = None  # Key of the labels in the JSON files of a tar. None: label, or one like it.
    classes: str | None = None  # File with one class a line, or a store: the classes in their order.
    ignore_label: tuple[int, ...] = ()  # Values of masks that are no class. (): as their layout has it.
    background_class: bool = False  # Value 0 of masks is a class of its own, the first.
    layout: Layout | None = None  # How images and masks are arranged. None: recognized by the names of folders.
    unlabeled: Literal["refuse", "keep"] = "refuse"  # Images without a label among others that have one.
    resize: Literal["squash", "center_crop", "pad"] = "squash"  # How images of another aspect ratio are fitted.
    crops: int | None = None  # Random crops of each image of the split train. None: the whole image.
    crop_scale: tuple[float, float] = (0.08, 1.0)  # Range of the area of these crops, as fractions of the image.
    label_maps: str | None = (
        None  # Folder of ReLabel's label maps, the labels of crops. None: those of the images.
    )
    seed: int = 0  # Seed of the crops.
    # Values that become black and white. None: the range of 8 or 16 bits.
    intensity: tuple[float, float] | None = None
    scaled_decoding: bool = False  # Decode large JPEGs at a half, a quarter or an eighth: faster, other ids.
    tokenizer: str | None = None  # Tokenizer file. None: one fitted to the images, or that of the digits.
    tokenizer_kind: Kind | None = None  # Kind of the tokenizer, only where its files do not show it (cosmos).
    compact: bool = False  # Keep only the codes that the split train uses, code 0 the most frequent.
    # Keep only the codes of this file: a released codebook.ckpt, or the .safetensors codebook of a store.
    codebook: str | None = None
    out: str | None = None  # Folder of the store, or its URL in a bucket; always needed.
    split: str | None = None  # Split of the store that is written. None: train, and what is held out.
    # Short side in pixels, so that each image has its own grid. None: the tokenizer's size; with annotations 512.
    short_side: int | None = None
    task: int | None = None  # This task, 0 .. --tasks - 1, which waits for no other. None: do all of it.
    tasks: int | None = None  # Number of tasks; `seitpp finish OUT` puts together what they write.
    codec: str = "ans"  # Codec of the ids: escape, packed, huffman, ans or context.
    keep_source: bool = False  # Also store the file name and the file size in bytes of each image, as columns.
    skip_errors: bool = False  # Skip images that cannot be read, and list them in OUT-SPLIT-skipped.txt.
    batch_size_per_process: int = 64  # Number of images per forward pass, on each process.
    workers: int | None = None  # Processes that decode images, per tokenizing process. None: one for each core.


PRESETS = {"published": Config(batch_size_per_process=256)}
PRESETS["imagenet5m"] = replace(PRESETS["published"], crops=5)
PRESETS["ade20k"] = replace(PRESETS["published"], source_split="training", batch_size_per_process=16)
PRESETS |= {name: replace(PRESETS["ade20k"], layout=name) for name in ("voc", "cityscapes")}
PRESETS["pairs"] = replace(PRESETS["ade20k"], layout="pairs", source_split=None)
PRESETS["digits"] = replace(PRESETS["published"], batch_size_per_process=128)
PRESETS["smoke"] = replace(PRESETS["digits"], workers=1)


TRAIN = "train"  # the split whose images --crops crops
# Optional columns beside tokens and label, and their types; an annotation is stored if the images have any.
COLUMNS = {"annotation": "binary", "file_name": "string", "source_bytes": "int64"}


def main(config: Config) -> None:
    if config.out is None:
        raise UserError("no store to write: name a folder with --out")
    check_task(config)
    accelerator = Accelerator()
    peers.watch()
    target = Target(config.out, config.task) if is_bucket(config.out) else None
    with ExitStack() as held:
        if target:
            open_once(accelerator, partial(held.enter_context, target.opened()))
            if accelerator.is_local_main_process and not accelerator.is_main_process:  # of another machine
                held.enter_context(target.opened())
            accelerator.wait_for_everyone()
        write_splits(replace(config, out=str(target.path)) if target else config, target, accelerator)
    if config.task is not None:
        accelerator.print(f"task {config.task} of {config.tasks} has ended; after all: seitpp finish {config.out}")


def write_splits(config: Config, target: Target | None, accelerator: Accelerator) -> None:
    """Write the splits of the store in the folder config.out, which `target` brings into a bucket."""
    where = target.url if target else config.out
    workers = {"workers": Choice(loader_workers(None), "by the CPU cores")} if config.workers is None else {}
    accelerator.print(settings_table(replace(config, out=where), workers))
    parts = open_once(accelerator, partial(open_parts, config))
    check_crops(config, parts)
    for split, source in parts.items():
        accelerator.print(f"split {split}: {source if isinstance(source, AnnotatedSource) else describe(source)}")
    tokenizer = open_tokenizer(config, next(iter(parts.values())), accelerator)
    todo = missing_splits(config, list(parts))
    for split in todo[:1] if config.task is not None and config.compact and not has_store(config) else todo:
        with ExitStack() as held:
            open_once(accelerator, partial(held.enter_context, sole_writer(Path(config.out), split, config.task)))
            first, of_split = split == next(iter(parts)), replace(config, split=split)
            common = {"first": first, "target": target, "accelerator": accelerator}
            tokenize(parts[split], tokenizer, config=of_split, **common)
    if accelerator.is_main_process and config.task is None:
        store = TokenStore(config.out, next(iter(parts)), verify=False)
        known = {"classes": store.num_classes > 1, "annotated": "annotation" in store.columns}
        print(block(next_steps("tokenize_images", config, where, result=known)))


def check_task(config: Config) -> None:
    """Raise UserError for a task that does not exist, or that would depend on others."""
    if (config.task is None) != (config.tasks is None):
        raise UserError("--task and --tasks: expected both, the number of this task and that of all; or neither")
    if config.task is not None and not 0 <= config.task < config.tasks:
        raise UserError(f"--task {config.task} of --tasks {config.tasks}: expected 0 .. {config.tasks - 1}")
    if config.task is not None and config.data is not None and config.tokenizer is None:
        raise UserError("--task: all tasks need one tokenizer: fit one first, then name it with --tokenizer")


def tokenize(
    source: ImageSource,
    tokenizer: Tokenizer,
    *,
    config: Config,
    first: bool,
    target: Target | None,
    accelerator: Accelerator,
) -> None:
    """Write the split config.split of the store config.out. Every process must call it and writes its own shards.

    `first` is whether a new store begins with this split, so that its images make the code table; `target` is what
    is written to a bucket. Raises UserError if the split exists already, or for an unreadable image unless
    --skip-errors is set.
    """
    where = target.url if target else config.out
    tokenizer = choose_codes(tokenizer, config).to(accelerator.device).eval()
    counting = config.compact and not has_store(config)  # asked before any process can have created the store
    annotated = isinstance(source, AnnotatedSource)
    if annotated and config.short_side is None:
        config = replace(config, short_side=SHORT_SIDE)
    size, grid = sizing(tokenizer, config)
    reading = reading_of(config, tokenizer)
    source = cropped(source, size, config)
    columns = [
        *(["annotation"] if annotated else []),
        *(["file_name", "source_bytes"] if config.keep_source else []),
    ]

    # Finished shards of an earlier run, and the shards that this process writes.
    staging = begin(source, tokenizer, target, config=config, grid=grid, columns=columns)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    groups = range(len(staging.groups))[config.task or 0 :: config.tasks or 1]
    shards = {shard for group in groups for shard in staging.groups[group]}
    todo = sorted(shards - staging.finished(shards))
    if accelerator.is_main_process:
        save_notes(staging, tokenizer, source=source, config=config, counting=counting)
    accelerator.wait_for_everyone()  # no process writes a shard before all processes have listed them
    mine = todo[rank::ranks]
    of_task = "" if config.task is None else f", {len(shards)} of this task"
    accelerator.print(
        f"split {config.split}: {len(source):,} images in {staging.num_shards} shards{of_task}, "
        f"{len(shards) - len(todo)} of them finished; grid {grid or 'of each image'}, "
        f"K = {tokenizer.spec.num_codes}; {ranks} process(es)"
    )

    # Decode, tokenize and write, shard by shard; the loader decodes ahead, also across shards.
    skipped = beside(config.out, f"{config.split}-skipped.txt")
    images = DecodedImages(source, size, reading=reading)
    batches = iter(decoding_loader(images, staging=staging, shards=mine, config=config))
    totals, started = np.zeros(4, np.int64), time.perf_counter()
    with tqdm(total=sum(len(staging.images(shard)) for shard in mine), unit="image", mininterval=1.0) as bar:
        for shard in mine:
            ids: list[np.ndarray] = []
            kept: list[ImageRecord] = []
            for batch in batches_of(staging.images(shard), config.batch_size_per_process):
                decoded = next(batches)
                if decoded.errors:
                    report_errors(decoded.errors, config.skip_errors, skipped)
                ids += encode(tokenizer, decoded, accelerator.device)
                kept += decoded.kept
                bar.update(len(batch))
            tokens = np.array(ids, np.uint16).reshape(-1, *tokenizer.books.planes, *grid) if grid else ids
            write_shard(staging, shard=shard, ids=tokens, kept=kept, columns=columns)
            totals += totals_of(kept)
    totals = accelerator.reduce(torch.from_numpy(totals).to(accelerator.device)).tolist()
    seconds = time.perf_counter() - started

    # All processes encode, unless codes are still to be chosen or another split makes the table; one publishes.
    accelerator.wait_for_everyone()
    if not counting and (first or has_store(config)):
        staging.encode(groups[rank::ranks])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and config.task is None:
        finish_split(staging)
        store = TokenStore(config.out, config.split, verify=False)
        summarize(store, where, totals=totals, seconds=seconds, annotated=annotated)
        if len(store) < len(source):
            print(f"skipped  {len(source) - len(store):10,} unreadable images of {len(source):,}, see {skipped}")
    accelerator.wait_for_everyone()


def begin(
    source: ImageSource,
    tokenizer: Tokenizer,
    target: Target | None,
    *,
    config: Config,
    grid: tuple[int, int] | None,
    columns: list[str],
) -> SplitStaging:
    """Begin the split config.split, or go on with it. Raises StoreError if it was begun otherwise."""
    write = partial(BucketStaging, target) if target else partial(SplitStaging, config.out)
    return write(
        codebook=tokenizer.books.to_books(),
        grid=grid,
        layout=layout.SEQUENCE if tokenizer.spec.sequence else None,
        num_images=len(source),
        codec=config.codec,
        split=config.split,
        class_names=source.class_names,
        tokenizer=description_of(tokenizer, config),
        columns={name: COLUMNS[name] for name in columns},
        multi_label=source.labels.multi_label,
        digest=partial(digest, source),
    )


def save_notes(
    staging: SplitStaging, tokenizer: Tokenizer, *, source: ImageSource, config: Config, counting: bool
) -> None:
    """Write what finishing needs, and beside the store the tokenizer whose codes are chosen already."""
    if config.codebook or (config.compact and not counting):
        tokenizer.save(beside(config.out, "tokenizer.safetensors"))
    each = source.number if isinstance(source, Crops) else 1
    save_plan(staging, tokenizer, inventory=inventory_of(source), crops=each, compact=counting)


def open_parts(config: Config) -> dict[str, ImageSource]:
    """Open --data, or the embedded digits, as the splits of the store that are to be written: {name: source}."""
    if config.set and config.data is None:
        raise UserError(f"--set {config.set}: name its folder with --data")
    if config.data is None:
        split = config.source_split or config.split or "train"
        return {config.split or split: DigitsSource(split)}
    if config.set:
        splits = read_set(config.set, config.data)
        for difference in differences(config.set, splits):
            print(f"warning: {difference}")
        return {split: DatasetSource(data, config.data, LabelRules()) for split, data in splits.items()}
    if has_annotations(config.data):
        return open_masks(config)
    if config.layout or config.ignore_label or config.background_class:
        raise UserError(
            f"{config.data}: got --layout, --ignore-label or --background-class, expected images with masks, as "
            "docs/segmentation.md says; check the folder"
        )
    rules = LabelRules(
        file=config.labels,
        column=config.label_column,
        key=config.label_key,
        classes=read_class_names(config.classes) if config.classes else stored_classes(config),
        unlabeled=config.unlabeled,
    )
    if config.splits:
        return open_every_split(config.data, rules)
    source = open_source(config.data, config.source_split, rules)
    if config.split or config.source_split or not config.hold_out:
        return {config.split or "train": source}
    if len(source) < config.hold_out:
        print(f"{len(source)} images, fewer than --hold-out {config.hold_out}: none is held out for validation")
        return {"train": source}
    train, validation = hold_out(source, config.hold_out, config.data)
    return {"train": train, "validation": validation}


def check_crops(config: Config, parts: dict[str, ImageSource]) -> None:
    """Raise UserError if --crops or --label-maps cannot be done with the splits that are to be written."""
    if config.crops is None:
        if config.label_maps:
            raise UserError("--label-maps: the labels of crops; say how many of each image with --crops N")
        return
    if config.short_side or any(isinstance(source, AnnotatedSource) for source in parts.values()):
        raise UserError("--crops: crops have one size and no masks; leave out --short-side, and name other images")
    if TRAIN not in parts:
        raise UserError(
            f"--crops: only images of the split {TRAIN} are cropped, got {', '.join(parts)}; leave it out"
        )
    labels = parts[TRAIN].labels
    if config.label_maps and (labels.multi_label or not labels.class_names):
        raise UserError(
            "--label-maps: expected images of one class each, whose names are known; name the classes of the maps "
            "in their order with --classes"
        )


def cropped(source: ImageSource, size: Size, config: Config) -> ImageSource:
    """Return the source of the crops of --crops, in the split train."""
    if config.crops is None or config.split != TRAIN:
        return source
    maps = LabelMaps(config.label_maps, len(source.class_names)) if config.label_maps else None
    return Crops(source, config.crops, RandomBoxes(config.seed, size, config.crop_scale), label_maps=maps)


def inventory_of(source: ImageSource) -> dict[str, Any]:
    """Return the inventory of a source; that of crops counts images."""
    if not isinstance(source, Crops):
        return inventory(source)
    return {**inventory(source.source), "crops": source.to_json()}


def stored_classes(config: Config) -> tuple[str, ...] | None:
    """Return the class names of the store --out, if it exists and has any: other splits have the same classes."""
    names = layout.read_document(Path(config.out))["class_names"] if has_store(config) else None
    return None if names is None else tuple(names)


def open_masks(config: Config) -> dict[str, ImageSource]:
    """Open images with masks as the splits of the store that are to be written: {name: source}.

    Raises UserError for files without a partner unless --skip-errors is set.
    """
    rules = MaskRules(config.layout, config.classes, config.ignore_label, config.background_class)
    if config.splits:
        parts = open_annotated_splits(config.data, rules)
    else:
        source = open_annotated(config.data, config.source_split, rules)
        parts = {config.split or "train": source}
        if not (config.split or config.source_split) and 0 < config.hold_out <= len(source):
            parts = dict(zip(("train", "validation"), source.hold_out(config.hold_out), strict=True))
    for source in parts.values():
        if not config.skip_errors:
            source.check_pairs()
    return parts


def open_tokenizer(config: Config, source: ImageSource, accelerator: Accelerator) -> Tokenizer:
    """Load --tokenizer, or that of the digits, or one that is fitted to images of the source, once."""
    if config.tokenizer is not None:
        return tokenizers.load(config.tokenizer, config.tokenizer_kind)
    if config.data is None:
        with accelerator.main_process_first():
            return tokenizers.load(digits().tokenizer)
    path = beside(config.out, "tokenizer.safetensors")
    with accelerator.main_process_first():
        if not path.exists():
            if has_store(config):
                raise UserError(f"{config.out}: name the tokenizer of this store with --tokenizer")
            reading = Reading(config.resize, intensity=config.intensity)
            fit_to_source(source, reading=reading, skip_errors=config.skip_errors).save(path)
    accelerator.print(f"tokenizer {path.name}, fitted to images of --data by this command or an earlier one")
    return tokenizers.load(path)


def missing_splits(config: Config, splits: list[str]) -> list[str]:
    """Return the splits that the store does not have yet; all where it has all, so that it refuses them itself."""
    if not has_store(config):
        return splits
    document = layout.read_document(Path(config.out))
    return [split for split in splits if split not in document["splits"]] or splits


def reading_of(config: Config, tokenizer: Tokenizer) -> Reading:
    """Return how images are read. Raises UserError for values that are no range."""
    if config.intensity is not None and not config.intensity[0] < config.intensity[1]:
        raise UserError(f"--intensity {config.intensity}: expected two values, the lower first")
    return Reading(config.resize, tokenizer.spec.channels, config.intensity, config.scaled_decoding)


def description_of(tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    """Return the description of the tokenizer and of how images were read, for the store."""
    short_side = {} if config.short_side is None else {"short_side": config.short_side}
    return {**tokenizer.description(), **short_side, "reading": reading_of(config, tokenizer).to_json()}


def beside(out: str, name: str) -> Path:
    """Return the path OUT-NAME next to the store."""
    return Path(f"{Path(out)}-{name}")


def has_store(config: Config) -> bool:
    """Return whether the store --out exists already, with at least one split."""
    return (Path(config.out) / layout.DOCUMENT).exists()


def choose_codes(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """Return the tokenizer restricted to the codes of --codebook, or with --compact to those of an existing store.

    Raises UserError if both are given, or with --compact for a new store whose first split is not train.
    """
    if config.compact and config.codebook:
        raise UserError("--compact and --codebook both say which codes are kept: leave one of them out")
    if (config.compact or config.codebook) and tokenizer.spec.digits:
        raise UserError(
            f"--compact and --codebook are for one table of codes, {tokenizer.spec.kind} has "
            f"{len(tokenizer.spec.digits)}: leave them out"
        )
    if config.codebook:
        file, rows = config.codebook, read_codebook(Path(config.codebook))
    elif config.compact and has_store(config):
        file, rows = config.out, layout.load_codebook(Path(config.out) / layout.CODEBOOK)
    elif config.compact and config.split != "train":
        raise UserError(
            f"--compact counts the codes of the split train: {config.out} has none yet, tokenize that split first"
        )
    else:
        return tokenizer
    try:
        return tokenizer.select(torch.from_numpy(rows))
    except TokenizerError as error:
        raise UserError(f"{file}: {error}") from error


def sizing(tokenizer: Tokenizer, config: Config) -> tuple[Size, tuple[int, int] | None]:
    """Return the image size and the common grid (None: one per image).

    Raises UserError for a short side that the tokenizer cannot take.
    """
    short_side, multiple = config.short_side, tokenizer.side_multiple
    if short_side is None:
        return tokenizer.spec.image_size, tokenizer.spec.grid
    if short_side < multiple or short_side % multiple or config.resize != "squash":
        raise UserError(
            f"--short-side {short_side}: expected a multiple of {multiple} and no --resize, because the "
            f"{tokenizer.spec.kind} tokenizer takes whole images whose sides are multiples of {multiple} pixels"
        )
    return partial(fit_short_side, short_side=short_side, multiple=multiple), None


def batches_of(images: range, size: int) -> Iterator[range]:
    """Split the images of a shard into batches of `size`."""
    return (images[start : start + size] for start in range(0, len(images), size))


def decoding_loader(
    images: DecodedImages, *, staging: SplitStaging, shards: list[int], config: Config
) -> DataLoader:
    """Return a loader of decoded images of `shards`, in order; no batch has images of two shards."""
    batches = [
        list(batch)
        for shard in shards
        for batch in batches_of(staging.images(shard), config.batch_size_per_process)
    ]
    return DataLoader(
        images, batch_sampler=batches, collate_fn=already_a_batch, num_workers=loader_workers(config.workers)
    )


def report_errors(errors: list[str], skip: bool, path: Path) -> None:
    """Raise UserError for an unreadable image, or with `skip` append it to the list at `path`."""
    if not skip:
        raise UserError(f"{errors[0]}; repair or remove it, or pass --skip-errors; finished shards are kept")
    files.append_file(path, "".join(f"{escaped(error)}\n" for error in errors).encode())


def write_shard(
    staging: SplitStaging,
    *,
    shard: int,
    ids: np.ndarray | list[np.ndarray],
    kept: list[ImageRecord],
    columns: list[str],
) -> None:
    """Write the tokens, labels and columns of a shard to disk."""
    labels = [image.label for image in kept]
    staging.write(shard, ids, labels, columns={name: [getattr(image, name) for image in kept] for name in columns})


def totals_of(kept: list[ImageRecord]) -> np.ndarray:
    """Sum over images -> (4,) int64: images, bytes of image files, of annotation files, of stored annotations."""
    rows = [(1, image.source_bytes, image.annotation_bytes, len(image.annotation)) for image in kept]
    return np.array(rows, np.int64).reshape(-1, 4).sum(axis=0)


def summarize(store: TokenStore, where: str, *, totals: list[int], seconds: float, annotated: bool) -> None:
    """Print the speed and the source sizes of this run over all processes, and the size of the whole split."""
    used = sum(int((digit > 0).sum()) for digit in store.digit_counts)
    done, *sizes = totals
    print(f"{done:,} images in {seconds:.1f} s, {done / seconds:.1f} images/s")
    if done:
        image, annotation, stored = (size / done for size in sizes)
        print(f"source   {image:10,.1f} bytes per image{' (JPEG)' if annotated else ''}")
        if annotated:
            print(f"labels   {annotation:10,.1f} bytes per image (PNG), {stored:,.1f} as stored")
    size = store.payload_bytes / len(store)
    print(f"tokens   {size:10,.1f} bytes per image, {len(store):,} images in {where}")
    print(f"codes    {used:10,} of {sum(store.books.sizes):,} used")


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
