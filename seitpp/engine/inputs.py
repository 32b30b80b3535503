"""The inputs of a run: its stores, images and codebooks, and training steps on zeros that measure memory."""

from collections.abc import Callable, Collection, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from torch import Tensor, nn
from torch.utils.data import Dataset

from seitpp.augment import SoftLabels
from seitpp.augment.maps import Sides, both_sides
from seitpp.books import Books
from seitpp.codebook import codebook_fingerprint
from seitpp.data.dataset import Chosen, evaluation_loader, fraction_of
from seitpp.data.digits import DigitsSource, digits
from seitpp.data.selection import HELD_OUT, Selection, set_aside
from seitpp.engine.config import RunConfig, TrainConfig
from seitpp.engine.memory import Trial
from seitpp.engine.run import SKIPPED, Run
from seitpp.errors import UserError, refusing
from seitpp.files import read_json
from seitpp.images.annotated import AnnotatedSource
from seitpp.images.decode import RGB, ImageError, Reading, decode_image
from seitpp.images.labels import LabelRules
from seitpp.images.sources import ImageSource, SourceSubset, hold_out, open_source
from seitpp.models import Loaded, TokenAdapt, load_pretrained_tokenadapt
from seitpp.models.weights.classifiers import classifier_spec
from seitpp.objectives import soft_label_loss
from seitpp.store import TokenStore
from seitpp.store.layout import SEQUENCE

Data = TypeVar("Data")
Source = TypeVar("Source", ImageSource, AnnotatedSource)

BLOCK, CHECKED = 64, (8, 8)  # images of which `readable` decodes so many at a time, to so many pixels

ON_DIGITS = ("digits", "smoke")  # the presets that run on the embedded digits


def open_stores(run: Run, store: str | None) -> tuple[TokenStore, TokenStore]:
    """Open the splits "train" and "validation" of a store, or of the embedded digits if none is named.

    Of a store with the split train alone, every 20th image is held out for validation. One process on each machine
    verifies the files. Raises UserError if the preset needs a store and none is named, or if the images of the
    store have different grids.
    """
    if store is None:
        preset = run.config.preset
        if preset not in ON_DIGITS:
            presets = ", ".join(ON_DIGITS)
            raise UserError(
                f"preset {preset} needs --store: name the folder of a token store, or take a preset that runs on "
                f"the embedded digits ({presets})"
            )
        store = embedded(run, digits).store
    return open_splits(store, verify=run.accelerator.is_local_main_process)


def open_splits(path: str | Path, *, verify: bool) -> tuple[TokenStore, TokenStore]:
    """Open the training and the validation images of a store, as `open_stores` does. Raises UserError as well."""
    train = TokenStore(path, "train", verify)
    if train.grid is None:
        raise UserError(
            f"{train.path}: got images with different grids, expected one grid: tokenize all images at one size"
        )
    # Beside train, a split of another name is probably meant for validation: TokenStore refuses it.
    alone = train.splits == ["train"]
    return set_aside(train) if alone else (train, TokenStore(path, "validation", verify))


def open_once(accelerator: Accelerator, open_data: Callable[[], Data]) -> Data:
    """Return what `open_data` returns; only the main process calls it and sends the result to the others.

    So a folder of a million files is listed once. An error that the user can mend is raised on all processes.
    """
    opened: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            opened = [open_data(), None]
        except (UserError, OSError) as error:
            opened = [None, error]
    data, error = broadcast_object_list(opened)
    if error is not None:
        raise error
    return data


def embedded(run: Run, make: Callable[[], Data]) -> Data:
    """Return the embedded data set from `make`, which one process on each machine calls before the others."""
    with run.accelerator.main_process_first():
        return make()


def open_images(
    data: str, split: str | None, validation_split: str | None, *, rules: LabelRules | None = None
) -> tuple[ImageSource, ImageSource]:
    """Open the training and the validation images of a source (`seitpp.images.sources.open_source`).

    Without `validation_split`, every twentieth image of `split` is held out for validation. Without `rules`, no
    labels are read; with them, the classes of both are those of the training images.
    """
    source = open_source(data, split, rules)
    if validation_split is None:
        return hold_out(source, HELD_OUT, data)
    if rules and source.class_names:
        rules = replace(rules, classes=tuple(source.class_names))
    return source, open_source(data, validation_split, rules)


