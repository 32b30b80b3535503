"""Inpainting with a masked token model by iterative decoding (MaskGIT, Chang et al., arXiv 2202.04200).

Each round predicts all hidden tokens, keeps the patches with the highest confidence and hides the others again,
so that later patches are predicted from earlier ones. The input of a round resembles that of a training step:
as many patches as SeiT++ always drops from the encoder are dropped here too, but only hidden ones; the other
hidden patches enter as mask tokens. If fewer patches are hidden, all of them are dropped, and the encoder sees
more visible patches than in training. On the digits this matters little: dropping none, some or all of the hidden
patches changed the loss by less than 0.01 nats.
"""

import math
from itertools import pairwise

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Int64
from torch import Tensor

from seitpp.augment.keyed import Keys
from seitpp.errors import UserError
from seitpp.models.masking import MASK_RATIOS, MaskPlan, hidden_tokens, mask_plan, over_digits
from seitpp.models.mtm import MTM

LOGIT_CELLS = 1 << 26  # the most logits in memory at once, unless a single image has more


class DecodingError(UserError):
    """Raised when the hidden region or the settings of the decoding are invalid."""


@torch.no_grad()
def fill_iteratively(
    model: MTM,
    ids: Int64[Tensor, "batch *digits height width"],
    hidden: Bool[Tensor, "batch height width"],
    *,
    keys: Keys,
    rounds: int = 8,
    temperature: float = 0.0,
) -> Int64[Tensor, "batch *digits height width"]:
    """Replace the hidden tokens of `ids` by codes that `model` predicts in several rounds.

    `model` is in eval mode and never sees the ids of hidden tokens. `keys` identify the images of the batch. At
    `temperature` 0, the most likely codes and the patches of highest confidence are taken. Above 0, codes are
    sampled from softmax(logits / temperature), and Gumbel noise is added to the confidence of a patch, which is
    the mean log-probability of its tokens, or of their digits; the scale of the noise falls from `temperature` to
    0 in the last round.
    Raises DecodingError if there is less than one round, if the temperature is negative, or as `hidden_patches`.
    """
    if rounds < 1 or temperature < 0:
        raise DecodingError(
            f"iterative decoding: got {rounds} rounds at temperature {temperature}, expected 1 round or more, and "
            "a temperature >= 0"
        )
    patches, num_hidden = hidden_patches(hidden, model.encoder.patch_embed.grid_size)
    counts = cosine_counts(num_hidden, rounds)
    images = max(1, LOGIT_CELLS // (hidden[0].numel() * sum(model.sizes)))
    chunks = torch.arange(len(ids), device=ids.device).split(images)
    return torch.cat([_fill(model, ids[at], patches[at], keys.of(at), counts, temperature) for at in chunks])


def _fill(model: MTM, ids: Tensor, patches: Tensor, keys: Keys, counts: list[int], temperature: float) -> Tensor:
    """`fill_iteratively` for one chunk of images; `counts` are those of `cosine_counts`."""
    patch_grid = model.encoder.patch_embed.grid_size
    for turn, (before, after) in enumerate(pairwise(counts)):
        plan = decoding_plan(patches, before, keys=keys, turn=turn)
        logits = model(ids, plan).float().permute(0, 2, 3, 1)  # codes last, their order in memory
        digits = list(enumerate(logits.split(model.sizes, dim=3)))
        codes = [_choose(part, keys, turn, temperature, digit=digit) for digit, part in digits]
        hidden = over_digits(hidden_tokens(plan, ids.shape[-2:]), ids)
        ids = torch.where(hidden, torch.stack(codes, dim=1).view(ids.shape), ids)
        scale = temperature * (1 - (turn + 1) / (len(counts) - 1))
        sure = sum(_confidence(part, codes[digit], patch_grid) for digit, part in digits) / len(digits)
        confidence = sure + scale * _gumbel(keys, turn, patches.shape[1])
        patches = mask_plan(confidence.masked_fill(~patches, torch.inf), 0, after).hidden
    return ids


def cosine_counts(hidden: int, rounds: int) -> list[int]:
    """Return the number of hidden patches before the first round and after each round, from `hidden` down to 0.

    After round t of T it is hidden * cos(pi t / 2 T), rounded down, but at least one patch is filled per round.
    With fewer patches than rounds there are as many rounds as patches.
    """
    rounds = min(rounds, hidden)
    counts = [hidden]
    for turn in range(1, rounds + 1):
        scheduled = math.floor(hidden * math.cos(math.pi * turn / (2 * rounds)))
        counts.append(max(rounds - turn, min(counts[-1] - 1, scheduled)))
    return counts


def hidden_patches(
    hidden: Bool[Tensor, "batch height width"], patch_grid: tuple[int, int]
) -> tuple[Bool[Tensor, "batch patches"], int]:
    """Return the patch mask of a token mask, and the number of hidden patches per image.

    It is the inverse of `hidden_tokens`. Raises DecodingError unless the mask covers whole patches, the same
    number in each image, and at least one.
    """
    rows, columns = patch_grid
    tokens = rearrange(hidden, "b (h p) (w q) -> b (h w) (p q)", h=rows, w=columns)
    patches = tokens.any(dim=2)
    if not torch.equal(patches, tokens.all(dim=2)):
        raise DecodingError(
            "hidden region: got parts of patches, expected whole patches of "
            f"{hidden.shape[1] // rows} x {hidden.shape[2] // columns} tokens: align the region with the patches"
        )
    counts = patches.sum(dim=1).unique().tolist()
    if len(counts) != 1 or counts == [0]:
        raise DecodingError(
            f"hidden region: got {counts} hidden patches per image, expected the same number in each image of a "
            "batch, and at least 1"
        )
    return patches, counts[0]


def decoding_plan(patches: Bool[Tensor, "batch patches"], num_hidden: int, *, keys: Keys, turn: int) -> MaskPlan:
    """Build the mask plan of round `turn`, where `patches` is true for the `num_hidden` hidden patches per image.

    As many patches as in training are dropped from the encoder, or all hidden ones if fewer are hidden. Which
    of the hidden patches are dropped is random.
    """
    num_patches = patches.shape[1]
    dropped, _ = MASK_RATIOS["seitpp"].counts(num_patches, 1.0)
    noise = keys.uniform(f"decode_drop_{turn}", num_patches)
    return mask_plan(torch.where(patches, noise, 1.0), min(dropped, num_hidden), num_hidden)


def _choose(logits: Tensor, keys: Keys, turn: int, temperature: float, *, digit: int) -> Tensor:
    """Logits (B, H, W, K) -> codes (B, H, W): the most likely, or sampled by the inverse CDF."""
    if temperature == 0:
        return logits.argmax(dim=3)
    height, width = logits.shape[1:3]
    stream = f"decode_code_{turn}_{digit}" if digit else f"decode_code_{turn}"
    u = keys.uniform(stream, height * width).view(-1, height, width, 1)
    cumulative = (logits / temperature).softmax(dim=3).cumsum(dim=3)
    # Rounding may leave the last cumulative sum below 1.
    return (cumulative <= u).sum(dim=3).clamp(max=logits.shape[3] - 1)


def _confidence(logits: Tensor, codes: Tensor, patch_grid: tuple[int, int]) -> Tensor:
    """The mean log-probability of the `codes` (B, H, W) of each patch: (B, L)."""
    log_probabilities = logits.log_softmax(dim=3).gather(3, codes.unsqueeze(3)).squeeze(3)
    return reduce(log_probabilities, "b (h p) (w q) -> b (h w)", "mean", h=patch_grid[0], w=patch_grid[1])


def _gumbel(keys: Keys, turn: int, num_patches: int) -> Tensor:
    return -keys.uniform(f"decode_order_{turn}", num_patches).clamp(min=2.0**-25).log().neg().log()
