"""ViT-VQGAN, the tokenizer of SeiT: a plain transformer either side of a cosine codebook.

Parameter names are those of the public enhancing-transformers checkpoints, so that these load as they are.

| size  | width | blocks | heads | parameters at 256 pixels, 8192 codes |
|-------|-------|--------|-------|--------------------------------------|
| small | 512   | 8      | 8     | 51.96 M                              |
| base  | 768   | 12     | 12    | 172.24 M                             |
"""

import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seitpp.tensors import is_checkpoint, load_state_dict, load_tensors, save_tensors
from seitpp.tokenizers.base import HEADER, Tokenizer, TokenizerError, TokenizerSpec
from seitpp.tokenizers.transformer import HEAD, Transformer, TransformerShape, sincos_positions

KIND = "vit_vqgan"
PREFIXES = ("encoder.", "decoder.", "quantizer.", "pre_quant.", "post_quant.")
BETA = 0.25  # weight of the commitment loss (checkpoint fact)
SIZES = {"small": TransformerShape(512, 8, 8, 2048), "base": TransformerShape(768, 12, 12, 3072)}
# Tensors that the configuration is read from; {} is the side, en or de.
POSITIONS = {"encoder": "encoder.en_pos_embedding", "decoder": "decoder.de_pos_embedding"}
PATCHES, CODEBOOK = "encoder.to_patch_embedding.0.weight", "quantizer.embedding.weight"
QKV, MLP = "{}.transformer.layers.0.0.fn.to_qkv.weight", "{}.transformer.layers.0.1.fn.net.0.weight"


class Reconstruction(NamedTuple):
    """What training sees: `images` (B, 3, height, width), not clamped; `loss` () of the codebook, commitment
    included; `ids` (B, H, W); `vectors` (B, D, H, W), the L2-normalized features (to restart dead codes on)."""

    images: Tensor
    loss: Tensor
    ids: Tensor
    vectors: Tensor


class Encoder(nn.Module):
    """Images (B, 3, height, width) -> (B, H W, width): patches, positions, transformer."""

    def __init__(self, shape: TransformerShape, grid: tuple[int, int], patch: int):
        super().__init__()
        self.to_patch_embedding = nn.Sequential(nn.Conv2d(3, shape.width, patch, patch))
        self.register_buffer("en_pos_embedding", sincos_positions(grid, shape.width).unsqueeze(0))
        self.transformer = Transformer(shape)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.to_patch_embedding(images).flatten(2).transpose(1, 2)
        return self.transformer(patches + self.en_pos_embedding)


class Decoder(nn.Module):
    """(B, H W, width) -> images (B, 3, height, width): positions, transformer, one patch of pixels a token."""

    def __init__(self, shape: TransformerShape, grid: tuple[int, int], patch: int):
        super().__init__()
        self.register_buffer("de_pos_embedding", sincos_positions(grid, shape.width).unsqueeze(0))
        self.transformer = Transformer(shape)
        # Public checkpoints call it to_pixel.1.
        self.to_pixel = nn.Sequential(nn.Identity(), nn.ConvTranspose2d(shape.width, 3, patch, patch))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.transformer(tokens + self.de_pos_embedding)
        return self.to_pixel(rearrange(tokens, "b (h w) c -> b c h w", h=grid[0]))


class Quantizer(nn.Module):
    """The codebook (K, D); only the direction of a row counts."""

    def __init__(self, num_codes: int, code_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, code_dim)


