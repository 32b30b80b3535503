"""The settings of mtm_pretrain's preset `auto`, chosen from the number of images, the grid and the device.

`choose` returns every setting with its reason. The rules lead through two known runs: `published` (SeiT++: ViT-B,
the 1.28 million images of ImageNet-1k, 400 epochs of batch 4096, on 8 GPUs) and `digits`, which was measured (3
blocks, 1,437 images, 100 epochs of batch 128, on a CPU). Each rule says what it takes from which; what lies
between is a rule of thumb that was not measured. A setting that the user named stays as it is, and the rules after
it build on it.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from seitpp.augment.maps import Sides, both_sides
from seitpp.data.dataset import fraction_of
from seitpp.engine.config import AUTO, Choice, Config
from seitpp.engine.system import launched_processes, loader_workers
from seitpp.errors import UserError
from seitpp.models.vit import PATCH
from seitpp.store import TokenStore
from seitpp.store.layout import SEQUENCE

SAID = "you said"
NANO, TINY, SMALL, BASE = "mtm_vit_nano", "mtm_vit_tiny", "mtm_vit_small", "mtm_vit_base"
# Images from which a model is chosen: published for a million and more, that of the digits below ten thousand.
FEWEST = {BASE: 1_000_000, SMALL: 50_000, TINY: 10_000, NANO: 0}
DECODERS = {NANO: (96, 2, 4), TINY: (192, 4, 6)}  # width, depth, heads; the published one for all other models
PUBLISHED_DECODER = (512, 4, 16)
PUBLISHED_EPOCHS, DIGITS_EPOCHS, DIGITS_UPDATES = 400, 100, 1100
PUBLISHED_BATCH, DIGITS_BATCH = 4096, 128
PUBLISHED_LR, DIGITS_LR = 2.4e-3, 3e-3  # at the peak, of the batches above
LR_BATCH = 256  # the batch size that --base-lr is for
CROPPED_FROM = 16  # tokens on the shorter side from which a grid is cropped
CROP = 7 / 8  # of the shorter side: 28 of 32 (published)
LONGEST = 2  # the longer side over the shorter one, above which a square crop would lose most of the image
# Patches of training images in a run on a CPU: an hour on one slow core at 8,000 patches a second, which is the
# small model's speed there. An Apple GPU is assumed to be 20 times as fast; nobody has measured one.
BUDGETS = {"cpu": 30_000_000, "mps": 600_000_000}
PATCHES_AT_A_TIME = 25_600, 3_200  # in a micro-batch elsewhere than on a GPU, of the smallest model and of others
CHECKPOINT_STEPS = 300  # updates between two checkpoints; an epoch of the published run has 312


class Facts(NamedTuple):
    """What settings are chosen from: the training images, the grid (H, W) in tokens, the device, the launch.

    `processes` train together, one on each GPU; each has `cores` CPU cores to load data. `bf16` is whether a
    GPU has bfloat16, `adapts` whether a TokenAdapt was named, `sequence` whether the tokens have no rows and
    columns.
    """

    images: int
    grid: tuple[int, int]
    device: Literal["cpu", "cuda", "mps"]
    processes: int = 1
    cores: int = 1
    bf16: bool = True
    adapts: bool = False
    sequence: bool = False

    def __str__(self) -> str:
        kind = {"cpu": "a CPU", "cuda": f"{self.processes} GPU(s)", "mps": "an Apple GPU"}[self.device]
        tokens = f"sequences of {self.grid[1]}" if self.sequence else f"grid {self.grid[0]} x {self.grid[1]}"
        return f"{self.images:,} training images, {tokens}, {kind}"


def settle(config: Config, named: Collection[str], train: TokenStore) -> Config:
    """Fill in the settings of preset `auto` for the training images; `explain` has the reason of each.

    The settings `named` on the command line stay. Raises UserError as `choose` does, or for a bad --fraction.
    """
    chosen = choose(facts_of(config, train), {name: getattr(config, name) for name in named})
    return replace(config, **{name: choice.value for name, choice in chosen.items()})


def explain(config: Config, train: TokenStore) -> dict[str, Choice]:
    """Return the settings of preset `auto` with their reasons, and the preset with what they were chosen for.

    It is empty for other presets. A setting other than would be chosen here is the user's, or that of the run that
    is resumed or repeated.
    """
    if config.preset != AUTO or config.store is None:
        return {}
    facts = facts_of(config, train)
    values = {name: getattr(config, name) for name in RULES}
    chosen = {"preset": Choice(AUTO, str(facts))}
    for name, rule in RULES.items():
        try:
            choice = rule(facts, values)
        except UserError:  # about a value that is not used
            choice = None
        chosen[name] = choice if choice and choice.value == values[name] else Choice(values[name], SAID)
    return chosen


def facts_of(config: Config, train: TokenStore) -> Facts:
    """Return what the settings are chosen from. Raises UserError for a bad --fraction."""
    return Facts(
        images=len(fraction_of(len(train), config.fraction, config.seed)),
        grid=train.grid,
        adapts=config.tokenadapt is not None,
        sequence=train.layout == SEQUENCE,
        **device_facts(),
    )


def device_facts() -> dict[str, Any]:
    """Return the fields of `Facts` about this machine and launch."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    processes = launched_processes()
    device = "cpu"
    if not on_cpu:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return {
        "device": device,
        "processes": processes,
        "cores": loader_workers(None),
        "bf16": device == "cuda" and torch.cuda.is_bf16_supported(False),
    }


