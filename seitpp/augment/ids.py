"""Token-EDA (SeiT): easy data augmentation of text, applied to the ids of a grid; whole batches, no loop."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from seitpp.augment.keyed import Keys
from seitpp.codebook import synonyms

LARGEST_SQUARE = 0.25  # side of a swapped square, as a share of the grid's shorter side

Pair = tuple[Tensor, Tensor]


def replace_synonyms(ids: Tensor, table: Tensor, keys: Keys, rate: float) -> Tensor:
    """Replace each token with probability `rate` by one of its synonyms, all equally likely (SeiT, SR).

    `ids` (B, H, W) int64, `table` (K, n) int64 from `tokens.codebook.synonyms` -> (B, H, W) int64.
    """
    draws = keys.uniform("replace_synonyms", ids[0].numel()).view(ids.shape)
    # A draw that decides for a replacement is uniform below the rate, so it also chooses the synonym.
    chosen = (draws * (table.shape[1] / (rate or 1.0))).long().clamp(max=table.shape[1] - 1)
    return torch.where(draws < rate, table[ids, chosen], ids)


def swap_squares(ids: Tensor, keys: Keys) -> Tensor:
    """Swap two equal squares of each grid that do not overlap (SeiT, RS): ids (B, H, W) -> (B, H, W).

    The side is int(shorter side of the grid * U(0, 0.25)), so it may be 0, which changes nothing. All pairs of
    places at which the two squares do not overlap are equally likely.
    """
    height, width = ids.shape[1:]
    draws = keys.uniform("swap_squares", 6)
    side = (draws[:, 0] * (LARGEST_SQUARE * min(height, width))).long()
    tops, lefts = _places_apart((height, width), side.clamp(min=1), draws[:, 1:])
    first, second = (_square(*corner, side, (height, width)) for corner in zip(tops, lefts, strict=True))
    distance = ((tops[1] - tops[0]) * width + lefts[1] - lefts[0]).unsqueeze(1)
    source = torch.arange(height * width, device=ids.device) + distance * (first.long() - second.long())
    return ids.flatten(1).gather(1, source).view(ids.shape)


def _square(top: Tensor, left: Tensor, side: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H * W) bool: which tokens lie in the square."""
    rows, columns = (
        (torch.arange(length, device=side.device) - start.unsqueeze(1))
        for start, length in zip((top, left), grid, strict=True)
    )
    rows, columns = ((line >= 0) & (line < side.unsqueeze(1)) for line in (rows, columns))
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).flatten(1)


def _places_apart(grid: tuple[int, int], side: Tensor, draws: Tensor) -> tuple[Pair, Pair]:
    """Tops and lefts (B,) of two squares that do not overlap: exactly uniform, without rejection.

    `side` (B,) >= 1, `draws` (B, 5) in [0, 1). Either the rows are apart and the columns are any, or the rows
    are not and the columns are; which one is decided by how many pairs each has.
    """
    rows, columns = (length - side + 1 for length in grid)
    rows_apart, columns_apart = ((places - side) * (places - side + 1) for places in (rows, columns))
    one, other = rows_apart * columns**2, (rows**2 - rows_apart) * columns_apart
    by_rows = draws[:, 0] * (one + other) < one
    u, v, w, x = draws[:, 1:].unbind(dim=1)
    tops = _choose(by_rows, _apart(rows, side, u, v), _close(rows, side, u))
    lefts = _choose(by_rows, (_below(columns, w), _below(columns, x)), _apart(columns, side, w, x))
    return tops, lefts


def _choose(condition: Tensor, one: Pair, other: Pair) -> Pair:
    return torch.where(condition, one[0], other[0]), torch.where(condition, one[1], other[1])


def _below(places: Tensor, draw: Tensor) -> Tensor:
    return (draw * places).long()


def _apart(places: Tensor, side: Tensor, u: Tensor, v: Tensor) -> Pair:
    """Any ordered pair of positions below `places` that are at least `side` apart.

    These are the pairs of different positions on a line that is side - 1 shorter, with the larger one moved up.
    """
    one, other = _below(places - side + 1, u), _below(places - side, v)
    other = other + (other >= one)
    return one + (side - 1) * (one > other), other + (side - 1) * (other > one)


def _close(places: Tensor, side: Tensor, u: Tensor) -> Pair:
    """Any ordered pair of positions below `places` that are less than `side` apart.

    In the square table of all pairs these are the diagonals -side + 1 .. side - 1. Diagonal d > 0 has places - d
    pairs and diagonal d - side has places - side + d, so that joined they make side - 1 lines of equal length,
    which follow the main diagonal.
    """
    line = 2 * places - side
    pair = _below(places + (side - 1) * line, u)
    distance, at = (pair - places) // line + 1, (pair - places) % line
    below = at - (places - distance)
    joined = _choose(below < 0, (at, at + distance), (below + side - distance, below))
    return _choose(pair < places, (pair, pair), joined)


@dataclass(frozen=True)
class EDARates:
    """How often Token-EDA acts. One draw of an image decides: SR acts on the lowest `replaced_images` of the
    draws, RS on the highest `swapped_images`, so both act on an image only where the two sum to more than 1.
    """

    replaced_images: float
    replaced_tokens: float  # of the tokens of such an image
    swapped_images: float


EDA_RATES = {
    "paper": EDARates(replaced_images=1.0, replaced_tokens=0.25, swapped_images=0.25),
    "release": EDARates(replaced_images=0.25, replaced_tokens=0.25, swapped_images=0.25),
}


class TokenEDA(nn.Module):
    """SR, then RS, each on its share of the images.

    `codebook` (K, D) float; `rates` "paper" (a quarter of all tokens; RS on a quarter of the images) or "release"
    (SR on a quarter of the images, in which a quarter of the tokens; RS on another quarter).
    """

    def __init__(self, codebook: Tensor, rates: Literal["paper", "release"] = "release"):
        super().__init__()
        self.register_buffer("synonyms", synonyms(codebook))
        self.rates = EDA_RATES[rates]

    def forward(self, ids: Tensor, keys: Keys) -> Tensor:
        """Ids (B, H, W) int64, keys of the same B images -> ids (B, H, W) int64."""
        draw = keys.uniform("token_eda", 1).unsqueeze(2)
        replaced = replace_synonyms(ids, self.synonyms, keys, self.rates.replaced_tokens)
        ids = torch.where(draw < self.rates.replaced_images, replaced, ids)
        return torch.where(draw >= 1 - self.rates.swapped_images, swap_squares(ids, keys), ids)

    def extra_repr(self) -> str:
        return f"{self.rates}, synonyms={self.synonyms.shape[1]}, largest_square={LARGEST_SQUARE}"