class ViTVQGAN(Tokenizer):
    """Built with random weights from a spec and the shapes of both transformers; see also `new` and
    `from_checkpoint`. Positions are fixed 2-D sin-cos, kept in the state dict.
    """

    def __init__(self, spec: TokenizerSpec, encoder: TransformerShape, decoder: TransformerShape):
        super().__init__(spec)
        self.encoder = Encoder(encoder, spec.grid, spec.patch)
        self.decoder = Decoder(decoder, spec.grid, spec.patch)
        self.quantizer = Quantizer(spec.num_codes, spec.code_dim)
        self.pre_quant = nn.Linear(encoder.width, spec.code_dim)
        self.post_quant = nn.Linear(spec.code_dim, decoder.width)
        self._trained: tuple[tuple[int, int], Tensor, Tensor] | None = None  # grid and positions, once changed
        self.apply(_initialize)

    @classmethod
    def new(
        cls, size: str, image_size: int = 256, patch: int = 8, num_codes: int = 8192, code_dim: int = 32
    ) -> "ViTVQGAN":
        """An untrained "small" or "base" one; the defaults are the published sizes."""
        spec = TokenizerSpec(KIND, (image_size, image_size), patch, num_codes, code_dim)
        return cls(spec, SIZES[size], SIZES[size])

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "ViTVQGAN":
        """Open a Lightning checkpoint, a bare state dict or a safetensors file, in eval mode, as fp32.

        The configuration is read from the shapes. Tensors of the training losses and of the optimizer are
        left out; every other one must fit. Nothing is unpickled. Raises TokenizerError naming the file.
        """
        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"no tokenizer file at {path}: expected a ViT-VQGAN checkpoint")
        if is_checkpoint(path):
            spec, tensors = None, load_state_dict(path, TokenizerError, _wanted)
        else:
            spec, tensors = load_tensors(path, HEADER, TokenizerError, wanted=_wanted)
        return cls._from_tensors(tensors, TokenizerSpec.from_json(spec) if spec else None, path)

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], spec: TokenizerSpec | None, path: Path) -> "ViTVQGAN":
        read_spec, encoder, decoder = _configuration(tensors, path)
        if spec is not None:  # that of our own file: only it knows a grid that is not square
            read_spec = replace(spec, num_codes=read_spec.num_codes, code_dim=read_spec.code_dim)
        with torch.device("meta"):
            tokenizer = cls(read_spec, encoder, decoder)
        _require_equal_shapes(tokenizer.state_dict(), tensors, path)
        # Copies, so that the tokenizer does not depend on the file staying as it is.
        copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
        tokenizer.load_state_dict(copies, assign=True)
        return tokenizer.requires_grad_().eval()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file that `from_checkpoint` and `tokenizers.load` open."""
        save_tensors(Path(path), self.state_dict(), key=HEADER, header=asdict(self.spec))

    @property
    def codebook(self) -> Tensor:
        """(K, D), as trained: not normalized."""
        return self.quantizer.embedding.weight

    def set_image_size(self, size: int | tuple[int, int]) -> None:
        """Tokenize images of another size from now on: positions are interpolated bicubically.

        Not what the checkpoint was trained for: look at reconstructions. For smaller images, positions cut out of
        the trained ones were worse (tests/bench/positions.py). Always from the positions that it came with, so
        sizes in between leave no trace, and its own size has its own positions again, bit for bit. Raises
        TokenizerError unless `size` is a multiple of the patch.
        """
        encoder, decoder = self.encoder.en_pos_embedding, self.decoder.de_pos_embedding
        trained = self._trained or (self.spec.grid, encoder, decoder)
        super().set_image_size(size)
        self._trained = trained
        self.encoder.en_pos_embedding = _interpolated(trained[1].to(encoder), trained[0], self.spec.grid)
        self.decoder.de_pos_embedding = _interpolated(trained[2].to(decoder), trained[0], self.spec.grid)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) in [0, 1] -> map (B, D, H, W), not normalized."""
        tokens = self.pre_quant(self.encoder(self.model_input(images)))
        return rearrange(tokens, "b (h w) d -> b d h w", h=self.spec.grid[0])

    def reconstruct(self, maps: Tensor) -> Tensor:
        """Map of L2-normalized rows (B, D, H, W) -> images (B, 3, height, width), not clamped."""
        tokens = self.post_quant(maps.flatten(2).transpose(1, 2))
        return self.decoder(tokens, self.spec.grid)

    def _pixels(self, ids: Tensor) -> Tensor:
        if tuple(ids.shape[1:]) != self.spec.grid:
            raise TokenizerError(
                f"ids of shape {tuple(ids.shape)} to decode, expected (B, {self.spec.grid[0]}, "
                f"{self.spec.grid[1]}): set_image_size() changes it"
            )
        return self.reconstruct(self._rows(ids))

    def _rows(self, ids: Tensor) -> Tensor:
        return F.normalize(self.codebook[ids], dim=-1).permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Reconstruction:
        """Training: images (B, 3, height, width) in [0, 1] -> reconstruction, losses and ids.

        Straight-through: the decoder's gradient reaches the encoder as if nothing were quantized. The loss
        moves rows to features and, with weight 0.25, features to rows, both L2-normalized.
        """
        vectors = F.normalize(self.features(images), dim=1)
        ids = self.quantize(vectors)
        rows = self._rows(ids)
        loss = F.mse_loss(rows, vectors.detach()) + BETA * F.mse_loss(vectors, rows.detach())
        through = vectors + (rows - vectors).detach()
        return Reconstruction(self.reconstruct(through), loss, ids, vectors.detach())

    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        self.quantizer.embedding = nn.Embedding.from_pretrained(rows, freeze=False)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))  # as the linear map of a patch that it is
        nn.init.zeros_(module.bias)
    # The codebook keeps nn.Embedding's normal law: its directions are uniform on the sphere.


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
    patch, side = tensors[PATCHES].shape[-1], math.isqrt(tensors[POSITIONS["encoder"]].shape[1])
    num_codes, code_dim = tensors[CODEBOOK].shape
    spec = TokenizerSpec(KIND, (side * patch, side * patch), patch, num_codes, code_dim)
    return spec, *(_shape(tensors, side) for side in POSITIONS)


def _shape(tensors: dict[str, Tensor], side: str) -> TransformerShape:
    blocks = [re.match(rf"{side}\.transformer\.layers\.(\d+)\.", name) for name in tensors]
    depth = 1 + max(int(match[1]) for match in blocks if match)
    heads = tensors[QKV.format(side)].shape[0] // (3 * HEAD)
    return TransformerShape(tensors[POSITIONS[side]].shape[2], depth, heads, tensors[MLP.format(side)].shape[0])


def _require_equal_shapes(expected: dict[str, Tensor], got: dict[str, Tensor], path: Path) -> None:
    problems = [
        *(f"{name} is missing" for name in expected if name not in got),
        *(f"{name} is unexpected" for name in got if name not in expected),
        *(
            f"{name} is {tuple(got[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in got and got[name].shape != tensor.shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise TokenizerError(f"{path} is no whole ViT-VQGAN: {'; '.join(problems[:5])}{more}")


def _interpolated(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    if old == new:
        return positions
    maps = rearrange(positions, "1 (h w) c -> 1 c h w", h=old[0])
    resized = F.interpolate(maps.float(), new, mode="bicubic").to(positions.dtype)
    return rearrange(resized, "1 c h w -> 1 (h w) c").contiguous()