def choose(facts: Facts, said: Mapping[str, Any]) -> dict[str, Choice]:
    """Choose the settings of masked token modeling; those that the user `said` stay.

    Raises UserError for a grid that is too small to be masked.
    """
    chosen: dict[str, Choice] = {}
    for name, rule in RULES.items():
        values = {name: choice.value for name, choice in chosen.items()}
        chosen[name] = Choice(said[name], SAID) if name in said else rule(facts, values)
    return chosen


def encoder(facts: Facts, _: Mapping) -> Choice:
    """Choose the encoder by the number of images; none but the smallest on a CPU, at most tiny on an Apple GPU."""
    name = next(name for name, fewest in FEWEST.items() if facts.images >= fewest)
    if facts.device == "cpu" and name != NANO:
        return Choice(NANO, "the encoder of the digits: larger ones take days on a CPU")
    if facts.device == "mps" and name in (SMALL, BASE):
        return Choice(TINY, f"{name} would fit the images, but takes days on an Apple GPU")
    reasons = {
        NANO: f"fewer than {FEWEST[TINY]:,} images: the encoder of the digits",
        TINY: f"{FEWEST[TINY]:,} to {FEWEST[SMALL]:,} images: between the digits and ImageNet",
        SMALL: f"{FEWEST[SMALL]:,} to {FEWEST[BASE]:,} images: between the digits and ImageNet",
        BASE: "a million images and more: as published",
    }
    return Choice(name, reasons[name])


def decoder(part: int, facts: Facts, values: Mapping) -> Choice:
    """Choose width (part 0), depth (1) or number of heads (2) of the decoder that goes with the encoder."""
    sizes = DECODERS.get(values["model"], PUBLISHED_DECODER)
    return Choice(
        sizes[part], f"{'goes with' if values['model'] in DECODERS else 'published, for'} {values['model']}"
    )


def dropout(facts: Facts, values: Mapping) -> Choice:
    """Take no dropout for the smallest encoder, where 0.1 made the digits worse, else the published 0.1."""
    if values["model"] == NANO:
        return Choice(0.0, "0.1 made the digits worse")
    return Choice(0.1, "as published")


def patch_size(facts: Facts, _: Mapping) -> Choice:
    """Take patches of 2 x 2 tokens (published), and each token of a sequence by itself."""
    if facts.sequence:
        return Choice(1, "the tokens of a sequence have no rows and columns")
    return Choice(PATCH, "as published")


