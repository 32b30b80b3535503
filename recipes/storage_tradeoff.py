"""Compare ways to keep a training set in few bytes: for each, a network trained on what is left, and the bytes.

    accelerate launch recipes/storage_tradeoff.py                     # the embedded digits
    accelerate launch recipes/storage_tradeoff.py --data photos --budgets 1kB 2kB 5kB --seeds 3
    accelerate launch recipes/storage_tradeoff.py published --data imagenet --validation-split val \
        --tokenizer vitvqgan.safetensors --out runs/tradeoff  # and with --resume after an interruption

Every row of the table has the same network, number of updates, crops and CutMix, and the same test images. Rows:
all originals; a part of them, by chance or by score; fewer pixels; JPEG; WebP and AVIF at the best quality that
meets the bytes of the tokens and each of --budgets (bytes an image); tokens, of all or some images or of several
crops of each; and tokens with masked modeling, which takes a part of the updates. `digits` (the default) has 66
trainings, which took 32 minutes on a busy CPU core: docs/results.md has bytes and accuracies. `published` has
the sizes and the schedule of SeiT, whose pixels and tokens had augmentations of their own; neither its result nor
its time is measured. On disk it needs about four times the space of the originals.
The recipe reads images with labels and a tokenizer; without one, a small one is fitted. It writes config.json,
stored/ (the sets, of which all bytes are counted), rows/ (a file for each finished training), table.csv,
tradeoff.png and result.json into --out. It keeps no weights.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import timm
import torch
from accelerate.utils import set_seed, tqdm
from torch import Tensor, nn
from torch.utils.data import Dataset

from downstream.storage.front import Score
from downstream.storage.packs import Pack
from downstream.storage.pictures import compressed, smaller
from downstream.storage.scores import best, read_scores, write_scores
from downstream.storage.shelf import Row, Shelf
from downstream.storage.sizes import listed
from downstream.storage.table import best_within, in_words, points_of, summary
from downstream.storage.tokens import CentralWindows, SameBoxes
from seitpp import files, plots, tokenizers
from seitpp.augment import EvalPixelView, EvalView, Keys, PixelView, SeitPPFinetuneView, SeitPPView, SeitView
from seitpp.augment.maps import both_sides
from seitpp.codebook import Codebook
from seitpp.data.dataset import TokenDataset, evaluation_loader, fraction_of, training_loader
from seitpp.data.digits import digits
from seitpp.data.order import BatchOrder
from seitpp.engine.config import RunConfig
from seitpp.engine.evaluate import predict
from seitpp.engine.inputs import open_classified
from seitpp.engine.optim import adamw, warmup_cosine
from seitpp.engine.ranges import parse_bytes
from seitpp.engine.report import Report, Table, plot
from seitpp.engine.run import Run
from seitpp.engine.system import launched_processes
from seitpp.engine.waiting import progress
from seitpp.errors import UserError
from seitpp.files import read_json
from seitpp.images.batches import ImageDataset
from seitpp.images.decode import RGB
from seitpp.images.sources import ImageSource
from seitpp.models import MTM, classifier_from
from seitpp.models.vit import SIZES
from seitpp.objectives import MASK_RATIOS, mask_plan, soft_label_loss
from seitpp.recipe import run_recipe
from seitpp.store import TokenStore
from seitpp.tokenizers import Tokenizer
from seitpp.tokenizers.fitting import fit_to_source


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the comparison. The defaults are ViT-B, ImageNet-1k, and the updates of 300 epochs (SeiT)."""

    resume: bool = False  # Go on in --out: what is stored and what is trained stays.
    data: str | None = None  # Images with labels, as for recipes/tokenize_images.py. None: the embedded digits.
    split: str | None = "train"  # Split of --data to train on. None: all of it.
    validation_split: str | None = "validation"  # Split of --data to test on. None: every twentieth image.
    skip_errors: bool = False  # Leave out images of --data that cannot be read, and list them in OUT/skipped.txt.
    tokenizer: str | None = None  # Tokenizer: a file or a folder. None: that of the digits, or a fitted one.
    budgets: tuple[str, ...] = ("1kB", "2kB", "5kB")  # Bytes an image, for WebP and AVIF, and for the summary.
    seeds: int = 3  # Trainings of each row.
    uniform: tuple[float, ...] = (0.7, 0.4, 0.2)  # Fractions of the images, chosen by chance.
    by_score: tuple[float, ...] = (0.6, 0.4, 0.2)  # Fractions of the images, chosen by score.
    # One number a line, for each training image in order. None: the mean probability of its class during training.
    scores: str | None = None
    keep: Literal["high", "low"] = "high"  # The end of the scores that is kept: easy images if they are our own.
    score_passes: int = 5  # Evaluations of the training images, evenly spread, for scores of our own.
    resolution: tuple[float, ...] = (0.3, 0.2, 0.1)  # Sides of the images, as fractions.
    jpeg_quality: tuple[int, ...] = (10, 5, 1)  # Qualities of JPEG.
    token_fractions: tuple[float, ...] = (0.6, 0.2)  # Fractions of the images, kept as tokens.
    crops: tuple[int, ...] = (2, 5)  # Numbers of crops an image, kept as tokens.
    network: Literal["nano", "tiny", "small", "base"] = "base"  # Size of the ViT of all rows.
    # The network's input: central window of the tokens, a square, or height and width. None: the whole grid.
    size: int | tuple[int, int] | None = 28
    crop_scale: tuple[float, float] = (0.08, 1.0)  # Range of the area of a random crop, as fractions.
    cutmix: float = 1.0  # Alpha of the Beta distribution of CutMix. 0: no CutMix.
    smoothing: float = 0.1  # Label smoothing.
    drop_path: float = 0.1  # Stochastic depth rate.
    updates: int = 375_000  # Updates of each row.
    warmup_updates: int = 6_250  # Length of the linear warm-up of the learning rate, in updates.
    masked_share: float = 0.5  # Of the updates of tokens + MTM, the share of masked modeling.
    batch_size: int = 1024  # Number of images per update.
    lr: float = 1.5e-3  # Peak learning rate of AdamW.
    min_lr: float = 1e-5  # Learning rate at the end of the cosine schedule.
    weight_decay: float = 0.1  # Weight decay of AdamW.
    workers: int | None = None  # Processes that read batches. None: by the CPU cores.


