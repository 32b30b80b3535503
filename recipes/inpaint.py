"""Hide a region of images and fill it with a pre-trained masked token model, in one shot and in several rounds.

    accelerate launch recipes/inpaint.py --checkpoint runs/mtm_pretrain-digits
    accelerate launch recipes/inpaint.py --checkpoint runs/mtm_pretrain-digits --region 0.5 0 0.5 1
    accelerate launch recipes/inpaint.py published --checkpoint base.pth --store imagenet-tokens

The digits take seconds on a CPU. The table gives the accuracy in percent: how many hidden tokens of the 360
validation images are predicted correctly by the model of mtm_pretrain, preset digits, seed 0. "One code" predicts
the most frequent hidden code everywhere.

| region           | one shot | 8 rounds | one code |
|------------------|----------|----------|----------|
| middle (default) | 30.7     | 30.1     | 3.8      |
| lower half       | 43.2     | 41.4     | 29.0     |
| everything       | 31.5     | 29.2     | 28.9     |

Rounds do not make more tokens correct; they make tokens that fit together. If everything is hidden, 8 rounds
draw a digit, one shot draws a blur of many. With --temperature 1 the tokens are sampled, and 14.8 % of them are
correct in the middle. The published models have not been tried.

The recipe reads a model of recipes/mtm_pretrain.py, or the official one, and the validation images of a token
store. It writes config.json, result.json and inpainting.png (tokens, hidden region, both results) into --out. It
trains nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset

from seitpp import TokenStore, plots
from seitpp.augment import EvalView, Keys
from seitpp.data.dataset import Batch, TokenDataset, evaluation_loader
from seitpp.data.digits import digits
from seitpp.engine.config import RunConfig
from seitpp.engine.findings import inpainted
from seitpp.engine.inputs import check_codebook, open_stores, store_facts
from seitpp.engine.report import Report
from seitpp.engine.run import Run
from seitpp.engine.waiting import progress
from seitpp.errors import UserError
from seitpp.models import MTM, load_pretrained
from seitpp.models.inpainting import decoding_plan, fill_iteratively, hidden_patches
from seitpp.recipe import run_recipe
from seitpp.tokenizers import Kind

BATCH_SIZE = 64


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of inpainting: the model, the images and the hidden region."""

    # Folder of a run of mtm_pretrain, its model.safetensors, or an official MTM checkpoint; always needed.
    checkpoint: str | None = None
    store: str | None = None  # Folder of a token store. None: the embedded digits.
    tokenizer: str | None = None  # Tokenizer that decodes tokens for the picture. None: codes are colors.
    # Kind of the tokenizer, only needed where its files do not show it (cosmos).
    tokenizer_kind: Kind | None = None
    # Top, left, height and width of the hidden region, as fractions of the grid.
    region: tuple[float, float, float, float] = (0.25, 0.25, 0.5, 0.5)
    rounds: int = 8  # Number of rounds, each of which fixes the most confident patches.
    # Softmax temperature when codes are sampled. 0: the most likely codes, without sampling.
    temperature: float = 0.0
    images: int = 8  # Number of images in the picture.
    measured: int = 1000  # Largest number of validation images for the accuracies.


PRESETS = {"published": Config()}
PRESETS["digits"] = replace(PRESETS["published"], preset="digits", precision="no")
PRESETS["smoke"] = replace(PRESETS["digits"], preset="smoke", rounds=2, measured=32)


def main(config: Config) -> None:
    # 1. Run: the output folder and the processes.
    if config.checkpoint is None:
        raise UserError("no model to inpaint with: name a pre-training run's folder with --checkpoint")
    if min(config.images, config.measured) < 1:
        raise UserError(f"--images {config.images} --measured {config.measured}: expected 1 or more of each")
    run = Run("inpaint", config)

    # 2. Data and model with the same codebook and a sufficient grid; the region in whole patches.
    train, validation = open_stores(run, config.store)
    model = open_model(config.checkpoint, validation).to(run.device)
    patch_embed = model.encoder.patch_embed
    region = region_tokens(config.region, patch_embed.img_size, patch_embed.grid_size).to(run.device)
    tokenizer = digits().tokenizer if config.store is None else config.tokenizer
    decode = plots.picture_decoder(tokenizer, validation.books, kind=config.tokenizer_kind)

    # 3. Results for a few images before the folder is created, because this call refuses invalid settings.
    fill = partial(fill_region, model, region=region, config=config, run=run)
    shown = fill(TokenDataset(validation).__getitems__(spread(validation, config.images)))
    run.start()
    run.describe(f"{int(region.sum())} of {region.numel()} tokens hidden")

    # 4. Results: the accuracy on hidden tokens, and a picture.
    result = measure(fill, store=validation, count=config.measured, run=run)
    for name, value in result.items():
        run.print(f"{name:20} {value:8.3f}")
    run.finish(result, store_facts(train, validation, config))
    if run.is_main:
        rows, path = picture_rows(shown, decode), run.out / "inpainting.png"
        plots.picture_grid(rows, path)
        text = "The gray region is hidden from the model and filled by it, at once and in rounds."
        filled = plots.shown_rows(rows, path, "Filled regions", text=text)
        run.report(Report("Hidden regions, filled", inpainted(result, config.rounds), [filled]))


