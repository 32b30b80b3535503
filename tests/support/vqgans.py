"""Tiny VQGAN checkpoints in the layouts of other projects, made of a diffusers VQModel or of random numbers."""

import re

import pytest
import torch
from torch import Tensor, nn

# Names of a diffusers VQModel -> those of taming-transformers, in this order.
TAMING = (
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.attentions\.", r"down.\1.attn."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
    (r"up_blocks\.(\d+)\.attentions\.", r"up.\1.attn."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
# Names of taming-transformers -> those of LlamaGen, whose decoder counts its levels the other way.
LLAMAGEN = (
    (r"\.(?:down|up)\.(\d+)\.block\.", r".conv_blocks.\1.res."),
    (r"\.(?:down|up)\.(\d+)\.", r".conv_blocks.\1."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
)

# Classes of transformers -> the options that make them small.
VQVAES = {
    "ChameleonVQVAE": {"embed_dim": 8, "num_embeddings": 20, "latent_channels": 8, "resolution": 32},
    "Emu3VQVAE": {"codebook_size": 20, "attn_resolutions": [1], "hidden_size": 64},
    "JanusVQVAE": {"embed_dim": 8, "num_embeddings": 20, "latent_channels": 8, "num_patches": 16},
}


def small_vq_model(**options) -> nn.Module:
    """A VQModel of two levels with random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        num_vq_embeddings=20,
        vq_embed_dim=4,
        **options,
    ).eval()


def small_vqvae(name: str, levels: int = 2) -> nn.Module:
    """A VQVAE of transformers with random weights, whose patch has 2 ** (levels - 1) pixels a side."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    widths = [1, *[2] * (levels - 1)]
    size = {"base_channels": 32, "channel_multiplier": widths, "num_res_blocks": 1, **VQVAES[name]}
    return getattr(transformers, name)(getattr(transformers, f"{name}Config")(**size)).eval()


def renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def taming_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a VQModel as taming-transformers names and shapes them."""
    levels, tensors = len(model.config.block_out_channels), {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"up_blocks\.(\d+)", lambda at: f"up_blocks.{levels - 1 - int(at[1])}", name)
        is_linear = re.search(r"\.to_(?:q|k|v|out\.0)\.weight", name)
        tensors[renamed(name, TAMING)] = tensor[..., None, None] if is_linear else tensor
    return tensors


def llamagen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a VQModel as LlamaGen names and shapes them."""
    levels, tensors = len(model.config.block_out_channels), {"quantize.codebook_used": torch.zeros(8)}
    for name, tensor in taming_tensors(model).items():
        name = re.sub(r"\.up\.(\d+)", lambda at: f".up.{levels - 1 - int(at[1])}", name)
        tensors[renamed(name, LLAMAGEN)] = tensor
    return tensors


def mage_tensors(widths: tuple[int, ...] = (32, 64, 64), num_codes: int = 20, dim: int = 8) -> dict[str, Tensor]:
    """Random tensors in the layout of MAGE, two residual blocks a level."""
    generator, tensors = torch.Generator().manual_seed(0), {}

    def convolution(name: str, inputs: int, outputs: int, kernel: int = 3, bias: bool = False) -> None:
        scale = (inputs * kernel**2) ** -0.5
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=generator) * scale
        if bias:
            tensors[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) * 0.1
        tensors[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        convolution(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        convolution(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            convolution(f"{name}.nin_shortcut", outputs, outputs, 1)

    last = len(widths) - 1
    convolution("encoder.conv_in", 3, widths[0])
    convolution("decoder.conv_in", dim, widths[-1], bias=True)
    for side in ("encoder", "decoder"):
        for block in (1, 2):
            residual(f"{side}.mid.block_{block}", widths[-1], widths[-1])
    for level, width in enumerate(widths):
        residual(f"encoder.down.{level}.block.0", widths[max(0, level - 1)], width)
        residual(f"encoder.down.{level}.block.1", width, width)
        residual(f"decoder.up.{level}.block.0", widths[min(last, level + 1)], width)
        residual(f"decoder.up.{level}.block.1", width, width)
        if level:
            convolution(f"decoder.up.{level}.upsample.conv", width, width, bias=True)
    norm("encoder.norm_out", widths[-1])
    convolution("encoder.conv_out", widths[-1], dim, 1, bias=True)
    norm("decoder.norm_out", widths[0])
    convolution("decoder.conv_out", widths[0], 3, bias=True)
    tensors["quantize.embedding.weight"] = torch.randn(num_codes, dim, generator=generator)
    return tensors