PRESETS = {"published": Config()}
PRESETS["digits"] = replace(
    PRESETS["published"],
    preset="digits",
    budgets=("80B", "400B"),
    network="nano",
    size=None,
    crop_scale=(0.7, 1.0),
    drop_path=0.0,
    cutmix=0.0,  # so few updates do not suffice for mixed images
    updates=250,
    warmup_updates=25,
    batch_size=32,
    lr=2e-3,
    precision="no",
    workers=0,
)
PRESETS["smoke"] = replace(
    PRESETS["digits"],
    preset="smoke",
    budgets=("10B", "150B"),
    seeds=2,
    uniform=(0.2,),
    by_score=(0.2,),
    score_passes=1,
    resolution=(0.3,),
    jpeg_quality=(1,),
    token_fractions=(0.2,),
    crops=(2,),
    updates=2,
    warmup_updates=1,
)


def main(config: Config) -> None:
    # 1. Run: the output folder; one process, since the trainings depend on nothing but their seed.
    budgets = {text: parse_bytes(text, "--budgets") for text in config.budgets}
    if min(budgets.values(), default=1) < 1:
        raise UserError(f"--budgets {' '.join(config.budgets)}: expected at least 1 byte an image each")
    if launched_processes() > 1 or config.precision == "fp16":
        raise UserError("storage_tradeoff trains on one process, with --precision no or bf16: launch it so")
    run = Run("storage_tradeoff", config)

    # 2. Images with labels, the tokenizer, and the part of an image that networks see.
    train, test = open_labeled(config, run)
    tokenizer = open_tokenizer(config, train).to(run.device)
    size = window_of(config, tokenizer)
    run.start()
    own = Path(config.tokenizer or run.out / "tokenizer.safetensors")
    if not own.exists():
        tokenizer.save(own)

    # 3. What is kept: each set is a folder, whose files are counted.
    where = {"tokenizer": tokenizer, "device": run.device, "seed": config.seed}
    setup = Setup(config, run, Shelf(run.out / "stored", train=train, test=test, **where), size)
    rows, unmet = store_rows(setup, budgets)
    run.describe(f"{len(train):,} images to keep, {len(test):,} to test, {len(rows)} rows of {config.seeds} seeds")

    # 4. A training for each row and seed; what is finished is not trained again.
    for row, seed in tqdm(
        [(row, seed) for row in rows for seed in seeds_of(config)], desc="rows", unit="training"
    ):
        path = run.out / "rows" / f"{row.name}-seed-{seed}.json"
        if not path.exists():
            files.make_folder(path.parent)
            files.replace_json(path, accuracies(setup, row, seed))

    # 5. The table, its Pareto fronts, and what fits into each budget.
    table = [facts(setup, row) for row in rows]
    files.replace_csv(run.out / "table.csv", list(table[0]), [list(entry.values()) for entry in table])
    plots.tradeoff(points_of(table), run.out / "tradeoff.png")
    within = {text: best_within(table, budget) for text, budget in budgets.items()}
    run.print("\n".join([in_words(table), *summary(table, within, unmet)]))
    tokenizer_bytes = sum(listed(own).values())
    run.print(f"the tokenizer, which counts for no row, has {tokenizer_bytes:,} bytes")
    result = {"rows": table, "budgets": within, "unmet": unmet, "tokenizer_bytes": tokenizer_bytes}
    run.finish(result, {"images": {"train": len(train), "test": len(test)}, "scores": scores_in_words(config)})
    text = "Top-1 accuracy on test images over the bytes of the training set; a line is the front of a family."
    shown = [plot(run.out / "tradeoff.png", "Accuracy over storage", text)]
    lines = Table("All ways", list(table[0]), [list(entry.values()) for entry in table])
    said = [f"Most accurate within {line}." for line in summary(table, within, unmet)]
    run.report(Report("Ways to keep a training set, compared", said, shown, [lines]))