def open_model(checkpoint: str, store: TokenStore) -> MTM:
    """Load the masked token model of a checkpoint.

    Raises UserError for another kind of model, another codebook, or a grid smaller than the model's input.
    """
    saved = load_pretrained(checkpoint)
    if not isinstance(saved.model, MTM):
        raise UserError(f"{checkpoint} is no masked token model: name a run of recipes/mtm_pretrain.py")
    if saved.codebook:
        check_codebook(store.books, source=str(store.path), expected=saved.codebook, checkpoint=checkpoint)
    codes, window = saved.model.sizes, saved.model.encoder.patch_embed.img_size
    if codes != store.books.sizes or window[0] > store.grid[0] or window[1] > store.grid[1]:
        got, want = (" x ".join(map(str, sizes)) for sizes in (store.books.sizes, codes))
        raise UserError(
            f"{store.path} has {got} codes and the grid {store.grid}, {checkpoint} {want} codes "
            f"and {window} tokens: expected the same codes and at least that grid"
        )
    return saved.model


def region_tokens(
    region: tuple[float, float, float, float], window: tuple[int, int], patch_grid: tuple[int, int]
) -> Tensor:
    """Mark a region of a window of tokens, rounded to whole patches -> (height, width) bool, True inside.

    `region` is (top, left, height, width) as fractions of the window, `window` is (height, width) in tokens.
    Raises UserError if the region is partly outside the window or covers no patch.
    """
    hidden = torch.zeros(window, dtype=torch.bool)
    spans = []
    for start, length, tokens, patches in zip(region[:2], region[2:], window, patch_grid, strict=True):
        ends = [round(fraction * patches) for fraction in (start, start + length)]
        if start < 0 or start + length > 1 + 1e-9 or ends[0] >= ends[1]:
            raise UserError(
                f"--region {' '.join(map(str, region))} of {patch_grid[0]} x {patch_grid[1]} patches: "
                "expected top, left, height and width as fractions of the grid, inside it and at least one patch"
            )
        spans.append(slice(*(end * (tokens // patches) for end in ends)))
    hidden[tuple(spans)] = True
    return hidden


class Filled(NamedTuple):
    """The true `ids` int64 and both results int64, all (B, H, W) or (B, Q, H, W), and the `hidden` mask (B, H, W).

    `loss` () is the cross-entropy of the single pass, in nats per hidden token.
    """

    ids: Tensor
    hidden: Tensor
    one_shot: Tensor
    iterative: Tensor
    loss: Tensor


@torch.no_grad()
def fill_region(model: MTM, batch: Batch, *, region: Tensor, config: Config, run: Run) -> Filled:
    """Fill the region in the central windows of a batch, in one shot and in rounds.

    Both begin with the same mask, so the loss holds for the first round too.
    """
    batch = batch.to(run.device)
    ids = EvalView(region.shape)(batch.ids)
    keys = Keys(config.seed, 0, batch.indices)
    hidden = region.expand(len(ids), *region.shape)
    patches, num_hidden = hidden_patches(hidden, model.encoder.patch_embed.grid_size)
    plan = decoding_plan(patches, num_hidden, keys=keys, turn=0)
    with run.accelerator.autocast():
        loss, _ = model(ids, plan, targets=ids)
        one_shot = fill_iteratively(model, ids, hidden, keys=keys, rounds=1)
        settings = {"rounds": config.rounds, "temperature": config.temperature}
        iterative = fill_iteratively(model, ids, hidden, keys=keys, **settings)
    return Filled(ids, hidden, one_shot, iterative, loss)


def spread(store: TokenStore, count: int) -> list[int]:
    """Return up to `count` indices, evenly spaced, because a sorted split begins with images of one class."""
    count = min(count, len(store))
    return [number * len(store) // count for number in range(count)]


def measure(fill: Callable[[Batch], Filled], *, store: TokenStore, count: int, run: Run) -> dict[str, float]:
    """Return the token accuracies in the region in percent: one shot, rounds, and the most frequent code.

    `loss` is the cross-entropy of the single pass, in nats per hidden token. With several digits, all are means
    over these.
    """
    ranks, rank = run.accelerator.num_processes, run.accelerator.process_index
    chosen = Subset(TokenDataset(store), spread(store, count))
    codes = [torch.zeros(size, device=run.device) for size in store.books.sizes]
    sums = torch.zeros(3, device=run.device)
    loader = evaluation_loader(chosen, BATCH_SIZE, rank=rank, ranks=ranks, workers=0)
    for batch in progress(loader, "filling"):
        filled = fill(batch)
        expected = of_hidden(filled.ids, filled.hidden)
        results = (filled.one_shot, filled.iterative)
        correct = [(of_hidden(ids, filled.hidden) == expected).sum() for ids in results]
        sums += torch.stack([*correct, filled.loss * expected.numel()])
        for counts, digit in zip(codes, expected, strict=True):
            counts += torch.bincount(digit, minlength=len(counts))
    sums, *codes = (run.accelerator.reduce(part, "sum") for part in (sums, *codes))
    one_shot, iterative, loss = (sums / sum(counts.sum() for counts in codes)).tolist()
    return {
        "accuracy_one_shot": 100 * one_shot,
        "accuracy_iterative": 100 * iterative,
        "accuracy_one_code": mean(100 * float(counts.max() / counts.sum()) for counts in codes),
        "loss": loss,
    }


def of_hidden(ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the digits (Q, n) of the hidden tokens of ids (B, H, W) or (B, Q, H, W)."""
    planes = ids if ids.ndim == 4 else ids.unsqueeze(1)
    return planes.transpose(0, 1)[:, hidden]


def picture_rows(filled: Filled, decode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the rows of the picture (n, 3, h, w): the tokens, the same with a gray region, and both results."""
    tokens = decode(filled.ids.cpu())
    return {
        "tokens": tokens,
        "hidden region": plots.gray_out(tokens, filled.hidden.cpu()),
        "one shot": decode(filled.one_shot.cpu()),
        "round by round": decode(filled.iterative.cpu()),
    }


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
