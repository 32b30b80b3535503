"""The VQGANs of taming-transformers, MAGE and LlamaGen, whose code is on no package index.

All three are convolutional encoders and decoders of residual blocks, swish and GroupNorm. They differ in details,
and every detail shows in the names and shapes of the tensors, from which the network is built:

| | taming | LlamaGen | MAGE |
|---|---|---|---|
| levels of the encoder | `down.I.block.J` | `conv_blocks.I.res.J` | `down.I.block.J` |
| biases in residual blocks | yes | yes | no |
| shortcut where the width changes | of the input | of the input | of the block's own output |
| attention | on some levels, and in the middle | lowest level, and in the middle | none |
| halving | convolution of stride 2 | convolution of stride 2 | mean of 2 x 2 |
| 1 x 1 convolutions around the codebook | yes | yes | no |
| lookup | euclidean | cosine | euclidean |
| range of the images | [-1, 1] | [-1, 1] | [0, 1] |

The modules have the names of taming-transformers; those of LlamaGen are translated.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seitpp.errors import reason
from seitpp.tokenizers.adapters import HALF, Adapter, MapAdapter
from seitpp.tokenizers.base import TokenizerError, TokenizerSpec, fp32_copies, require_equal_shapes

TAMING, MAGE, LLAMAGEN = KINDS = ("taming", "mage", "llamagen")
CODEBOOK = "quantize.embedding.weight"
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
GROUPS, EPS = 32, 1e-6
LLAMAGEN_LEVEL = re.compile(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(?:res\.|(attn\.|downsample\.|upsample\.))")
LLAMAGEN_MIDDLE = {".mid.0.": ".mid.block_1.", ".mid.1.": ".mid.attn_1.", ".mid.2.": ".mid.block_2."}

Shapes = Mapping[str, torch.Size]


class Convolution(nn.Conv2d):
    """The convolution whose weight is `name` in `shapes`, padded so that a stride of 1 keeps the size."""

    def __init__(self, shapes: Shapes, name: str, stride: int = 1):
        outputs, inputs, kernel, _ = shapes[f"{name}.weight"]
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, bias=f"{name}.bias" in shapes)


def normalization(shapes: Shapes, name: str) -> nn.GroupNorm:
    """Return the GroupNorm whose weight is `name` in `shapes`."""
    return nn.GroupNorm(GROUPS, shapes[f"{name}.weight"][0], EPS)


class Residual(nn.Module):
    """Twice GroupNorm, swish and convolution, with a residual connection: `nin_shortcut` if the width changes."""

    def __init__(self, shapes: Shapes, name: str):
        super().__init__()
        self.norm1, self.conv1 = normalization(shapes, f"{name}.norm1"), Convolution(shapes, f"{name}.conv1")
        self.norm2, self.conv2 = normalization(shapes, f"{name}.norm2"), Convolution(shapes, f"{name}.conv2")
        changes = self.conv1.in_channels != self.conv1.out_channels
        self.nin_shortcut = Convolution(shapes, f"{name}.nin_shortcut") if changes else None

    def forward(self, maps: Tensor) -> Tensor:
        changed = self.conv1(F.silu(self.norm1(maps)))
        changed = self.conv2(F.silu(self.norm2(changed)))
        if self.nin_shortcut is None:
            return maps + changed
        of_input = self.nin_shortcut.in_channels == maps.shape[1]  # else MAGE's, of the output
        return self.nin_shortcut(maps if of_input else changed) + changed


class Attention(nn.Module):
    """Self-attention of one head over all positions, with a residual connection."""

    def __init__(self, shapes: Shapes, name: str):
        super().__init__()
        self.norm = normalization(shapes, f"{name}.norm")
        self.q, self.k, self.v = (Convolution(shapes, f"{name}.{part}") for part in "qkv")
        self.proj_out = Convolution(shapes, f"{name}.proj_out")

    def forward(self, maps: Tensor) -> Tensor:
        normed = self.norm(maps)
        queries, keys, values = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return maps + self.proj_out(mixed.transpose(1, 2).unflatten(2, maps.shape[2:]))


class Halve(nn.Module):
    """A convolution of stride 2, padded on the right and below, or the mean of 2 x 2 where there is none."""

    def __init__(self, shapes: Shapes, name: str):
        super().__init__()
        self.conv = Convolution(shapes, f"{name}.conv", stride=2) if f"{name}.conv.weight" in shapes else None

    def forward(self, maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, 2) if self.conv is None else self.conv(F.pad(maps, (0, 1, 0, 1)))


class Double(nn.Module):
    """Each pixel four times, then a convolution."""

    def __init__(self, shapes: Shapes, name: str):
        super().__init__()
        self.conv = Convolution(shapes, f"{name}.conv")

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv(F.interpolate(maps, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if the level has any."""

    def __init__(self, shapes: Shapes, name: str):
        super().__init__()
        self.block = nn.ModuleList(Residual(shapes, part) for part in parts(shapes, f"{name}.block"))
        self.attn = nn.ModuleList(Attention(shapes, part) for part in parts(shapes, f"{name}.attn"))

    def forward(self, maps: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            maps = block(maps)
            if number < len(self.attn):
                maps = self.attn[number](maps)
        return maps


class Middle(nn.Module):
    """Residual block, attention if there is any, residual block, at the lowest resolution."""

    def __init__(self, shapes: Shapes, name: str):
        super().__init__()
        self.block_1 = Residual(shapes, f"{name}.block_1")
        self.attn_1 = Attention(shapes, f"{name}.attn_1") if f"{name}.attn_1.q.weight" in shapes else nn.Identity()
        self.block_2 = Residual(shapes, f"{name}.block_2")

    def forward(self, maps: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(maps)))


