"""Random numbers that belong to an image, not to a process: counter-based, so nothing is saved for a resume.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) in int64 arithmetic, which
is the same on every device. The key is (seed, epoch), the counter (image index, stream name, block).
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
CPU_WORDS = 1 << 18  # made at once on a CPU: more would leave its cache


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four int64 tensors of 32-bit words (broadcastable) and two words of key -> four tensors of random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # A product of two 32-bit words wraps to the right 64 bits in int64. Only what is multiplied next has to
        # be cut to 32 bits: everything else is xored into it first.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & WORD, p1, ((p0 >> 32) ^ c3 ^ k1) & WORD, p0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


@dataclass(frozen=True)
class Keys:
    """The identity of a batch's randomness: the run's seed, the epoch, and each image's index (B,) int64."""

    seed: int
    epoch: int
    indices: Tensor

    def of(self, places: Tensor) -> "Keys":
        """The keys of the images at `places` (b,) int64 of the batch."""
        return Keys(self.seed, self.epoch, self.indices[places])

    def uniform(self, stream: str, n: int) -> Tensor:
        """(B, n) float32 in [0, 1), on the device of `indices`; each stream name gives other numbers.

        The numbers of an image do not depend on the batch it is in.
        """
        return torch.cat([(words >> 8).float() * 2.0**-24 for words in self._words(stream, n)])

    def normal(self, stream: str, n: int) -> Tensor:
        """(B, n) float32 of the normal distribution N(0, 1), otherwise as `uniform`.

        A word gives two of them, from 16 bits each, since the words are what costs time; none is beyond 4.86.
        """
        return torch.cat([_box_muller(words)[:, :n] for words in self._words(stream, -(-n // 2))])

    def _words(self, stream: str, n: int) -> Iterator[Tensor]:
        """Random 32-bit words, (B, n) int64 in all: on a CPU for some of the images at a time."""
        blocks = torch.arange(-(-n // 4), device=self.indices.device).unsqueeze(0)
        name = torch.full_like(blocks, _number_of(stream))
        at_once = max(1, CPU_WORDS // n) if self.indices.device.type == "cpu" else len(self.indices)
        for indices in self.indices.unsqueeze(1).split(at_once):
            counter = (indices & WORD, indices >> 32, name, blocks)
            words = philox4x32(counter, (self.seed & WORD, self.epoch & WORD))
            yield torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :n]


@torch.compiler.assume_constant_result  # else a compiled view would break off here
def _number_of(stream: str) -> int:
    return zlib.crc32(stream.encode())


def _box_muller(words: Tensor) -> Tensor:
    """(B, n) words -> (B, 2 n) normal numbers: the high half of a word gives a radius, the low half an angle."""
    radius = ((words >> 16).float().add_(0.5).mul_(2.0**-16)).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFF).float() * (2 * math.pi / 2**16)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
