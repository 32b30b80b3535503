"""TokenAdapt (SeiT++): f maps token vectors to a space where pixel augmentations apply, g maps back to tokens.

f: linear D -> C per token, fixed positions, one transformer block, LayerNorm, transposed convolution 2 x 2 to D.
g: convolution 2 x 2 from D to C, fixed positions, one block, LayerNorm, linear C -> K. Where tokens have several
digits, K is the number of values of all: the logits of digit 0 come first, then those of digit 1, and so on.

Initial values, all in `TokenAdapt.init_weights`; the published ones are not known:

| parameter                | distribution         | reason                                      |
|--------------------------|----------------------|---------------------------------------------|
| linear and conv weights  | Xavier uniform       | a 2x2 conv is the linear map of its patch   |
| the last layer, C -> K   | 0                    | the first prediction is uniform: loss ln K  |
| biases                   | 0                    |                                             |
| LayerNorm                | weight 1, bias 0     |                                             |
| positions                | sin-cos, not trained | SeiT++ release                              |
"""

import inspect
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from seitpp.augment.geometry import Geometry, apply_geometry
from seitpp.models.masking import likeliest
from seitpp.models.vit import digit_sizes
from seitpp.tokenizers.transformer import Transformer, TransformerShape, init_xavier, sincos_positions

CELLS = 2  # cells of the space of f along one side of a token (SeiT++ release: 32 -> 64)


class TokenAdapt(nn.Module):
    """The networks f and g of TokenAdapt. The defaults are the published sizes (3.81 M trained parameters).

    `grid` is the size (H, W) of a whole image in tokens, `crop` (H', W') that of an augmented image. `num_codes`
    is K, or the number of values of each digit of a token, `code_dim` D. The blocks have `width` C, `heads` of 64
    channels, and an MLP of `mlp` channels.
    """

    def __init__(
        self,
        grid: tuple[int, int] = (32, 32),
        *,
        crop: tuple[int, int] = (28, 28),
        num_codes: int | Sequence[int] = 391,
        code_dim: int = 32,
        width: int = 384,
        heads: int = 6,
        mlp: int = 1536,
    ):
        super().__init__()
        arguments = locals()
        self.settings = {name: arguments[name] for name in inspect.signature(TokenAdapt).parameters}
        self.grid, self.crop = tuple(grid), tuple(crop)  # lists if read from a file
        self.sizes = digit_sizes(num_codes)
        shape = TransformerShape(width, 1, heads, mlp)
        self.embed = nn.Linear(code_dim, width)
        self.register_buffer("convert_positions", sincos_positions(grid, width).unsqueeze(0))
        self.convert_blocks = Transformer(shape)
        self.to_space = nn.ConvTranspose2d(width, code_dim, CELLS, CELLS)
        self.from_space = nn.Conv2d(code_dim, width, CELLS, CELLS)
        self.register_buffer("invert_positions", sincos_positions(crop, width).unsqueeze(0))
        self.invert_blocks = Transformer(shape)
        self.head = nn.Linear(width, sum(self.sizes))
        self.init_weights()

    def forward(
        self, maps: Float[Tensor, "batch dim height width"], geometry: Geometry
    ) -> Float[Tensor, "batch codes {self.crop[0]} {self.crop[1]}"]:
        """Predict the tokens of augmented images: logits g(A(f(Z))) from the vectors Z of the whole images.

        A is the augmentation `geometry`.
        """
        return self.invert(apply_geometry(self.convert(maps), geometry))

    def convert(
        self, maps: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim 2*height 2*width"]:
        """f: map the vectors of whole images to the space in which pixel augmentations apply."""
        tokens = self.embed(maps.flatten(2).transpose(1, 2))
        tokens = self.convert_blocks(tokens + self.convert_positions)
        return self.to_space(rearrange(tokens, "b (h w) c -> b c h w", h=self.grid[0]))

    def invert(
        self, maps: Float[Tensor, "batch dim {2*self.crop[0]} {2*self.crop[1]}"]
    ) -> Float[Tensor, "batch codes {self.crop[0]} {self.crop[1]}"]:
        """g: map the augmented space back to logits of tokens."""
        tokens = self.from_space(maps).flatten(2).transpose(1, 2)
        logits = self.head(self.invert_blocks(tokens + self.invert_positions))
        return rearrange(logits, "b (h w) k -> b k h w", h=self.crop[0])

    def likeliest(
        self, maps: Float[Tensor, "batch dim {2*self.crop[0]} {2*self.crop[1]}"]
    ) -> Int64[Tensor, "batch *digits {self.crop[0]} {self.crop[1]}"]:
        """Return the most likely tokens of maps in the augmented space."""
        return likeliest(self.invert(maps), self.sizes)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the initial values of the table at the top of this file."""
        self.apply(init_xavier)
        nn.init.zeros_(self.head.weight)
