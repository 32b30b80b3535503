"""TokenAdapt (SeiT++): f takes token vectors to a space where pixel augmentations hold, g takes it back to tokens.

f: linear D -> C on every token, fixed positions, one transformer block, LayerNorm, transposed conv 2x2 -> D.
g: conv 2x2 D -> C, fixed positions, one block, LayerNorm, linear C -> K.

Initial values, all in `TokenAdapt.init_weights`; the published ones are not known:

| parameter                | law                  | reason                                      |
|--------------------------|----------------------|---------------------------------------------|
| linear and conv weights  | Xavier uniform       | a 2x2 conv is the linear map of its patch   |
| the last layer, C -> K   | 0                    | the first prediction is uniform: loss ln K  |
| biases                   | 0                    |                                             |
| LayerNorm                | weight 1, bias 0     |                                             |
| positions                | sin-cos, not trained | SeiT++ release                              |
"""

import inspect

import torch
from einops import rearrange
from torch import Tensor, nn

from seitpp.augment.geometry import Geometry, apply_geometry
from seitpp.tokenizers.transformer import Transformer, TransformerShape, sincos_positions

CELLS = 2  # cells of f's space along one side of a token (SeiT++ release: 32 -> 64)


class TokenAdapt(nn.Module):
    """f and g. The defaults are the published sizes (3.81 M trained).

    `grid` is (H, W) tokens of a whole image, `crop` (H', W') of an augmented one; `num_codes` K, `code_dim` D;
    `width` C, `heads` of 64 channels and `mlp` are those of the blocks.
    """

    def __init__(
        self,
        grid: tuple[int, int] = (32, 32),
        *,
        crop: tuple[int, int] = (28, 28),
        num_codes: int = 391,
        code_dim: int = 32,
        width: int = 384,
        heads: int = 6,
        mlp: int = 1536,
    ):
        super().__init__()
        given = locals()
        self.settings = {name: given[name] for name in inspect.signature(TokenAdapt).parameters}
        self.grid, self.crop = tuple(grid), tuple(crop)  # a file has lists
        shape = TransformerShape(width, 1, heads, mlp)
        self.embed = nn.Linear(code_dim, width)
        self.register_buffer("convert_positions", sincos_positions(grid, width).unsqueeze(0))
        self.convert_blocks = Transformer(shape)
        self.to_space = nn.ConvTranspose2d(width, code_dim, CELLS, CELLS)
        self.from_space = nn.Conv2d(code_dim, width, CELLS, CELLS)
        self.register_buffer("invert_positions", sincos_positions(crop, width).unsqueeze(0))
        self.invert_blocks = Transformer(shape)
        self.head = nn.Linear(width, num_codes)
        self.init_weights()

    def forward(self, maps: Tensor, geometry: Geometry) -> Tensor:
        """Vectors (B, D, H, W) of whole images, A -> logits (B, K, H', W') of the tokens of A(x): g(A(f(Z)))."""
        return self.invert(apply_geometry(self.convert(maps), geometry))

    def convert(self, maps: Tensor) -> Tensor:
        """f: vectors (B, D, H, W) -> (B, D, 2 H, 2 W), where pixel augmentations hold."""
        tokens = self.embed(maps.flatten(2).transpose(1, 2))
        tokens = self.convert_blocks(tokens + self.convert_positions)
        return self.to_space(rearrange(tokens, "b (h w) c -> b c h w", h=self.grid[0]))

    def invert(self, maps: Tensor) -> Tensor:
        """g: augmented (B, D, 2 H', 2 W') -> logits (B, K, H', W')."""
        tokens = self.from_space(maps).flatten(2).transpose(1, 2)
        logits = self.head(self.invert_blocks(tokens + self.invert_positions))
        return rearrange(logits, "b (h w) k -> b k h w", h=self.crop[0])

    @torch.no_grad()
    def init_weights(self) -> None:
        """See the table at the top of this file."""
        self.apply(_init_module)
        nn.init.zeros_(self.head.weight)


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
