"""Statistics of how a codebook is used, and the restart of dead codes."""

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor
from torch.optim import Optimizer

from seitpp.tokenizers.base import check_ids

# Below this fraction of used codes the codebook has probably collapsed.
ENOUGH_USED = 0.5
# A code that is used less often than this fraction of the mean is dead and is restarted.
DEAD_BELOW = 0.02
MOMENTS = {"exp_avg", "exp_avg_sq"}  # state of Adam, one row per code


class Usage(NamedTuple):
    """How many of `num_codes` codes are `used`, and the `perplexity`, exp(entropy), of their frequencies."""

    used: int
    num_codes: int
    perplexity: float

    @property
    def share(self) -> float:
        """The fraction of the codes that is used, in [0, 1]."""
        return self.used / self.num_codes

    def __str__(self) -> str:
        return f"{self.used} of {self.num_codes} codes used ({self.share:.0%}), perplexity {self.perplexity:.1f}"


def code_counts(ids: Integer[Tensor, "*shape"], num_codes: int) -> Int64[Tensor, " codes"]:
    """Count how often each code occurs. Raises TokenizerError for ids outside [0, num_codes)."""
    return tally(check_ids(ids, num_codes, "code_counts"), num_codes)


def tally(ids: Int64[Tensor, "*shape"], num_codes: int) -> Int64[Tensor, " codes"]:
    """Count how often each code occurs, without a check of the ids that would make the host wait."""
    ids = ids.flatten()
    return torch.zeros(num_codes, dtype=torch.long, device=ids.device).index_add_(0, ids, torch.ones_like(ids))


def usage(counts: Integer[Tensor, " codes"]) -> Usage:
    """Compute the usage of a codebook from its counts. Warns if fewer than half of the codes are used."""
    counts = counts.cpu()  # not every device has float64
    frequencies = counts.double() / counts.sum().clamp(min=1)
    report = Usage(int((counts > 0).sum()), len(counts), torch.special.entr(frequencies).sum().exp().item())
    if report.share < ENOUGH_USED:
        warnings.warn(
            f"{report}: use more images or fewer codes, or drop the rest by compact()", UserWarning, stacklevel=2
        )
    return report


@torch.no_grad()
def restart_dead_codes(
    codebook: Float[Tensor, "codes dim"],
    counts: Integer[Tensor, " codes"],
    vectors: Float[Tensor, "vectors dim"],
    *,
    generator: torch.Generator,
    optimizer: Optimizer,
) -> int:
    """Replace each code with a count under 2 % of the mean by a random vector, in place; return their number.

    `counts` are those since the last restart; `generator` is on the CPU. The moments of these codes in
    `optimizer`, an Adam, are set to 0, since the old ones would move the codes away from their new positions.
    """
    counts = counts.cpu()  # not every device has float64; a restart is rare, so it may wait for the device
    dead = (counts < DEAD_BELOW * counts.double().mean()).nonzero().flatten().to(codebook.device)
    chosen = torch.randint(len(vectors), (len(dead),), generator=generator)
    codebook[dead] = vectors[chosen.to(vectors.device)].to(codebook.dtype)
    for name in MOMENTS & optimizer.state.get(codebook, {}).keys():  # empty before the first update
        optimizer.state[codebook][name][dead] = 0
    return len(dead)
