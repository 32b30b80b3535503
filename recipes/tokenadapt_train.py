"""Train TokenAdapt (SeiT++): f and g, between which pixel augmentations of a token grid give tokens again.

    accelerate launch recipes/tokenadapt_train.py           # the embedded digits
    accelerate launch recipes/tokenadapt_train.py photos    # scikit-learn's two photographs
    accelerate launch recipes/tokenadapt_train.py published --data imagenet --split train --validation-split val \\
        --tokenizer imagenet-tokens-tokenizer.safetensors

`digits` (the default) takes a minute on one CPU core. Of the tokens of augmented, held-out digits TokenAdapt
finds 73 %, augmentation of the vectors themselves 35 % (flips alone 85 and 39, rotations 78 and 51, crops 72 and
52); decoded, its tokens are 6.3 dB closer to the augmented image. `photos` took 11 minutes: 49 and 46 %, 1.8 dB
closer; it needs more photographs than two. With seven, at scales where a patch holds texture, and judged on one
never seen (tests/bench/tokenadapt_photographs.py, 6 minutes): 43 and 29 % (flips 54 and 38, rotations 46 and 31,
crops 49 and 41), 2.5 dB. `published` has the published sizes and was not run.
Reads images and a tokenizer, which stays as it is. Writes model.safetensors, config.json, metrics.jsonl,
checkpoints/, result.json and pictures into --out. Trains no classifier: f and g go, frozen, into other recipes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from seitpp import plots, tokenizers
from seitpp.augment import Keys, apply_geometry, crop_and_flip, random_geometry
from seitpp.augment.geometry import Geometry
from seitpp.augment.maps import center_window
from seitpp.codebook import codebook_fingerprint, embed
from seitpp.data.dataset import BatchOrder, evaluation_loader
from seitpp.data.digits import DigitsSource, digits
from seitpp.data.photographs import PhotographWindows
from seitpp.engine.accumulation import Sharing
from seitpp.engine.config import TrainConfig
from seitpp.engine.inputs import ON_DIGITS, embedded, image_facts, open_images, train_subset
from seitpp.engine.optim import Schedule, adamw
from seitpp.engine.reconstruction import MEASURES, Augmented, augment_in_every_way, compare, token_accuracy
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.batches import ImageDataset, Pixels
from seitpp.models import TokenAdapt
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.objectives.adapt import TokenizerPair, adapt_loss, tokenizer_pair
from seitpp.recipe import run_recipe
from seitpp.tokenizers import PatchKMeans, Tokenizer

FIT_IMAGES = 400  # without a tokenizer, so many training images make one


@dataclass(frozen=True)
class Config(TrainConfig):
    """Sizes and augmentation are published (SeiT++, TokenAdapt), optimization and length are not: ours."""

    data: str | None = None  # a folder, .parquet or .tar files, or the name of a data set
    split: str | None = None  # the part of the source to train on; all of it where none is named
    validation_split: str | None = None  # the part that is held out; every twentieth image where none is named
    tokenizer: str | None = None  # it must take images of both sizes; patch_kmeans where none is named
    load_size: int = 256  # images are resized to this side
    image_size: int = 256  # side of the random windows of them that are tokenized
    crop_size: int = 28  # side of the augmented grid in tokens
    crop_scale: tuple[float, float] = (0.2, 1.0)
    identity: float = 0.1  # share of the images that are not augmented
    width: int = 384
    heads: int = 6  # of 64 channels
    epochs: float = 10
    warmup_epochs: float = 0.5
    batch_size: int = 256  # global
    base_lr: float = 1e-3  # for a batch of 256; scaled linearly
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest gradient norm


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
    # 1. Run: the output folder, the launch, the seed.
    run = Run("tokenadapt_train", config)

    # 2. Data: images to learn from and others to judge by; a frozen tokenizer of whole and of augmented images.
    everything, validation = open_data(config)
    train = train_subset(config, everything)
    tokenizer = open_tokenizer(config, run, train).to(run.device).eval()
    pair = tokenizer_pair(tokenizer, config.image_size, config.crop_size)
    order = BatchOrder(len(train), config.batch_size, config.seed)
    codebook, grid = tokenizer.codebook.detach(), pair.whole.spec.grid

    # 3. View: see `augmentations`; one draw acts on pixels, in f's space, and for the yardstick on vectors.
    laws = augmentations(config)

    # 4. Model: its first loss is ln K.
    num_codes, code_dim = codebook.shape
    model = TokenAdapt(
        grid,
        crop=pair.augmented.spec.grid,
        num_codes=num_codes,
        code_dim=code_dim,
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
    sizes = f"{grid[0]} x {grid[1]} tokens -> {config.crop_size} x {config.crop_size}, K = {len(codebook)}"
    run.describe(
        f"{len(train):,} images to train on, {len(validation):,} held out; {sizes}", training, model=model
    )

    # 6. Training.
    for step, batch in training.steps(train):
        keys = Keys(config.seed, step // order.steps_per_epoch, batch.indices)
        images = crop_and_flip(batch.images, keys, config.image_size)
        geometry = random_geometry(keys, grid[0], config.crop_size, identity=config.identity, **laws["together"])
        target = pair.augmented.encode(apply_geometry(images, geometry).clamp(0, 1))
        logits = training.wrapped(embed(pair.whole.encode(images), codebook), geometry)
        accuracy = token_accuracy(logits.argmax(dim=1), target).mean()
        training.update(adapt_loss(logits, target), accuracy=accuracy)

    # 7. Proof: held-out images, one augmentation after the other, in figures and in pictures.
    model, validation = training.unsharded(model).eval(), run.eval_subset(validation)
    result = judge(model, pair, validation, config, run)
    if run.is_main:
        save_pretrained(run.out / "model.safetensors", model, codebook_fingerprint(codebook.cpu().numpy()))
        if config.tokenizer is None:
            tokenizer.save(run.out / "tokenizer.safetensors")
        plots.curves(run.log.read(), ["loss", "accuracy"], run.out / "losses.png")
        plots.picture_grid(show(model, pair, validation, config, run), run.out / "augmented.png")
    run.finish(result, image_facts(train, everything, validation))


def zeros_loss(
    images: int, device: torch.device, model: TokenAdapt, whole: Tokenizer, augmented: Tokenizer
) -> Tensor:
    """A step on zeros, by which its memory is counted."""
    for tokenizer in (whole, augmented):
        ids = tokenizer.encode(torch.zeros(images, 3, *tokenizer.spec.image_size, device=device))
    boxes = torch.zeros(images, 4, dtype=torch.long, device=device)
    flipped, matrices = boxes[:, 0].bool(), torch.zeros(images, 3, 3, device=device)
    geometry = Geometry(flipped, matrices, boxes, model.grid[0], model.crop[0])
    maps = torch.zeros(images, model.settings["code_dim"], *model.grid, device=device)
    return adapt_loss(model(maps, geometry), ids)


def augmentations(config: Config) -> dict[str, dict]:
    """Arguments of `random_geometry` by name: three that do one thing to every image, and what is trained."""
    nothing = {"flip": 0.0, "affine": 0.0, "scale": None}
    return {
        "flip": {**nothing, "flip": 1.0},
        "rotation": {**nothing, "affine": 1.0, "part": 1.0, "shift": 0.0, "shear": 0.0},
        "crop": {**nothing, "scale": config.crop_scale},
        "together": {"scale": config.crop_scale},
    }


def augmented(model: TokenAdapt, pair: TokenizerPair, batch: Pixels, config: Config, law: dict) -> Augmented:
    """What `law` makes of the central windows of held-out images, in every way."""
    size = config.image_size, config.image_size
    geometry = random_geometry(
        Keys(config.seed, 0, batch.indices), pair.whole.spec.grid[0], config.crop_size, **law
    )
    return augment_in_every_way(model, pair, originals=center_window(batch.images, size) / 255, geometry=geometry)


def judge(
    model: TokenAdapt, pair: TokenizerPair, validation: Dataset, config: Config, run: Run
) -> dict[str, float]:
    """`MEASURES` of each augmentation, means over the held-out images; printed as a table."""
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    laws = augmentations(config)
    sums = torch.zeros(len(laws), len(MEASURES), device=run.device)
    for batch in evaluation_loader(validation, 64, rank=rank, ranks=ranks, workers=config.workers):
        for row, law in zip(sums, laws.values(), strict=True):
            made = augmented(model, pair, batch.to(run.device), config, law)
            row += compare(made, pair.augmented).sum(dim=0)
    means = (run.accelerator.reduce(sums) / len(validation)).tolist()
    run.print(f"{'':10}" + "".join(f"{measure:>21}" for measure in MEASURES))
    result = {}
    for name, row in zip(laws, means, strict=True):
        run.print(f"{name:10}" + "".join(f"{value:21.2f}" for value in row))
        result |= {f"{name}_{measure}": value for measure, value in zip(MEASURES, row, strict=True)}
    return result


def show(
    model: TokenAdapt, pair: TokenizerPair, validation: Dataset, config: Config, run: Run
) -> dict[str, Tensor]:
    """Rows of pictures: held-out images from all over the source, and their augmentation in every way."""
    chosen = range(0, len(validation), -(-len(validation) // 8))
    batch = validation.__getitems__(list(chosen)).to(run.device)
    made = augmented(model, pair, batch, config, augmentations(config)["together"])
    decode = pair.augmented.decode
    rows = {
        "image": made.originals,
        "augmented": made.images,
        "its tokens": decode(made.ids),
        "direct": decode(made.direct),
        "TokenAdapt": decode(made.tokenadapt),
    }
    return {name: images.cpu() for name, images in rows.items()}


def open_data(config: Config) -> tuple[Dataset, Dataset]:
    """Images to train on and held-out ones: of the named source, two photographs, or the digits."""
    size = config.load_size, config.load_size
    if config.data is not None:
        train, validation = open_images(config.data, config.split, config.validation_split)
        return ImageDataset(train, size), ImageDataset(validation, size)
    if config.preset == "photos":
        return PhotographWindows(config.load_size, "train"), PhotographWindows(config.load_size, "validation")
    if config.preset not in ON_DIGITS:
        raise UserError(f"preset {config.preset} needs --data; without a preset the digits are used")
    return ImageDataset(DigitsSource("train"), size), ImageDataset(DigitsSource("validation"), size)


def open_tokenizer(config: Config, run: Run, train: Dataset) -> Tokenizer:
    """The named one, that of the digits, or patch_kmeans on training images, the same on every process."""
    if config.image_size > config.load_size:
        raise UserError(f"--image-size {config.image_size}: expected at most --load-size {config.load_size}")
    if config.tokenizer is not None:
        return tokenizers.load(config.tokenizer)
    if config.preset == "photos":
        chosen = BatchOrder(len(train), 1, config.seed).epoch_order(0)[:FIT_IMAGES].tolist()
        images = train.__getitems__(chosen).images / 255
        return PatchKMeans.fit(images, image_size=config.load_size, patch=8, num_codes=391, code_dim=32)
    if config.data is not None:
        raise UserError(f"preset {config.preset} with --data needs --tokenizer, the file of one for such images")
    return tokenizers.load(embedded(run, digits).tokenizer)


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
