"""The token stores of a run, the named one or the embedded digits, and steps on zeros that have their shapes."""

from collections.abc import Callable, Sized
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from seitpp.augment import SoftLabels
from seitpp.codebook import codebook_fingerprint
from seitpp.data.dataset import Chosen, fraction_of
from seitpp.data.digits import digits
from seitpp.engine.config import RunConfig, TrainConfig
from seitpp.engine.memory import Trial
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.sources import ImageSource, hold_out, open_source
from seitpp.models import Loaded, TokenAdapt, load_pretrained_tokenadapt
from seitpp.models.weights.classifiers import classifier_spec
from seitpp.objectives import soft_label_loss
from seitpp.store import TokenStore

Made = TypeVar("Made")

HELD_OUT = 20  # a sorted source's last images would all be of one class
ON_DIGITS = ("digits", "smoke")  # the presets that need no data


def open_stores(run: Run, store: str | None) -> tuple[TokenStore, TokenStore]:
    """The splits train and validation of the store, or of the digits where none is named.

    One process of each machine verifies the files. Raises UserError where the preset is made for a store of the
    user's, or where the images of the store differ in their grids.
    """
    if store is None:
        preset = run.config.preset
        if preset not in ON_DIGITS:
            raise UserError(f"preset {preset} needs --store, a folder of tokens; the digits are for {ON_DIGITS}")
        store = embedded(run, digits).store
    verify = run.accelerator.is_local_main_process
    train, validation = (TokenStore(store, split, verify) for split in ("train", "validation"))
    if train.grid is None:
        raise UserError(
            f"{train.path}: its images have grids of their own, expected one grid: tokenize to one size"
        )
    return train, validation


def embedded(run: Run, make: Callable[[], Made]) -> Made:
    """What `make` gives, an embedded data set: made once, by one process of each machine."""
    with run.accelerator.main_process_first():
        return make()


def open_images(data: str, split: str | None, validation_split: str | None) -> tuple[ImageSource, ImageSource]:
    """Images to train on and held-out ones, of a source that `seitpp.images.sources.open_source` opens: its two
    splits, or where none is held out by name, every twentieth image of the one.
    """
    source = open_source(data, split)
    if validation_split is not None:
        return source, open_source(data, validation_split)
    return hold_out(source, HELD_OUT, data)


def train_subset(config: TrainConfig, dataset: Dataset) -> Dataset:
    """The --fraction of the training images, which the seed chooses. Raises UserError for one that is none."""
    if config.fraction == 1:
        return dataset
    return Chosen(dataset, fraction_of(len(dataset), config.fraction, config.seed))


def describe_store(store: TokenStore, config: RunConfig) -> str:
    """Its size and codes, and how much of it is trained on, in words."""
    text = (
        f"{len(store):,} images, {store.payload_bytes / len(store):.1f} bytes each, grid {store.grid}, "
        f"K = {store.num_codes}, {store.num_classes} classes"
    )
    fraction = getattr(config, "fraction", 1)
    if fraction == 1:
        return text
    facts = train_facts(store, config)
    used = (
        f"{facts['training_images']:,} of {len(store):,} training images, {facts['training_bytes']:,} bytes of ids"
    )
    return f"{text}\n--fraction {fraction:g}: {used}"


def store_facts(train: TokenStore, validation: TokenStore, config: RunConfig) -> dict[str, Any]:
    """What result.json says of the data of a run."""
    return {
        "payload_bytes_per_image": train.payload_bytes / len(train),
        "data": {
            "images": {store.split: len(store) for store in (train, validation)},
            "grid": train.grid,
            "num_codes": train.num_codes,
            "code_dim": train.codebook.shape[1],
            "codec": train.codec.name,
            "fingerprint": train.fingerprint,
            "tokenizer": train.tokenizer,
        },
        **(train_facts(train, config) if isinstance(config, TrainConfig) else {}),
    }


def train_facts(store: TokenStore, config: TrainConfig) -> dict[str, int]:
    """How many images a run trains on, and the bytes of their ids."""
    chosen = fraction_of(len(store), config.fraction, config.seed)
    return {"training_images": len(chosen), "training_bytes": int(store.payload_sizes[chosen].sum())}