def open_classified(
    run: Run, validation_split: str | None, purpose: str, *, on_digits: Collection[str] = ON_DIGITS
) -> tuple[ImageSource, ImageSource]:
    """Open the training and the validation images of the run's --data and --split, with their classes.

    Without --data they are the embedded digits, of the presets `on_digits`. Images that cannot be read are left
    out if the run says so (`readable`). Raises UserError if an image has no label, which the `purpose` needs, if
    the two have other classes, and for another preset without --data.
    """
    data = run.config.data
    if data is None:
        if run.config.preset not in on_digits:
            raise UserError(
                f"preset {run.config.preset} needs --data: name labeled images, or take a preset that runs on the "
                f"embedded digits ({', '.join(on_digits)})"
            )
        return DigitsSource("train"), DigitsSource("validation")
    opened = partial(open_images, data, run.config.split, validation_split, rules=LabelRules())
    parts = open_once(run.accelerator, opened)
    for part in parts:
        require_labels(part, purpose, data)
    names = parts[0].class_names
    if not names or names != parts[1].class_names:
        raise UserError(
            f"{data}: the splits have different classes or none, expected the same class names in both: "
            "name labeled splits with --split and --validation-split"
        )
    train, validation = (readable(part, run) for part in parts)
    return train, validation


def readable(source: Source, run: Run, *, reading: Reading = RGB) -> Source:
    """Return the images that can be read, if the run says `skip_errors`; else the source as it is.

    Without `skip_errors`, images without mask and masks without image are refused (ImageError). With it, all
    images are decoded once before, JPEGs at the lowest resolution, by the workers of all processes, each of which
    must call this: so every epoch and every evaluation has the same images. What is left out is counted, printed
    and listed in the run's skipped.txt. Raises UserError if nothing is left.
    """
    if not run.config.skip_errors:
        if isinstance(source, AnnotatedSource):
            source.check_pairs()
        return source
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    loader = evaluation_loader(_Checked(source, reading), BLOCK, rank=rank, ranks=ranks, workers=run.workers)
    found = [error for errors in tqdm(loader, desc="reading all images", unit="batch") for error in errors]
    errors = dict(sorted(gather_object(found)))
    if not errors:
        return source
    run.print(
        f"{len(errors):,} of {len(source):,} images cannot be read and are left out, see {run.out / SKIPPED}"
    )
    run.skip(errors.values())
    kept = [index for index in range(len(source)) if index not in errors]
    if not kept:
        raise UserError(f"none of {len(source):,} images can be read: {errors[0]}; check --data")
    return source.subset(kept) if isinstance(source, AnnotatedSource) else SourceSubset(source, kept)


class _Checked(Dataset):
    """The errors of images that cannot be read: a list of (index, message) for each batch."""

    def __init__(self, source: ImageSource | AnnotatedSource, reading: Reading):
        self.source, self.reading = source, replace(reading, scaled=True)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> list[tuple[int, str]]:
        errors = []
        for index in indices:
            try:
                decode_image(self.source.read(index), CHECKED, reading=self.reading)
            except ImageError as error:
                errors.append((index, str(error)))
        return errors


def reading_of_run(checkpoint: str, channels: int) -> Reading:
    """Return how the images of a run's store were read, as its result.json says; the default where it does not."""
    result = Path(checkpoint) / "result.json"
    record = read_json(result, UserError, "the result of a run") if result.is_file() else {}
    with refusing(UserError, f"{result} cannot be read", "how the images of a run were read"):
        tokenizer = (record.get("data") or {}).get("tokenizer") or {}
        return Reading.from_json(tokenizer.get("reading"), channels)


def require_labels(source: ImageSource, purpose: str, data: str) -> None:
    """Raise UserError unless every image of the source, called `data` in messages, has a label."""
    missing = source.labels.values.count(None)
    if missing:
        raise UserError(
            f"{purpose} needs classes: {missing:,} of {len(source):,} images of {data} have none "
            f"({source.labels.origin}); name images with labels"
        )


