"""Random numbers that belong to an image, not to a process: counter-based, so nothing is saved for a resume.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) in int64 arithmetic, which
is the same on every device. The key is (seed, epoch), the counter (image index, stream name, block).
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four int64 tensors of 32-bit words (broadcastable) and two words of key -> four tensors of random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # A product of two 32-bit words wraps to the right 64 bits in int64; masks undo the sign.
        high, low = _product(MULTIPLIERS[0], c0), _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = low[0] ^ c1 ^ k0, low[1], high[0] ^ c3 ^ k1, high[1]
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    product = word * multiplier
    return (product >> 32) & WORD, product & WORD


@dataclass(frozen=True)
class Keys:
    """The identity of a batch's randomness: the run's seed, the epoch, and each image's index (B,) int64."""

    seed: int
    epoch: int
    indices: Tensor

    def uniform(self, stream: str, n: int) -> Tensor:
        """(B, n) float32 in [0, 1), on the device of `indices`; each stream name gives other numbers.

        The numbers of an image do not depend on the batch it is in.
        """
        indices = self.indices.unsqueeze(1)
        blocks = torch.arange(-(-n // 4), device=indices.device).unsqueeze(0)
        name = torch.full_like(blocks, zlib.crc32(stream.encode()))
        words = philox4x32((indices & WORD, indices >> 32, name, blocks), (self.seed & WORD, self.epoch & WORD))
        words = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :n]
        return (words >> 8).float() * 2.0**-24
