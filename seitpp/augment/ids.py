"""Token-EDA (SeiT): the "easy data augmentation" of text, applied to grids of ids in whole batches."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from seitpp.augment.keyed import Keys
from seitpp.books import Books
from seitpp.codebook import Codebook, synonyms

LARGEST_SQUARE = 0.25  # side of a swapped square, as a fraction of the grid's shorter side

Pair = tuple[Tensor, Tensor]


def replace_synonyms(
    ids: Int64[Tensor, "batch height width"], table: Int64[Tensor, "codes synonyms"], keys: Keys, *, rate: float
) -> Int64[Tensor, "batch height width"]:
    """Replace each token with probability `rate` by one of its synonyms, all equally likely (SeiT, SR).

    `table` holds the synonyms of each code, from `codebook.synonyms`; without any nothing is replaced.
    """
    if not table.shape[1]:
        return ids
    draws = keys.uniform("replace_synonyms", ids[0].numel()).view(ids.shape)
    # A draw below the rate is uniform in [0, rate), so it also selects the synonym.
    chosen = (draws * (table.shape[1] / (rate or 1.0))).long().clamp(max=table.shape[1] - 1)
    return torch.where(draws < rate, table[ids, chosen], ids)


def swap_squares(
    ids: Int64[Tensor, "batch *digits height width"], keys: Keys
) -> Int64[Tensor, "batch *digits height width"]:
    """Swap two squares of the same size in each grid that do not overlap (SeiT, RS).

    The side is int(shorter side of the grid * U(0, 0.25)); 0 changes nothing. All pairs of positions at which the
    two squares do not overlap are equally likely.
    """
    height, width = ids.shape[-2:]
    draws = keys.uniform("swap_squares", 6)
    side = (draws[:, 0] * (LARGEST_SQUARE * min(height, width))).long()
    tops, lefts = _disjoint_positions((height, width), side.clamp(min=1), draws[:, 1:])
    first, second = (_square(*corner, side, (height, width)) for corner in zip(tops, lefts, strict=True))
    distance = ((tops[1] - tops[0]) * width + lefts[1] - lefts[0]).unsqueeze(1)
    source = torch.arange(height * width, device=ids.device) + distance * (first.long() - second.long())
    flat = ids.flatten(-2)
    source = source.view(len(ids), *[1] * (flat.ndim - 2), -1).expand_as(flat)
    return flat.gather(-1, source).view(ids.shape)


def _square(top: Tensor, left: Tensor, side: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H * W) bool: whether a token is in the square."""
    rows, columns = (
        (torch.arange(length, device=side.device) - start.unsqueeze(1))
        for start, length in zip((top, left), grid, strict=True)
    )
    rows, columns = ((line >= 0) & (line < side.unsqueeze(1)) for line in (rows, columns))
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).flatten(1)


def _disjoint_positions(grid: tuple[int, int], side: Tensor, draws: Tensor) -> tuple[Pair, Pair]:
    """Tops and lefts (B,) of two squares that do not overlap: exactly uniform, without rejection sampling.

    `side` (B,) >= 1, `draws` (B, 5) in [0, 1). Either the rows do not overlap and the columns are arbitrary, or
    the rows overlap and the columns do not; the first draw selects one of the two in proportion to their numbers
    of pairs.
    """
    rows, columns = (length - side + 1 for length in grid)
    rows_apart, columns_apart = ((n - side) * (n - side + 1) for n in (rows, columns))
    one, other = rows_apart * columns**2, (rows**2 - rows_apart) * columns_apart
    by_rows = draws[:, 0] * (one + other) < one
    u, v, w, x = draws[:, 1:].unbind(dim=1)
    tops = _choose(by_rows, _apart(rows, side, u, v), _close(rows, side, u))
    lefts = _choose(by_rows, (_below(columns, w), _below(columns, x)), _apart(columns, side, w, x))
    return tops, lefts


def _choose(condition: Tensor, one: Pair, other: Pair) -> Pair:
    return torch.where(condition, one[0], other[0]), torch.where(condition, one[1], other[1])


