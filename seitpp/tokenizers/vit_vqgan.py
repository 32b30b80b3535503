"""ViT-VQGAN, the tokenizer of SeiT: a transformer encoder, a codebook with cosine lookup, a transformer decoder.

Parameter names match the public enhancing-transformers checkpoints, so these load without conversion.

| size  | width | blocks | heads | parameters at 256 pixels, 8192 codes |
|-------|-------|--------|-------|--------------------------------------|
| small | 512   | 8      | 8     | 51.96 M                              |
| base  | 768   | 12     | 12    | 172.24 M                             |
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seitpp.errors import refusing
from seitpp.tensors import built_for, is_checkpoint, load_state_dict, load_tensors
from seitpp.tokenizers.base import (
    HEADER,
    ImageSize,
    Tokenizer,
    TokenizerError,
    TokenizerSpec,
    fp32_copies,
    require_equal_shapes,
)
from seitpp.tokenizers.transformer import HEAD, Transformer, TransformerShape, init_xavier, sincos_positions

KIND = "vit_vqgan"
PREFIXES = ("encoder.", "decoder.", "quantizer.", "pre_quant.", "post_quant.")
BETA = 0.25  # weight of the commitment loss, as in the public checkpoints
SIZES = {"small": TransformerShape(512, 8, 8, 2048), "base": TransformerShape(768, 12, 12, 3072)}
# Names of the tensors whose shapes give the configuration; {} is encoder or decoder.
POSITIONS = {"encoder": "encoder.en_pos_embedding", "decoder": "decoder.de_pos_embedding"}
PATCHES, CODEBOOK = "encoder.to_patch_embedding.0.weight", "quantizer.embedding.weight"
QKV, MLP = "{}.transformer.layers.0.0.fn.to_qkv.weight", "{}.transformer.layers.0.1.fn.net.0.weight"


class Reconstruction(NamedTuple):
    """The output of `ViTVQGAN.forward`, for training.

    `images` (B, C, height, width) are not clamped; `loss` () is the codebook loss and the weighted commitment
    loss; `ids` are (B, H, W); `vectors` (B, D, H, W) are the L2-normalized features, to restart dead codes.
    """

    images: Tensor
    loss: Tensor
    ids: Tensor
    vectors: Tensor


class Encoder(nn.Module):
    """Patch embedding, position embeddings, transformer: images (B, C, height, width) -> (B, H W, width)."""

    def __init__(self, shape: TransformerShape, spec: TokenizerSpec):
        super().__init__()
        self.to_patch_embedding = nn.Sequential(nn.Conv2d(spec.channels, shape.width, spec.patch, spec.patch))
        self.register_buffer("en_pos_embedding", sincos_positions(spec.grid, shape.width).unsqueeze(0))
        self.transformer = Transformer(shape)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.to_patch_embedding(images).flatten(2).transpose(1, 2)
        return self.transformer(patches + self.en_pos_embedding)


class Decoder(nn.Module):
    """Position embeddings, transformer, one patch per token: (B, H W, width) -> images (B, C, height, width)."""

    def __init__(self, shape: TransformerShape, spec: TokenizerSpec):
        super().__init__()
        self.register_buffer("de_pos_embedding", sincos_positions(spec.grid, shape.width).unsqueeze(0))
        self.transformer = Transformer(shape)
        # The Identity gives the layer its name in public checkpoints, to_pixel.1.
        to_pixel = nn.ConvTranspose2d(shape.width, spec.channels, spec.patch, spec.patch)
        self.to_pixel = nn.Sequential(nn.Identity(), to_pixel)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.transformer(tokens + self.de_pos_embedding)
        return self.to_pixel(rearrange(tokens, "b (h w) c -> b c h w", h=grid[0]))


class Quantizer(nn.Module):
    """The codebook (K, D), of whose rows only the direction matters."""

    def __init__(self, num_codes: int, code_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, code_dim)


class ViTVQGAN(Tokenizer):
    """The ViT-VQGAN tokenizer with random weights; see also `new` and `from_checkpoint`.

    The position embeddings are fixed 2-D sin-cos and part of the state dict.
    """

    def __init__(self, spec: TokenizerSpec, encoder: TransformerShape, decoder: TransformerShape):
        super().__init__(spec)
        self.encoder = Encoder(encoder, spec)
        self.decoder = Decoder(decoder, spec)
        self.quantizer = Quantizer(spec.num_codes, spec.code_dim)
        self.pre_quant = nn.Linear(encoder.width, spec.code_dim)
        self.post_quant = nn.Linear(spec.code_dim, decoder.width)
        # Grid and position embeddings before the first change of the image size.
        self._trained: tuple[tuple[int, int], Tensor, Tensor] | None = None
        self.apply(init_xavier)  # not the codebook: the directions of its normal rows are uniform on the sphere

    @classmethod
    def new(
        cls,
        size: str,
        *,
        image_size: ImageSize = 256,
        patch: int = 8,
        num_codes: int = 8192,
        code_dim: int = 32,
        channels: int = 3,
    ) -> "ViTVQGAN":
        """Create an untrained "small" or "base" tokenizer; the defaults are the published ones."""
        spec = TokenizerSpec.unscaled(
            KIND, image_size, patch, num_codes=num_codes, code_dim=code_dim, channels=channels
        )
        return cls(spec, SIZES[size], SIZES[size])

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "ViTVQGAN":
        """Load a Lightning checkpoint, a plain state dict or a safetensors file, in eval mode and fp32.

        The configuration is read from the tensor shapes. Tensors outside the tokenizer (losses, optimizer) are
        ignored; all others must match. No code in the file is run. Raises TokenizerError naming the file if it is
        missing, damaged or does not match.
        """
        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"no tokenizer file at {path}: expected a ViT-VQGAN checkpoint")
        if is_checkpoint(path):
            spec, tensors = None, load_state_dict(path, TokenizerError, _wanted)
        else:
            spec, tensors = load_tensors(path, HEADER, TokenizerError, wanted=_wanted)
        return cls.from_tensors(tensors, spec, path)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], header: Mapping | None, path: Path) -> "ViTVQGAN":
        """Build the tokenizer from the tensors and the header of a file; tensors outside it are ignored.

        Raises TokenizerError naming `path` if tensors of the tokenizer are missing or do not match.
        """
        tensors = {name: tensor for name, tensor in tensors.items() if _wanted(name)}
        spec = TokenizerSpec.from_json(header) if header else None
        read_spec, encoder, decoder = _configuration(tensors, path)
        if spec is not None:  # from the header that `save` writes: shapes do not tell a grid that is not square
            read_spec = replace(spec, num_codes=read_spec.num_codes, code_dim=read_spec.code_dim)
        complaint = f"{path} is not a complete ViT-VQGAN"
        fitting = refusing(TokenizerError, complaint, "sizes that go together")
        with fitting, torch.device("meta"), built_for(len(tensors)):
            tokenizer = cls(read_spec, encoder, decoder)
        require_equal_shapes(tokenizer.state_dict(), tensors, complaint)
        tokenizer.load_state_dict(fp32_copies(tensors), assign=True)
        return tokenizer.requires_grad_().eval()

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D) as trained, not normalized."""
        return self.quantizer.embedding.weight

    def set_image_size(self, size: ImageSize) -> None:
        """Set the size of the images to tokenize; position embeddings are interpolated bicubically.

        The checkpoint was not trained for other sizes: look at reconstructions. For smaller images, cropping the
        position embeddings instead was worse (tests/bench/positions.py). Interpolation always starts from the
        original embeddings, so intermediate sizes do not matter, and the original size restores them bit for bit.
        Raises TokenizerError unless `size` is a multiple of the patch.
        """
        encoder, decoder = self.encoder.en_pos_embedding, self.decoder.de_pos_embedding
        trained = self._trained or (self.spec.grid, encoder, decoder)
        super().set_image_size(size)
        self._trained = trained
        self.encoder.en_pos_embedding = _interpolated(trained[1].to(encoder), trained[0], self.spec.grid)
        self.decoder.de_pos_embedding = _interpolated(trained[2].to(decoder), trained[0], self.spec.grid)

    def features(self, images: Tensor) -> Tensor:
        """Compute the feature map (B, D, H, W), not normalized, of images (B, C, height, width) in [0, 1]."""
        tokens = self.pre_quant(self.encoder(self._model_input(images)))
        return rearrange(tokens, "b (h w) d -> b d h w", h=self.spec.grid[0])

    def reconstruct(self, maps: Tensor) -> Tensor:
        """Decode a map of L2-normalized rows (B, D, H, W) to images (B, C, height, width), not clamped."""
        tokens = self.post_quant(maps.flatten(2).transpose(1, 2))
        return self.decoder(tokens, self.spec.grid)

    def _pixels(self, ids: Tensor) -> Tensor:
        if tuple(ids.shape[1:]) != self.spec.grid:
            raise TokenizerError(
                f"vit_vqgan tokenizer: got ids of shape {tuple(ids.shape)}, expected (B, {self.spec.grid[0]}, "
                f"{self.spec.grid[1]}): set_image_size() changes the grid"
            )
        return self.reconstruct(self._rows(ids))

    def _rows(self, ids: Tensor) -> Tensor:
        return F.normalize(self.codebook[ids], dim=-1).permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Reconstruction:
        """Compute the reconstruction, loss and ids of images (B, C, height, width) in [0, 1] for training.

        With the straight-through estimator, the decoder's gradient reaches the encoder as if nothing were
        quantized. The loss moves rows to features and, with weight 0.25, features to rows, both L2-normalized.
        """
        vectors = F.normalize(self.features(images), dim=1)
        ids = self.quantize(vectors)
        rows = self._rows(ids)
        loss = F.mse_loss(rows, vectors.detach()) + BETA * F.mse_loss(vectors, rows.detach())
        through = vectors + (rows - vectors).detach()
        return Reconstruction(self.reconstruct(through), loss, ids, vectors.detach())

    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        self.quantizer.embedding = nn.Embedding.from_pretrained(rows, freeze=False)


