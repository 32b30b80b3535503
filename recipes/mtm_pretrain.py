"""Pre-train a masked token model (SeiT++) and evaluate it: on hidden tokens, and its frozen encoder by probes.

    accelerate launch recipes/mtm_pretrain.py                                    # the embedded digits
    accelerate launch recipes/mtm_pretrain.py --store tokens                     # any store: preset auto
    accelerate launch recipes/mtm_pretrain.py published --store imagenet-tokens --tokenadapt RUN  # 1 GPU
    accelerate launch --multi_gpu --num_processes 8 recipes/mtm_pretrain.py plain --store imagenet-tokens

`digits` (the default) takes about 2 minutes on a CPU and lifts the linear probe from about 60 to 86-88 % and
k-NN from about 45 to 83-86 % (three seeds, tests/long/mtm_digits.py). `auto` (the default with --store) chooses
model, batch, epochs and more for the number of images, the grid and the device, and prints each choice with its
reason; a flag has the last word. `published` is the run of the paper: ViT-B on ImageNet-1k tokens for 400 epochs,
half of the images augmented by TokenAdapt (recipes/tokenadapt_train.py). `plain` has no TokenAdapt, `coloradapt`
adds ColorAdapt. Their time on GPUs is not measured.
The recipe reads a token store; of one with the split train alone, every 20th image is held out. Linear probe and
k-NN need images with one label each, of two classes or more, and are left out otherwise. The recipe writes
config.json, metrics.jsonl, evaluations.jsonl, checkpoints/, model.safetensors, report.html with its pictures, and
result.json with findings in words into --out. It does not fine-tune: the weights are for recipes/finetune.py,
probe.py and inpaint.py.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from seitpp import plots, tokenizers
from seitpp.augment import ColorPreset, EvalView, Keys, SeitPPView
from seitpp.codebook import Codebook, codebook_fingerprint
from seitpp.data.dataset import TokenDataset, order_of
from seitpp.data.digits import digits, digits_images
from seitpp.engine.accumulation import Sharing
from seitpp.engine.auto import check_maskable, explain, settle
from seitpp.engine.config import TrainConfig
from seitpp.engine.findings import findings
from seitpp.engine.inputs import (
    adapt_zeros,
    check_codes,
    describe_store,
    open_splits,
    open_stores,
    open_tokenadapt,
    refuse_on_sequences,
    store_facts,
    train_subset,
    window_of,
)
from seitpp.engine.masked import Evaluation
from seitpp.engine.memory import Trial
from seitpp.engine.metrics import count_flops
from seitpp.engine.optim import Schedule, adamw
from seitpp.engine.report import Report
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.models import MTM, TokenAdapt, load_pretrained
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.objectives import MASK_RATIOS, mask_plan
from seitpp.recipe import run_recipe
from seitpp.store import TokenStore
from seitpp.tokenizers import Kind


@dataclass(frozen=True)
class Config(TrainConfig):
    """Settings of pre-training. The defaults are ViT-B, ImageNet-1k, 400 epochs, batch size 4096 (SeiT++)."""

    store: str | None = None  # Folder of a token store. None: the embedded digits.
    # Tokenizer file that decodes tokens for the report. None: the one beside the store, else codes are colors.
    tokenizer: str | None = None
    # Kind of the tokenizer, only needed where its files do not show it (cosmos).
    tokenizer_kind: Kind | None = None
    # Initial weights: folder of a run, a model file, or an official checkpoint. None: random weights.
    init_from: str | None = None
    model: str = "mtm_vit_base"  # Name of the encoder in timm's registry.
    # Tokens of a patch, a position of the transformer: the side of a square, or down and across.
    patch_size: int | tuple[int, int] = 2
    decoder_width: int = 512  # Number of channels of the decoder.
    decoder_depth: int = 4  # Number of transformer blocks of the decoder.
    decoder_heads: int = 16  # Number of attention heads of the decoder.
    dropout: float = 0.1  # Dropout rate after the token embedding and in the decoder.
    # Random resized crop in tokens: the side of a square, or height and width. None: the whole grid.
    crop_size: int | tuple[int, int] | None = 28
    crop_scale: tuple[float, float] = (
        0.2,
        1.0,
    )  # Smallest and largest area of the crop, as fractions of the grid.
    flip: float = 0.0  # Probability that a grid is mirrored, which is not the mirrored image: for comparison.
    # TokenAdapt weights: a run of recipes/tokenadapt_train.py, its model.safetensors, or an official checkpoint.
    tokenadapt: str | None = None
    tokenadapt_fraction: float = 0.5  # Fraction of the images that are augmented by TokenAdapt.
    color: ColorPreset | None = None  # Preset of Emb-Noise and ColorAdapt. None: neither.
    mask_ratio: Literal["seitpp", "mage", "mae"] = "seitpp"  # Distribution of the mask ratio.
    epochs: float = 400  # Length of training in epochs.
    warmup_epochs: float = 40  # Length of the linear warm-up of the learning rate, in epochs.
    grad_checkpointing: bool = False  # Recompute activations: a third more work for a fraction of the memory.
    batch_size: int = 4096  # Number of images per update, over all processes.
    # Number of shards whose images are shuffled together. None: all, of a store in a bucket 64.
    window_shards: int | None = None
    base_lr: float = 1.5e-4  # Peak learning rate at batch size 256; scaled linearly with the batch size.
    weight_decay: float = 0.05  # Weight decay of AdamW.
    betas: tuple[float, float] = (0.9, 0.95)  # Betas of AdamW.
    evaluation_epochs: float = 20  # Number of epochs between two evaluations of the frozen encoder.


PRESETS = {"published": Config(compile=True)}
PRESETS["coloradapt"] = replace(PRESETS["published"], preset="coloradapt", color="coloradapt")
PRESETS["plain"] = replace(PRESETS["published"], preset="plain", tokenadapt_fraction=0.0)
PRESETS["auto"] = replace(PRESETS["plain"], preset="auto")  # what is not named on the command line, `choose` sets
PRESETS["digits"] = replace(
    PRESETS["published"],
    preset="digits",
    model="mtm_vit_nano",
    decoder_width=96,
    decoder_depth=2,
    decoder_heads=4,
    dropout=0.0,  # 0.1 gave 1.7 points less on the linear probe, 0.3 less by k-NN (one seed)
    crop_size=None,
    tokenadapt_fraction=0.0,
    epochs=100,
    warmup_epochs=10,
    batch_size=128,
    base_lr=6e-3,
    precision="no",
    compile=False,
    workers=0,
    checkpoint_epochs=10,
    evaluation_epochs=25,
)
PRESETS["smoke"] = replace(
    PRESETS["digits"],
    preset="smoke",
    dropout=0.1,
    epochs=2,
    warmup_epochs=1,
    checkpoint_epochs=0.5,
    log_steps=1,
)


def main(config: Config) -> None:
    # 1. Run: the output folder, the processes, the seed.
    run = Run("mtm_pretrain", config)

    # 2. Data: all sizes are read from the store.
    train, validation = open_stores(run, config.store)
    images = train_subset(config, TokenDataset(train))
    order = order_of(images, batch_size=config.batch_size, seed=config.seed, window=config.window_shards)
    codebook, grid = Codebook.of(train.books), window_of(train, config.crop_size, "--crop-size")
    refuse_on_sequences(train, config, "flip", "tokenadapt_fraction")
    check_maskable(grid, train.grid, config.patch_size)

    # 3. Augmentation on the device: ids -> vectors -> color -> crop or TokenAdapt -> ids.
    adapt = open_tokenadapt(config.tokenadapt, train.books, str(train.path))
    view = SeitPPView(
        codebook,
        size=config.crop_size,
        scale=config.crop_scale,
        flip=config.flip,
        adapt=adapt,
        tokenadapt_fraction=config.tokenadapt_fraction,
        color=config.color,
        lookup=train.lookup,
    ).to(run.device)
    mask_ratio = MASK_RATIOS[config.mask_ratio]
    if config.compile:
        view.compile()

    # 4. Model: the first loss is ln K.
    model = new_model(config, grid, train).to(run.device)
    untrained, patches = copy.deepcopy(model.encoder), model.encoder.patch_embed.num_patches
    if config.init_from and not run.has_checkpoint:
        start_from(model, config.init_from, train)

    # 5. Optimization.
    schedule = Schedule.from_config(config, order)
    optimizer = adamw(model, config.weight_decay, betas=config.betas)
    most_masked, shape = mask_ratio.counts(patches, mask_ratio.highest), (*codebook.planes, *grid)
    step_on_zeros = zeros_loss(shape, most_masked, config.tokenadapt_fraction)
    training = run.training(
        model,
        optimizer,
        schedule,
        data_fingerprint=train.fingerprint,
        flops_per_image=step_flops(model, shape, mask_ratio.counts(patches, 0.5)),
        sharing=Sharing(step_on_zeros, (adapt,) if adapt else (), multiple=8),
    )
    chosen = explain(config, train)
    run.describe(describe_store(train, config), view, training, model=model, chosen=chosen)

    # 6. Training, with evaluations of the current model.
    evaluation = Evaluation(
        run, images, TokenDataset(validation), num_classes=train.num_classes, view=EvalView(grid)
    )
    run.print(str(evaluation))

    def evaluate() -> dict[str, float]:
        return evaluation.scores(training.unsharded(model))

    for step, batch in training.steps(images, evaluate):
        keys = Keys(config.seed, step // order.steps_per_epoch, batch.indices)
        with run.accelerator.autocast():  # for TokenAdapt
            ids = view(batch.ids, keys)
        ratio = mask_ratio.ratio(config.seed, step)
        plan = mask_plan(keys.uniform("mask", patches), *mask_ratio.counts(patches, ratio))
        loss, accuracy = training.wrapped(ids, plan, targets=ids)
        training.update(loss, accuracy=accuracy, mask_ratio=ratio)

    # 7. Results: the trained and the untrained encoder evaluated, the weights, and the report.
    model = training.unsharded(model).eval()
    result = evaluation.scores(model)
    result |= {f"{name}_untrained": value for name, value in evaluation.probes(untrained).items()}
    said = findings(result, counts=train.digit_counts, probed=evaluation.images, left_out=evaluation.left_out)
    run.print("\n".join(["findings:", *(f"- {sentence}" for sentence in said)]))
    if run.is_main:
        save_pretrained(run.out / "model.safetensors", model, codebook_fingerprint(train.books))
        result["loss"] = run.log.read()[-1]["loss"]
    run.finish(result | {"findings": said}, store_facts(train, validation, config))
    if run.is_main:
        write_report(run, model=model, validation=validation, grid=grid, result=result, said=said)


def write_report(
    run: Run, *, model: MTM, validation: TokenStore, grid: tuple[int, int], result: dict, said: list[str]
) -> None:
    """Write report.html: what is `said` about the result, curves, and validation images filled by the model."""
    config, on_digits = run.config, run.config.store is None
    tokenizer = digits().tokenizer if on_digits else config.tokenizer or tokenizer_beside(validation)
    decode = plots.picture_decoder(tokenizer, validation.books, kind=config.tokenizer_kind)
    originals = digits_images("validation")[0] if on_digits else None
    pictures = plots.reconstructions(
        model, validation, grid=grid, seed=config.seed, decode=decode, originals=originals
    )
    shown = plots.pretraining_plots(
        run.out,
        result=result,
        records=run.log.read(),
        evaluations=run.evaluations.read(),
        counts=validation.digit_counts,
        pictures=pictures,
    )
    run.report(Report("Masked token model, pre-trained", said, shown))


def tokenizer_beside(store: TokenStore) -> Path | None:
    """Return the tokenizer that tokenize_images saved beside the store, if it is there and has the same codes."""
    path = Path(f"{store.path}-tokenizer.safetensors")
    if not path.is_file():
        return None
    found = codebook_fingerprint(tokenizers.load(path).books.to_books())
    return path if found == codebook_fingerprint(store.books) else None


def choose(config: Config, named: Collection[str]) -> Config:
    """Choose the settings of preset auto that are not `named`, for the training images of --store."""
    return settle(config, named, open_splits(config.store, verify=False)[0]) if config.store else config


def new_model(config: Config, grid: tuple[int, int], store: TokenStore) -> MTM:
    """Create a masked token model with random weights for the codebook of the store."""
    model = MTM(
        config.model,
        grid=grid,
        num_codes=store.books.num_codes,
        code_dim=store.books.dim,
        patch_size=config.patch_size,
        decoder_width=config.decoder_width,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads,
        dropout=config.dropout,
    )
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


def start_from(model: MTM, path: str, store: TokenStore) -> None:
    """Load the weights of another masked token model into `model`.

    Raises UserError for another kind of model, another codebook, or tensors of other names or shapes.
    """
    saved = load_pretrained(path)
    if not isinstance(saved.model, MTM):
        raise UserError(f"--init-from {path} holds a classifier: expected a masked token model")
    check_codes(store.books, source=str(store.path), saved=saved, checkpoint=path)
    loaded, expected = saved.model.state_dict(), model.state_dict()
    for name in sorted(loaded.keys() | expected.keys()):
        there, here = (tuple(state[name].shape) if name in state else "nothing" for state in (loaded, expected))
        if there != here:
            raise UserError(
                f"--init-from {path} has other sizes: {name} is {there} there, {here} in this run: pass the "
                "--model, --crop-size and --decoder-* settings of that model"
            )
    model.load_state_dict(loaded)


def step_flops(model: MTM, shape: tuple[int, ...], counts: tuple[int, int]) -> int:
    """Return the floating-point operations for ids of `shape`, forward and backward.

    `counts` are (dropped, masked) patches.
    """
    patches = model.encoder.patch_embed.num_patches
    ids = torch.zeros(1, *shape, dtype=torch.long, device="meta")
    return count_flops(model, ids, mask_plan(torch.zeros(1, patches, device="meta"), *counts), ids)


def zeros_loss(shape: tuple[int, ...], counts: tuple[int, int], tokenadapt_fraction: float) -> Trial:
    """Return a training step on zeros, from which the memory of a step is computed.

    `shape` is that of the ids of an image, `counts` are the (dropped, masked) patches per image. The fraction of
    the images is augmented by TokenAdapt.
    """

    def loss(images: int, device: torch.device, model: MTM, adapt: TokenAdapt | None = None) -> Tensor:
        if adapt:
            adapt_zeros(adapt, round(tokenadapt_fraction * images), device)
        ids = torch.zeros(images, *shape, dtype=torch.long, device=device)
        plan = mask_plan(torch.zeros(images, model.encoder.patch_embed.num_patches, device=device), *counts)
        return model(ids, plan, targets=ids).loss

    return loss


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits", settle=choose)