def _below(n: Tensor, draw: Tensor) -> Tensor:
    return (draw * n).long()


def _apart(n: Tensor, side: Tensor, u: Tensor, v: Tensor) -> Pair:
    """A uniform ordered pair of positions below `n` that differ by at least `side`.

    It is a pair of different positions below n - side + 1, whose larger one is increased by side - 1.
    """
    one, other = _below(n - side + 1, u), _below(n - side, v)
    other = other + (other >= one)
    return one + (side - 1) * (one > other), other + (side - 1) * (other > one)


def _close(n: Tensor, side: Tensor, u: Tensor) -> Pair:
    """A uniform ordered pair of positions below `n` that differ by less than `side`.

    In the n x n table of all pairs these are the diagonals -side + 1 .. side - 1. Diagonal d > 0 has n - d pairs
    and diagonal d - side has n - side + d: joined, they are side - 1 lines of equal length. The pairs are numbered
    along the main diagonal first, then along these lines.
    """
    line = 2 * n - side
    pair = _below(n + (side - 1) * line, u)
    distance, at = (pair - n) // line + 1, (pair - n) % line
    below = at - (n - distance)
    joined = _choose(below < 0, (at, at + distance), (below + side - distance, below))
    return _choose(pair < n, (pair, pair), joined)


@dataclass(frozen=True)
class EDARates:
    """The fractions of the images, and of their tokens, that Token-EDA changes.

    One uniform draw per image decides: SR is applied below `replaced_images` and RS from 1 - `swapped_images`, so
    an image gets both only if the two sum to more than 1.
    """

    replaced_images: float
    replaced_tokens: float  # of the tokens of such an image
    swapped_images: float


EDA_RATES = {
    "paper": EDARates(replaced_images=1.0, replaced_tokens=0.25, swapped_images=0.25),
    "release": EDARates(replaced_images=0.25, replaced_tokens=0.25, swapped_images=0.25),
}


class TokenEDA(nn.Module):
    """Token-EDA: synonym replacement (SR), then swapped squares (RS), each on a fraction of the images.

    `rates`: "paper" (SR replaces a quarter of the tokens of all images; RS on a quarter of the images) or
    "release" (SR replaces a quarter of the tokens of a quarter of the images; RS on another quarter of the
    images). The synonyms of a code of one table are its nearest codes; of a token that is rows of several tables,
    each digit gets one of the rows nearest to its own.
    """

    def __init__(
        self,
        codebook: Codebook | Books | Float[Tensor, "codes dim"],
        rates: Literal["paper", "release"] = "release",
    ):
        super().__init__()
        self.codebook = Codebook.of(codebook)
        for number, table in enumerate(self.codebook.tables):
            self.register_buffer(f"synonyms_{number}", synonyms(table))
        self.rates = EDA_RATES[rates]

    def forward(
        self, ids: Int64[Tensor, "batch *digits height width"], keys: Keys
    ) -> Int64[Tensor, "batch *digits height width"]:
        """Return the augmented ids; `keys` are those of the same images."""
        draw = keys.uniform("token_eda", 1).view(-1, *[1] * (ids.ndim - 1))
        ids = torch.where(draw < self.rates.replaced_images, self._replaced(ids, keys), ids)
        return torch.where(draw >= 1 - self.rates.swapped_images, swap_squares(ids, keys), ids)

    def _replaced(self, ids: Tensor, keys: Keys) -> Tensor:
        rate, codebook = self.rates.replaced_tokens, self.codebook
        tables = [getattr(self, f"synonyms_{number}") for number in range(len(codebook.tables))]
        if codebook.combine == "index":
            return codebook.split(replace_synonyms(codebook.joined(ids), tables[0], keys, rate=rate))
        planes = zip(ids.unbind(dim=1), tables, strict=True)
        return torch.stack([replace_synonyms(plane, table, keys, rate=rate) for plane, table in planes], dim=1)

    def extra_repr(self) -> str:
        return f"{self.rates}, synonyms={self.synonyms_0.shape[1]}, largest_square={LARGEST_SQUARE}"
