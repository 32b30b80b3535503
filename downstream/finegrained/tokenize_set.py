"""Turn a fine-grained set, as its authors distribute it, into a token store with its published splits.

    accelerate launch downstream/finegrained/tokenize_set.py flowers102 --data flowers-102 --tokenizer TOKENIZER
    accelerate launch downstream/finegrained/tokenize_set.py cars --data stanford_cars --tokenizer TOKENIZER
    accelerate launch downstream/finegrained/tokenize_set.py cub200 --data CUB_200_2011 --tokenizer TOKENIZER
    accelerate launch downstream/finegrained/tokenize_set.py inat18 --data inat2018 --tokenizer TOKENIZER
    accelerate launch downstream/finegrained/tokenize_set.py inat19 --data inat2019 --tokenizer TOKENIZER
    accelerate launch downstream/finegrained/tokenize_set.py pets --data oxford-iiit-pet --tokenizer TOKENIZER
    accelerate launch downstream/finegrained/tokenize_set.py food101 --data food-101 --tokenizer TOKENIZER

TOKENIZER is a tokenizer file, that of the store on which the model was pre-trained; --codebook keeps only those
codes that a file names, as recipes/tokenize_images.py does. Writes the splits `train` and `validation` of the
store --out (SET-tokens where nothing is named) on any number of processes. Interrupted, the same command goes on
as recipes/tokenize_images.py does. Numbers of images or classes that differ from the published ones are a warning.
Downloads nothing; the rate on a GPU is not measured.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from sets import SETS, differences, read_set

from seitpp import TokenStore, tokenizers
from seitpp.engine.command import run_recipe
from seitpp.errors import UserError
from seitpp.images.sources import DatasetSource

sys.path.append(str(Path(__file__).parents[2] / "recipes"))
import tokenize_images


@dataclass(frozen=True)
class Config:
    """Which set, by which tokenizer, into which store."""

    name: str  # of the set; the preset says it
    out: str  # the store
    data: str | None = None  # the folder of the set
    tokenizer: str | None = None  # a tokenizer file
    codebook: str | None = None  # keep its codes of this file only, as recipes/tokenize_images.py does
    skip_errors: bool = False  # leave out images that cannot be read, and list them beside the store
    batch_size: int = 256  # images of one forward, on each process
    workers: int = 16  # processes that decode images, for each process that tokenizes


PRESETS = {name: Config(name, out=f"{name}-tokens") for name in SETS}


def main(config: Config) -> None:
    # 1. The launch, the set and the tokenizer.
    if config.data is None or config.tokenizer is None:
        raise UserError(f"{config.name}: name its folder with --data and a tokenizer file with --tokenizer")
    accelerator = Accelerator()
    splits = read_set(config.name, config.data)
    tokenizer = tokenizers.load(config.tokenizer)
    for difference in differences(config.name, splits):
        accelerator.print(f"warning: {difference}")

    # 2. The splits that the store lacks, one after the other.
    for split in missing(config.out, list(splits)):
        source = DatasetSource(splits[split], config.data)
        tokenize_images.tokenize(source, tokenizer, of_split(config, split), accelerator)


def missing(out: str, splits: list[str]) -> list[str]:
    """All of `splits`, or those that an interrupted run left. Raises UserError if the store has them all."""
    written = TokenStore(out, splits[0], verify=False).splits if (Path(out) / splits[0]).exists() else []
    found = [split for split in splits if split not in written]
    if not found:
        raise UserError(f"{out}: has the splits {', '.join(splits)} already; name another folder with --out")
    return found


def of_split(config: Config, split: str) -> tokenize_images.Config:
    """The same settings, as the recipe for one split has them."""
    return tokenize_images.Config(
        data=config.data,
        tokenizer=config.tokenizer,
        codebook=config.codebook,
        out=config.out,
        split=split,
        skip_errors=config.skip_errors,
        batch_size=config.batch_size,
        workers=config.workers,
    )


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="flowers102")