def crop(facts: Facts, values: Mapping) -> Choice:
    """Crop 7/8 of the shorter side (published: 28 of 32), whole patches; keep small grids whole (digits).

    A grid that cannot be divided into patches is always cropped. Raises UserError if fewer than two patches
    remain, of which one is hidden and one seen.
    """
    (height, width), patch = facts.grid, both_sides(values["patch_size"])
    if facts.sequence:
        check_maskable(facts.grid, facts.grid, patch)
        return Choice(None, "a sequence cannot be cropped")
    short, multiple = min(facts.grid), math.lcm(*patch)
    if short >= CROPPED_FROM and max(facts.grid) <= LONGEST * short:
        return Choice(
            round(CROP * short) // multiple * multiple, "random crops of 7/8 of the shorter side, as published"
        )
    if height % patch[0] or width % patch[1]:
        side = short // multiple * multiple
        check_maskable((side, side), facts.grid, patch)
        tokens = f"{patch[0]} x {patch[1]} tokens"
        return Choice(side, f"a patch is {tokens}: the largest square of whole patches in {height} x {width}")
    check_maskable(facts.grid, facts.grid, patch)
    if short >= CROPPED_FROM:
        return Choice(None, "the whole grid: a square crop would lose most of so long an image")
    return Choice(None, "the whole grid: it is small")


