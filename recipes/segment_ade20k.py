"""Fine-tune a token ViT for semantic segmentation with the UPerNet of mmsegmentation.

    accelerate launch recipes/segment_ade20k.py                                  # synthetic scenes, from scratch
    accelerate launch recipes/segment_ade20k.py published --store ade20k-tokens --checkpoint RUN          # 1 GPU
    accelerate launch --multi_gpu --num_processes 8 recipes/segment_ade20k.py published --store ade20k-tokens \\
        --checkpoint RUN --tokenadapt ADAPT
    accelerate launch recipes/segment_ade20k.py published --data ADEChallengeData2016 --tokenizer vitvqgan.ckpt \\
        --checkpoint RUN                                                         # pixels, for comparison

Needs `pip install "seitpp[segmentation]"`. The store is written by recipes/tokenize_images.py from images with
masks. With --data, the splits train and validation of a folder of images with masks (ADE-20k, Pascal VOC,
Cityscapes, pairs of folders) are augmented by mmsegmentation's own pipeline and tokenized inside the backbone.
The preset `published` has the settings of MAE and BEiT for ViT-B on ADE20K, since SeiT++ does not publish its own;
its accuracy and run time are not measured. The preset `scenes` (the default) runs on a CPU; its results are in
docs/segmentation.md. Writes config.json, metrics.jsonl, evaluations.jsonl, checkpoints/, model.safetensors,
per_class.csv, curves.png, validation.png and result.json into --out; recipes/evaluate_segmentation.py draws
predictions.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.segmentation.data import WholeImage
from downstream.segmentation.default import FEW_SCENES, SCENES, default_scenes
from downstream.segmentation.mmseg import load_mmseg
from downstream.segmentation.sources import PixelSource, Source, TokenSource, mask_rules, pixels_a_token
from downstream.segmentation.view import SegmentView
from seitpp import TokenStore, plots, tokenizers
from seitpp.augment import ColorPreset, Keys
from seitpp.codebook import codebook_fingerprint
from seitpp.engine.accumulation import Sharing
from seitpp.engine.config import TrainConfig
from seitpp.engine.findings import segmented
from seitpp.engine.inputs import embedded, open_tokenadapt
from seitpp.engine.memory import Trial
from seitpp.engine.optim import Schedule, adamw
from seitpp.engine.report import Report
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.masks import Layout
from seitpp.models import input_kind
from seitpp.recipe import run_recipe
from seitpp.tokenizers import Kind, Tokenizer

if TYPE_CHECKING:  # needs the optional mmsegmentation
    from downstream.segmentation.metric import SegmentationScore

DEFAULTS = {"scenes": SCENES, "smoke": FEW_SCENES}  # data of a preset if neither --store nor --data is given


@dataclass(frozen=True)
class Config(TrainConfig):
    """Settings of a run; the defaults are those of MAE and BEiT: ViT-B on ADE20K for 160,000 iterations."""

    store: str | None = None  # a token store with annotations; the presets scenes and smoke create one if None
    data: str | None = None  # images with masks and their splits train and validation, to train on pixels
    tokenizer: str | None = None  # only with data: the file or folder of the tokenizer
    # Kind of the tokenizer, only needed where its files do not show it (cosmos).
    tokenizer_kind: Kind | None = None
    short_side: int = 512  # only with data: the short side in pixels after the resize, before the random scale
    layout: Layout | None = None  # only with data: how the folder is arranged; None: recognized
    classes: str | None = None  # only with data: a file of class names; None: those of the set
    ignore_label: tuple[int, ...] = ()  # only with data: values of masks without a class
    background_class: bool = False  # only with data: value 0 of masks is a class, that of the first name
    skip_errors: bool = False  # only with data: leave out images that cannot be read; OUT/skipped.txt has them
    checkpoint: str | None = None  # pre-trained weights: a run's folder or a model file; None: from scratch
    model: str = "mtm_vit_base"  # only without checkpoint: the name of the ViT
    tokenadapt: str | None = None  # to mirror half of the images: a run of recipes/tokenadapt_train.py or a file
    crop_size: int = 64  # side in tokens of the training crops and of the windows in evaluation
    scale: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75  # largest fraction of the labeled pixels of a crop that one class may have
    color: ColorPreset | None = None
    channels: int | None = None  # width of the UPerNet head; None: the width of the ViT
    drop_path: float = 0.1
    steps: int = 160_000
    warmup_steps: int = 1_500
    grad_checkpointing: bool = False  # saves activation memory, costs about a third more computation
    batch_size: int = 16  # over all processes
    lr: float = 1e-4
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    evaluation_steps: int = 16_000
    stride: int | None = None  # of the windows in evaluation, in tokens; None: two thirds of crop_size


PRESETS = {"published": Config()}
PRESETS["vit_small"] = replace(PRESETS["published"], preset="vit_small", model="mtm_vit_small")
PRESETS["scenes"] = replace(
    PRESETS["published"],
    preset="scenes",
    model="mtm_vit_nano",
    short_side=64,
    crop_size=16,
    scale=(1.0, 1.0),
    max_share=1.0,
    channels=32,
    drop_path=0.0,
    steps=1200,
    warmup_steps=50,
    batch_size=8,
    lr=2e-3,
    layer_decay=0.85,  # for three blocks; 0.65 is for twelve
    precision="no",
    workers=0,
    checkpoint_epochs=2,
    evaluation_steps=200,
)
PRESETS["smoke"] = replace(
    PRESETS["scenes"],
    preset="smoke",
    crop_size=8,
    scale=(0.5, 2.0),
    max_share=0.75,
    channels=16,
    drop_path=0.1,
    steps=16,
    warmup_steps=4,
    checkpoint_epochs=1,
    evaluation_steps=8,
    log_steps=1,
)


def main(config: Config) -> None:
    load_mmseg()
    # These modules import the optional mmsegmentation; without it, load_mmseg has raised an error of one line.
    from downstream.segmentation.backbone import open_backbone
    from downstream.segmentation.evaluation import count_pixels, stride_of
    from downstream.segmentation.inference import predict_labels, slide_logits
    from downstream.segmentation.metric import SegmentationScore
    from downstream.segmentation.model import (
        broadcast_statistics,
        build_segmenter,
        save_segmenter,
        segmentation_loss,
    )

    # 1. Run: output folder, processes, seed.
    run = Run("segment_ade20k", config)
    sync_norm = run.device.type == "cuda" and run.accelerator.num_processes > 1
    check_share(config, run)

    # 2. Data and augmentation: tokens of a store, or pixels.
    source = pixel_source(config, run) if config.data else token_source(config, run)
    order, names = source.order, source.class_names
    validation = run.eval_subset(source.validation)

    # 3. Model: a pyramid of four levels, UPerHead, and an auxiliary head for training.
    backbone = open_backbone(
        config.checkpoint, config.model, source, window=config.crop_size, drop_path=config.drop_path
    )
    model = build_segmenter(backbone, len(names), channels=config.channels, sync_norm=sync_norm).to(run.device)
    backbone.vit.set_grad_checkpointing(config.grad_checkpointing)

    # 4. Optimization, with layer-wise learning rate decay.
    schedule = Schedule(
        order,
        config.steps,
        config.warmup_steps,
        checkpoint_steps=order.steps(config.checkpoint_epochs),
        evaluation_steps=config.evaluation_steps,
        peak_lr=config.lr,
        decay="linear",
    )
    optimizer = adamw(model, config.weight_decay, layer_decay=config.layer_decay)
    sharing = Sharing(zeros_loss(source, config.crop_size), tuple(filter(None, [source.tokenizer])), multiple=2)
    training = run.training(model, optimizer, schedule, data_fingerprint=source.fingerprint, sharing=sharing)
    run.describe(f"{source}; {len(names)} classes", training, model=model)

    # 5. Training, with evaluations on all pixels of the validation images.
    cells, pixels_per_token = source.cells, source.pixels_per_token
    windows = {"window": cells * config.crop_size, "stride": cells * stride_of(config.crop_size, config.stride)}

    def evaluate() -> SegmentationScore:
        whole = training.unsharded(model).eval()
        broadcast_statistics(whole)

        def predict(image: WholeImage) -> Tensor:
            inputs = source.inputs(image, backbone)
            logits = slide_logits(whole, inputs, **windows, pixels_per_token=pixels_per_token // cells)
            return predict_labels(logits, image.labels.shape[1:])

        return count_pixels(predict, validation, names, accelerator=run.accelerator, workers=run.workers)

    for step, batch in training.steps(source.train, lambda: evaluate().summary()):
        keys = Keys(config.seed, step // order.steps_per_epoch, batch.indices)
        inputs, labels = source.augmented(batch, keys, backbone)
        loss, parts = segmentation_loss(training.wrapped, inputs, labels)
        training.update(loss, **parts)

    # 6. Results: metrics, a table of the classes, weights, and curves.
    score, model = evaluate(), training.unsharded(model)
    run.print(score.table())
    if run.is_main:
        facts = {"codebook": codebook_fingerprint(source.codebook), "class_names": names}
        sizes = {"pixels_per_token": pixels_per_token, "short_side": source.short_side}
        save_segmenter(run.out / "model.safetensors", model, **facts, **sizes)
        score.write_csv(run.out / "per_class.csv")
    run.finish(score.summary(), source.facts)
    if run.is_main:
        write_report(run, score, training.step)


def write_report(run: Run, score: "SegmentationScore", step: int) -> None:
    """Write report.html: what the `score` after `step` steps says, curves, and a table of the classes."""
    evaluations = [*run.evaluations.read(), {"step": step, **score.summary()}]
    shown = {"names": ["loss", "decode.acc_seg", "lr"], "scores": ["mIoU", "aAcc", "mAcc"]}
    drawn = plots.training_curves(run.out, records=run.log.read(), evaluations=evaluations, **shown)
    classes = score.per_class()
    said = segmented(score.summary(), score.class_names, classes["IoU"])
    table = plots.class_table(score.class_names, classes)
    run.report(Report("Segmenter of images, trained", said, drawn, [table]))


def zeros_loss(source: Source, crop: int) -> Trial:
    """Return a training step on zeros, from which the memory of a step is computed."""
    from downstream.segmentation.model import segmentation_loss  # needs mmsegmentation, as in main

    def cross_entropy(logits: Tensor, samples: list) -> dict[str, Tensor]:
        labels = torch.cat([sample.gt_sem_seg.data for sample in samples])
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        return {"loss": F.cross_entropy(logits, labels, reduction="none").mean()}

    def loss(images: int, device: torch.device, model: nn.Module, _: Tokenizer | None = None) -> Tensor:
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):  # it works on GPUs only
                module.__class__ = nn.BatchNorm2d
        for head in (model.decode_head, model.auxiliary_head):  # their accuracy needs real values
            head.loss_by_feat = cross_entropy
        side, pixels = source.cells * crop, source.pixels_per_token * crop
        vit, shape = model.backbone.vit, (images, side, side)
        if source.tokenizer:
            inputs = torch.zeros(images, 3, side, side, device=device)
        elif input_kind(vit) == "ids":
            inputs = torch.zeros(shape, dtype=torch.long, device=device)
        else:
            inputs = torch.zeros(images, source.codebook.shape[1], side, side, device=device)
        labels = torch.zeros(images, pixels, pixels, dtype=torch.long, device=device)
        return segmentation_loss(model, inputs, labels)[0]

    return loss


def token_source(config: Config, run: Run) -> Source:
    """Open the splits train and validation of the store, by default of the scenes."""
    store = config.store
    mask_rules(config)
    if config.tokenizer:
        raise UserError(
            "got --tokenizer without --data, expected both or neither: add --data, or remove --tokenizer"
        )
    if store is None:
        if config.preset not in DEFAULTS:
            raise UserError(f"preset {config.preset}: got no data, expected --store or --data: name one of them")
        store = embedded(run, partial(default_scenes, DEFAULTS[config.preset])).store
    verify = run.accelerator.is_local_main_process
    train, validation = (TokenStore(store, split, verify) for split in ("train", "validation"))
    adapt = open_tokenadapt(config.tokenadapt, train.books, str(train.path))
    view = SegmentView(
        torch.from_numpy(train.books.only_table("segmentation")),
        crop=config.crop_size,
        pixels_per_token=pixels_a_token(train),
        scale=config.scale,
        max_share=config.max_share,
        color=config.color,
        adapt=adapt,
    )
    return TokenSource(run, train=train, validation=validation, view=view.to(run.device))


def pixel_source(config: Config, run: Run) -> Source:
    """Open images with masks, to be tokenized inside the backbone."""
    for name in ("store", "color", "tokenadapt"):
        if getattr(config, name):
            raise UserError(f"got --{name} and --data, expected one of them: --data is for training on pixels")
    if config.tokenizer is None:
        raise UserError("got --data without --tokenizer, expected both: name the tokenizer of the checkpoint")
    tokenizer = tokenizers.load(config.tokenizer, config.tokenizer_kind)
    return PixelSource(
        run,
        config.data,
        tokenizer,
        rules=mask_rules(config),
        crop=config.crop_size,
        short_side=config.short_side,
        scale=config.scale,
        max_share=config.max_share,
    )


def check_share(config: Config, run: Run) -> None:
    """Raise UserError if a micro-batch has one image: the batch norm over 1 x 1 pooled cells needs two values."""
    accumulation = config.accumulation or 1
    if config.batch_size / (run.accelerator.num_processes * accumulation) < 2:
        raise UserError(
            f"got a batch of {config.batch_size} on {run.accelerator.num_processes} processes x {accumulation} "
            "accumulation steps, expected at least 2 images per micro-batch for batch norm: increase --batch-size"
        )


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="scenes")
