"""How well a codebook is used, and what to do about codes that nobody uses."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from seitpp.tokenizers.base import check_ids

# Below this share of used codes a tokenizer is likely to have collapsed.
ENOUGH_USED = 0.5
# A code that is used less often than this part of the mean is dead, and is put elsewhere.
DEAD_BELOW = 0.02
MOMENTS = {"exp_avg", "exp_avg_sq"}  # of Adam, a row for each code


class Usage(NamedTuple):
    """Of `num_codes` codes `used` were seen; `perplexity` = how many equally frequent codes are as diverse."""

    used: int
    num_codes: int
    perplexity: float

    @property
    def share(self) -> float:
        """The part of the codes that was seen, in [0, 1]."""
        return self.used / self.num_codes

    def __str__(self) -> str:
        return f"{self.used} of {self.num_codes} codes used ({self.share:.0%}), perplexity {self.perplexity:.1f}"


def code_counts(ids: Tensor, num_codes: int) -> Tensor:
    """How often each code is seen in ids of any shape: (K,) int64. Raises TokenizerError for ids beyond K."""
    return tally(check_ids(ids, num_codes, "code_counts"), num_codes)


def tally(ids: Tensor, num_codes: int) -> Tensor:
    """The counts (K,) int64 of ids (int64, any shape) in [0, K), not checked: the host waits for nothing."""
    ids = ids.flatten()
    return torch.zeros(num_codes, dtype=torch.long, device=ids.device).index_add_(0, ids, torch.ones_like(ids))


def usage(counts: Tensor) -> Usage:
    """The usage that counts (K,) show. Warns where under half of the codes are used."""
    counts = counts.cpu()  # in float64, which not every device has
    shares = counts.double() / counts.sum().clamp(min=1)
    report = Usage(int((counts > 0).sum()), len(counts), torch.special.entr(shares).sum().exp().item())
    if report.share < ENOUGH_USED:
        warnings.warn(
            f"{report}: more images, fewer codes, or compact() to keep the used ones", UserWarning, stacklevel=2
        )
    return report


@torch.no_grad()
def restart_dead_codes(
    codebook: Tensor, counts: Tensor, vectors: Tensor, generator: torch.Generator, optimizer: Optimizer
) -> int:
    """Move codes with a count under 2 % of the mean onto random `vectors` (N, D), in place; how many they were.

    `codebook` (K, D) and `counts` (K,) since the last restart; `generator` is a CPU one. The moments of these
    codes in `optimizer`, an Adam, become 0: those of the old places would move the codes away from the new ones.
    """
    counts = counts.cpu()  # a restart is rare: it may wait for the device, which may have no float64
    dead = (counts < DEAD_BELOW * counts.double().mean()).nonzero().flatten().to(codebook.device)
    chosen = torch.randint(len(vectors), (len(dead),), generator=generator)
    codebook[dead] = vectors[chosen.to(vectors.device)].to(codebook.dtype)
    for name in MOMENTS & optimizer.state.get(codebook, {}).keys():  # there are none before the first update
        optimizer.state[codebook][name][dead] = 0
    return len(dead)