def train_subset(config: TrainConfig, dataset: Dataset) -> Dataset:
    """Return the --fraction of the training images that the seed chooses. Raises UserError for a bad fraction."""
    if config.fraction == 1:
        return dataset
    return Chosen(dataset, fraction_of(len(dataset), config.fraction, config.seed))


def describe_store(store: TokenStore, config: RunConfig) -> str:
    """Describe the size and the codes of a store, and how much of it is used for training, in a few lines."""
    text = (
        f"{len(store):,} images, {store.payload_bytes / len(store):.1f} bytes each, grid {store.grid}, "
        f"K = {store.num_codes}, {store.num_classes} classes"
    )
    if isinstance(store, Selection):
        text = f"{text}\n{store.rule}"
    fraction = getattr(config, "fraction", 1)
    if fraction == 1:
        return text
    facts = train_facts(store, config)
    used = (
        f"{facts['training_images']:,} of {len(store):,} training images, {facts['training_bytes']:,} bytes of ids"
    )
    return f"{text}\n--fraction {fraction:g}: {used}"


def store_facts(train: TokenStore, validation: TokenStore, config: RunConfig) -> dict[str, Any]:
    """Return the facts about a run's data that are stored in result.json."""
    return {
        "payload_bytes_per_image": train.payload_bytes / len(train),
        "data": {
            "images": {store.split: len(store) for store in (train, validation)},
            "grid": train.grid,
            "num_codes": train.num_codes,
            "code_dim": train.books.dim,
            "codec": train.codec.name,
            "fingerprint": train.fingerprint,
            "tokenizer": train.tokenizer,
            **({"validation": train.rule} if isinstance(train, Selection) else {}),
        },
        **(train_facts(train, config) if isinstance(config, TrainConfig) else {}),
    }


def train_facts(store: TokenStore, config: TrainConfig) -> dict[str, int]:
    """Return the number of images that a run trains on, and the bytes of their encoded ids."""
    if config.fraction == 1:  # known without a look into all shards
        return {"training_images": len(store), "training_bytes": store.payload_bytes}
    chosen = fraction_of(len(store), config.fraction, config.seed)
    return {"training_images": len(chosen), "training_bytes": int(store.payload_sizes[chosen].sum())}


def image_facts(images: Dataset, train: Sized, validation: Sized) -> dict[str, Any]:
    """Return the facts about a run on images that are stored in result.json.

    `images` are those of `train` that it trains on.
    """
    return {
        "data": {"images": {"train": len(train), "validation": len(validation)}},
        "training_images": len(images),
    }


def window_of(store: TokenStore, size: Sides | None, flag: str) -> tuple[int, int]:
    """Return the size of the window that the model sees: a square, (height, width), or the whole grid if None.

    Raises UserError, which names `flag`, if the grid is smaller, or if the tokens are a sequence.
    """
    if size is None:
        return store.grid
    if store.layout == SEQUENCE and both_sides(size) != store.grid:
        raise UserError(
            f"{flag} {size}: the tokens of {store.path} are sequences of {store.grid[1]}, which cannot be cut: "
            f"pass {flag} None"
        )
    window = both_sides(size)
    if window[0] > store.grid[0] or window[1] > store.grid[1]:
        got = size if isinstance(size, int) else f"{size[0]} {size[1]}"
        limit = "its shorter side" if isinstance(size, int) else "its height and width"
        raise UserError(f"{flag} {got} from the grid {store.grid} of {store.path}: expected at most {limit}")
    return window


def refuse_on_sequences(store: TokenStore, config: object, *names: str) -> None:
    """Raise UserError if a setting that needs rows and columns is named for a store whose tokens are sequences.

    `names` are those of the settings of `config` that need them; None or 0 is always accepted.
    """
    for name in names if store.layout == SEQUENCE else ():
        if value := getattr(config, name):
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} {value}: the tokens of {store.path} are sequences without rows and columns: pass "
                f"--{flag} {'0' if isinstance(value, float) else 'None'}"
            )


