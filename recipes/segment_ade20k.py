"""Fine-tune a model of tokens for semantic segmentation: UPerNet of mmsegmentation on a token ViT.

    accelerate launch recipes/segment_ade20k.py                                  # synthetic scenes, from scratch
    accelerate launch recipes/segment_ade20k.py published --store ade20k-tokens --checkpoint RUN          # 1 GPU
    accelerate launch --multi_gpu --num_processes 8 recipes/segment_ade20k.py published --store ade20k-tokens \\
        --checkpoint RUN --tokenadapt ADAPT
    accelerate launch recipes/segment_ade20k.py published --data ADEChallengeData2016 --tokenizer vitvqgan.ckpt \\
        --checkpoint RUN                                                         # pixels, for comparison

Needs `pip install "seitpp[segmentation]"`. A store is one that recipes/tokenize_images.py made of images with
annotations; with --data the tokenizer works inside the backbone and mmsegmentation's own pipeline before it.
`published` has the settings of MAE and BEiT for ViT-B on ADE-20k, since SeiT++ does not say its own: neither its
result nor its time is measured. `scenes` (the default) is for a CPU; what it reaches is in docs/segmentation.md.
Writes config.json, metrics.jsonl, evaluations.jsonl, checkpoints/, model.safetensors, per_class.csv, curves.png,
validation.png and result.json into --out; pictures are for recipes/evaluate_segmentation.py.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.segmentation.default import FEW_SCENES, SCENES, default_scenes
from downstream.segmentation.mmseg import load_mmseg
from downstream.segmentation.view import SegmentView
from seitpp import TokenStore, plots, tokenizers
from seitpp.augment import ColorPreset, Keys
from seitpp.codebook import codebook_fingerprint
from seitpp.engine.accumulation import Sharing
from seitpp.engine.config import TrainConfig
from seitpp.engine.inputs import embedded, open_tokenadapt
from seitpp.engine.memory import Trial
from seitpp.engine.optim import Schedule, adamw
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.models import input_kind
from seitpp.recipe import run_recipe
from seitpp.tokenizers import Tokenizer

if TYPE_CHECKING:
    from downstream.segmentation.sources import Source

DEFAULTS = {"scenes": SCENES, "smoke": FEW_SCENES}  # what a preset takes where no data is named


@dataclass(frozen=True)
class Config(TrainConfig):
    """ViT-B on ADE-20k for 160,000 iterations, the settings of MAE and BEiT."""

    store: str | None = None  # a token store with annotations; the scenes where neither store nor data is named
    data: str | None = None  # images and annotations in the layout of ADE-20k: trains on pixels
    tokenizer: str | None = None  # of the data
    short_side: int = 512  # of the data: pixels to which images are resized, before the crop's scale
    checkpoint: str | None = None  # where to start: a run's folder or a model file; None: from scratch
    model: str = "mtm_vit_base"  # from scratch
    tokenadapt: str | None = None  # mirrors half of the images: a run of recipes/tokenadapt_train.py, or a file
    crop_size: int = 64  # side in tokens, in training and of the windows in evaluation
    scale: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75  # of one class in a crop
    color: ColorPreset | None = None
    channels: int | None = None  # of the head; None: the width of the ViT
    drop_path: float = 0.1
    steps: int = 160_000
    warmup_steps: int = 1_500
    grad_checkpointing: bool = False  # a third more work for a fraction of the memory
    batch_size: int = 16  # global
    lr: float = 1e-4
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    evaluation_steps: int = 16_000
    stride: int | None = None  # of the windows in evaluation, in tokens; None: two thirds of the crop


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
    layer_decay=0.85,  # three blocks; 0.65 is for twelve
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
    from downstream.segmentation.evaluation import WholeImage, count_pixels, stride_of
    from downstream.segmentation.inference import predict_labels, slide_logits
    from downstream.segmentation.metric import SegmentationScore
    from downstream.segmentation.model import (
        broadcast_statistics,
        build_segmenter,
        save_segmenter,
        segmentation_loss,
    )
    from downstream.segmentation.sources import open_backbone

    # 1. Run: the output folder, the launch, the seed.
    run = Run("segment_ade20k", config)
    sync_norm = run.device.type == "cuda" and run.accelerator.num_processes > 1
    check_share(config, run)

    # 2. Data and their view: tokens of a store, or pixels.
    source = pixel_source(config, run) if config.data else token_source(config, run)
    order, judged = source.order, run.eval_subset(source.validation)

    # 3. Model: a pyramid of four levels, UPerHead, and an auxiliary head while it trains.
    backbone = open_backbone(config.checkpoint, config.model, source, config.crop_size, config.drop_path)
    model = build_segmenter(backbone, len(source.class_names), config.channels, sync_norm).to(run.device)
    backbone.vit.set_grad_checkpointing(config.grad_checkpointing)

    # 4. Optimization; lower layers learn more slowly.
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
    run.describe(f"{source}; {len(source.class_names)} classes", training, model=model)

    # 5. Training; on the way, every pixel of the validation images.
    sides = [source.cells * side for side in (config.crop_size, stride_of(config.crop_size, config.stride))]

    def evaluate() -> SegmentationScore:
        whole = training.unsharded(model).eval()
        broadcast_statistics(whole)

        def predict(image: WholeImage) -> Tensor:
            logits = slide_logits(whole, source.inputs(image, backbone), *sides, source.patch // source.cells)
            return predict_labels(logits, image.labels.shape[1:])

        return count_pixels(predict, judged, source.class_names, run.accelerator, config.workers)

    for step, batch in training.steps(source.train, lambda: evaluate().summary()):
        keys = Keys(config.seed, step // order.steps_per_epoch, batch.indices)
        inputs, labels = source.augmented(batch, keys, backbone)
        loss, parts = segmentation_loss(training.wrapped, inputs, labels)
        training.update(loss, **parts)

    # 6. Proof: exact figures, a table by class, weights, and curves.
    score, model = evaluate(), training.unsharded(model)
    run.print(score.table())
    if run.is_main:
        fingerprint = codebook_fingerprint(source.codebook)
        save_segmenter(run.out / "model.safetensors", model, fingerprint, source.class_names, source.patch)
        score.write_csv(run.out / "per_class.csv")
        evaluations = [*run.evaluations.read(), {"step": training.step, **score.summary()}]
        shown = {"names": ["loss", "decode.acc_seg", "lr"], "scores": ["mIoU", "aAcc", "mAcc"]}
        plots.training_curves(run.out, records=run.log.read(), evaluations=evaluations, **shown)
    run.finish(score.summary(), source.facts)


def zeros_loss(source: "Source", crop: int) -> Trial:
    """A step on zeros, by which its memory is counted."""
    from downstream.segmentation.model import segmentation_loss

    def cross_entropy(logits: Tensor, samples: list) -> dict[str, Tensor]:
        labels = torch.cat([sample.gt_sem_seg.data for sample in samples])
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        return {"loss": F.cross_entropy(logits, labels, reduction="none").mean()}

    def loss(images: int, device: torch.device, model: nn.Module, _: Tokenizer | None = None) -> Tensor:
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):  # which asks for a GPU
                module.__class__ = nn.BatchNorm2d
        for head in (model.decode_head, model.auxiliary_head):  # whose accuracy asks for values
            head.loss_by_feat = cross_entropy
        side, pixels = source.cells * crop, source.patch * crop
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


def token_source(config: Config, run: Run) -> "Source":
    """The splits train and validation of the store, or of the scenes where none is named."""
    from downstream.segmentation.sources import TokenSource, pixels_a_token

    store = config.store
    if config.tokenizer:
        raise UserError("--tokenizer belongs to --data, which trains on pixels: leave it out, or name images")
    if store is None:
        if config.preset not in DEFAULTS:
            raise UserError(f"preset {config.preset} needs --store, tokens with annotations, or --data")
        store = embedded(run, partial(default_scenes, DEFAULTS[config.preset])).store
    verify = run.accelerator.is_local_main_process
    train, validation = (TokenStore(store, split, verify) for split in ("train", "validation"))
    adapt = open_tokenadapt(config.tokenadapt, train.codebook, str(train.path))
    view = SegmentView(
        torch.from_numpy(train.codebook),
        crop=config.crop_size,
        patch=pixels_a_token(train),
        scale=config.scale,
        max_share=config.max_share,
        color=config.color,
        adapt=adapt,
    )
    return TokenSource(run, train, validation, view.to(run.device))


def pixel_source(config: Config, run: Run) -> "Source":
    """Images and annotations in the layout of ADE-20k, with the tokenizer inside the backbone."""
    from downstream.segmentation.sources import PixelSource

    for name in ("store", "color", "tokenadapt"):
        if getattr(config, name):
            raise UserError(f"--{name} has no meaning for pixels, which --data names: leave one of the two out")
    if config.tokenizer is None:
        raise UserError("--data without --tokenizer: name the tokenizer whose tokens the checkpoint knows")
    tokenizer = tokenizers.load(config.tokenizer)
    return PixelSource(
        run,
        config.data,
        tokenizer,
        crop=config.crop_size,
        short_side=config.short_side,
        scale=config.scale,
        max_share=config.max_share,
    )


def check_share(config: Config, run: Run) -> None:
    """Raise UserError if a process has one image at a time, over which a batch norm of 1 x 1 cells is nothing."""
    accumulation = config.accumulation or 1
    share = config.batch_size / (run.accelerator.num_processes * accumulation)
    if share < 2:
        raise UserError(
            f"batch {config.batch_size} on {run.accelerator.num_processes} processes x {accumulation} "
            "accumulation steps: expected at least 2 images at a time, for the batch norms"
        )


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="scenes")
