"""Turn a collection of images into a token store of about one kilobyte an image.

    accelerate launch recipes/tokenize_images.py --data photos --tokenizer tokenizer.safetensors --out tokens
    accelerate launch --multi_gpu --num_processes 8 recipes/tokenize_images.py published --data imagenet \\
        --source-split train --tokenizer vitvqgan.ckpt --compact --out imagenet-tokens
    accelerate launch recipes/tokenize_images.py --data photos --tokenizer vitvqgan.ckpt --out photos-tokens \\
        --codebook codebook.ckpt
    accelerate launch recipes/tokenize_images.py ade20k --data ADEChallengeData2016 --tokenizer vitvqgan.ckpt \\
        --out ade20k-tokens
    accelerate launch recipes/tokenize_images.py ade20k --data ADEChallengeData2016 --tokenizer vitvqgan.ckpt \\
        --out ade20k-tokens --source-split validation --split validation
    accelerate launch recipes/tokenize_images.py --set flowers102 --data flowers-102 --tokenizer vitvqgan.ckpt \\
        --out flowers102-tokens

Reads a folder of images, Parquet files, webdataset tars or a named data set; writes one split of the store --out,
which may hold other splits already. A folder with images/ and annotations/ is read as ADE-20k: the store keeps
each image's grid and its annotation, lossless. Interrupted, the same command goes on after the last finished shard
and ends with the same bytes, on another number of processes too. With --compact the store keeps only those codes
that its split `train` uses, numbered by popularity, as the published token sets do; with --codebook those of a
released codebook, in its order, so that official models take the ids. The tokenizer with these codes is then
OUT-tokenizer.safetensors, for the --tokenizer of other commands. With --set, --data is the folder of a
fine-grained set as its authors distribute it, and both of its splits are written. With nothing named it tokenizes
the embedded digits, in seconds; the rate of `published` and `ade20k` on a GPU is not measured. Trains nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch.utils.data import DataLoader

from downstream.finegrained.sets import SetName, differences, read_set
from seitpp import TokenStore, tokenizers
from seitpp.data.digits import DigitsSource, digits
from seitpp.errors import UserError
from seitpp.images.annotated import SHORT_SIDE, AnnotatedSource, has_annotations
from seitpp.images.batches import DecodedBatch, DecodedImages, ImageRecord
from seitpp.images.decode import Size, fit_short_side
from seitpp.images.sources import DatasetSource, ImageSource, open_source
from seitpp.recipe import run_recipe
from seitpp.store import SplitStaging, layout
from seitpp.store.release import read_codebook
from seitpp.tokenizers import Tokenizer, TokenizerError, by_frequency
from seitpp.tokenizers.encoding import encode


@dataclass(frozen=True)
class Config:
    """Which images, by which tokenizer, into which split of which store."""

    data: str | None = None  # a folder, .parquet or .tar files, or the name of a data set; else the digits
    set: SetName | None = None  # --data is the folder of this fine-grained set
    source_split: str | None = None  # the part of the source to read; all of it where none is named
    tokenizer: str | None = None  # a tokenizer file; that of the digits where nothing is named
    compact: bool = False  # keep the codes that the split train uses only, 0 the most frequent
    codebook: str | None = None  # keep the codes of this file only: a codebook.ckpt, or a store's .safetensors
    out: str | None = None  # the store
    split: str = "train"  # the split of the store that is written
    short_side: int | None = None  # pixels, each image its own grid; else the tokenizer's size (annotated: 512)
    codec: str = "ans"
    keep_source: bool = False  # also keep each image's file name and its size in bytes, as columns
    skip_errors: bool = False  # leave out images that cannot be read, and list them beside the store
    batch_size_per_process: int = 64  # images of one forward, on each process
    workers: int = 4  # processes that decode images, for each process that tokenizes


PRESETS = {"published": Config(batch_size_per_process=256, workers=16)}
PRESETS["ade20k"] = replace(PRESETS["published"], source_split="training", batch_size_per_process=16)
PRESETS["digits"] = replace(PRESETS["published"], batch_size_per_process=128, workers=0)
PRESETS["smoke"] = replace(PRESETS["digits"], workers=1)


# What can be kept beside tokens and label; an image's annotation is, where it has one.
COLUMNS = {"annotation": "binary", "file_name": "string", "source_bytes": "int64"}


def main(config: Config) -> None:
    if config.out is None:
        raise UserError("no store to write: name a folder with --out")
    accelerator = Accelerator()
    (tokenize_set if config.set else tokenize_split)(config, accelerator)


def tokenize_split(config: Config, accelerator: Accelerator) -> None:
    """Write one split of images of any kind."""
    source, tokenizer = open_data(config, accelerator)
    if isinstance(source, AnnotatedSource) and config.short_side is None:
        config = replace(config, short_side=SHORT_SIDE)
    tokenize(source, tokenizer, config, accelerator)


def tokenize(source: ImageSource, tokenizer: Tokenizer, config: Config, accelerator: Accelerator) -> None:
    """Write the split config.split of the store config.out, each process its own shards; all processes call it.

    Raises UserError if the split is there already, or at an image that cannot be read unless those are skipped.
    """
    tokenizer = choose_codes(tokenizer, config).to(accelerator.device).eval()
    counting = config.compact and not has_store(config)  # before anybody can have made it
    size, grid, description = sizing(tokenizer, config.short_side)
    annotated = isinstance(source, AnnotatedSource)
    columns = [
        *(["annotation"] if annotated else []),
        *(["file_name", "source_bytes"] if config.keep_source else []),
    ]

    # What is there already, and what this process is to do.
    staging = SplitStaging(
        config.out,
        codebook=tokenizer.codebook.detach().float().cpu().numpy(),
        grid=grid,
        num_images=len(source),
        codec=config.codec,
        split=config.split,
        class_names=source.class_names,
        tokenizer=description,
        columns={name: COLUMNS[name] for name in columns},
    )
    todo = sorted(set(range(staging.num_shards)) - staging.finished())
    accelerator.wait_for_everyone()  # nobody writes a shard before all have seen which are missing
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    accelerator.print(
        f"{config}\n{len(source):,} images in {staging.num_shards} shards, {staging.num_shards - len(todo)} of "
        f"them finished; grid {grid or 'of each image'}, K = {tokenizer.spec.num_codes}; "
        f"{accelerator.num_processes} process(es)"
    )

    # Decode, tokenize, write shard by shard; the loader decodes ahead, across shards.
    skipped = beside(config.out, f"{config.split}-skipped.txt")
    batches = iter(decoding_loader(DecodedImages(source, size), staging, mine, config))
    totals, started = np.zeros(4, np.int64), time.perf_counter()
    with tqdm(total=sum(len(staging.images(shard)) for shard in mine), unit="image", mininterval=1.0) as bar:
        for shard in mine:
            ids: list[np.ndarray] = []
            kept: list[ImageRecord] = []
            for _ in batches_of(staging.images(shard), config.batch_size_per_process):
                decoded = next(batches)
                if decoded.errors:
                    report_errors(decoded.errors, config.skip_errors, skipped)
                ids += encode(tokenizer, decoded, accelerator.device)
                kept += decoded.kept
                bar.update(len(decoded.kept))
            write_shard(
                staging, shard, np.array(ids, np.uint16).reshape(-1, *grid) if grid else ids, kept, columns
            )
            totals += totals_of(kept)
    totals = accelerator.reduce(torch.from_numpy(totals).to(accelerator.device)).tolist()
    seconds = time.perf_counter() - started

    # One process counts, encodes and publishes what all have made.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if counting:
            tokenizer = keep_used_codes(tokenizer, staging, config)
        if config.compact or config.codebook:
            tokenizer.save(beside(config.out, "tokenizer.safetensors"))
        staging.publish()
        summarize(TokenStore(config.out, config.split, verify=False), totals, seconds, annotated)
    accelerator.wait_for_everyone()


def tokenize_set(config: Config, accelerator: Accelerator) -> None:
    """Write the splits of a fine-grained set, or those that an interrupted run left, one after the other.

    Raises UserError if the store has them all.
    """
    if config.data is None or config.tokenizer is None:
        raise UserError(f"--set {config.set}: name its folder with --data and a tokenizer file with --tokenizer")
    splits, tokenizer = read_set(config.set, config.data), tokenizers.load(config.tokenizer)
    for difference in differences(config.set, splits):
        accelerator.print(f"warning: {difference}")
    first = next(iter(splits))
    started = (Path(config.out) / first).exists()
    written = TokenStore(config.out, first, verify=False).splits if started else []
    missing = [split for split in splits if split not in written]
    if not missing:
        raise UserError(
            f"{config.out}: has the splits {', '.join(splits)} already; name another folder with --out"
        )
    for split in missing:
        source = DatasetSource(splits[split], config.data)
        tokenize(source, tokenizer, replace(config, split=split), accelerator)


def open_data(config: Config, accelerator: Accelerator) -> tuple[ImageSource, Tokenizer]:
    """The named images and tokenizer, or the digits and theirs."""
    if config.data is None:
        with accelerator.main_process_first():
            default = digits().tokenizer
        return DigitsSource(config.source_split or config.split), tokenizers.load(config.tokenizer or default)
    if config.tokenizer is None:
        raise UserError("--data without --tokenizer: name a tokenizer file (recipes/tokenizer_train.py makes one)")
    if has_annotations(config.data):
        return AnnotatedSource(config.data, config.source_split), tokenizers.load(config.tokenizer)
    return open_source(config.data, config.source_split), tokenizers.load(config.tokenizer)


def beside(out: str, name: str) -> Path:
    """The file OUT-NAME."""
    return Path(f"{Path(out)}-{name}")


def has_store(config: Config) -> bool:
    """Whether the store --out has a split already."""
    return (Path(config.out) / layout.DOCUMENT).exists()


def choose_codes(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """The tokenizer with the codes of --codebook, or with --compact of the store, all where there is none."""
    if config.compact and config.codebook:
        raise UserError("--compact and --codebook both say which codes are kept: leave one of them out")
    if config.codebook:
        file, rows = config.codebook, read_codebook(Path(config.codebook))
    elif config.compact and has_store(config):
        file, rows = config.out, layout.read_codebook(Path(config.out), layout.read_document(Path(config.out)))
    elif config.compact and config.split != "train":
        raise UserError(f"--compact counts the codes of the split train: {config.out} has none yet, make it first")
    else:
        return tokenizer
    try:
        return tokenizer.select(torch.from_numpy(rows))
    except TokenizerError as error:
        raise UserError(f"{file}: {error}") from error


def keep_used_codes(tokenizer: Tokenizer, staging: SplitStaging, config: Config) -> Tokenizer:
    """The tokenizer with the codes that the finished shards use only, which are re-numbered like it."""
    counts = torch.from_numpy(staging.counts())
    compacted = tokenizer.compact(counts)
    *_, description = sizing(compacted, config.short_side)
    staging.keep(by_frequency(counts).numpy(), description)
    return compacted


def sizing(tokenizer: Tokenizer, short_side: int | None) -> tuple[Size, tuple[int, int] | None, dict]:
    """The size of images, their grid where all have the same, and what the store says of its tokenizer."""
    if short_side is None:
        return tokenizer.spec.image_size, tokenizer.spec.grid, tokenizer.description()
    multiple = tokenizer.side_multiple
    if short_side < multiple or short_side % multiple:
        raise UserError(
            f"--short-side {short_side}: expected a multiple of {multiple}, since the {tokenizer.spec.kind} "
            f"tokenizer wants images whose sides are multiples of {multiple} pixels"
        )
    size = partial(fit_short_side, short_side=short_side, multiple=multiple)
    return size, None, {**tokenizer.description(), "short_side": short_side}


def batches_of(images: range, size: int) -> Iterator[range]:
    """A shard's images, `size` at a time."""
    return (images[start : start + size] for start in range(0, len(images), size))


