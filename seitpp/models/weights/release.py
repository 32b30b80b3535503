"""Load and write checkpoints in the format of the SeiT and SeiT++ releases.

| kind              | recognized by                       | model      | input                    | also holds    |
|-------------------|-------------------------------------|------------|--------------------------|---------------|
| MTM               | mlm_layer.*                         | MTM        | ids (B, H, W), mask plan | a TokenAdapt  |
| SeiT++ classifier | token_emb.*                         | mtm_vit_*  | ids (B, H, W)            | a TokenAdapt  |
| SeiT classifier   | patch_embed.proj alone              | seit_vit_* | map (B, D, H, W)         |               |
| TokenAdapt        | conversion_function.*, no cls_token | TokenAdapt | map (B, D, H, W)         |               |

A published MTM or SeiT++ classifier also holds the TokenAdapt that it was trained with; `from_release` loads one
or the other. An MTM also holds `decoder_pos_embed`, fixed decoder positions that it never uses.

Sizes are read from the shapes of the tensors, except for the number of heads: the released models have 64 channels
per head, 32 in the decoder of MTM. Grids are square.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from seitpp import files
from seitpp.errors import refusing
from seitpp.models.mtm import MTM
from seitpp.models.stem import STEMS, ModelError, StemAdapter
from seitpp.models.tokenadapt import TokenAdapt
from seitpp.models.vit import PATCH, TokenEmbed
from seitpp.models.weights.state import ReleasedState, read_state, renamed
from seitpp.tensors import built_for, checkpoint_bytes
from seitpp.tokenizers.transformer import HEAD, sincos_positions

DECODER_HEAD = 32  # channels of an attention head in the decoder of MTM
SIZE_NAMES = {192: "tiny", 384: "small"}  # by width; other widths are built as "base" with their sizes overridden

# Prefixes by which the kind of a checkpoint is recognized; the first match counts.
KIND_PREFIXES = {
    "MTM": "mlm_layer.",
    "SeiT++ classifier": "token_emb.",
    "SeiT classifier": "patch_embed.proj.",
    "TokenAdapt": ("conversion_function.", "reverse_transform."),
}
ENCODER = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.")
DECODER = ("mask_token_label", "decoder_embed.", "decoder_pos_embed_learned", "decoder_blocks.", "decoder_norm.")
# Prefixes of which each checkpoint must hold at least one tensor.
REQUIRED = {
    "MTM": (*ENCODER, "token_emb.", "norm.", *DECODER, "mlm_layer."),
    "SeiT++ classifier": (*ENCODER, "token_emb.", "head."),
    "SeiT classifier": (*ENCODER, "head."),
    "TokenAdapt": KIND_PREFIXES["TokenAdapt"],
}
UNUSED_POSITIONS = "decoder_pos_embed"

# Prefixes of our names -> prefixes of the released names.
TOKEN_NAMES = {
    "patch_embed.token_emb.": "token_emb.word_embeddings.",
    "patch_embed.token_norm.": "token_emb.LayerNorm.",
}
CLASSIFIER_NAMES = {**TOKEN_NAMES, "fc_norm.": "norm."}
MTM_NAMES = {
    **{f"encoder.{ours}": theirs for ours, theirs in TOKEN_NAMES.items()},
    "encoder.": "",
    "mask_token": "mask_token_label",
    "decoder_pos_embed": "decoder_pos_embed_learned",
    "head.norm.": "mlm_layer.ln.",
    "head.": "mlm_layer.",
}
TOKENADAPT_NAMES = {
    "embed.": "conversion_function.0.",
    "convert_positions": "conversion_function.1.de_pos_embedding",
    "convert_blocks.": "conversion_function.1.transformer.",
    "to_space.": "conversion_function.1.to_pixel.1.",
    "invert_positions": "reverse_transform.0.en_pos_embedding",
    "from_space.": "reverse_transform.0.to_patch_embedding.0.",
    "invert_blocks.": "reverse_transform.0.transformer.",
    "head.": "reverse_transform.1.",
}
# Released tensors from whose shapes the sizes of a TokenAdapt are read.
TOKENADAPT_SIZES = (
    "conversion_function.0.weight",
    "conversion_function.1.de_pos_embedding",
    "conversion_function.1.transformer.layers.0.0.fn.to_qkv.weight",
    "conversion_function.1.transformer.layers.0.1.fn.net.0.weight",
    "reverse_transform.0.en_pos_embedding",
    "reverse_transform.1.weight",
)


def from_release(path: str | Path, part: Literal["model", "tokenadapt"] = "model") -> nn.Module:
    """Load the model of a released checkpoint, in eval mode; its kind is read from the keys (table above).

    `part="tokenadapt"` loads the TokenAdapt of a file that also holds another model. The file was written by
    `torch.save` ({"model": state, ...} as by DeiT, or a bare state dict) or is a safetensors file; of several sets
    of weights, "model" is loaded. The last norm of a classifier may be named norm or fc_norm. Unused tensors are
    listed in one warning, except those in the last column of the table. Nothing that could run code is unpickled.
    Raises ModelError naming the file if it cannot be read, is of an unknown kind, lacks a tensor, or has a tensor
    of a wrong shape.
    """
    path = Path(path)
    state = read_state(path)
    kind = _kind(path, state) if part == "model" else "TokenAdapt"
    if kind == "TokenAdapt" and "cls_token" in state:
        state = {name: tensor for name, tensor in state.items() if name.startswith(KIND_PREFIXES[kind])}
    tensors = ReleasedState(path, kind, state)
    tensors.need(REQUIRED[kind])
    with refusing(ModelError, f"{path} ({kind}) has tensors of wrong shapes", "those of a release"):
        with torch.device("meta"), built_for(len(tensors)):  # nothing is allocated by their shapes unchecked
            tensors.shaped(*_empty(tensors))
        model, names = _empty(tensors)
    return tensors.fill(model, names, expected_unused=_expected_unused(tensors))


def to_release(model: nn.Module, tokenadapt: TokenAdapt | None = None) -> dict[str, Tensor]:
    """Return the state dict of a model with the names and shapes of the release.

    The model is a seit_vit_* or mtm_vit_* classifier, an MTM or a TokenAdapt. `tokenadapt` is added to an MTM or
    mtm_vit_* classifier, as published. Raises ModelError for another model, for a TokenAdapt with another number
    of codes, and for a model that could not be loaded again: if its heads do not have 64 channels (32 in the
    decoder of MTM), if it does not average over the patches, or if its grid is not square.
    """
    names = _exportable(model)
    state = {renamed(name, names): tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    if isinstance(model, MTM):
        state["mlm_layer.bias"] = state["mlm_layer.bias"].view(1, 1, -1)
        state[UNUSED_POSITIONS] = _unused_positions(model)
    if tokenadapt is not None:
        _check_tokenadapt(model, tokenadapt)
        state |= to_release(tokenadapt)
    return state


def save_release(model: nn.Module, path: str | Path, tokenadapt: TokenAdapt | None = None) -> None:
    """Write {"model": `to_release(model, tokenadapt)`} with `torch.save`, atomically."""
    files.replace_bytes(Path(path), checkpoint_bytes({"model": to_release(model, tokenadapt)}))


def _kind(path: Path, state: dict[str, Tensor]) -> str:
    """Return the first kind in KIND_PREFIXES that matches a tensor."""
    for kind, prefix in KIND_PREFIXES.items():
        if any(name.startswith(prefix) for name in state) and not (kind == "TokenAdapt" and "cls_token" in state):
            return kind
    raise ModelError(
        f"{path}: got tensors ({', '.join(list(state)[:3])}, ...) of no released model, expected a SeiT or SeiT++ "
        "classifier, MTM or TokenAdapt"
    )


def _empty(tensors: ReleasedState) -> tuple[nn.Module, dict[str, str]]:
    """Return a new model of the kind and sizes of `tensors`, and its prefixes in the release."""
    if tensors.kind == "TokenAdapt":
        return TokenAdapt(**_tokenadapt_sizes(tensors)), TOKENADAPT_NAMES
    if tensors.kind == "MTM":
        return _mtm(tensors), MTM_NAMES
    # timm, and some checkpoints, name the norm after the mean over the patches fc_norm.
    names = TOKEN_NAMES if "fc_norm.weight" in tensors else CLASSIFIER_NAMES
    return (_ids_classifier if tensors.kind == "SeiT++ classifier" else _map_classifier)(tensors), names


def _expected_unused(tensors: ReleasedState) -> set[str]:
    """Return the names of tensors that a published file holds and its model does not use."""
    unused, tokenadapt = {UNUSED_POSITIONS} if tensors.kind == "MTM" else set(), _tokenadapt_tensors()
    return (
        unused | tokenadapt if tokenadapt <= tensors.keys() else unused
    )  # a part of a TokenAdapt is not expected


def _map_classifier(tensors: ReleasedState) -> VisionTransformer:
    channels, kernel = tensors["patch_embed.proj.weight"].shape[1:3]
    stems = {geometry.kernel: name for name, geometry in STEMS.items()}
    if kernel not in stems:
        raise ModelError(f"{tensors.path}: got a stem of kernel {kernel}, expected one of {sorted(stems)}")
    stem, size = stems[kernel], tensors.size()
    return timm.create_model(
        f"seit_vit_{SIZE_NAMES.get(size['embed_dim'], 'base')}",
        img_size=tensors.side() * STEMS[stem].stride,
        in_chans=channels,
        stem=stem,
        num_classes=len(tensors["head.bias"]),
        **size,
    )


def _ids_classifier(tensors: ReleasedState) -> VisionTransformer:
    num_codes, code_dim = tensors["token_emb.word_embeddings.weight"].shape
    size = tensors.size()
    return timm.create_model(
        f"mtm_vit_{SIZE_NAMES.get(size['embed_dim'], 'base')}",
        img_size=tensors.side() * PATCH,
        in_chans=code_dim,
        num_codes=num_codes,
        num_classes=len(tensors["head.bias"]),
        **size,
    )


def _mtm(tensors: ReleasedState) -> MTM:
    num_codes, code_dim = tensors["token_emb.word_embeddings.weight"].shape
    size, width, side = tensors.size(), len(tensors["decoder_embed.bias"]), tensors.side() * PATCH
    return MTM(
        f"mtm_vit_{SIZE_NAMES.get(size['embed_dim'], 'base')}",
        grid=(side, side),
        num_codes=num_codes,
        code_dim=code_dim,
        decoder_width=width,
        decoder_depth=tensors.depth("decoder_blocks."),
        decoder_heads=tensors.heads(width, DECODER_HEAD),
        encoder_size=size,
    )


def _exportable(model: nn.Module) -> dict[str, str]:
    """Return the prefixes of a model in the release. Raises ModelError if the release has no such model."""
    if isinstance(model, TokenAdapt):
        return TOKENADAPT_NAMES
    body = model.encoder if isinstance(model, MTM) else model
    stem = getattr(body, "patch_embed", None)
    if not isinstance(body, VisionTransformer) or not isinstance(stem, StemAdapter | TokenEmbed):
        raise ModelError(f"got a {type(model).__name__}, expected a seit_vit_*, mtm_vit_*, MTM or TokenAdapt")
    if stem.grid_size[0] != stem.grid_size[1]:
        raise ModelError(
            f"got a grid of {stem.grid_size} patches, expected a square grid: the release has no other"
        )
    _check_heads(body.blocks, HEAD)
    if isinstance(model, MTM):
        _check_heads(model.decoder_blocks, DECODER_HEAD)
        return MTM_NAMES
    if body.global_pool != "avg" or body.num_classes == 0:
        raise ModelError(
            f"got pooling {body.global_pool!r} and {body.num_classes} classes, expected avg and a classifier head"
        )
    return CLASSIFIER_NAMES


def _check_heads(blocks: nn.Sequential, channels: int) -> None:
    head_dim = blocks[0].attn.head_dim
    if head_dim != channels:
        raise ModelError(
            f"got attention heads of {head_dim} channels, expected {channels}: the release does not store the "
            "number of heads"
        )


def _unused_positions(model: MTM) -> Tensor:
    """Return sin-cos positions with zeros for cls, as in the encoder: (1, 1 + L, decoder width)."""
    positions = torch.zeros_like(model.decoder_pos_embed, device="cpu")
    positions[0, 1:] = sincos_positions(model.encoder.patch_embed.grid_size, positions.shape[-1])
    return positions


def _check_tokenadapt(model: nn.Module, tokenadapt: TokenAdapt) -> None:
    stem = getattr(model.encoder if isinstance(model, MTM) else model, "patch_embed", None)
    if not isinstance(stem, TokenEmbed):
        raise ModelError(
            f"got a {type(model).__name__} with a TokenAdapt, expected an MTM or a mtm_vit_* classifier: the "
            "release adds a TokenAdapt to no other model"
        )
    expected, num_codes = stem.token_emb.num_embeddings, tokenadapt.settings["num_codes"]
    if num_codes != expected:
        raise ModelError(
            f"got a TokenAdapt of {num_codes} codes, expected the {expected} codes of the model: pass a "
            "TokenAdapt of the same codebook"
        )


def _tokenadapt_tensors() -> set[str]:
    """Return the names of all tensors of a released TokenAdapt; they do not depend on its sizes."""
    with torch.device("meta"):
        return {renamed(name, TOKENADAPT_NAMES) for name in TokenAdapt().state_dict()}


def _tokenadapt_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of TokenAdapt from the shapes of the released tensors; grids are square."""
    embed, whole, qkv, mlp, augmented, head = (tensors[name].shape for name in TOKENADAPT_SIZES)
    grid, crop = (math.isqrt(positions.numel() // embed[0]) for positions in (whole, augmented))
    return {
        "grid": (grid, grid),
        "crop": (crop, crop),
        "num_codes": head[0],
        "code_dim": embed[1],
        "width": embed[0],
        "heads": qkv[0] // (3 * HEAD),
        "mlp": mlp[0],
    }
