"""Tokenize a collection of images into a token store of about one kilobyte per image.

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

The recipe reads a folder of images, Parquet files, webdataset tars or a named data set. It writes one split of the
store --out, which may already contain other splits. A folder with images/ and annotations/ is read as ADE-20k: the
store keeps the grid of each image and its annotation, lossless. If the command is interrupted, the same command
continues after the last finished shard and writes the same bytes, also on another number of processes.
With --compact the store keeps only the codes that its split `train` uses, the most frequent first, as the
published token sets do. With --codebook it keeps the codes of a released codebook in their order, so that official
models accept the ids. The tokenizer with these codes is saved as OUT-tokenizer.safetensors, for --tokenizer of
other commands. With --set, --data is the folder of a fine-grained data set as its authors distribute it, and both
of its splits are written. With --out alone, the embedded digits are tokenized, in seconds. The speed of
`published` and `ade20k` on a GPU is not measured. The recipe trains nothing.
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
from seitpp.images.annotated import SHORT_SIDE, AnnotatedSource, has_annotations, open_annotated
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
    """Settings of tokenization: the images, the tokenizer and the split of the store."""

    data: str | None = None  # Folder, .parquet or .tar files, or name of a data set. None: the embedded digits.
    set: SetName | None = None  # Name of the fine-grained data set in the folder --data. None: other images.
    source_split: str | None = None  # Split of --data to read. None: all of it.
    tokenizer: str | None = None  # Tokenizer file; needed with --data. None: the tokenizer of the digits.
    compact: bool = False  # Keep only the codes that the split train uses, code 0 the most frequent.
    # Keep only the codes of this file: a released codebook.ckpt, or the .safetensors codebook of a store.
    codebook: str | None = None
    out: str | None = None  # Folder of the store; always needed.
    split: str = "train"  # Split of the store that is written.
    # Short side in pixels, so that each image has its own grid. None: the tokenizer's size; with annotations 512.
    short_side: int | None = None
    codec: str = "ans"  # Codec of the ids: escape, packed, huffman, ans or context.
    keep_source: bool = False  # Also store the file name and the file size in bytes of each image, as columns.
    skip_errors: bool = False  # Skip images that cannot be read, and list them in OUT-SPLIT-skipped.txt.
    batch_size_per_process: int = 64  # Number of images per forward pass, on each process.
    workers: int = 4  # Number of processes that decode images, per tokenizing process.


PRESETS = {"published": Config(batch_size_per_process=256, workers=16)}
PRESETS["ade20k"] = replace(PRESETS["published"], source_split="training", batch_size_per_process=16)
PRESETS["digits"] = replace(PRESETS["published"], batch_size_per_process=128, workers=0)
PRESETS["smoke"] = replace(PRESETS["digits"], workers=1)


# Optional columns beside tokens and label, and their types; an annotation is stored if the images have any.
COLUMNS = {"annotation": "binary", "file_name": "string", "source_bytes": "int64"}


def main(config: Config) -> None:
    if config.out is None:
        raise UserError("no store to write: name a folder with --out")
    accelerator = Accelerator()
    (tokenize_set if config.set else tokenize_split)(config, accelerator)


def tokenize_split(config: Config, accelerator: Accelerator) -> None:
    """Write one split from --data, or from the embedded digits."""
    source, tokenizer = open_data(config, accelerator)
    if isinstance(source, AnnotatedSource) and config.short_side is None:
        config = replace(config, short_side=SHORT_SIDE)
    tokenize(source, tokenizer, config=config, accelerator=accelerator)


def tokenize(source: ImageSource, tokenizer: Tokenizer, *, config: Config, accelerator: Accelerator) -> None:
    """Write the split config.split of the store config.out. Every process must call it and writes its own shards.

    Raises UserError if the split exists already, or for an unreadable image unless --skip-errors is set.
    """
    tokenizer = choose_codes(tokenizer, config).to(accelerator.device).eval()
    counting = config.compact and not has_store(config)  # asked before any process can have created the store
    size, grid, description = sizing(tokenizer, config.short_side)
    annotated = isinstance(source, AnnotatedSource)
    columns = [
        *(["annotation"] if annotated else []),
        *(["file_name", "source_bytes"] if config.keep_source else []),
    ]

    # Finished shards of an earlier run, and the shards that this process writes.
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
    accelerator.wait_for_everyone()  # no process writes a shard before all processes have listed them
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    accelerator.print(
        f"{config}\n{len(source):,} images in {staging.num_shards} shards, {staging.num_shards - len(todo)} of "
        f"them finished; grid {grid or 'of each image'}, K = {tokenizer.spec.num_codes}; "
        f"{accelerator.num_processes} process(es)"
    )

    # Decode, tokenize and write, shard by shard; the loader decodes ahead, also across shards.
    skipped = beside(config.out, f"{config.split}-skipped.txt")
    batches = iter(decoding_loader(DecodedImages(source, size), staging=staging, shards=mine, config=config))
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
            tokens = np.array(ids, np.uint16).reshape(-1, *grid) if grid else ids
            write_shard(staging, shard=shard, ids=tokens, kept=kept, columns=columns)
            totals += totals_of(kept)
    totals = accelerator.reduce(torch.from_numpy(totals).to(accelerator.device)).tolist()
    seconds = time.perf_counter() - started

    # One process selects the codes and publishes the shards of all processes.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if counting:
            tokenizer = keep_used_codes(tokenizer, staging, config)
        if config.compact or config.codebook:
            tokenizer.save(beside(config.out, "tokenizer.safetensors"))
        staging.publish()
        store = TokenStore(config.out, config.split, verify=False)
        summarize(store, totals=totals, seconds=seconds, annotated=annotated)
    accelerator.wait_for_everyone()


def tokenize_set(config: Config, accelerator: Accelerator) -> None:
    """Write the splits of a fine-grained data set that the store does not have yet, one after the other.

    Raises UserError if the store has all of them.
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
        tokenize(source, tokenizer, config=replace(config, split=split), accelerator=accelerator)


