"""Fine-tune a trained model on the tokens of another data set (or the same one), or on pixels, or train on pixels.

    accelerate launch recipes/finetune.py --checkpoint runs/mtm_pretrain-digits   # the embedded digits
    accelerate launch recipes/finetune.py published --checkpoint RUN --store imagenet-tokens  # 1 GPU
    accelerate launch --multi_gpu --num_processes 8 recipes/finetune.py pixels --checkpoint RUN --data imagenet
    accelerate launch --multi_gpu --num_processes 8 recipes/finetune.py deit_base --data imagenet

--checkpoint is the folder of a run, a model file of this project, or an official checkpoint of SeiT or SeiT++.
`published` is the fine-tuning of SeiT++ after masked token modeling: ViT-B on ImageNet-1k tokens. `tokens` (from
ImageNet-21k tokens to other tokens) and `pixels` (the stem becomes a patch embedding of 16 x 16 pixels) are the
fine-tunings of SeiT, which its three-stage training runs one after the other; where SeiT gives no setting, they
have the settings of DeiT III (README_revenge.md of facebookresearch/deit). `finegrained` is for the data sets of
downstream/finegrained. --model, the name of a ViT or ResNet of timm, takes the place of --checkpoint: it begins
with random weights and takes pixels. `deit_base`, `deit_small`, `resnet50` and `resnet18` are the baselines on
pixels of SeiT, with the settings of DeiT (arXiv 2012.12877); the paper reports 81.8, 79.9, 76.1 and 69.7 % top-1.
No result and no time of these presets is measured. `digits` (the default) takes 50 s on one CPU core and reaches
97.5 % top-1 after pre-training, 93.6 % without; `deit_digits` is a small ViT on the pixels of the digits.
The recipe writes config.json, metrics.jsonl, evaluations.jsonl, checkpoints/, model.safetensors, curves.png,
validation.png and result.json into --out. It does not change the checkpoint.
"""

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from timm.utils import unfreeze
from torch import Tensor, nn
from torch.utils.data import Dataset

from seitpp import plots
from seitpp.augment import (
    CentralBoxes,
    ColorPreset,
    EvalPixelView,
    EvalView,
    Keys,
    PixelView,
    RandomBoxes,
    SeitPPFinetuneView,
    SeitView,
)
from seitpp.augment.maps import both_sides
from seitpp.codebook import Codebook, codebook_fingerprint
from seitpp.data.dataset import Batch, Chosen, TokenDataset, few_labels, indices_within
from seitpp.engine.accumulation import Sharing
from seitpp.engine.classes import ClassBalance, OrderedImages, balanced
from seitpp.engine.config import SMOKE, TrainConfig
from seitpp.engine.evaluate import score_classifier
from seitpp.engine.findings import classified
from seitpp.engine.inputs import (
    ON_DIGITS,
    check_codes,
    classifier_trial,
    image_facts,
    open_classified,
    open_stores,
    open_tokenadapt,
    refuse_on_sequences,
    store_facts,
    train_subset,
    window_of,
)
from seitpp.engine.metrics import count_flops
from seitpp.engine.optim import OPTIMIZERS, Schedule
from seitpp.engine.report import Report
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.batches import ImageDataset, Pixels
from seitpp.models import (
    Loaded,
    TokenAdapt,
    classifier_from,
    input_kind,
    input_size,
    load_pretrained,
    new_pixel_classifier,
    pixel_classifier_from,
    save_classifier,
    set_trainable,
)
from seitpp.objectives import soft_label_loss, top1_accuracy
from seitpp.recipe import run_recipe