class Encoder(nn.Module):
    """Images (B, C, height, width) -> maps (B, Z, height / 2^n, width / 2^n) of n + 1 levels."""

    def __init__(self, shapes: Shapes):
        super().__init__()
        self.conv_in = Convolution(shapes, "encoder.conv_in")
        self.down = nn.ModuleList(Level(shapes, name) for name in parts(shapes, "encoder.down"))
        for number, level in enumerate(self.down[:-1]):
            level.downsample = Halve(shapes, f"encoder.down.{number}.downsample")
        self.mid = Middle(shapes, "encoder.mid")
        self.norm_out = normalization(shapes, "encoder.norm_out")
        self.conv_out = Convolution(shapes, "encoder.conv_out")

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv_in(images)
        for level in self.down[:-1]:
            maps = level.downsample(level(maps))
        maps = self.mid(self.down[-1](maps))
        return self.conv_out(F.silu(self.norm_out(maps)))


class Decoder(nn.Module):
    """Maps (B, Z, H, W) -> images (B, C, 2^n H, 2^n W) of n + 1 levels; level 0 is that of the images."""

    def __init__(self, shapes: Shapes):
        super().__init__()
        self.conv_in = Convolution(shapes, "decoder.conv_in")
        self.mid = Middle(shapes, "decoder.mid")
        self.up = nn.ModuleList(Level(shapes, name) for name in parts(shapes, "decoder.up"))
        for number, level in enumerate(self.up[1:], start=1):
            level.upsample = Double(shapes, f"decoder.up.{number}.upsample")
        self.norm_out = normalization(shapes, "decoder.norm_out")
        self.conv_out = Convolution(shapes, "decoder.conv_out")

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.mid(self.conv_in(maps))
        for level in reversed(self.up[1:]):
            maps = level.upsample(level(maps))
        maps = self.up[0](maps)
        return self.conv_out(F.silu(self.norm_out(maps)))


class Network(nn.Module):
    """The encoder and the decoder of tensors with these shapes, and the 1 x 1 convolutions around the codebook.

    Raises KeyError or ValueError for a tensor that is missing or has another rank than expected.
    """

    def __init__(self, shapes: Shapes):
        super().__init__()
        self.encoder, self.decoder = Encoder(shapes), Decoder(shapes)
        self.quant_conv, self.post_quant_conv = (
            Convolution(shapes, name) if f"{name}.weight" in shapes else nn.Identity()
            for name in ("quant_conv", "post_quant_conv")
        )

    @property
    def patch(self) -> int:
        """The number of pixels along a side of a token."""
        return 2 ** (len(self.encoder.down) - 1)

    def features(self, images: Tensor) -> Tensor:
        """Compute the feature map of images in the network's range."""
        return self.quant_conv(self.encoder(images))

    def decode(self, rows: Tensor) -> Tensor:
        """Decode a map of codebook rows (B, D, H, W) to images in the network's range."""
        return self.decoder(self.post_quant_conv(rows))


