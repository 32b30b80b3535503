"""Stem-Adapters: first layers that feed maps of code vectors to networks for pixels (SeiT, "Stem-Adapter").

| stem   | layer                                            | D x 28 x 28 becomes | for     |
|--------|--------------------------------------------------|---------------------|---------|
| linear | per position                                     | C x 28 x 28         | ViT     |
| conv2  | convolution, kernel 2, stride 2                  | C x 14 x 14         | ViT     |
| conv4  | convolution, kernel 4, stride 2, padding 1       | C x 14 x 14         | ViT     |
| deconv | transposed convolution, kernel 4, stride 2, padding 1 | 64 x 56 x 56   | ResNet  |

A ViT with the linear stem takes maps of 14 x 14. The output size of the transposed convolution is that of the
paper, the size after the stem of a ResNet for pixels; its kernel is not published.
"""

from typing import NamedTuple

from timm.layers import PatchEmbed
from torch import nn

from seitpp.errors import UserError


class ModelError(UserError):
    """Raised for a model file that cannot be used, and for invalid sizes or parts of a model."""


class Geometry(NamedTuple):
    """The kernel size, stride and padding of a convolution, in the order of its arguments."""

    kernel: int
    stride: int
    padding: int


STEMS = {"linear": Geometry(1, 1, 0), "conv2": Geometry(2, 2, 0), "conv4": Geometry(4, 2, 1)}
DECONV = Geometry(4, 2, 1)


def stem_geometry(stem: str) -> Geometry:
    """Return the geometry of a ViT's stem. Raises ModelError if `stem` is not linear, conv2 or conv4."""
    if stem not in STEMS:
        raise ModelError(f"got stem {stem!r} of a ViT: expected one of {', '.join(STEMS)}; deconv is for ResNets")
    return STEMS[stem]


class StemAdapter(PatchEmbed):
    """The stem of a ViT on maps, a timm `embed_layer`: map (B, D, H, W) float -> patches (B, L, C).

    L = (H // stride) * (W // stride); timm passes the stride as `patch_size`. Raises ModelError if `stem` is not
    linear, conv2 or conv4.
    """

    def __init__(self, *args, stem: str, in_chans: int, embed_dim: int, bias: bool, **kwargs):
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, bias=bias, **kwargs)
        self.stem = stem
        factory = {"device": self.proj.weight.device, "dtype": self.proj.weight.dtype}
        self.proj = nn.Conv2d(in_chans, embed_dim, *stem_geometry(stem), bias=bias, **factory)