def _wanted(name: str) -> bool:
    return name.startswith(PREFIXES)


def _configuration(
    tensors: dict[str, Tensor], path: Path
) -> tuple[TokenizerSpec, TransformerShape, TransformerShape]:
    sides = [template.format(side) for template in (QKV, MLP) for side in POSITIONS]
    dims = {**dict.fromkeys(sides, 2), **dict.fromkeys(POSITIONS.values(), 3), PATCHES: 4, CODEBOOK: 2}
    wrong = [name for name, ndim in dims.items() if name not in tensors or tensors[name].ndim != ndim]
    if wrong:
        raise TokenizerError(f"{path} holds no ViT-VQGAN: missing or of another rank: {', '.join(wrong)}")
    channels, patch = tensors[PATCHES].shape[1], tensors[PATCHES].shape[-1]
    side = math.isqrt(tensors[POSITIONS["encoder"]].shape[1])
    num_codes, code_dim = tensors[CODEBOOK].shape
    spec = TokenizerSpec.unscaled(
        KIND, side * patch, patch, num_codes=num_codes, code_dim=code_dim, channels=channels
    )
    return spec, *(_shape(tensors, side) for side in POSITIONS)


def _shape(tensors: dict[str, Tensor], side: str) -> TransformerShape:
    blocks = [re.match(rf"{side}\.transformer\.layers\.(\d+)\.", name) for name in tensors]
    depth = 1 + max(int(match[1]) for match in blocks if match)
    heads = tensors[QKV.format(side)].shape[0] // (3 * HEAD)
    return TransformerShape(tensors[POSITIONS[side]].shape[2], depth, heads, tensors[MLP.format(side)].shape[0])


def _interpolated(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    if old == new:
        return positions
    maps = rearrange(positions, "1 (h w) c -> 1 c h w", h=old[0])
    resized = F.interpolate(maps.float(), new, mode="bicubic").to(positions.dtype)
    return rearrange(resized, "1 c h w -> 1 (h w) c").contiguous()
