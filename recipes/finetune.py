"""Fine-tune a trained model: on the tokens of another set (or the same one), or on pixels.

    accelerate launch recipes/finetune.py --checkpoint runs/mtm_pretrain-digits   # the embedded digits
    accelerate launch recipes/finetune.py published --checkpoint RUN --store imagenet-tokens  # 1 GPU
    accelerate launch --multi_gpu --num_processes 8 recipes/finetune.py pixels --checkpoint RUN --data imagenet

A checkpoint is a run's folder, a model file of ours, or an official one of SeiT or SeiT++. `published` is the
fine-tuning of SeiT++ after masked token modeling, ViT-B on ImageNet-1k tokens. `tokens` (from ImageNet-21k
tokens to other tokens) and `pixels` (the stem becomes an embedding of 16 x 16 pixels) are the other two ways of
SeiT, one after the other in its three-stage way, with the settings of DeiT III (README_revenge.md of
facebookresearch/deit) where SeiT gives none; `finegrained` is for the sets of downstream/finegrained. No result
or time of these is measured. `digits` (the default) takes 50 s on a CPU core: 97.5 % after pre-training, 93.6 %
without.
Writes config.json, metrics.jsonl, evaluations.jsonl, checkpoints/, model.safetensors, curves.png, validation.png
and result.json into --out. Does not touch the checkpoint.
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
from seitpp.codebook import codebook_fingerprint
from seitpp.data.dataset import Batch, BatchOrder, Chosen, TokenDataset, few_labels
from seitpp.engine.accumulation import Sharing
from seitpp.engine.config import SMOKE, TrainConfig
from seitpp.engine.evaluate import predict
from seitpp.engine.inputs import (
    check_codes,
    classifier_trial,
    image_facts,
    open_images,
    open_stores,
    open_tokenadapt,
    store_facts,
    train_subset,
    window_of,
)
from seitpp.engine.metrics import count_flops
from seitpp.engine.optim import OPTIMIZERS, Schedule
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
    pixel_classifier_from,
    save_classifier,
    set_trainable,
)
from seitpp.objectives import soft_label_loss, top1_accuracy
from seitpp.recipe import run_recipe


@dataclass(frozen=True)
class Config(TrainConfig):
    """The published run: a ViT-B after masked token modeling, ImageNet-1k tokens, 100 epochs (SeiT++)."""

    checkpoint: str | None = None  # where to start: a run's folder or a model file
    store: str | None = None  # a token store; the embedded digits where neither store nor data is named
    data: str | None = None  # images, as recipes/tokenize_images.py takes them: fine-tunes to pixels
    split: str | None = "train"  # of the data
    validation_split: str | None = "validation"  # of the data; None: every twentieth image is held out
    labels_per_class: int | None = None  # of a store: train on so many images of each class, chosen by the seed
    trainable: Literal["all", "attention", "head"] = "all"  # which weights; the head always
    size: int | None = None  # side of the input; None: that of the checkpoint in tokens, or 224 pixels
    crop_mode: Literal["resized", "window"] | None = "resized"  # of maps; pixels and ids are always resized
    crop_scale: tuple[float, float] = (0.08, 1.0)
    eda: Literal["release", "paper"] | None = None  # of maps
    color: ColorPreset | None = "seitpp"  # of tokens
    tokenadapt: str | None = None  # of ids: a run of recipes/tokenadapt_train.py, its file, or the official one
    tokenadapt_fraction: float = 0.5  # of ids: share of the images that go through TokenAdapt
    three_augment: bool = True  # of pixels: gray, solarized or blurred, then color jitter (DeiT III)
    cutmix: float = 1.0
    mixup: float = 0.8  # of ids: in TokenAdapt's space only
    smoothing: float = 0.1
    drop_path: float = 0.1
    epochs: float = 100
    warmup_epochs: float = 5
    grad_checkpointing: bool = False  # a third more work for a fraction of the memory
    batch_size: int = 1024  # global
    optimizer: Literal["adamw", "lamb"] = "adamw"
    clip: float | None = None  # the largest norm of the gradient
    base_lr: float = 4e-3  # for a batch of 1024; scaled by the square root
    min_lr: float = 1e-6
    weight_decay: float = 0.1
    layer_decay: float = 0.65
    evaluation_epochs: float = 5


PRESETS = {"published": Config(compile=True)}
PRESETS["tokens"] = replace(
    PRESETS["published"],
    preset="tokens",
    crop_mode="window",
    color="paper",
    tokenadapt_fraction=0.0,
    mixup=0.0,
    batch_size=4096,
    base_lr=5e-6,  # 1e-5 at 4096
    layer_decay=1.0,
)
PRESETS["pixels"] = replace(  # rate, batch and epochs of SeiT; else as DeiT III goes from ImageNet-21k to 1k
    PRESETS["published"],
    preset="pixels",
    color=None,
    tokenadapt_fraction=0.0,
    mixup=0.0,
    drop_path=0.15,  # of ViT-B; 0.05 of ViT-S
    optimizer="lamb",
    clip=1.0,
    base_lr=5e-4,
    min_lr=1e-5,
    weight_decay=0.02,
    layer_decay=1.0,
)
PRESETS["finegrained"] = replace(  # ours: nothing is published of it
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
    layer_decay=0.85,  # three blocks; 0.65 is for twelve
    precision="no",
    compile=False,
    workers=0,
    checkpoint_epochs=10,
    evaluation_epochs=5,
)
PRESETS["smoke"] = replace(PRESETS["digits"], preset="smoke", **SMOKE)


def main(config: Config) -> None:
    # 1. Run: the output folder, the launch, the seed; where to start.
    if config.checkpoint is None:
        raise UserError("nothing to fine-tune: name a run's folder or a model file with --checkpoint")
    run = Run("finetune", config)
    source = load_pretrained(config.checkpoint)

    # 2. Data, views and model: of tokens or of pixels.
    task = (pixel_task if config.data else token_task)(config, run, source)
    train, validation, model = task.train, task.validation, task.model.to(run.device)
    view, center_view, of = task.view.to(run.device), task.center_view.to(run.device), attrgetter(task.field)
    order = BatchOrder(len(train), config.batch_size, config.seed)
    if config.optimizer == "lamb":  # its steps are in proportion to a weight's norm: a head of 2e-5 would stay
        nn.init.trunc_normal_(model.get_classifier().weight, std=0.02)
    set_trainable(model, config.trainable)
    if config.compile:
        view.compile()
    model.set_grad_checkpointing(config.grad_checkpointing)

    # 3. Optimization; lower layers learn more slowly.
    schedule = Schedule.from_config(config, order, lr_batch=1024, scaling="sqrt")
    optimizer = OPTIMIZERS[config.optimizer](model, config.weight_decay, layer_decay=config.layer_decay)
    training = run.training(
        model,
        optimizer,
        schedule,
        data_fingerprint=task.fingerprint,
        clip=config.clip,
        flops_per_image=count_flops(model, task.zeros.unsqueeze(0).to("meta")),
        sharing=Sharing(
            classifier_trial(task.zeros, config.tokenadapt_fraction), tuple(filter(None, [task.adapt])), 4
        ),
    )
    run.describe(f"{len(train):,} images, {model.num_classes} classes", view, training, model=model)

    # 4. Training.
    judged = run.eval_subset(validation)

    def evaluate() -> dict[str, float]:
        def inputs(batch: Batch | Pixels) -> Tensor:
            return center_view(of(batch))

        return predict(
            training.unsharded(model), judged, inputs=inputs, accelerator=run.accelerator, workers=config.workers
        ).accuracies()

    for step, batch in training.steps(train, evaluate):
        keys = Keys(config.seed, step // order.steps_per_epoch, batch.indices)
        with run.accelerator.autocast():  # TokenAdapt's
            inputs, targets = view(of(batch), batch.labels, keys)
        logits = training.wrapped(inputs)
        loss = soft_label_loss(logits, targets, config.smoothing)
        training.update(loss, accuracy=top1_accuracy(logits, targets.labels))

    # 5. Proof: exact accuracies, weights, and curves.
    result, model = evaluate(), training.unsharded(model)
    run.print("\n".join(f"{name} {value:6.2f} % of {len(judged):,} images" for name, value in result.items()))
    if run.is_main:
        unfreeze(model)
        save_classifier(run.out / "model.safetensors", model, **task.header)
        evaluations = [*run.evaluations.read(), {"step": training.step, **result}]
        shown = {"names": ["loss", "accuracy", "lr"], "scores": ["top1", "top5"]}
        plots.training_curves(run.out, records=run.log.read(), evaluations=evaluations, **shown)
    run.finish(result, task.facts)


class Task(NamedTuple):
    """What differs between tokens and pixels; `field` names what a batch holds of an image, ids or images."""

    train: Dataset
    validation: Dataset
    field: str
    view: nn.Module
    center_view: nn.Module
    model: nn.Module
    fingerprint: str  # of the data
    header: dict[str, Any]  # codebook, class names and window, for save_classifier
    zeros: Tensor  # one image as the model takes it
    facts: dict[str, Any]  # of the data, for result.json
    adapt: TokenAdapt | None = None


def token_task(config: Config, run: Run, source: Loaded) -> Task:
    """A store, and the source with a new head."""
    train, validation = open_stores(run, config.store)
    body = getattr(source.model, "encoder", source.model)
    kind = input_kind(body)
    if kind == "pixels":
        raise UserError(f"{config.checkpoint} takes pixels: name images with --data")
    check_codes(train.codebook, source=str(train.path), saved=source, checkpoint=config.checkpoint)
    if kind == "maps" and config.tokenadapt_fraction:
        raise UserError(
            f"{config.checkpoint} takes maps, which TokenAdapt does not give: preset tokens, or pass "
            "--tokenadapt-fraction 0"
        )
    if kind == "ids" and (config.eda or config.crop_mode != "resized"):
        raise UserError(f"{config.checkpoint} takes ids: --eda and --crop-mode are those of maps, leave them out")
    size = window = window_of(train, config.size, "--size")
    if config.size is None:  # a linear stem or a ResNet was judged by another window than its input
        size = input_size(body) or source.window or size
        window = source.window or size
    if size[0] != size[1]:
        raise UserError(f"a grid of {size}: the views cut squares, name a side of at most {min(size)} with --size")
    model = classifier_from(source.model, train.num_classes, img_size=size, drop_path_rate=config.drop_path)
    codebook, mixed = torch.from_numpy(train.codebook), {"cutmix": config.cutmix, "mixup": config.mixup}
    adapt = None
    if kind == "ids":
        adapt = open_tokenadapt(config.tokenadapt, train.codebook, str(train.path))
        view = SeitPPFinetuneView(
            codebook,
            size=size[0],
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
        view = SeitView(codebook, size=size[0], **crop, eda=config.eda, color=config.color, **mixed)
        center_view = EvalView(window, codebook, size[0])
    images, labels = train_subset(config, TokenDataset(train)), train.labels
    if config.labels_per_class:
        labels = labels[images.indices] if isinstance(images, Chosen) else labels
        images = Chosen(images, few_labels(labels, config.labels_per_class, config.seed))
    return Task(
        images,
        TokenDataset(validation),
        "ids",
        view,
        center_view,
        model,
        train.fingerprint,
        {"codebook": codebook_fingerprint(train.codebook), "class_names": train.class_names, "window": window},
        torch.zeros(size, dtype=torch.long) if kind == "ids" else torch.zeros(codebook.shape[1], *size),
        store_facts(train, validation, config),
        adapt,
    )


def pixel_task(config: Config, run: Run, source: Loaded) -> Task:
    """Images as they are, and the source with a new stem and a new head."""
    for name in ("store", "eda", "color", "tokenadapt", "labels_per_class"):
        if getattr(config, name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} has no meaning for pixels, which --data names: leave one of the two out")
    train, validation = open_images(config.data, config.split, config.validation_split)
    names = train.class_names
    if not names or names != validation.class_names:
        raise UserError(f"{config.data}: expected classes with the same names in both splits")
    size = config.size or 224
    boxes = RandomBoxes(config.seed, config.crop_scale)
    model = pixel_classifier_from(source.model, len(names), img_size=size, drop_path_rate=config.drop_path)
    images = train_subset(config, ImageDataset(train, (size, size), boxes))
    return Task(
        images,
        ImageDataset(validation, (size, size), CentralBoxes(size)),
        "images",
        PixelView(config.cutmix, config.mixup, config.three_augment),
        EvalPixelView(),
        model,
        f"{len(train)} images of {len(names)} classes",
        {"codebook": None, "class_names": names},
        torch.zeros(3, size, size),
        image_facts(images, train, validation),
    )


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
