"""Turn a collection of images into a token store of about one kilobyte an image.

    accelerate launch recipes/tokenize_images.py --data photos --tokenizer tokenizer.safetensors --out tokens
    accelerate launch --multi_gpu --num_processes 8 recipes/tokenize_images.py published --data imagenet \\
        --source-split train --tokenizer vitvqgan.ckpt --out imagenet-tokens

Reads a folder of images, Parquet files, webdataset tars or a named data set; writes one split of the store --out,
which may hold other splits already. Interrupted, the same command goes on after the last finished shard and ends
with the same bytes, on another number of processes too. With nothing named it tokenizes the embedded digits, in
seconds; the rate of `published` on a GPU is not measured. Trains nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch.utils.data import DataLoader, Dataset

from seitpp import TokenStore, tokenizers
from seitpp.engine.config import run_recipe
from seitpp.errors import UserError
from seitpp.store import SplitStaging
from seitpp.tokenizers import Tokenizer
from seitpp.tokenizers.images import ImageError, ImageSource, decode_image, open_source
from seitpp.tokens.digits import DigitsSource, digits


@dataclass(frozen=True)
class Config:
    """Which images, by which tokenizer, into which split of which store."""

    data: str | None = None  # a folder, .parquet or .tar files, or the name of a data set; else the digits
    source_split: str | None = None  # the part of the source to read; all of it where none is named
    tokenizer: str | None = None  # a tokenizer file; that of the digits where nothing is named
    out: str | None = None  # the store
    split: str = "train"  # the split of the store that is written
    codec: str = "ans"
    keep_source: bool = False  # also keep each image's file name and its size in bytes, as columns
    skip_errors: bool = False  # leave out images that cannot be read, and list them beside the store
    batch_size: int = 64  # images of one forward, on each process
    workers: int = 4  # processes that decode images, for each process that tokenizes


PRESETS = {"published": Config(batch_size=256, workers=16)}
PRESETS["digits"] = replace(PRESETS["published"], batch_size=128, workers=0)
PRESETS["smoke"] = replace(PRESETS["digits"], workers=1)


def main(config: Config) -> None:
    # 1. The launch, images and tokenizer.
    accelerator = Accelerator()
    source, tokenizer = open_data(config, accelerator)
    if config.out is None:
        raise UserError("no store to write: name a folder with --out")

    # 2. Into a split of the store.
    tokenize(source, tokenizer, config, accelerator)


def tokenize(source: ImageSource, tokenizer: Tokenizer, config: Config, accelerator: Accelerator) -> None:
    """Write the split config.split of the store config.out, each process its own shards; all processes call it.

    Raises UserError if the split is there already, or at an image that cannot be read unless those are skipped.
    """
    tokenizer = tokenizer.to(accelerator.device).eval()

    # What is there already, and what this process is to do.
    staging = SplitStaging(
        config.out,
        codebook=tokenizer.codebook.float().cpu().numpy(),
        grid=tokenizer.spec.grid,
        num_images=len(source),
        codec=config.codec,
        split=config.split,
        class_names=source.class_names,
        tokenizer=tokenizer.description(),
        columns={"file_name": "string", "source_bytes": "int64"} if config.keep_source else None,
    )
    todo = sorted(set(range(staging.num_shards)) - staging.finished())
    accelerator.wait_for_everyone()  # nobody writes a shard before all have seen which are missing
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    accelerator.print(
        f"{config}\n{len(source):,} images in {staging.num_shards} shards, {staging.num_shards - len(todo)} of "
        f"them finished; grid {tokenizer.spec.grid}, K = {tokenizer.spec.num_codes}; "
        f"{accelerator.num_processes} process(es)"
    )

    # Decode, tokenize, write shard by shard; the loader decodes ahead, across shards.
    skipped = Path(f"{config.out}-{config.split}-skipped.txt")
    batches = iter(decoding_loader(source, tokenizer, staging, mine, config))
    done, source_bytes, started = 0, 0, time.perf_counter()
    with tqdm(total=sum(len(staging.images(shard)) for shard in mine), unit="image", mininterval=1.0) as bar:
        for shard in mine:
            parts = []
            for _ in batches_of(staging.images(shard), config.batch_size):
                decoded = next(batches)
                if decoded.errors:
                    report_errors(decoded.errors, config.skip_errors, skipped)
                pixels = decoded.images.to(accelerator.device, non_blocking=True)
                parts.append((tokenizer.encode(pixels.float() / 255).cpu().numpy().astype(np.uint16), decoded))
                bar.update(len(decoded.indices))
            done += write_shard(staging, shard, parts, config.keep_source)
            source_bytes += sum(sum(decoded.source_bytes) for _, decoded in parts)
    seconds = time.perf_counter() - started

    # One process counts, encodes and publishes what all have made.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        staging.publish()
        summarize(TokenStore(config.out, config.split, verify=False), done, source_bytes, seconds)
    accelerator.wait_for_everyone()


class Decoded(NamedTuple):
    """A batch of readable images and what is kept of each; `errors` says which were not readable."""

    indices: list[int]
    images: torch.Tensor  # (n, 3, height, width) uint8; a tensor, which a worker hands over without a copy
    labels: list[int]
    names: list[str]
    source_bytes: list[int]
    errors: list[str]


class DecodedImages(Dataset):
    """Images of a source, decoded and resized; an unreadable one is reported, not raised, by a worker."""

    def __init__(self, source: ImageSource, size: tuple[int, int]):
        self.source, self.size = source, size

    def __getitems__(self, indices: list[int]) -> Decoded:
        kept, images, errors = [], [], []
        for index in indices:
            try:
                sample = self.source.read(index)
                images.append(decode_image(sample, self.size))
                kept.append((index, sample.label, sample.name, len(sample.data)))
            except ImageError as error:
                errors.append(str(error))
        pixels = torch.from_numpy(np.stack(images)) if images else torch.empty(0, 3, *self.size, dtype=torch.uint8)
        columns = [list(column) for column in zip(*kept, strict=True)] or [[], [], [], []]
        return Decoded(columns[0], pixels, columns[1], columns[2], columns[3], errors)


def open_data(config: Config, accelerator: Accelerator) -> tuple[ImageSource, Tokenizer]:
    """The named images and tokenizer, or the digits and theirs."""
    if config.data is None:
        with accelerator.main_process_first():
            default = digits().tokenizer
        return DigitsSource(config.source_split or config.split), tokenizers.load(config.tokenizer or default)
    if config.tokenizer is None:
        raise UserError("--data without --tokenizer: name a tokenizer file (recipes/tokenizer_train.py makes one)")
    return open_source(config.data, config.source_split), tokenizers.load(config.tokenizer)


def batches_of(images: range, size: int) -> Iterator[range]:
    """A shard's images, `size` at a time."""
    return (images[start : start + size] for start in range(0, len(images), size))


