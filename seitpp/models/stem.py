"""Stem-Adapters: how the map of an image enters a network made for pixels (SeiT, section "Stem-Adapter").

| stem   | layer                                            | D x 28 x 28 becomes | for     |
|--------|--------------------------------------------------|---------------------|---------|
| linear | per position                                     | C x 28 x 28         | ViT     |
| conv2  | convolution, kernel 2, stride 2                  | C x 14 x 14         | ViT     |
| conv4  | convolution, kernel 4, stride 2, padding 1       | C x 14 x 14         | ViT     |
| deconv | transposed convolution, kernel 4, stride 2, padding 1 | 64 x 56 x 56   | ResNet  |

A ViT with the linear stem is given maps of 14 x 14. The size that the transposed convolution reaches is the
paper's, that after a ResNet's own stem; its kernel is not published.
"""

from typing import NamedTuple

from timm.layers import PatchEmbed
from torch import nn

from seitpp.errors import UserError


class ModelError(UserError):
    """A model file that cannot be used, or a size or part that a model cannot have."""


class Geometry(NamedTuple):
    """The first arguments of a convolution after its channels."""

    kernel: int
    stride: int
    padding: int


STEMS = {"linear": Geometry(1, 1, 0), "conv2": Geometry(2, 2, 0), "conv4": Geometry(4, 2, 1)}
DECONV = Geometry(4, 2, 1)


def stem_geometry(stem: str) -> Geometry:
    """The convolution of a ViT's stem. Raises ModelError if there is no such stem."""
    if stem not in STEMS:
        raise ModelError(f"stem {stem!r} of a ViT: expected one of {', '.join(STEMS)} (deconv is that of ResNets)")
    return STEMS[stem]


class StemAdapter(PatchEmbed):
    """The stem of a ViT on maps, a timm `embed_layer`: (B, D, H, W) float -> patches (B, L, C).

    L = (H // stride) * (W // stride); `patch_size`, which timm gives, is the stride. Raises ModelError if `stem`
    is not linear, conv2 or conv4.
    """

    def __init__(self, *args, stem: str, in_chans: int, embed_dim: int, bias: bool, **kwargs):
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, bias=bias, **kwargs)
        self.stem = stem
        like = {"device": self.proj.weight.device, "dtype": self.proj.weight.dtype}
        self.proj = nn.Conv2d(in_chans, embed_dim, *stem_geometry(stem), bias=bias, **like)