class Setup(NamedTuple):
    """What all rows share: settings, run, stored sets, and the input of the network, (height, width) in tokens."""

    config: Config
    run: Run
    shelf: Shelf
    size: tuple[int, int]

    @property
    def pixels(self) -> tuple[int, int]:
        """The input of the network in pixels."""
        patch = self.shelf.tokenizer.spec.patch
        return self.size[0] * patch, self.size[1] * patch


def open_labeled(config: Config, run: Run) -> tuple[ImageSource, ImageSource]:
    """Open the training and the test images. Raises UserError if they do not have one class each."""
    train, test = open_classified(run, config.validation_split, "storage_tradeoff")
    if train.labels.multi_label:
        raise UserError(f"{config.data}: its images have several classes each, expected one; name other images")
    return train, test


def open_tokenizer(config: Config, train: ImageSource) -> Tokenizer:
    """Load the tokenizer; where none is named that of the digits, or a small one, fitted to the images.

    A resumed run takes the one it fitted. Raises UserError for a tokenizer without a grid, or not for RGB.
    """
    fitted = Path(config.out or "") / "tokenizer.safetensors"
    if config.resume and config.tokenizer is None and fitted.is_file():
        return tokenizers.load(fitted)
    path = config.tokenizer or (digits().tokenizer if config.data is None else None)
    tokenizer = tokenizers.load(path) if path else fit_to_source(train, reading=RGB, skip_errors=False)
    if tokenizer.spec.sequence or tokenizer.spec.channels != 3:
        raise UserError(
            f"--tokenizer {path}: expected tokens with rows and columns, of RGB images: crops and pictures of the "
            "same parts need them"
        )
    return tokenizer.eval()