def decoding_loader(images: DecodedImages, staging: SplitStaging, shards: list[int], config: Config) -> DataLoader:
    """Batches of decoded images of `shards`, in order; a batch never holds images of two shards."""
    batches = [
        list(batch)
        for shard in shards
        for batch in batches_of(staging.images(shard), config.batch_size_per_process)
    ]
    return DataLoader(images, batch_sampler=batches, collate_fn=as_it_is, num_workers=config.workers)


def as_it_is(batch: DecodedBatch) -> DecodedBatch:
    """The dataset makes whole batches."""
    return batch


def report_errors(errors: list[str], skip: bool, path: Path) -> None:
    """Stop at an unreadable image, or add it to the list of those that are left out."""
    if not skip:
        raise UserError(f"{errors[0]}; mend or remove it, or pass --skip-errors; finished shards are kept")
    with path.open("a") as file:
        file.writelines(f"{error}\n" for error in errors)


def write_shard(
    staging: SplitStaging,
    shard: int,
    ids: np.ndarray | list[np.ndarray],
    kept: list[ImageRecord],
    columns: list[str],
) -> None:
    """Write the images of a shard durably."""
    labels = np.array([image.label for image in kept], dtype=np.int64)
    staging.write(shard, ids, labels, columns={name: [getattr(image, name) for image in kept] for name in columns})


def totals_of(kept: list[ImageRecord]) -> np.ndarray:
    """(4,) int64: images, and the bytes of their files, of their annotations' files and of these as stored."""
    rows = [(1, image.source_bytes, image.annotation_bytes, len(image.annotation)) for image in kept]
    return np.array(rows, np.int64).reshape(-1, 4).sum(axis=0)


def summarize(store: TokenStore, totals: list[int], seconds: float, annotated: bool) -> None:
    """Print what all processes did in this run, and what the whole split takes."""
    used = int((store.counts > 0).sum())
    done, *sizes = totals
    print(f"{done:,} images in {seconds:.1f} s, {done / seconds:.1f} images/s")
    if done:
        image, annotation, stored = (size / done for size in sizes)
        print(f"source   {image:10,.1f} bytes an image{' (JPEG)' if annotated else ''}")
        if annotated:
            print(f"labels   {annotation:10,.1f} bytes an image (PNG), {stored:,.1f} as they are stored")
    print(
        f"tokens   {store.payload_bytes / len(store):10,.1f} bytes an image, {len(store):,} images in {store.path}"
    )
    print(f"codes    {used:10,} of {store.num_codes:,} used")


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