def check_maskable(window: tuple[int, int], grid: tuple[int, int], patch_size: Sides) -> None:
    """Raise UserError unless the window of a grid has two patches: one to hide, one to see."""
    down, across = both_sides(patch_size)
    patches = (window[0] // down) * (window[1] // across)
    if patches < 2:
        raise UserError(
            f"grid {grid[0]} x {grid[1]}: got {patches} patches of {down} x {across} tokens, expected at least 2, "
            "one to hide and one to see: pass a smaller --patch-size, or tokenize larger images"
        )


def adapted(facts: Facts, _: Mapping) -> Choice:
    """Augment half of the images by TokenAdapt (published) if one was named."""
    return Choice(0.5, "as published") if facts.adapts else Choice(0.0, "no --tokenadapt was named")


def batch_size(facts: Facts, _: Mapping) -> Choice:
    """Let the batch grow with the root of the number of images: 128 for 1,437 (digits), 4096 for 1.28 million.

    It is a power of two, or the multiple of the processes below it. On a CPU it is at most that of the digits, for
    more updates in the same time.
    """
    grown = DIGITS_BATCH * math.sqrt(facts.images / 1437)
    batch = min(PUBLISHED_BATCH, 2 ** round(math.log2(grown)))
    reason = "grows with the root of the images, from 128 (digits) to 4096 (published)"
    if facts.device == "cpu" and batch > DIGITS_BATCH:
        batch, reason = DIGITS_BATCH, "that of the digits: on a CPU updates are rare"
    while batch > facts.images:
        batch //= 2
    return Choice(max(1, batch // facts.processes) * facts.processes, reason)


def base_lr(facts: Facts, values: Mapping) -> Choice:
    """Keep the peak learning rate of the digits for their encoder; else scale the published with the batch's root.

    The root is the usual rule for Adam (Malladi et al., arXiv 2205.10287). Adam's gradients of a small batch are
    noisier.
    """
    batch = values["batch_size"]
    if values["model"] == NANO:
        peak, reason = DIGITS_LR, f"{DIGITS_LR:g} at the peak, as for the digits"
    else:
        peak = PUBLISHED_LR * math.sqrt(batch / PUBLISHED_BATCH)
        reason = (
            f"{peak:.2g} at the peak: the published {PUBLISHED_LR:g} times the root of batch / {PUBLISHED_BATCH}"
        )
    return Choice(float(f"{peak * LR_BATCH / batch:.3g}"), reason)


def epochs(facts: Facts, values: Mapping) -> Choice:
    """Take 400 epochs on GPUs (published), elsewhere 100 (digits), but no more than the time allows.

    Of few images it takes more epochs until there are as many updates as for the digits.
    """
    known, name = (PUBLISHED_EPOCHS, "published") if facts.device == "cuda" else (DIGITS_EPOCHS, "for the digits")
    wanted = max(known, math.ceil(DIGITS_UPDATES / max(1, facts.images // values["batch_size"])))
    reason = (
        f"as {name}" if wanted == known else f"few images: as many updates as for the digits, {DIGITS_UPDATES:,}"
    )
    if facts.device == "cuda":
        if facts.images >= FEWEST[BASE] and facts.processes < 8:
            reason = "as published, on 8 GPUs; with fewer it takes as many times longer"
        return Choice(wanted, reason)
    budget = BUDGETS[facts.device] / (facts.images * patches(facts.grid, values))
    if budget >= wanted:
        return Choice(wanted, reason)
    if budget < 1:
        return Choice(1, "the fewest; a run of more than hours needs a GPU")
    where = "about an hour on a slow CPU core" if facts.device == "cpu" else "meant for some hours on an Apple GPU"
    return Choice(round(budget), f"{where}; more are better")


def patches(grid: tuple[int, int], values: Mapping) -> int:
    """Return the number of patches that the model sees of an image."""
    (height, width), (down, across) = both_sides(values["crop_size"] or grid), both_sides(values["patch_size"])
    return (height // down) * (width // across)


def warmup(facts: Facts, values: Mapping) -> Choice:
    """Warm up for a tenth of the epochs (published and digits)."""
    return Choice(values["epochs"] / 10, "a tenth of the epochs, as published")


def precision(facts: Facts, _: Mapping) -> Choice:
    """Take bf16 on a GPU (published), fp16 on a GPU without it, float32 elsewhere (digits)."""
    if facts.device != "cuda":
        return Choice("no", "float32: half precision is for GPUs of Nvidia and AMD")
    return Choice("bf16", "as published") if facts.bf16 else Choice("fp16", "the GPU has no bfloat16")


def compiles(facts: Facts, values: Mapping) -> Choice:
    """Compile the larger models on a GPU (published): for a short run the minutes of compiling do not pay."""
    if facts.device == "cuda" and values["model"] not in DECODERS:
        return Choice(True, "as published")
    return Choice(False, "takes minutes, which pay off in long runs on a GPU")


def accumulation(facts: Facts, values: Mapping) -> Choice:
    """Leave the micro-batches of a GPU to its free memory; elsewhere take few enough images at a time."""
    if facts.device == "cuda":
        return Choice(None, "as few as fit into the memory of the GPU, counted when the run starts")
    share = values["batch_size"] // facts.processes
    limit = PATCHES_AT_A_TIME[values["model"] != NANO]
    most = max(1, limit // patches(facts.grid, values))
    number = next(number for number in range(1, share + 1) if share % number == 0 and share // number <= most)
    return Choice(number, f"{share // number} images at a time")


def workers(facts: Facts, _: Mapping) -> Choice:
    """Load in as many processes as there are cores (published), in none on a CPU, whose cores train (digits)."""
    if facts.device == "cpu":
        return Choice(0, "the cores train")
    return Choice(None, f"by the CPU cores, here {facts.cores} for each process")


def checkpoints(facts: Facts, values: Mapping) -> Choice:
    """Save every 300 updates, in whole epochs (published: each), at least 10 times a run (digits)."""
    epoch = max(1, facts.images // values["batch_size"])
    every = min(values["epochs"] / 10, max(1, round(CHECKPOINT_STEPS / epoch)))
    return Choice(every, f"about every {max(1, round(every * epoch)):,} updates")


def evaluations(facts: Facts, values: Mapping) -> Choice:
    """Evaluate 20 times a run on a GPU (published), 4 times elsewhere (digits)."""
    times = 20 if facts.device == "cuda" else 4
    return Choice(values["epochs"] / times, f"{times} evaluations of the encoder")


RULES: dict[str, Callable[[Facts, Mapping], Choice]] = {
    "model": encoder,
    "decoder_width": lambda facts, values: decoder(0, facts, values),
    "decoder_depth": lambda facts, values: decoder(1, facts, values),
    "decoder_heads": lambda facts, values: decoder(2, facts, values),
    "dropout": dropout,
    "patch_size": patch_size,
    "crop_size": crop,
    "tokenadapt_fraction": adapted,
    "batch_size": batch_size,
    "base_lr": base_lr,
    "epochs": epochs,
    "warmup_epochs": warmup,
    "precision": precision,
    "compile": compiles,
    "accumulation": accumulation,
    "workers": workers,
    "checkpoint_epochs": checkpoints,
    "evaluation_epochs": evaluations,
}