def check_codebook(codebook: Books | np.ndarray, *, source: str, expected: str, checkpoint: str) -> None:
    """Raise UserError unless the fingerprint of the codebook of `source` is the `expected` one of `checkpoint`."""
    fingerprint = codebook_fingerprint(codebook)
    if fingerprint != expected:
        raise UserError(
            f"codebook {fingerprint[:16]} of {source} is not the codebook {expected[:16]} that {checkpoint} "
            "was trained on: name its tokenizer or a store of it"
        )


def check_codes(codebook: Books | np.ndarray, *, source: str, saved: Loaded, checkpoint: str) -> None:
    """Raise UserError unless a model was trained on ids of the codebook of `source`.

    Where the model's codebook is unknown, as with official checkpoints, only the size is compared: the number of
    codes for a model that embeds ids, the dimension of a code for a model that takes maps.
    """
    if saved.codebook:
        check_codebook(codebook, source=source, expected=saved.codebook, checkpoint=checkpoint)
        return
    sizes, books = classifier_spec(getattr(saved.model, "encoder", saved.model)).arguments, Books.of(codebook)
    takes_ids = "num_codes" in sizes
    expected, size = (sizes["num_codes"], books.rows) if takes_ids else (sizes["in_chans"], books.dim)
    if size != expected or (takes_ids and books.digits > 1):
        unit = "codes" if takes_ids else "dimensions"
        raise UserError(
            f"the codebook of {source} has {size} {unit}, {checkpoint} takes {expected}: "
            "name its tokenizer or a store of it"
        )


def adapt_zeros(adapt: TokenAdapt, images: int, device: torch.device) -> None:
    """Run TokenAdapt on zeros for `images` images, as a view does, to allocate the same memory."""
    height, width = adapt.crop
    with torch.no_grad():
        adapt.convert(torch.zeros(images, adapt.settings["code_dim"], *adapt.grid, device=device))
        adapt.invert(torch.zeros(images, adapt.settings["code_dim"], 2 * height, 2 * width, device=device))


def classifier_trial(zeros: Tensor, adapted: float = 0.0, several: int | None = None) -> Trial:
    """Return a training step of a classifier on zeros, from which its memory is computed.

    `zeros` has the shape and dtype of one input; the fraction `adapted` of the images passes through TokenAdapt
    before the model. `several` is the number of classes if images have several each.
    """

    def loss(images: int, device: torch.device, model: nn.Module, adapt: TokenAdapt | None = None) -> Tensor:
        if adapt:
            adapt_zeros(adapt, round(adapted * images), device)
        shape, dtype = ((images, several), torch.uint8) if several else ((images,), torch.long)
        labels = torch.zeros(shape, dtype=dtype, device=device)
        targets = SoftLabels(labels, labels, torch.zeros(images, device=device))
        inputs = torch.zeros(images, *zeros.shape, dtype=zeros.dtype, device=device)
        return soft_label_loss(model(inputs), targets, 0.1)

    return loss


def open_tokenadapt(path: str | None, codebook: Books | np.ndarray, source: str) -> TokenAdapt | None:
    """Load the TokenAdapt for the ids of `source`; return None if no path is named.

    `path` is the folder of a run, its model file, or an official checkpoint that contains a TokenAdapt. Raises
    ModelError if it contains none, UserError if it was trained on another codebook (of an official one, only the
    size is known).
    """
    if path is None:
        return None
    model, expected, *_ = load_pretrained_tokenadapt(path)
    sizes = (model.settings["num_codes"], model.settings["code_dim"])
    if expected is not None:
        check_codebook(codebook, source=source, expected=expected, checkpoint=path)
    elif (found := (Books.of(codebook).num_codes, Books.of(codebook).dim)) != sizes:
        got, want = (f"{codes} codes of {dim} dimensions" for codes, dim in (found, sizes))
        raise UserError(
            f"the codebook of {source} has {got}, the TokenAdapt in {path} takes {want}: "
            "name its tokenizer or a store of it"
        )
    return model