def decoding_loader(
    source: ImageSource, tokenizer: Tokenizer, staging: SplitStaging, shards: list[int], config: Config
) -> DataLoader:
    """Batches of decoded images of `shards`, in order; a batch never holds images of two shards."""
    batches = [list(batch) for shard in shards for batch in batches_of(staging.images(shard), config.batch_size)]
    dataset = DecodedImages(source, tokenizer.spec.image_size)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=as_it_is, num_workers=config.workers)


def as_it_is(batch: Decoded) -> Decoded:
    """The dataset makes whole batches."""
    return batch


def report_errors(errors: list[str], skip: bool, path: Path) -> None:
    """Stop at an unreadable image, or add it to the list of those that are left out."""
    if not skip:
        raise UserError(f"{errors[0]}; mend or remove it, or pass --skip-errors; finished shards are kept")
    with path.open("a") as file:
        file.writelines(f"{error}\n" for error in errors)


def write_shard(staging: SplitStaging, shard: int, parts: list[tuple[np.ndarray, Decoded]], keep: bool) -> int:
    """Write the images of a shard durably; their number."""
    ids = np.concatenate([ids for ids, _ in parts])
    labels = np.array([label for _, decoded in parts for label in decoded.labels], dtype=np.int64)
    columns = {
        "file_name": [name for _, decoded in parts for name in decoded.names],
        "source_bytes": [size for _, decoded in parts for size in decoded.source_bytes],
    }
    staging.write(shard, ids, labels, columns if keep else None)
    return len(ids)


def summarize(store: TokenStore, done: int, source_bytes: int, seconds: float) -> None:
    """Print what this process did, and what the whole split takes."""
    used = int((store.counts > 0).sum())
    print(f"{done:,} images here in {seconds:.1f} s, {done / seconds:.1f} images/s")
    if done:
        print(f"source   {source_bytes / done:10,.1f} bytes an image")
    print(
        f"tokens   {store.payload_bytes / len(store):10,.1f} bytes an image, {len(store):,} images in {store.path}"
    )
    print(f"codes    {used:10,} of {store.num_codes:,} used")


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