@dataclass(frozen=True)
class Config(TrainConfig):
    """Settings of fine-tuning. The defaults are a ViT-B after masked token modeling, ImageNet-1k tokens and 100
    epochs (SeiT++).
    """

    checkpoint: str | None = None  # Initial weights: folder of a run, or a model file. None: --model.
    # Instead of --checkpoint: name of a ViT or ResNet of timm for pixels, which begins with random weights.
    model: str | None = None
    store: str | None = None  # Folder of a token store. None, and no --data: the embedded digits.
    data: str | None = None  # Images to fine-tune on as pixels, as for recipes/tokenize_images.py.
    split: str | None = "train"  # Split of --data to train on. None: all of it.
    validation_split: str | None = "validation"  # Split of --data to evaluate on. None: every twentieth image.
    skip_errors: bool = False  # Leave out images of --data that cannot be read, and list them in OUT/skipped.txt.
    # Tokens only: number of training images per class, chosen by the seed. None: all.
    labels_per_class: int | None = None
    # Weights that are trained: all; attention, position embedding and head; or the head alone.
    trainable: Literal["all", "attention", "head"] = "all"
    # Input in tokens or pixels: the side of a square, or height and width. None: the checkpoint's, or 224 pixels.
    size: int | tuple[int, int] | None = None
    # Resized crop; none; or for models of maps a crop without resizing ("window").
    crop_mode: Literal["resized", "window"] | None = "resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)  # Range of the area of a resized crop, as fractions.
    eda: Literal["release", "paper"] | None = None  # Models of maps only: preset of the Token-EDA rates.
    color: ColorPreset | None = "seitpp"  # Tokens only: preset of Emb-Noise and ColorAdapt. None: neither.
    # Models of ids only: a run of recipes/tokenadapt_train.py, its model.safetensors, or an official checkpoint.
    tokenadapt: str | None = None
    # Models of ids only: fraction of the images that are augmented by TokenAdapt.
    tokenadapt_fraction: float = 0.5
    flip: float = 0.5  # Pixels only: probability that an image is mirrored.
    three_augment: bool = True  # Pixels only: grayscale, solarize or blur, then color jitter (DeiT III).
    cutmix: float = 1.0  # Alpha of the Beta distribution of CutMix. 0: no CutMix.
    # Alpha of the Beta distribution of Mixup; models of ids: only for the images augmented by TokenAdapt.
    mixup: float = 0.8
    smoothing: float = 0.1  # Label smoothing.
    # Rare classes: as they are, with a larger weight in the loss, or drawn as often as the others.
    class_balance: ClassBalance = "none"
    drop_path: float = 0.1  # Stochastic depth rate.
    epochs: float = 100  # Length of training in epochs.
    warmup_epochs: float = 5  # Length of the linear warm-up of the learning rate, in epochs.
    grad_checkpointing: bool = False  # Recompute activations: a third more work for a fraction of the memory.
    batch_size: int = 1024  # Number of images per update, over all processes.
    # Number of shards whose images are shuffled together. None: all, of a store in a bucket 64.
    window_shards: int | None = None
    optimizer: Literal["adamw", "lamb"] = "adamw"  # Optimizer: AdamW or LAMB.
    clip: float | None = None  # Largest norm of the gradient. None: no clipping.
    base_lr: float = 4e-3  # Peak learning rate at batch size 1024; scaled with the square root of the batch size.
    min_lr: float = 1e-6  # Learning rate at the end of the cosine schedule.
    weight_decay: float = 0.1  # Weight decay of the optimizer.
    layer_decay: float = 0.65  # Factor of the learning rate from each layer to the one below it.
    evaluation_epochs: float = 5  # Number of epochs between two evaluations.