def open_data(config: Config, accelerator: Accelerator) -> tuple[ImageSource, Tokenizer]:
    """Open --data and --tokenizer, or the embedded digits and their tokenizer."""
    if config.data is None:
        with accelerator.main_process_first():
            default = digits().tokenizer
        return DigitsSource(config.source_split or config.split), tokenizers.load(config.tokenizer or default)
    if config.tokenizer is None:
        raise UserError(
            "--data without --tokenizer: name a tokenizer file (recipes/tokenizer_train.py trains one)"
        )
    if has_annotations(config.data):
        source = open_annotated(config.data, config.source_split)
        if not config.skip_errors:
            source.check_pairs()
        return source, tokenizers.load(config.tokenizer)
    return open_source(config.data, config.source_split), tokenizers.load(config.tokenizer)


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
    if config.codebook:
        file, rows = config.codebook, read_codebook(Path(config.codebook))
    elif config.compact and has_store(config):
        file, rows = config.out, layout.read_codebook(Path(config.out), layout.read_document(Path(config.out)))
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


def keep_used_codes(tokenizer: Tokenizer, staging: SplitStaging, config: Config) -> Tokenizer:
    """Return the tokenizer restricted to the codes that the finished shards use, and renumber the shards."""
    counts = torch.from_numpy(staging.counts())
    compacted = tokenizer.compact(counts)
    *_, description = sizing(compacted, config.short_side)
    staging.keep(by_frequency(counts).numpy(), description)
    return compacted


def sizing(tokenizer: Tokenizer, short_side: int | None) -> tuple[Size, tuple[int, int] | None, dict]:
    """Return the image size, the common grid (None: one per image), and the tokenizer's description for the store.

    Raises UserError for a short side that the tokenizer cannot take.
    """
    if short_side is None:
        return tokenizer.spec.image_size, tokenizer.spec.grid, tokenizer.description()
    multiple = tokenizer.side_multiple
    if short_side < multiple or short_side % multiple:
        raise UserError(
            f"--short-side {short_side}: expected a multiple of {multiple}, because the {tokenizer.spec.kind} "
            f"tokenizer takes images whose sides are multiples of {multiple} pixels"
        )
    size = partial(fit_short_side, short_side=short_side, multiple=multiple)
    return size, None, {**tokenizer.description(), "short_side": short_side}


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
    return DataLoader(images, batch_sampler=batches, collate_fn=as_it_is, num_workers=config.workers)


def as_it_is(batch: DecodedBatch) -> DecodedBatch:
    """Return the batch unchanged: the dataset returns whole batches."""
    return batch


def report_errors(errors: list[str], skip: bool, path: Path) -> None:
    """Raise UserError for an unreadable image, or with `skip` append it to the list at `path`."""
    if not skip:
        raise UserError(f"{errors[0]}; repair or remove it, or pass --skip-errors; finished shards are kept")
    with path.open("a") as file:
        file.writelines(f"{error}\n" for error in errors)


def write_shard(
    staging: SplitStaging,
    *,
    shard: int,
    ids: np.ndarray | list[np.ndarray],
    kept: list[ImageRecord],
    columns: list[str],
) -> None:
    """Write the tokens, labels and columns of a shard to disk."""
    labels = np.array([image.label for image in kept], dtype=np.int64)
    staging.write(shard, ids, labels, columns={name: [getattr(image, name) for image in kept] for name in columns})


def totals_of(kept: list[ImageRecord]) -> np.ndarray:
    """Sum over images -> (4,) int64: images, bytes of image files, of annotation files, of stored annotations."""
    rows = [(1, image.source_bytes, image.annotation_bytes, len(image.annotation)) for image in kept]
    return np.array(rows, np.int64).reshape(-1, 4).sum(axis=0)


def summarize(store: TokenStore, *, totals: list[int], seconds: float, annotated: bool) -> None:
    """Print the speed and the source sizes of this run over all processes, and the size of the whole split."""
    used = int((store.counts > 0).sum())
    done, *sizes = totals
    print(f"{done:,} images in {seconds:.1f} s, {done / seconds:.1f} images/s")
    if done:
        image, annotation, stored = (size / done for size in sizes)
        print(f"source   {image:10,.1f} bytes per image{' (JPEG)' if annotated else ''}")
        if annotated:
            print(f"labels   {annotation:10,.1f} bytes per image (PNG), {stored:,.1f} as stored")
    size = store.payload_bytes / len(store)
    print(f"tokens   {size:10,.1f} bytes per image, {len(store):,} images in {store.path}")
    print(f"codes    {used:10,} of {store.num_codes:,} used")


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