class VQGAN(MapAdapter):
    """The tokenizer of a VQGAN checkpoint of taming-transformers, MAGE or LlamaGen, for RGB images."""

    def __init__(self, network: Network, table: Tensor, *, kind: str, image_size: int = 256):
        num_codes, code_dim = table.shape
        spec = TokenizerSpec(
            kind,
            (image_size, image_size),
            network.patch,
            num_codes=num_codes,
            code_dim=code_dim,
            lookup="cosine" if kind == LLAMAGEN else "euclidean",
            **({} if kind == MAGE else {"mean": HALF, "std": HALF}),
        )
        super().__init__(spec, F.normalize(table.float(), dim=1) if kind == LLAMAGEN else table, network)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], path: Path, kind: str | None = None) -> "VQGAN":
        """Build the tokenizer from the tensors of a checkpoint, in eval mode and fp32; others are ignored.

        The kind is found from the names unless it is given. Raises TokenizerError naming `path` if tensors are
        missing or do not fit, or if they are those of another kind.
        """
        tensors = _unprefixed(tensors)
        found = kind_of(tensors)
        if found is None or kind not in (None, found):
            what = f"that of {found}" if found else "no VQGAN"
            raise TokenizerError(f"{path}: got {what}, expected a VQGAN of {kind or ', '.join(KINDS)}")
        complaint, table = f"{path} is not a complete {found} VQGAN", tensors.get(CODEBOOK)
        if table is None or table.ndim != 2:
            raise TokenizerError(f"{complaint}: {CODEBOOK} is missing, or has not two dimensions")
        renamed = _taming_names({name: part for name, part in tensors.items() if name.startswith(PARTS)})
        return cls(network_of(renamed, table.shape[1], complaint), table, kind=found)

    @classmethod
    def rebuild(cls, header: Mapping, tensors: Mapping[str, Tensor], path: Path) -> Adapter:
        """Rebuild the tokenizer from the header and the tensors of a file that `save` wrote.

        Raises TokenizerError naming `path` if the file is incomplete.
        """
        spec = TokenizerSpec.from_json(header)
        start = len("model.")
        weights = {name[start:]: part for name, part in tensors.items() if name.startswith("model.")}
        complaint = f"{path} is not a complete {spec.kind} tokenizer"
        if "table" not in tensors or tensors["table"].ndim != 2:
            raise TokenizerError(f"{complaint}: table is missing")
        network = network_of(weights, tensors["table"].shape[1], complaint)
        return cls(network, tensors["table"], kind=spec.kind).restore(spec, tensors, str(path))

    def _header(self) -> dict:
        return self.spec.to_json()

    def _maps(self, inputs: Tensor) -> Tensor:
        return self.model.features(inputs)

    def _images(self, ids: Tensor) -> Tensor:
        return self.model.decode(self._rows(ids))


def kind_of(tensors: Mapping[str, object]) -> str | None:
    """Return which VQGAN has tensors of these names: "taming", "mage", "llamagen", or None for none of them."""
    if not any(name.endswith(CODEBOOK) for name in tensors):
        return None
    if any("encoder.conv_blocks.0.res.0.conv1.weight" in name for name in tensors):
        return LLAMAGEN
    if not any("encoder.down.0.block.0.conv1.weight" in name for name in tensors):
        return None
    return TAMING if any("encoder.down.0.block.0.conv1.bias" in name for name in tensors) else MAGE


def network_of(tensors: Mapping[str, Tensor], code_dim: int, complaint: str) -> Network:
    """Return the network of tensors under taming's names, with copies of them in fp32.

    Raises TokenizerError that begins with `complaint` if tensors are missing, left over or do not fit together, or
    to codes of dimension `code_dim` and RGB images.
    """
    try:
        with torch.device("meta"):  # where nothing is allocated and computing takes no time
            network = Network({name: tensor.shape for name, tensor in tensors.items()})
            images, rows = torch.empty(1, 3, 4 * network.patch, 4 * network.patch), torch.empty(1, code_dim, 4, 4)
            if network.features(images).shape != rows.shape or network.decode(rows).shape != images.shape:
                raise ValueError(
                    f"its layers do not lead from RGB images to codes of dimension {code_dim} and back"
                )
    except KeyError as error:
        raise TokenizerError(f"{complaint}: {error.args[0]} is missing") from error
    except Exception as error:  # of torch, for shapes that do not go together
        raise TokenizerError(f"{complaint}: its layers do not fit together ({reason(error)})") from error
    require_equal_shapes(network.state_dict(), tensors, complaint)
    network.load_state_dict(fp32_copies(tensors), assign=True)
    return network


def parts(shapes: Shapes, name: str) -> list[str]:
    """Return the names of the numbered children of a module: `name`.0, `name`.1 and so on."""
    start = len(name) + 1
    numbers = {key[start:].split(".", 1)[0] for key in shapes if key.startswith(f"{name}.")}
    return [f"{name}.{number}" for number in sorted(map(int, filter(str.isdecimal, numbers)))]


def _unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the name of the module that holds the VQGAN in a checkpoint of a larger model (first_stage_model)."""
    prefixes = sorted((name.removesuffix(CODEBOOK) for name in tensors if name.endswith(CODEBOOK)), key=len)
    first = next((prefix for prefix in prefixes if prefix.endswith("first_stage_model.")), None)
    prefix = "" if "" in prefixes or not prefixes else first or prefixes[0]
    return {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}


def _taming_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the names of LlamaGen; others stay."""
    levels = len(parts({name: part.shape for name, part in tensors.items()}, "decoder.conv_blocks"))
    return {_taming_name(name, levels): tensor for name, tensor in tensors.items()}


def _taming_name(name: str, levels: int) -> str:
    for theirs, tamings in LLAMAGEN_MIDDLE.items():
        name = name.replace(theirs, tamings)
    if not (match := LLAMAGEN_LEVEL.match(name)):
        return name
    side, number, other = match[1], int(match[2]), match[3] or "block."
    # LlamaGen numbers the decoder's levels from the lowest resolution, taming from the highest.
    level = f"down.{number}" if side == "encoder" else f"up.{levels - 1 - number}"
    return f"{side}.{level}.{other}{name[match.end() :]}"
