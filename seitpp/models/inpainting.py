"""Filling a region with a masked token model, round by round (MaskGIT, Chang et al., arXiv 2202.04200).

Each round predicts every hidden token, keeps the patches that the model is surest of and hides the others
again, so that later patches are predicted with earlier ones in view. A round looks to the model as a step of
its training did: the share that SeiT++ always drops from the encoder is dropped here too, of hidden patches
only, and hidden ones beyond it enter as mask tokens. Where fewer are hidden, all of them are dropped, and the
encoder sees more patches than in training, all of them with content. On the digits it matters little: to drop
none, some or all hidden patches moved the loss by less than 0.01 nats.
"""

import math
from itertools import pairwise

import torch
from einops import rearrange, reduce
from torch import Tensor

from seitpp.augment.keyed import Keys
from seitpp.errors import UserError
from seitpp.models.masking import MASK_RATIOS, MaskPlan, hidden_tokens, mask_plan
from seitpp.models.mtm import MTM

LOGIT_CELLS = 1 << 26  # as many logits as are there at once, but those of one image always


class DecodingError(UserError):
    """A region that cannot be filled, or settings of the filling that mean nothing."""


@torch.no_grad()
def fill_iteratively(
    model: MTM, ids: Tensor, hidden: Tensor, keys: Keys, rounds: int = 8, temperature: float = 0.0
) -> Tensor:
    """Ids (B, H, W) int64 with all that is `hidden` (B, H, W) bool replaced by the model's own codes.

    `model` in eval mode; `keys` of the same B images. What the ids hold in hidden places is never seen.
    `temperature` 0 takes the likeliest codes and keeps the surest patches. Above 0, codes are drawn from
    softmax(logits / temperature), and the confidence of a patch, the mean log-probability of its tokens, gets
    Gumbel noise, whose scale falls from `temperature` to 0 in the last round. Raises DecodingError as
    `hidden_patches` does, for less than one round, or for a negative temperature.
    """
    if rounds < 1 or temperature < 0:
        raise DecodingError(
            f"{rounds} rounds at temperature {temperature}: expected 1 round or more, and a temperature >= 0"
        )
    patches, num_hidden = hidden_patches(hidden, model.encoder.patch_embed.grid_size)
    counts = cosine_counts(num_hidden, rounds)
    images = max(1, LOGIT_CELLS // (hidden[0].numel() * model.settings["num_codes"]))
    parts = torch.arange(len(ids), device=ids.device).split(images)
    return torch.cat([_fill(model, ids[at], patches[at], keys.of(at), counts, temperature) for at in parts])


def _fill(model: MTM, ids: Tensor, patches: Tensor, keys: Keys, counts: list[int], temperature: float) -> Tensor:
    """What `fill_iteratively` does, for a few images; `counts` of hidden patches before and after each round."""
    patch_grid = model.encoder.patch_embed.grid_size
    for turn, (before, after) in enumerate(pairwise(counts)):
        plan = decoding_plan(patches, before, keys, turn)
        logits = model(ids, plan).float().permute(0, 2, 3, 1)  # codes last, as they lie in memory
        codes = _choose(logits, keys, turn, temperature)
        ids = torch.where(hidden_tokens(plan, ids.shape[-2:]), codes, ids)
        scale = temperature * (1 - (turn + 1) / (len(counts) - 1))
        confidence = _confidence(logits, codes, patch_grid) + scale * _gumbel(keys, turn, patches.shape[1])
        patches = mask_plan(confidence.masked_fill(~patches, torch.inf), 0, after).hidden
    return ids


def cosine_counts(hidden: int, rounds: int) -> list[int]:
    """Patches that are hidden before the first round and after each: from `hidden` down to 0, by a cosine.

    The share after round t of T is cos(pi t / 2 T), rounded down, but every round shows at least one patch:
    with fewer patches than rounds there is one round for each.
    """
    rounds = min(rounds, hidden)
    counts = [hidden]
    for turn in range(1, rounds + 1):
        wanted = math.floor(hidden * math.cos(math.pi * turn / (2 * rounds)))
        counts.append(max(rounds - turn, min(counts[-1] - 1, wanted)))
    return counts


def hidden_patches(hidden: Tensor, patch_grid: tuple[int, int]) -> tuple[Tensor, int]:
    """A token mask (B, H, W) bool as patches (B, L), the inverse of `hidden_tokens`, and how many.

    Raises DecodingError unless it covers whole patches, as many in each image and at least one.
    """
    rows, columns = patch_grid
    tokens = rearrange(hidden, "b (h p) (w q) -> b (h w) (p q)", h=rows, w=columns)
    patches = tokens.any(dim=2)
    if not torch.equal(patches, tokens.all(dim=2)):
        raise DecodingError(
            f"a region with parts of patches: expected whole ones, of {hidden.shape[1] // rows} x "
            f"{hidden.shape[2] // columns} tokens"
        )
    counts = patches.sum(dim=1).unique().tolist()
    if len(counts) != 1 or counts == [0]:
        raise DecodingError(
            f"{counts} hidden patches an image: expected one number for the whole batch, at least 1"
        )
    return patches, counts[0]


def decoding_plan(patches: Tensor, num_hidden: int, keys: Keys, turn: int) -> MaskPlan:
    """The plan of a round for hidden `patches` (B, L) bool, `num_hidden` an image.

    The number dropped from the encoder is that of training, or all where fewer are hidden; which, is drawn.
    """
    num_patches = patches.shape[1]
    dropped, _ = MASK_RATIOS["seitpp"].counts(num_patches, 1.0)
    noise = keys.uniform(f"decode_drop_{turn}", num_patches)
    return mask_plan(torch.where(patches, noise, 1.0), min(dropped, num_hidden), num_hidden)


def _choose(logits: Tensor, keys: Keys, turn: int, temperature: float) -> Tensor:
    """Logits (B, H, W, K) -> codes (B, H, W): the likeliest, or drawn by the inverse of their sums."""
    if temperature == 0:
        return logits.argmax(dim=3)
    height, width = logits.shape[1:3]
    u = keys.uniform(f"decode_code_{turn}", height * width).view(-1, height, width, 1)
    cumulative = (logits / temperature).softmax(dim=3).cumsum(dim=3)
    # A sum may end below 1 by rounding.
    return (cumulative <= u).sum(dim=3).clamp(max=logits.shape[3] - 1)


def _confidence(logits: Tensor, codes: Tensor, patch_grid: tuple[int, int]) -> Tensor:
    """Mean log-probability of a patch's codes (B, H, W) -> (B, L)."""
    scores = logits.log_softmax(dim=3).gather(3, codes.unsqueeze(3)).squeeze(3)
    return reduce(scores, "b (h p) (w q) -> b (h w)", "mean", h=patch_grid[0], w=patch_grid[1])


def _gumbel(keys: Keys, turn: int, num_patches: int) -> Tensor:
    return -keys.uniform(f"decode_order_{turn}", num_patches).clamp(min=2.0**-25).log().neg().log()
