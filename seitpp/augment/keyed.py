"""Random numbers that depend on the image, not on the process; there is no state to save for a resume.

They come from the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011) in int64 arithmetic, which is the same on every device. The key is (seed, epoch), the counter
(image index, stream name, block).
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
CPU_WORDS = 1 << 18  # computed at once on a CPU: more would not fit its cache


def philox4x32(
    counter: tuple[Int64[Tensor, "..."], ...], key: tuple[int, int]
) -> tuple[Int64[Tensor, "..."], ...]:
    """Return four tensors of random 32-bit words for four broadcastable tensors of 32-bit counter words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # In int64 the product of two 32-bit words overflows to the correct 64 bits. Only the words that are
        # multiplied in the next round must be cut to 32 bits: all others are xored into them first.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & WORD, p1, ((p0 >> 32) ^ c3 ^ k1) & WORD, p0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


@dataclass(frozen=True)
class Keys:
    """What the random numbers of a batch depend on: the run's seed, the epoch, and the index of each image."""

    seed: int
    epoch: int
    indices: Int64[Tensor, " batch"]

    def of(self, positions: Int64[Tensor, " chosen"]) -> "Keys":
        """Return the keys of the images at these positions in the batch."""
        return Keys(self.seed, self.epoch, self.indices[positions])

    def uniform(self, stream: str, n: int) -> Float32[Tensor, "batch {n}"]:
        """Return n numbers per image, uniform in [0, 1), on the device of `indices`.

        They differ between stream names. The numbers of an image do not depend on the other images of the batch.
        """
        return torch.cat([(words >> 8).float() * 2.0**-24 for words in self._words(stream, n)])

    def normal(self, stream: str, n: int) -> Float32[Tensor, "batch {n}"]:
        """Return n numbers per image, normally distributed N(0, 1), otherwise as `uniform`.

        Two of them come from one word, 16 bits each, since computing the words takes most of the time; so their
        absolute values are at most 4.86.
        """
        return torch.cat([_box_muller(words)[:, :n] for words in self._words(stream, -(-n // 2))])

    def _words(self, stream: str, n: int) -> Iterator[Tensor]:
        """Random 32-bit words, (B, n) int64 in total; on a CPU in chunks of images."""
        blocks = torch.arange(-(-n // 4), device=self.indices.device).unsqueeze(0)
        name = torch.full_like(blocks, _number_of(stream))
        chunk = max(1, CPU_WORDS // n) if self.indices.device.type == "cpu" else len(self.indices)
        for indices in self.indices.unsqueeze(1).split(chunk):
            counter = (indices & WORD, indices >> 32, name, blocks)
            words = philox4x32(counter, (self.seed & WORD, self.epoch & WORD))
            yield torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :n]


@torch.compiler.assume_constant_result  # else a compiled view would have a graph break here
def _number_of(stream: str) -> int:
    return zlib.crc32(stream.encode())


def _box_muller(words: Tensor) -> Tensor:
    """(B, n) words -> (B, 2 n) normal numbers: the radius from the high half of a word, the angle from the low."""
    radius = ((words >> 16).float().add_(0.5).mul_(2.0**-16)).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFF).float() * (2 * math.pi / 2**16)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