def image_facts(images: Dataset, train: Sized, validation: Sized) -> dict[str, Any]:
    """What result.json says of a run on images; `images` are those of `train` that it trains on."""
    return {
        "data": {"images": {"train": len(train), "validation": len(validation)}},
        "training_images": len(images),
    }


def window_of(store: TokenStore, side: int | None, flag: str) -> tuple[int, int]:
    """What is seen of a grid: `side` x `side` tokens, or all of it. Raises UserError if the grid is smaller."""
    if side is None:
        return store.grid
    if side > min(store.grid):
        raise UserError(
            f"{flag} {side} from the grid {store.grid} of {store.path}: expected at most its shorter side"
        )
    return side, side


def check_codebook(codebook: np.ndarray, source: str, expected: str, checkpoint: str) -> None:
    """Raise UserError unless the ids of `source` mean what the checkpoint learned: equal fingerprints."""
    found = codebook_fingerprint(codebook)
    if found != expected:
        raise UserError(
            f"codebook {found[:16]} of {source} is not the codebook {expected[:16]} that {checkpoint} "
            "was trained on: name the store of its tokenizer"
        )


def check_codes(codebook: np.ndarray, source: str, saved: Loaded, checkpoint: str) -> None:
    """Raise UserError unless a model can take the ids of `source`.

    They must be of its codebook; where that is unknown, as of official checkpoints, as many codes as it embeds, or
    of as many dimensions as its maps.
    """
    if saved.codebook:
        check_codebook(codebook, source, saved.codebook, checkpoint)
        return
    sizes = classifier_spec(getattr(saved.model, "encoder", saved.model)).arguments
    takes_ids = "num_codes" in sizes
    expected, found = (sizes["num_codes"], len(codebook)) if takes_ids else (sizes["in_chans"], codebook.shape[1])
    if found != expected:
        what = "codes" if takes_ids else "dimensions"
        raise UserError(
            f"the codebook of {source} has {found} {what}, {checkpoint} takes {expected}: "
            "name the store of its tokenizer"
        )


def adapt_zeros(adapt: TokenAdapt, images: int, device: torch.device) -> None:
    """What a view does to so many images by TokenAdapt, as far as it takes memory."""
    height, width = adapt.crop
    with torch.no_grad():
        adapt.convert(torch.zeros(images, adapt.settings["code_dim"], *adapt.grid, device=device))
        adapt.invert(torch.zeros(images, adapt.settings["code_dim"], 2 * height, 2 * width, device=device))


def classifier_trial(zeros: Tensor, adapted: float = 0.0) -> Trial:
    """A step of a classifier on `zeros`, one of its inputs, by which its memory is counted; the share `adapted` of
    the images goes through TokenAdapt before.
    """

    def loss(images: int, device: torch.device, model: nn.Module, adapt: TokenAdapt | None = None) -> Tensor:
        if adapt:
            adapt_zeros(adapt, round(adapted * images), device)
        labels = torch.zeros(images, dtype=torch.long, device=device)
        targets = SoftLabels(labels, labels, torch.zeros(images, device=device))
        inputs = torch.zeros(images, *zeros.shape, dtype=zeros.dtype, device=device)
        return soft_label_loss(model(inputs), targets, 0.1)

    return loss


def open_tokenadapt(path: str | None, codebook: np.ndarray, source: str) -> TokenAdapt | None:
    """TokenAdapt for the ids of `source`, from a run's folder, its file, or an official checkpoint that holds one;
    None where no path is named.

    Raises ModelError if the file holds none, UserError if it was trained for another codebook, which of an
    official one only the sizes tell.
    """
    if path is None:
        return None
    model, expected, *_ = load_pretrained_tokenadapt(path)
    sizes = (model.settings["num_codes"], model.settings["code_dim"])
    if expected is not None:
        check_codebook(codebook, source, expected, path)
    elif codebook.shape != sizes:
        found, taken = (f"{codes} codes of {dim} dimensions" for codes, dim in (codebook.shape, sizes))
        raise UserError(
            f"the codebook of {source} has {found}, the TokenAdapt in {path} takes {taken}: "
            "name the store of its tokenizer"
        )
    return model