def window_of(config: Config, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the network's input (height, width) in tokens.

    Raises UserError if it is larger than the grid, or odd: a patch of the network is 2 x 2 tokens.
    """
    grid = tokenizer.spec.grid
    size = both_sides(config.size or grid)
    if any(side > whole or side % 2 for side, whole in zip(size, grid, strict=True)):
        raise UserError(
            f"--size {size[0]} {size[1]} of a grid of {grid[0]} x {grid[1]} tokens: expected even sides of at "
            "most the grid"
        )
    return size


def seeds_of(config: Config) -> range:
    """Return the seeds of the trainings of each row."""
    return range(config.seed, config.seed + config.seeds)


def store_rows(setup: Setup, budgets: Mapping[str, int]) -> tuple[list[Row], list[str]]:
    """Write all sets, and say which budgets a format cannot meet."""
    config, shelf = setup.config, setup.shelf
    originals = shelf.pictures("originals", "all")
    rows, images = [originals], len(shelf.train)
    for fraction in config.uniform:
        rows.append(shelf.pictures("uniform", f"{fraction:g}", chosen=fraction_of(images, fraction, config.seed)))
    if config.by_score:
        scores = scores_of(setup, originals)
        for fraction in config.by_score:
            chosen = best(scores, fraction, config.keep)
            rows.append(shelf.pictures(f"{config.keep} score", f"{fraction:g}", chosen=chosen))
    for scale in config.resolution:
        rows.append(shelf.pictures("resolution", f"{scale:g}", change=partial(smaller, scale=scale)))
    for quality in config.jpeg_quality:
        change = partial(compressed, file_format="JPEG", quality=quality)
        rows.append(shelf.pictures("JPEG", f"q{quality}", change=change))
    tokens = shelf.tokens("tokens", "all")
    budgets = {f"the {tokens.sizes.total / images:.1f} B of tokens": tokens.sizes.total / images, **budgets}
    unmet = []
    for file_format in ("WEBP", "AVIF"):
        for text, budget in budgets.items():
            row = shelf.within(file_format, file_format, budget)
            if row is None:
                unmet.append(f"{file_format} does not meet {text} an image at any quality")
            elif row.name not in {other.name for other in rows}:
                rows.append(row)
    rows += [tokens, shelf.tokens("tokens + MTM", "all", kind="ids")]
    rows += [shelf.tokens("tokens of a part", f"{part:g}", fraction=part) for part in config.token_fractions]
    rows += [shelf.crops("tokens of crops", f"{n}", number=n, scale=config.crop_scale) for n in config.crops]
    return rows, unmet


def scores_of(setup: Setup, originals: Row) -> np.ndarray:
    """Return the scores of the training images (N,): those of --scores, or our own, from a training on all."""
    config, images = setup.config, len(setup.shelf.train)
    if config.scores:
        return read_scores(Path(config.scores), images)
    path = setup.run.out / "scores.txt"
    if not path.exists():
        set_seed(config.seed)
        model, training = learn(setup, originals, config.seed)
        total, every = np.zeros(images), max(1, config.updates // config.score_passes)
        for step in training:
            if (step + 1) % every == 0:
                total += confidences(setup, model, originals)
        write_scores(path, total)
    return read_scores(path, images)


def scores_in_words(config: Config) -> str:
    """Say what the scores are and which end of them is kept."""
    own = "mean probability of an image's class, as often as it was looked at during a training on all originals"
    return f"kept: the {config.keep} ones of {config.scores or own}"


@torch.no_grad()
def confidences(setup: Setup, model: nn.Module, row: Row) -> np.ndarray:
    """Return the probability that a network gives to the class of each picture of a row (N,) float64."""
    view, found = EvalPixelView().to(setup.run.device), []
    images = test_pictures(setup, Pack(row.folder))
    loader = evaluation_loader(images, 256, rank=0, ranks=1, workers=setup.run.workers)
    for batch in progress(loader, "scores"):
        batch = batch.to(setup.run.device)
        likely = model.eval()(view(batch.images)).float().softmax(dim=1)
        found.append(likely.gather(1, batch.labels.unsqueeze(1)).squeeze(1).cpu())
    return torch.cat(found).double().numpy()


def accuracies(setup: Setup, row: Row, seed: int) -> dict[str, float]:
    """Train a network on a row and test it, on clean images, and on images that were kept like the row's."""
    set_seed(seed)
    model, training = learn(setup, row, seed)
    for _ in training:
        pass
    run, shelf = setup.run, setup.shelf
    where = {"accelerator": run.accelerator, "workers": run.workers}
    if row.kind == "pixels":
        view, tests = EvalPixelView().to(run.device), {"top1": shelf.test}
        if row.matched:
            tests["top1_matched"] = Pack(row.matched)
        sets = {
            name: (test_pictures(setup, source), lambda batch: view(batch.images))
            for name, source in tests.items()
        }
    else:
        store = shelf.test_tokens()
        maps = {"codebook": Codebook.of(store.books), "size": setup.size} if row.kind == "maps" else {}
        view = EvalView(setup.size, **maps).to(run.device)
        sets = {"top1": (TokenDataset(store), lambda batch: view(batch.ids))}
    return {
        name: predict(model, images, inputs=inputs, **where).top(1).percent
        for name, (images, inputs) in sets.items()
    }


def test_pictures(setup: Setup, source: ImageSource) -> ImageDataset:
    """Return pictures as a network is tested on them: the part of the image that it sees of tokens."""
    return ImageDataset(source, setup.pixels, CentralWindows(setup.shelf.tokenizer.spec.grid, setup.size))


def learn(setup: Setup, row: Row, seed: int) -> tuple[nn.Module, Iterator[int]]:
    """Return a network and its training on a row, which is not begun; masked modeling of ids is done before."""
    config, device, (pixels, size) = setup.config, setup.run.device, (setup.pixels, setup.size)
    spec, classes = setup.shelf.tokenizer.spec, len(setup.shelf.train.class_names)
    arguments = {"num_classes": classes, "drop_path_rate": config.drop_path}
    if row.kind == "pixels":
        boxes = SameBoxes(seed, spec.grid, size, config.crop_scale)
        images, inputs = ImageDataset(Pack(row.folder), pixels, boxes), attrgetter("images")
        patch = 2 * spec.patch
        model = timm.create_model(
            "vit_base_patch16_224",
            img_size=pixels,
            patch_size=patch,
            global_pool="avg",
            **SIZES[config.network],
            **arguments,
        )
        view = PixelView(config.cutmix, three_augment=False, flip=0.0)
    else:
        store = TokenStore(row.folder)
        images, inputs, codebook = TokenDataset(store), attrgetter("ids"), Codebook.of(store.books)
        crop = {"size": size, "scale": config.crop_scale, "color": None, "cutmix": config.cutmix}
        if row.kind == "maps":
            name = f"seit_vit_{config.network}"
            model = timm.create_model(name, img_size=size, in_chans=codebook.dim, **arguments)
            view = SeitView(codebook, **crop, eda=None)
        else:
            encoder = masked_model(setup, store, images, seed=seed)
            model = classifier_from(encoder, classes, img_size=size, drop_path_rate=config.drop_path)
            view = SeitPPFinetuneView(codebook, **crop, tokenadapt_fraction=0.0, mixup=0.0, lookup=store.lookup)
    model, view = model.to(device), view.to(device)

    def loss_of(batch: Any, keys: Keys, step: int) -> Tensor:
        shown, targets = view(inputs(batch), batch.labels, keys)
        return soft_label_loss(model(shown), targets, config.smoothing)

    steps = config.updates - (masked_updates(config) if row.kind == "ids" else 0)
    return model, updates(setup, model, images, seed=seed, steps=steps, loss_of=loss_of)


def masked_updates(config: Config) -> int:
    """Return how many of the updates of a row are masked modeling, where there is some."""
    return round(config.masked_share * config.updates)


def masked_model(setup: Setup, store: TokenStore, images: Dataset, *, seed: int) -> MTM:
    """Return a masked token model that is trained on a store, for its share of the updates."""
    config, size = setup.config, setup.size
    width, heads = SIZES[config.network]["embed_dim"], SIZES[config.network]["num_heads"]
    decoder = {"decoder_width": width, "decoder_depth": 2, "decoder_heads": heads}
    model = MTM(
        f"mtm_vit_{config.network}",
        grid=size,
        num_codes=store.books.num_codes,
        code_dim=store.books.dim,
        **({} if config.network == "base" else decoder),
    ).to(setup.run.device)
    codebook, ratios = Codebook.of(store.books), MASK_RATIOS["seitpp"]
    crop = {"size": size, "scale": config.crop_scale, "tokenadapt_fraction": 0.0, "lookup": store.lookup}
    view, patches = SeitPPView(codebook, **crop).to(setup.run.device), model.encoder.patch_embed.num_patches

    def loss_of(batch: Any, keys: Keys, step: int) -> Tensor:
        ids = view(batch.ids, keys)
        counts = ratios.counts(patches, ratios.ratio(seed, step))
        return model(ids, mask_plan(keys.uniform("mask", patches), *counts), targets=ids).loss

    for _ in updates(setup, model, images, seed=seed, steps=masked_updates(config), loss_of=loss_of):
        pass
    return model


def updates(
    setup: Setup,
    model: nn.Module,
    images: Dataset,
    *,
    seed: int,
    steps: int,
    loss_of: Callable[[Any, Keys, int], Tensor],
) -> Iterator[int]:
    """Train a network for some updates, yielding the number of each after it: the loop of every row."""
    config, run = setup.config, setup.run
    order, optimizer = BatchOrder(len(images), config.batch_size, seed), adamw(model, config.weight_decay)
    warmup = min(config.warmup_updates, steps - 1)
    rates = {"steps": steps, "warmup": warmup, "peak": config.lr, "final": config.min_lr}
    one = {"rank": 0, "ranks": 1, "accumulation": 1, "workers": run.workers}
    loader = training_loader(images, order, range(steps), **one)
    for step, batch in enumerate(tqdm(loader, desc=f"seed {seed}", total=steps, unit="step", leave=False)):
        batch = batch.to(run.device)
        keys = Keys(seed, step // order.steps_per_epoch, batch.indices)
        model.train()
        with run.accelerator.autocast():
            loss = loss_of(batch, keys, step)
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, **rates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


def facts(setup: Setup, row: Row) -> dict[str, Any]:
    """Return a line of the table: the row, its bytes, and its accuracies over the seeds."""
    paths = [setup.run.out / "rows" / f"{row.name}-seed-{seed}.json" for seed in seeds_of(setup.config)]
    found = [read_json(path, UserError, "the accuracies of a training") for path in paths]
    total = row.sizes.total
    line: dict[str, Any] = {"family": row.family, "setting": row.setting, "images": row.images}
    line |= row.sizes._asdict() | {"bytes": total, "bytes_per_image": total / len(setup.shelf.train)}
    line |= {"GB": total / 10**9, "GiB": total / 2**30}
    for name in ("top1", "top1_matched"):
        known = [scores[name] for scores in found if name in scores]
        score = Score.of(known) if known else None
        line |= {name: score and score.mean, f"{name}_std": score and score.deviation}
    return line


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