PRESETS = {"published": Config(compile=True)}
PRESETS["tokens"] = replace(
    PRESETS["published"],
    preset="tokens",
    crop_mode="window",
    color="paper",
    tokenadapt_fraction=0.0,
    mixup=0.0,
    batch_size=4096,
    base_lr=5e-6,  # 1e-5 at batch size 4096
    layer_decay=1.0,
)
PRESETS["pixels"] = replace(  # SeiT: learning rate, batch size, epochs; the rest: DeiT III, ImageNet-21k to 1k
    PRESETS["published"],
    preset="pixels",
    color=None,
    tokenadapt_fraction=0.0,
    mixup=0.0,
    drop_path=0.15,  # for ViT-B; for ViT-S it is 0.05
    optimizer="lamb",
    clip=1.0,
    base_lr=5e-4,
    min_lr=1e-5,
    weight_decay=0.02,
    layer_decay=1.0,
)
PRESETS["deit_base"] = replace(  # DeiT, but for RandAugment, Random Erasing and repeated augmentation
    PRESETS["published"],
    preset="deit_base",
    model="vit_base_patch16_224",
    color=None,
    tokenadapt_fraction=0.0,
    epochs=300,
    base_lr=1e-3,  # 5e-4 at batch size 512
    min_lr=1e-5,
    weight_decay=0.05,
    layer_decay=1.0,
)
PRESETS |= {
    name: replace(PRESETS["deit_base"], preset=name, **changes)
    for name, changes in {
        "deit_small": {"model": "vit_small_patch16_224"},
        "resnet50": {"model": "resnet50", "drop_path": 0.0},
        "resnet18": {"model": "resnet18", "drop_path": 0.0},
    }.items()
}
PRESETS["finegrained"] = replace(  # settings of this project: the papers give none
    PRESETS["published"],
    preset="finegrained",
    color=None,
    tokenadapt_fraction=0.0,
    mixup=0.0,
    batch_size=256,
    base_lr=1e-3,
)
PRESETS["digits"] = replace(
    PRESETS["published"],
    preset="digits",
    crop_scale=(0.7, 1.0),
    color=None,
    tokenadapt_fraction=0.0,
    mixup=0.0,
    epochs=60,
    warmup_epochs=3,
    batch_size=128,
    base_lr=8e-3,
    layer_decay=0.85,  # for three blocks; 0.65 is for twelve
    precision="no",
    compile=False,
    workers=0,
    checkpoint_epochs=10,
    evaluation_epochs=5,
)
PRESETS["deit_digits"] = replace(
    PRESETS["digits"],
    preset="deit_digits",
    model="vit_nano_patch8_32",
    size=32,
    flip=0.0,  # a mirrored digit is none
    three_augment=False,
    min_lr=1e-5,
    weight_decay=0.05,
    layer_decay=1.0,
)
PRESETS["smoke"] = replace(PRESETS["digits"], preset="smoke", **SMOKE)


