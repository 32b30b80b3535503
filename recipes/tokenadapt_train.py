"""Train TokenAdapt (SeiT++): f and g map tokens into a space for pixel augmentations, and back to tokens.

    accelerate launch recipes/tokenadapt_train.py           # the embedded digits
    accelerate launch recipes/tokenadapt_train.py photos    # scikit-learn's two photographs
    accelerate launch recipes/tokenadapt_train.py published --data imagenet --split train --validation-split val \\
        --tokenizer imagenet-tokens-tokenizer.safetensors

`digits` (the default) takes a minute on one CPU core. On augmented, held-out digits TokenAdapt predicts 73 % of
the tokens correctly; augmenting the vectors directly gives 35 % (flips alone 85 and 39, rotations 78 and 51, crops
72 and 52). Its decoded tokens are 6.3 dB (PSNR) closer to the augmented image. `photos` took 11 minutes: 49 and
46 %, 1.8 dB; two photographs are too few. Trained on seven, at scales where a patch holds texture, and evaluated
on an unseen one (tests/bench/tokenadapt_photographs.py, 6 minutes): 43 and 29 % (flips 54 and 38, rotations 46 and
31, crops 49 and 41), 2.5 dB. `published` has the published sizes and was not run.
The recipe reads images and a tokenizer, which is not changed. It writes model.safetensors, config.json,
metrics.jsonl, checkpoints/, result.json and pictures into --out. It trains no classifier: other recipes use the
frozen f and g.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from seitpp import plots, tokenizers
from seitpp.augment import Keys, apply_geometry, crop_and_flip, random_geometry
from seitpp.augment.geometry import Geometry
from seitpp.augment.maps import center_window
from seitpp.codebook import codebook_fingerprint
from seitpp.data.dataset import evaluation_loader
from seitpp.data.digits import DigitsSource, digits
from seitpp.data.order import BatchOrder
from seitpp.data.photographs import PhotographWindows
from seitpp.engine.accumulation import Sharing
from seitpp.engine.config import TrainConfig
from seitpp.engine.findings import augmented as in_words
from seitpp.engine.inputs import (
    ON_DIGITS,
    embedded,
    image_facts,
    open_images,
    open_once,
    readable,
    train_subset,
)
from seitpp.engine.optim import Schedule, adamw
from seitpp.engine.reconstruction import (
    CROP_SCALE,
    MEASURES,
    Augmented,
    augment_in_every_way,
    augmentations,
    compare,
    token_accuracy,
)
from seitpp.engine.report import Report, plot
from seitpp.engine.run import Run
from seitpp.engine.waiting import progress
from seitpp.errors import UserError
from seitpp.images.batches import ImageDataset, Pixels
from seitpp.models import TokenAdapt
from seitpp.models.masking import likeliest
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.objectives.adapt import TokenizerPair, adapt_loss, tokenizer_pair
from seitpp.recipe import run_recipe
from seitpp.tokenizers import Kind, PatchKMeans, Tokenizer

FIT_IMAGES = 400  # number of training images that a tokenizer is fitted to if none is named


@dataclass(frozen=True)
class Config(TrainConfig):
    """Settings of TokenAdapt training. Sizes and augmentation are published (SeiT++); optimization and length are
    not, and are chosen by this project.
    """

    data: str | None = None  # Folder, .parquet or .tar files, or name of a data set. None: as the preset says.
    split: str | None = None  # Split of --data to train on. None: all of it.
    validation_split: str | None = None  # Split of --data to evaluate on. None: every twentieth image.
    skip_errors: bool = False  # Leave out images of --data that cannot be read, and list them in OUT/skipped.txt.
    # Tokenizer file; it must take both image sizes. None: that of the digits; preset photos fits patch_kmeans.
    tokenizer: str | None = None
    # Kind of the tokenizer, only needed where its files do not show it (cosmos).
    tokenizer_kind: Kind | None = None
    load_size: int = 256  # Side in pixels to which images are resized.
    image_size: int = 256  # Side in pixels of the random crops that are tokenized.
    crop_size: int = 28  # Side of the augmented grid in tokens.
    crop_scale: tuple[float, float] = CROP_SCALE  # Range of the area of the augmented crop, as fractions.
    identity: float = 0.1  # Fraction of the images that are not augmented.
    width: int = 384  # Number of channels of f and g.
    heads: int = 6  # Number of attention heads, of 64 channels each.
    epochs: float = 10  # Length of training in epochs.
    warmup_epochs: float = 0.5  # Length of the linear warm-up of the learning rate, in epochs.
    batch_size: int = 256  # Number of images per update, over all processes.
    base_lr: float = 1e-3  # Peak learning rate at batch size 256; scaled linearly with the batch size.
    weight_decay: float = 0.05  # Weight decay of AdamW.
    betas: tuple[float, float] = (0.9, 0.95)  # Betas of AdamW.
    clip: float = 1.0  # Largest norm of the gradient.


PRESETS = {"published": Config()}
PRESETS["photos"] = replace(
    PRESETS["published"],
    preset="photos",
    load_size=96,
    image_size=64,
    crop_size=7,
    width=192,
    heads=3,
    epochs=50,
    warmup_epochs=2,
    batch_size=32,
    base_lr=8e-3,
    precision="no",
    workers=0,
    checkpoint_epochs=10,
)
PRESETS["digits"] = replace(
    PRESETS["photos"],
    preset="digits",
    load_size=32,
    image_size=32,
    crop_size=8,
    width=128,
    heads=2,
    epochs=15,
    warmup_epochs=1,
    checkpoint_epochs=5,
)
PRESETS["smoke"] = replace(
    PRESETS["digits"],
    preset="smoke",
    width=64,
    heads=1,
    epochs=1,
    warmup_epochs=0.1,
    batch_size=64,
    checkpoint_epochs=0.5,
    log_steps=1,
)


def main(config: Config) -> None:
    # 1. Run: the output folder, the processes, the seed.
    run = Run("tokenadapt_train", config)

    # 2. Data: training and validation images; a frozen tokenizer for original and for augmented images.
    everything, validation = open_data(config, run)
    train = train_subset(config, everything)
    tokenizer = open_tokenizer(config, run, train).to(run.device).eval()
    pair = tokenizer_pair(tokenizer, config.image_size, config.crop_size)
    order = BatchOrder(len(train), config.batch_size, config.seed)
    codebook, grid = tokenizer.books, pair.whole.spec.grid

    # 3. Augmentation: one sample is applied to pixels and in the space of f, and in evaluation to vectors.
    settings = augmentations(config.crop_scale)["together"]

    # 4. Model: the first loss is ln K.
    model = TokenAdapt(
        grid,
        crop=pair.augmented.spec.grid,
        num_codes=codebook.to_books().num_codes,
        code_dim=codebook.dim,
        width=config.width,
        heads=config.heads,
        mlp=4 * config.width,
    ).to(run.device)

    # 5. Optimization.
    schedule = Schedule.from_config(config, order)
    optimizer = adamw(model, config.weight_decay, betas=config.betas)
    training = run.training(
        model,
        optimizer,
        schedule,
        data_fingerprint=f"{tokenizer.fingerprint} of {len(train)} images",
        clip=config.clip,
        sharing=Sharing(zeros_loss, tuple(pair)),
    )
    codes = " x ".join(map(str, codebook.sizes))
    sizes = f"{grid[0]} x {grid[1]} tokens -> {config.crop_size} x {config.crop_size}, K = {codes}"
    run.describe(
        f"{len(train):,} images to train on, {len(validation):,} held out; {sizes}", training, model=model
    )

    # 6. Training.
    for step, batch in training.steps(train):
        keys = Keys(config.seed, step // order.steps_per_epoch, batch.indices)
        images = crop_and_flip(batch.images, keys, config.image_size)
        geometry = random_geometry(keys, grid[0], config.crop_size, identity=config.identity, **settings)
        target = pair.augmented.encode(apply_geometry(images, geometry).clamp(0, 1))
        logits = training.wrapped(codebook.embed(pair.whole.encode(images)), geometry)
        accuracy = token_accuracy(likeliest(logits, codebook.sizes), target).mean()
        training.update(adapt_loss(logits, target, codebook.sizes), accuracy=accuracy)

    # 7. Results: validation images under each augmentation, as figures and as a picture.
    model, validation = training.unsharded(model).eval(), run.eval_subset(validation)
    result = judge(model, pair=pair, validation=validation, config=config, run=run)
    if run.is_main:
        save_pretrained(run.out / "model.safetensors", model, codebook_fingerprint(codebook.to_books()))
        if config.tokenizer is None:
            tokenizer.save(run.out / "tokenizer.safetensors")
    run.finish(result, image_facts(train, everything, validation))
    if run.is_main:
        losses, path = run.out / "losses.png", run.out / "augmented.png"
        plots.curves(run.log.read(), ["loss", "accuracy"], losses)
        rows = show(model, pair=pair, validation=validation, config=config, run=run)
        plots.picture_grid(rows, path)
        text = "The augmented image, its own tokens, and what two ways make of the tokens of the image."
        shown = [
            plots.shown_rows(rows, path, "Held-out images", text=text),
            plot(losses, "Training", "Loss and accuracy of every update."),
        ]
        run.report(Report("TokenAdapt, trained", in_words(result, "together"), shown))


def zeros_loss(images: int, device: torch.device, model: TokenAdapt, *tokenizers: Tokenizer) -> Tensor:
    """Take a training step on zeros, from which the memory of a step is computed."""
    for tokenizer in tokenizers:
        ids = tokenizer.encode(torch.zeros(images, 3, *tokenizer.spec.image_size, device=device))
    boxes = torch.zeros(images, 4, dtype=torch.long, device=device)
    flipped, matrices = boxes[:, 0].bool(), torch.zeros(images, 3, 3, device=device)
    geometry = Geometry(flipped, matrices, boxes, model.grid[0], model.crop[0])
    maps = torch.zeros(images, model.settings["code_dim"], *model.grid, device=device)
    return adapt_loss(model(maps, geometry), ids, model.sizes)


def augmented(
    model: TokenAdapt, *, pair: TokenizerPair, batch: Pixels, config: Config, settings: dict
) -> Augmented:
    """Augment the central windows of validation images by every method that is compared.

    `settings` are arguments of `random_geometry`.
    """
    size = config.image_size, config.image_size
    geometry = random_geometry(
        Keys(config.seed, 0, batch.indices), pair.whole.spec.grid[0], config.crop_size, **settings
    )
    return augment_in_every_way(model, pair, originals=center_window(batch.images, size) / 255, geometry=geometry)


def judge(
    model: TokenAdapt, *, pair: TokenizerPair, validation: Dataset, config: Config, run: Run
) -> dict[str, float]:
    """Compute and print `MEASURES` of each augmentation, as means over the validation images."""
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    operations = augmentations(config.crop_scale)
    sums = torch.zeros(len(operations), len(MEASURES), device=run.device)
    loader = evaluation_loader(validation, 64, rank=rank, ranks=ranks, workers=run.workers)
    for batch in progress(loader, "augmentations"):
        for row, settings in zip(sums, operations.values(), strict=True):
            output = augmented(model, pair=pair, batch=batch.to(run.device), config=config, settings=settings)
            row += compare(output, pair.augmented).sum(dim=0)
    means = (run.accelerator.reduce(sums) / len(validation)).tolist()
    run.print(f"{'':10}" + "".join(f"{measure:>21}" for measure in MEASURES))
    result = {}
    for name, row in zip(operations, means, strict=True):
        run.print(f"{name:10}" + "".join(f"{value:21.2f}" for value in row))
        result |= {f"{name}_{measure}": value for measure, value in zip(MEASURES, row, strict=True)}
    return result


def show(
    model: TokenAdapt, *, pair: TokenizerPair, validation: Dataset, config: Config, run: Run
) -> dict[str, Tensor]:
    """Return the rows of a picture: evenly spaced validation images, and each augmented by every method."""
    chosen = range(0, len(validation), -(-len(validation) // 8))
    batch = validation.__getitems__(list(chosen)).to(run.device)
    settings = augmentations(config.crop_scale)["together"]
    output = augmented(model, pair=pair, batch=batch, config=config, settings=settings)
    decode = pair.augmented.decode
    rows = {
        "image": output.originals,
        "augmented": output.images,
        "its tokens": decode(output.ids),
        "direct": decode(output.direct),
        "TokenAdapt": decode(output.tokenadapt),
    }
    return {name: images.cpu() for name, images in rows.items()}


def open_data(config: Config, run: Run) -> tuple[Dataset, Dataset]:
    """Open the training and validation images: of --data, of two photographs, or the embedded digits."""
    size = config.load_size, config.load_size
    if config.data is not None:
        splits = config.split, config.validation_split
        parts = open_once(run.accelerator, partial(open_images, config.data, *splits))
        train, validation = (ImageDataset(readable(part, run), size) for part in parts)
        return train, validation
    if config.preset == "photos":
        return PhotographWindows(config.load_size, "train"), PhotographWindows(config.load_size, "validation")
    if config.preset not in ON_DIGITS:
        raise UserError(
            f"preset {config.preset} needs --data: name images, or leave the preset out to use the digits"
        )
    return ImageDataset(DigitsSource("train"), size), ImageDataset(DigitsSource("validation"), size)


def open_tokenizer(config: Config, run: Run, train: Dataset) -> Tokenizer:
    """Load the named tokenizer or that of the digits, or fit patch_kmeans, with the same result on every process.

    Raises UserError for a crop larger than the loaded images, or for --data without a tokenizer.
    """
    if config.image_size > config.load_size:
        raise UserError(f"--image-size {config.image_size}: expected at most --load-size {config.load_size}")
    if config.tokenizer is not None:
        return tokenizers.load(config.tokenizer, config.tokenizer_kind)
    if config.preset == "photos":
        chosen = BatchOrder(len(train), 1, config.seed).epoch_order(0)[:FIT_IMAGES].tolist()
        images = train.__getitems__(chosen).images / 255
        return PatchKMeans.fit(images, image_size=config.load_size, patch=8, num_codes=391, code_dim=32)
    if config.data is not None:
        raise UserError(
            f"preset {config.preset} with --data needs --tokenizer: name a tokenizer file for these images"
        )
    return tokenizers.load(embedded(run, digits).tokenizer)


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
