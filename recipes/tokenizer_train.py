"""Train a tokenizer on images: a ViT-VQGAN by gradient descent, or PCA and k-means on patches in seconds.

    accelerate launch recipes/tokenizer_train.py                               # patch_kmeans, embedded digits
    accelerate launch recipes/tokenizer_train.py photos --data my-photographs  # patch_kmeans, 256 pixels
    accelerate launch recipes/tokenizer_train.py published --data imagenet --split train  # 1 GPU
    accelerate launch --multi_gpu --num_processes 8 recipes/tokenizer_train.py published --data imagenet \\
        --split train --validation-split val --adversarial --perceptual-vgg vgg16.pth

`digits` (the default) takes seconds on a CPU: 26.5 dB PSNR with 64 of 64 codes used. `photos` took 12 s for 120
images. `published` has the sizes of the public ViT-VQGAN base; the perceptual and the adversarial loss are off by
default. It was not run to its end, and not timed on a GPU. More figures: docs/results.md.
The recipe reads a folder of images, Parquet files, webdataset tars or a named data set. It writes
tokenizer.safetensors (for recipes/tokenize_images.py), config.json, metrics.jsonl, checkpoints/, result.json and
pictures into --out; patch_kmeans writes no metrics and no checkpoints. It does not write a token store. Codes that
no image uses are kept.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from seitpp import plots
from seitpp.augment import Keys, crop_and_flip
from seitpp.data.dataset import evaluation_loader
from seitpp.data.digits import DigitsSource
from seitpp.data.order import BatchOrder
from seitpp.engine.accumulation import Sharing
from seitpp.engine.config import TrainConfig
from seitpp.engine.findings import tokenized
from seitpp.engine.inputs import image_facts, open_images, open_once, readable, train_subset
from seitpp.engine.optim import Schedule, adamw
from seitpp.engine.reconstruction import quality
from seitpp.engine.report import Report, plot
from seitpp.engine.run import Run
from seitpp.engine.waiting import progress
from seitpp.errors import UserError
from seitpp.images.batches import ImageDataset
from seitpp.images.decode import Reading
from seitpp.images.sources import ImageSource
from seitpp.models.discriminator import Discriminator
from seitpp.models.perceptual import VGGDistance
from seitpp.models.weights.perceptual import load_vgg_distance
from seitpp.objectives import VQTraining, restart_due
from seitpp.objectives.vq import WEIGHTS, vq_losses, weighted_sum
from seitpp.recipe import run_recipe
from seitpp.tokenizers import (
    FeatureKMeans,
    PatchDCT,
    PatchKMeans,
    Tokenizer,
    TokenizerSpec,
    ViTVQGAN,
    open_network,
    refine,
    tally,
    usage,
)
from seitpp.tokenizers.base import height_and_width
from seitpp.tokenizers.transformer import TransformerShape

NEED_DATA = {"published", "photos"}


@dataclass(frozen=True)
class Config(TrainConfig):
    """Settings of tokenizer training. The defaults are a ViT-VQGAN base on ImageNet-1k at 256 pixels, 100 epochs,
    batch size 256 (approximately arXiv 2110.04627).
    """

    data: str | None = None  # Folder, .parquet or .tar files, or name of a data set. None: the embedded digits.
    split: str | None = None  # Split of --data to train on. None: all of it.
    validation_split: str | None = None  # Split of --data to evaluate on. None: every twentieth image.
    skip_errors: bool = False  # Leave out images of --data that cannot be read, and list them in OUT/skipped.txt.
    kind: Literal["vit_vqgan", "patch_kmeans", "patch_dct", "feature_kmeans"] = "vit_vqgan"  # Kind of tokenizer.
    # Size of the tokenized images in pixels: height and width, or the side of a square.
    image_size: int | tuple[int, int] = 256
    bands: int = 3  # Number of channels of the images: 3 is RGB, 1 gray; others are read from .tif and .npy.
    resize: Literal["squash", "center_crop", "pad"] = "squash"  # How images of another aspect ratio are fitted.
    # Values that become black and white. None: the range of 8 or 16 bits.
    intensity: tuple[float, float] | None = None
    patch: int = 8  # Side of a token's patch in pixels.
    num_codes: int = 8192  # Number of codes in the codebook.
    code_dim: int = 32  # Dimension of a code vector.
    # Where no gradients are needed: number of random training images to fit, all held in memory.
    fit_images: int = 200
    backbone: str | None = None  # feature_kmeans only: a timm model, or one of the hub as hf-hub:owner/name.
    backbone_weights: str | None = None  # feature_kmeans only: file with the weights of the timm model.
    digits: int = 4  # feature_kmeans only: number of digits of a token, each with its own --num-codes.
    # patch_kmeans only: updates of a small transformer on either side.
    refine_steps: int = 0
    width: int = 768  # vit_vqgan only: number of channels of encoder and decoder.
    depth: int = 12  # vit_vqgan only: number of transformer blocks of the encoder, and of the decoder.
    heads: int = 12  # vit_vqgan only: number of attention heads, of 64 channels each.
    # vit_vqgan only: size in pixels to which training images are resized before the crop, like --image-size.
    load_size: int | tuple[int, int] = 288
    # vit_vqgan only: torchvision's file of VGG16 weights for the perceptual loss. None: no perceptual loss.
    perceptual_vgg: str | None = None
    adversarial: bool = False  # vit_vqgan only: add a discriminator and its adversarial loss.
    epochs: float = 100  # vit_vqgan only: length of training in epochs.
    warmup_epochs: float = 10  # vit_vqgan only: length of the linear warm-up of the learning rate, in epochs.
    batch_size: int = 256  # vit_vqgan only: number of images per update, over all processes.
    base_lr: float = 1e-4  # vit_vqgan only: peak learning rate at batch size 256; scaled linearly.
    weight_decay: float = 1e-4  # vit_vqgan only: weight decay of AdamW.
    betas: tuple[float, float] = (0.9, 0.99)  # vit_vqgan only: betas of AdamW.


PRESETS = {"published": Config()}
PRESETS["photos"] = replace(
    PRESETS["published"], preset="photos", kind="patch_kmeans", num_codes=391, precision="no"
)
PRESETS["digits"] = replace(
    PRESETS["photos"], preset="digits", image_size=32, patch=4, num_codes=64, fit_images=2000, workers=0
)
PRESETS["dct"] = replace(PRESETS["photos"], preset="dct", kind="patch_dct", code_dim=31)  # 10 of each channel
PRESETS["features"] = replace(  # settings of this project; 196 tokens of 4 digits are 980 bytes
    PRESETS["photos"], preset="features", kind="feature_kmeans", image_size=224, num_codes=1024, code_dim=64
)
PRESETS["smoke"] = replace(
    PRESETS["digits"],
    preset="smoke",
    kind="vit_vqgan",
    code_dim=8,
    width=64,
    depth=1,
    heads=1,
    load_size=36,
    epochs=2,
    warmup_epochs=0.1,
    batch_size=16,
    base_lr=6.4e-2,
    checkpoint_epochs=0.5,
    log_steps=1,
)


def main(config: Config) -> None:
    # 1. Run: the output folder, the processes, the seed.
    run = Run("tokenizer_train", config)

    # 2. Data: training and validation images.
    check_settings(config)
    reading = Reading(config.resize, config.bands, config.intensity)
    parts = open_once(run.accelerator, partial(open_data, config))
    train, validation = (readable(part, run, reading=reading) for part in parts)
    size = config.load_size if config.kind == "vit_vqgan" else config.image_size
    images = train_subset(config, ImageDataset(train, height_and_width(size), reading=reading))
    images.__getitems__([0])  # wrong bands stop here, before anything is written
    run.describe(f"{len(images):,} images to train on, {len(validation):,} held out")

    # 3. The tokenizer, fitted or trained.
    tokenizer = (train_by_gradient if config.kind == "vit_vqgan" else fit)(config, run, images).eval()
    if run.is_main:
        tokenizer.save(run.out / "tokenizer.safetensors")

    # 4. Results: validation images, encoded and decoded.
    held_out = ImageDataset(validation, tokenizer.spec.image_size, reading=reading)
    result = judge(tokenizer, held_out, config=config, run=run)
    run.finish(result, image_facts(images, train, validation))
    if run.is_main:
        rows, path = show(tokenizer, held_out, run.device), run.out / "reconstructions.png"
        plots.picture_grid(rows, path)
        shown = [plots.shown_rows(rows, path, "Held-out images", text="Before and after the way through tokens.")]
        if (losses := run.out / "losses.png").exists():
            shown.append(plot(losses, "Training", "The losses of every update, and the perplexity of the codes."))
        title = "Tokenizer, trained" if config.kind == "vit_vqgan" else "Tokenizer, fitted"
        run.report(Report(title, tokenized(result, tokenizer.books.sizes), shown))


def check_settings(config: Config) -> None:
    """Raise UserError for a setting of the other kind of tokenizer, or a crop larger than the loaded images."""
    trained, refined, network = (
        ("adversarial", "perceptual_vgg"),
        ("refine_steps",),
        ("backbone", "backbone_weights"),
    )
    others = {
        "patch_kmeans": (*trained, *network),
        "patch_dct": (*trained, *refined, *network),
        "vit_vqgan": (*refined, *network),
        "feature_kmeans": (*trained, *refined),
    }
    for name in others[config.kind]:
        if getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')} has no meaning for --kind {config.kind}: leave it out")
    loaded, cropped = height_and_width(config.load_size), height_and_width(config.image_size)
    if config.kind == "vit_vqgan" and (loaded[0] < cropped[0] or loaded[1] < cropped[1]):
        raise UserError(f"--load-size {config.load_size}: expected at least --image-size {config.image_size}")
    if config.kind == "feature_kmeans" and (config.backbone is None or config.bands != 3):
        raise UserError(
            f"--kind feature_kmeans: got --backbone {config.backbone} and --bands {config.bands}, expected a "
            "model of timm and images of 3 bands"
        )
    if config.perceptual_vgg and config.bands != 3:
        raise UserError(f"--perceptual-vgg with --bands {config.bands}: VGG16 takes 3 channels, leave it out")


def fit(config: Config, run: Run, train: Dataset) -> Tokenizer:
    """Fit PCA and k-means to the patches of random training images, or to a network's features of them.

    Every process computes the same tokenizer.
    """
    chosen = BatchOrder(len(train), 1, config.seed).epoch_order(0)[: config.fit_images].tolist()
    if config.kind == "feature_kmeans":
        network = open_network(config.backbone, config.backbone_weights, config.image_size)
        batches = (train.__getitems__(chosen[at : at + 32]).images for at in range(0, len(chosen), 32))
        sizes = {"num_codes": config.num_codes, "digits": config.digits, "code_dim": config.code_dim}
        tokenizer = FeatureKMeans.fit(batches, network, image_size=config.image_size, **sizes)
        run.start()
        return tokenizer.to(run.device)
    images = train.__getitems__(chosen).images.float() / 255
    tokenizer = (PatchDCT if config.kind == "patch_dct" else PatchKMeans).fit(
        images,
        image_size=config.image_size,
        patch=config.patch,
        num_codes=config.num_codes,
        code_dim=config.code_dim,
    )
    if config.refine_steps:
        tokenizer = refine(tokenizer.to(run.device), images, steps=config.refine_steps, seed=config.seed)
    run.start()
    return tokenizer.to(run.device)


def train_by_gradient(config: Config, run: Run, images: Dataset) -> Tokenizer:
    """Train a ViT-VQGAN from random weights.

    Raises UserError under FSDP and DeepSpeed, because dead codes are restarted in a whole codebook.
    """
    if run.launch.splits_training:
        raise UserError(
            "a tokenizer cannot be trained under FSDP or DeepSpeed: launch with recipes/accelerate/eight_gpus.yaml"
        )
    # 1. Model.
    order = BatchOrder(len(images), config.batch_size, config.seed)
    spec = TokenizerSpec.unscaled(
        "vit_vqgan",
        config.image_size,
        config.patch,
        num_codes=config.num_codes,
        code_dim=config.code_dim,
        channels=config.bands,
    )
    shape = TransformerShape(config.width, config.depth, config.heads, 4 * config.width)
    discriminator = Discriminator(spec.image_size, channels=config.bands) if config.adversarial else None
    model = VQTraining(ViTVQGAN(spec, shape, shape), discriminator).to(run.device)
    perceptual = load_vgg_distance(config.perceptual_vgg).to(run.device) if config.perceptual_vgg else None

    # 2. Optimization.
    schedule = Schedule.from_config(config, order)
    optimizer = adamw(model, config.weight_decay, betas=config.betas)
    sharing = Sharing(zeros_loss, (perceptual,) if perceptual else ())
    training = run.training(model, optimizer, schedule, data_fingerprint=f"{len(images)} images", sharing=sharing)
    run.print(str(training))

    # 3. Training.
    tokens = config.batch_size * spec.grid[0] * spec.grid[1]
    for step, batch in training.steps(images):
        keys = Keys(config.seed, step // order.steps_per_epoch, batch.indices)
        pixels = crop_and_flip(batch.images, keys, spec.image_size)
        output = training.wrapped(pixels)
        with run.accelerator.autocast():
            losses = vq_losses(output, pixels, perceptual)
        perplexity = model.count(run.accelerator.reduce(tally(output.ids, config.num_codes)))
        if run.accelerator.sync_gradients and restart_due(
            step, steps=schedule.steps, tokens=tokens, num_codes=config.num_codes
        ):
            vectors = run.accelerator.gather(output.vectors)
            model.restart(vectors, seed=config.seed, step=step, optimizer=optimizer)
        terms = {name: loss.detach() for name, loss in losses.items()}
        training.update(weighted_sum(losses), **terms, perplexity=perplexity)
    run.print(f"dead codes were restarted {model.restarted} times")
    if run.is_main:
        records = run.log.read()
        columns = [name for name in (*WEIGHTS, "perplexity") if name in records[0]]
        plots.curves(records, columns, run.out / "losses.png")
    return model.tokenizer


def zeros_loss(images: int, device: torch.device, model: VQTraining, *perceptual: VGGDistance) -> Tensor:
    """Take a training step on zeros, from which the memory of a step is computed."""
    spec = model.tokenizer.spec
    pixels = torch.zeros(images, spec.channels, *spec.image_size, device=device)
    return weighted_sum(vq_losses(model(pixels), pixels, *perceptual))


def judge(tokenizer: Tokenizer, held_out: ImageDataset, *, config: Config, run: Run) -> dict:
    """Return the number of codes used, the perplexity, and the quality of the held-out images.

    It is the mean over images of PSNR (dB) and SSIM, or of features the fraction of their variance that tokens
    keep. With several digits, the perplexity is the product of theirs. Warns if few codes are used.
    """
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    dataset, sizes = run.eval_subset(held_out), tokenizer.books.sizes
    counts = [torch.zeros(size, dtype=torch.long, device=run.device) for size in sizes]
    sums = torch.zeros(2, device=run.device)
    loader = evaluation_loader(dataset, 64, rank=rank, ranks=ranks, workers=run.workers)
    for batch in progress(loader, "reconstructions"):
        images = batch.to(run.device).images.float() / 255
        ids = tokenizer.encode(images)
        for number, plane in enumerate(ids.unbind(dim=1) if len(sizes) > 1 else [ids]):
            counts[number] += tally(plane, sizes[number])
        if isinstance(tokenizer, FeatureKMeans):
            sums += kept_variance(tokenizer, images, ids)
        else:
            sums += quality(tokenizer.decode(ids), images).sum(dim=0)
    used = [usage(run.accelerator.reduce(one)) for one in counts]
    sums = run.accelerator.reduce(sums)
    run.print("; ".join(map(str, used)))
    codes = {"codes_used": sum(one.used for one in used), "perplexity": prod(one.perplexity for one in used)}
    if isinstance(tokenizer, FeatureKMeans):
        kept = 1 - float(sums[0] / sums[1])
        run.print(f"{100 * kept:.1f} % of the variance of the features is kept, {len(dataset):,} held-out images")
        return {**codes, "variance_kept": kept}
    mean_psnr, mean_ssim = (sums / len(dataset)).tolist()
    run.print(f"PSNR {mean_psnr:.2f} dB, SSIM {mean_ssim:.3f} of {len(dataset):,} held-out images")
    return {**codes, "psnr": mean_psnr, "ssim": mean_ssim}


def kept_variance(tokenizer: FeatureKMeans, images: Tensor, ids: Tensor) -> Tensor:
    """Return the squared error of the tokens' vectors, and the squares of the features, summed: (2,) float32."""
    features = tokenizer.features(images)
    return torch.stack([(tokenizer.books.embed(ids) - features).square().sum(), features.square().sum()])


def show(
    tokenizer: Tokenizer, held_out: ImageDataset, device: torch.device, *, count: int = 8
) -> dict[str, Tensor]:
    """Return the rows of a picture: up to `count` evenly spaced images, and their reconstructions."""
    chosen = range(0, len(held_out), -(-len(held_out) // count))
    pixels = held_out.__getitems__(list(chosen))
    images = pixels.images.float() / 255
    ids = tokenizer.encode(images.to(device))
    if isinstance(tokenizer, FeatureKMeans):
        return {"original": images, "tokens": plots.paint_codes(ids.cpu(), tokenizer.books.to_books())}
    return {"original": images, "reconstruction": tokenizer.decode(ids).cpu()}


def open_data(config: Config) -> tuple[ImageSource, ImageSource]:
    """Open the training and validation images: of --data, or the embedded digits."""
    if config.data is None:
        if config.preset in NEED_DATA:
            raise UserError(
                f"preset {config.preset} needs --data: name images, or leave the preset out to use the digits"
            )
        return DigitsSource("train"), DigitsSource("validation")
    return open_images(config.data, config.split, config.validation_split)


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