def main(config: Config) -> None:
    # 1. Run: the output folder, the processes, the seed; the initial weights.
    if (config.checkpoint is None) == (config.model is None):
        got = "neither" if config.model is None else f"{config.checkpoint} and {config.model}"
        raise UserError(
            "expected one of --checkpoint, a run's folder or a model file to fine-tune, and --model, a network of "
            f"timm that begins with random weights: got {got}"
        )
    run = Run("finetune", config)
    source = load_pretrained(config.checkpoint) if config.checkpoint else None

    # 2. Data, augmentation and model, for tokens or for pixels.
    task = (pixel_task if config.data or config.model else token_task)(config, run, source)
    train, validation, model = task.train.images, task.validation, task.model.to(run.device)
    order, multi_label = task.train.order, task.multi_label
    view, center_view = task.view.to(run.device), task.center_view.to(run.device)
    get_inputs = attrgetter(task.field)
    if config.optimizer == "lamb":  # scales an update by the norm of the weight: with std 2e-5 the head would stay
        nn.init.trunc_normal_(model.get_classifier().weight, std=0.02)
    set_trainable(model, config.trainable)
    if config.compile:
        view.compile()
    model.set_grad_checkpointing(config.grad_checkpointing)

    # 3. Optimization, with a smaller learning rate for lower layers.
    schedule = Schedule.from_config(config, order, lr_batch=1024, scaling="sqrt")
    optimizer = OPTIMIZERS[config.optimizer](model, config.weight_decay, layer_decay=config.layer_decay)
    two = task.zeros.expand(2, *task.zeros.shape)  # of one pixel in one image a batch norm knows no variance
    training = run.training(
        model,
        optimizer,
        schedule,
        data_fingerprint=task.fingerprint,
        clip=config.clip,
        flops_per_image=count_flops(model, two.to("meta")) // 2,
        sharing=Sharing(
            classifier_trial(task.zeros, config.tokenadapt_fraction, model.num_classes if multi_label else None),
            tuple(filter(None, [task.adapt])),
            multiple=4,
        ),
    )
    run.describe(f"{len(train):,} images, {model.num_classes} classes", view, training, model=model)

    # 4. Training.
    eval_images = run.eval_subset(validation)

    def evaluate() -> dict[str, float]:
        def inputs(batch: Batch | Pixels) -> Tensor:
            return center_view(get_inputs(batch))

        whole, where = training.unsharded(model), {"accelerator": run.accelerator, "workers": run.workers}
        return score_classifier(whole, eval_images, inputs=inputs, **where, multi_label=multi_label)

    for step, batch in training.steps(train, evaluate):
        keys = Keys(config.seed, step // order.steps_per_epoch, batch.indices)
        with run.accelerator.autocast():  # for TokenAdapt
            inputs, targets = view(get_inputs(batch), batch.labels, keys)
        logits = training.wrapped(inputs)
        loss = soft_label_loss(logits, targets, config.smoothing, class_weights=task.train.class_weights)
        training.update(loss, accuracy=top1_accuracy(logits, targets.labels))

    # 5. Results: accuracies, weights, and curves.
    result, model = evaluate(), training.unsharded(model)
    run.print("\n".join(f"{name} {value:6.2f} % of {len(eval_images):,} images" for name, value in result.items()))
    if run.is_main:
        unfreeze(model)
        save_classifier(run.out / "model.safetensors", model, **task.header, multi_label=multi_label)
        evaluations = [*run.evaluations.read(), {"step": training.step, **result}]
        shown = {"names": ["loss", "accuracy", "lr"], "scores": list(result)}
    run.finish(result, task.facts)
    if run.is_main:
        drawn = plots.training_curves(run.out, records=run.log.read(), evaluations=evaluations, **shown)
        said = classified(result, images=len(eval_images), classes=model.num_classes)
        begun = "fine-tuned" if config.checkpoint else "trained from random weights"
        run.report(Report(f"Classifier, {begun}", said, drawn))


class Task(NamedTuple):
    """The data, the augmentation and the model, which differ between tokens and pixels."""

    train: OrderedImages
    validation: Dataset
    field: str  # the field of a batch that holds the inputs: "ids" or "images"
    view: nn.Module  # training augmentation: (inputs, labels, keys) -> model input, soft labels
    center_view: nn.Module  # evaluation: inputs -> model input
    model: nn.Module
    fingerprint: str  # of the training data
    header: dict[str, Any]  # codebook fingerprint, class names and evaluation window, for save_classifier
    zeros: Tensor  # one model input, filled with zeros
    facts: dict[str, Any]  # about the data, for result.json
    multi_label: bool  # whether images have several classes
    adapt: TokenAdapt | None = None


def token_task(config: Config, run: Run, source: Loaded) -> Task:
    """Open the token store, and give the source model a new head.

    Raises UserError if the model does not take these tokens or a setting does not apply to it.
    """
    train, validation = open_stores(run, config.store)
    for store in (train, validation):
        store.require_classes("finetune")
    network = getattr(source.model, "encoder", source.model)
    kind = input_kind(network)
    if kind == "pixels":
        raise UserError(f"{config.checkpoint} takes pixels: name images with --data instead of --store")
    check_codes(train.books, source=str(train.path), saved=source, checkpoint=config.checkpoint)
    if kind == "maps" and config.tokenadapt_fraction:
        raise UserError(
            f"{config.checkpoint} takes maps, but TokenAdapt is for models that take ids: use preset tokens, or "
            "pass --tokenadapt-fraction 0"
        )
    if kind == "ids" and (config.eda or config.crop_mode == "window"):
        raise UserError(
            f"{config.checkpoint} takes ids: --eda and --crop-mode window are for models that take maps, leave "
            "them out"
        )
    refuse_on_sequences(train, config, "crop_mode", "tokenadapt_fraction")
    size = window = window_of(train, config.size, "--size")
    if config.size is None:  # a linear stem or a ResNet was evaluated on another window than its input size
        size = input_size(network) or source.window or size
        window = source.window or size
    model = classifier_from(source.model, train.num_classes, img_size=size, drop_path_rate=config.drop_path)
    codebook, mixed = Codebook.of(train.books), {"cutmix": config.cutmix, "mixup": config.mixup}
    adapt = None
    if kind == "ids":
        adapt = open_tokenadapt(config.tokenadapt, train.books, str(train.path))
        if not config.crop_mode and size != train.grid:
            raise UserError(
                f"--crop-mode None: the model takes {size[0]} x {size[1]} tokens, images have {train.grid[0]} x "
                f"{train.grid[1]}: leave --crop-mode out, or pass --size {train.grid[0]} {train.grid[1]}"
            )
        view = SeitPPFinetuneView(
            codebook,
            size=size if config.crop_mode else None,
            scale=config.crop_scale,
            adapt=adapt,
            tokenadapt_fraction=config.tokenadapt_fraction,
            color=config.color,
            lookup=train.lookup,
            **mixed,
        )
        center_view = EvalView(window)
    else:
        crop = {"crop": config.crop_mode, "scale": config.crop_scale}
        view = SeitView(codebook, size=size, **crop, eda=config.eda, color=config.color, **mixed)
        center_view = EvalView(window, codebook, size)
    images = train_subset(config, TokenDataset(train))
    if config.labels_per_class:
        labels = train.labels[indices_within(images)]
        images = Chosen(images, few_labels(labels, config.labels_per_class, config.seed))
    return Task(
        balanced(images, train, config, device=run.device),
        TokenDataset(validation),
        "ids",
        view,
        center_view,
        model,
        train.fingerprint,
        {"codebook": codebook_fingerprint(train.books), "class_names": train.class_names, "window": window},
        torch.zeros(*codebook.planes, *size, dtype=torch.long)
        if kind == "ids"
        else torch.zeros(codebook.dim, *size),
        store_facts(train, validation, config),
        train.multi_label,
        adapt,
    )


def pixel_task(config: Config, run: Run, source: Loaded | None) -> Task:
    """Open the images, and give the source model a new stem and a new head, or make a model with random weights.

    Raises UserError for a setting that does not apply to pixels, or splits with different classes.
    """
    for name in ("store", "eda", "color", "tokenadapt", "labels_per_class", "window_shards"):
        if getattr(config, name):
            flag, pixels = name.replace("_", "-"), "--data" if source else "--model"
            raise UserError(f"--{flag} is for tokens, {pixels} is for pixels: leave one of the two out")
    on_digits = (*ON_DIGITS, "deit_digits")
    train, validation = open_classified(run, config.validation_split, "finetune", on_digits=on_digits)
    names, size = train.class_names, both_sides(config.size or 224)
    boxes = RandomBoxes(config.seed, size, config.crop_scale)
    sizes = {"img_size": size, "drop_path_rate": config.drop_path}
    if source is None:
        model = new_pixel_classifier(config.model, len(names), **sizes)
    else:
        model = pixel_classifier_from(source.model, len(names), **sizes)
    images = train_subset(config, ImageDataset(train, size, boxes))
    return Task(
        balanced(images, train, config, device=run.device),
        ImageDataset(validation, size, CentralBoxes(size)),
        "images",
        PixelView(config.cutmix, config.mixup, three_augment=config.three_augment, flip=config.flip),
        EvalPixelView(),
        model,
        f"{len(train)} images of {len(names)} classes",
        {"codebook": None, "class_names": names, "window": None if input_size(model) else size},
        torch.zeros(3, *size),
        image_facts(images, train, validation),
        train.labels.multi_label,
    )


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
