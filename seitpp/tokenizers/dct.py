"""The cosine transform as a tokenizer: the lowest frequencies of each channel of a patch, as JPEG has them.

A patch of 8 x 8 pixels becomes its n lowest coefficients in zigzag order, of each channel, each with variance 1
over the images that the tokenizer was fitted to, and the constant channel of `PatchKMeans`; k-means gives the
codes. A mirrored patch has the same coefficients, every second one with the other sign. The papers' own setting is
not published. Source of the order: Wallace, "The JPEG still picture compression standard", 1991.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from seitpp.tokenizers.base import TokenizerError, TokenizerSpec
from seitpp.tokenizers.patch_kmeans import CHUNK, FLAT, PatchKMeans

KIND = "patch_dct"


class PatchDCT(PatchKMeans):
    """A `PatchKMeans` whose components are cosines: D - 1 of them, equally many of each channel."""

    kind = KIND

    def __init__(self, spec: TokenizerSpec):
        super().__init__(spec)
        self.register_buffer("scale", torch.ones(spec.code_dim - 1))
        if (spec.code_dim - 1) % spec.channels:
            raise TokenizerError(
                f"code_dim {spec.code_dim}: expected 1 more than a multiple of {spec.channels}, the number of "
                "channels"
            )

    def _fit_components(self, patches: Tensor) -> None:
        channels = self.spec.channels
        colors = patches.unflatten(1, (channels, -1)).mean(dim=(0, 2))
        self.mean.copy_(colors.repeat_interleave(len(self.mean) // channels))
        waves = cosines(self.spec.patch, (self.spec.code_dim - 1) // channels)
        # Interleaved: the lowest frequency of every channel comes first.
        rows = torch.zeros(len(waves), channels, channels, waves.shape[1])
        for channel in range(channels):
            rows[:, channel, channel] = waves
        self.components.copy_(rows.flatten(0, 1).flatten(1))
        chunks = ((chunk - self.mean).double() @ self.components.double().T for chunk in patches.split(CHUNK))
        scale = (sum(chunk.square().sum(dim=0) for chunk in chunks) / len(patches)).sqrt()
        self.scale.copy_(torch.where(scale > FLAT, scale, torch.ones(())))


def cosines(side: int, count: int) -> Float[Tensor, "{count} {side}*{side}"]:
    """Return the `count` lowest cosines of a square in zigzag order, orthonormal, each flattened row by row.

    Raises TokenizerError if a square has fewer.
    """
    if not 1 <= count <= side * side:
        raise TokenizerError(f"{count} frequencies of {side} x {side} pixels: expected 1 to {side * side}")
    place, frequency = torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64)
    basis = (math.pi * (2 * place + 1) * frequency[:, None] / (2 * side)).cos()
    basis *= torch.where(frequency == 0, 1 / math.sqrt(side), math.sqrt(2 / side))[:, None]
    pairs = [(down, across) for down in range(side) for across in range(side)]
    # Along each diagonal, up and down in turn.
    pairs.sort(key=lambda pair: (sum(pair), pair[0] if sum(pair) % 2 else pair[1]))
    return torch.stack(
        [torch.outer(basis[down], basis[across]).flatten() for down, across in pairs[:count]]
    ).float()
