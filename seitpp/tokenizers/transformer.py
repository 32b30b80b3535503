"""The transformer of ViT-VQGAN: pre-norm blocks, attention heads of 64 channels, an MLP with tanh.

The modules are nested so that parameter names match public checkpoints (`layers.0.0.fn.to_qkv.weight`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

HEAD = 64  # channels of one attention head


class TransformerShape(NamedTuple):
    """The sizes of a transformer: width, number of blocks, number of heads (64 channels each), MLP width."""

    width: int
    depth: int
    heads: int
    mlp: int


class Attention(nn.Module):
    """Self-attention over (B, N, width); the projection to queries, keys and values has no bias."""

    def __init__(self, shape: TransformerShape):
        super().__init__()
        self.to_qkv = nn.Linear(shape.width, 3 * shape.heads * HEAD, bias=False)
        self.to_out = nn.Linear(shape.heads * HEAD, shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values = rearrange(self.to_qkv(tokens), "b n (t h c) -> t b h n c", t=3, c=HEAD)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.to_out(rearrange(mixed, "b h n c -> b n (h c)"))


class FeedForward(nn.Module):
    """The MLP of a block: linear, tanh, linear."""

    def __init__(self, shape: TransformerShape):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(shape.width, shape.mlp), nn.Tanh(), nn.Linear(shape.mlp, shape.width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class Residual(nn.Module):
    """A pre-norm residual branch: x + fn(LN(x))."""

    def __init__(self, width: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.fn(self.norm(tokens))


class Transformer(nn.Module):
    """A stack of blocks of attention and MLP, then one LayerNorm: (B, N, width) -> (B, N, width)."""

    def __init__(self, shape: TransformerShape):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(Residual(shape.width, fn(shape)) for fn in (Attention, FeedForward))
            for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        for attention, feed_forward in self.layers:
            tokens = feed_forward(attention(tokens))
        return self.norm(tokens)


def init_xavier(module: nn.Module) -> None:
    """Initialize one layer, for `Module.apply`: Xavier uniform weights, zero biases; LayerNorm weight 1, bias 0.

    A convolution is initialized as the linear map of its patch.
    """
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return fixed 2-D sin-cos position embeddings of a grid (H, W), row by row: (H W, width) float32.

    The first half of the channels encodes the column, the second half the row; each half holds sines, then
    cosines, with base 10000. `width` must be a multiple of 4.
    """
    bands = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64).outer(bands) for side in grid)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (rows, columns))
    by_column = repeat(columns, "w c -> (h w) c", h=grid[0])
    by_row = repeat(rows, "h c -> (h w) c", w=grid[1])
    return torch.cat([by_column, by_row], dim=1).float()
