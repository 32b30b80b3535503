"""The released checkpoints of SeiT and SeiT++, in and out.

| kind              | told by                  | ours                 | takes                     |
|-------------------|--------------------------|----------------------|---------------------------|
| SeiT classifier   | patch_embed.proj alone   | seit_vit_*           | map (B, D, H, W)          |
| SeiT++ classifier | token_emb.*              | mtm_vit_*            | ids (B, H, W)             |
| MTM               | mlm_layer.*              | MTM                  | ids (B, H, W), mask plan  |
| TokenAdapt        | conversion_function.*    | TokenAdapt           | map (B, D, H, W)          |

Sizes are read from the tensors, but for the heads: the released models have 64 channels a head, 32 in MTM's
decoder. Grids are square.
"""

from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from seitpp import files
from seitpp.models.foreign import HEAD, Released, read_state, renamed
from seitpp.models.mtm import MTM
from seitpp.models.stem import STEMS, ModelError, StemAdapter
from seitpp.models.tokenadapt import TokenAdapt, tokenadapt_from_release, tokenadapt_to_release
from seitpp.models.vit import PATCH, TokenEmbed

DECODER_HEAD = 32  # channels of an attention head of MTM's decoder
SIZE_NAMES = {192: "tiny", 384: "small"}  # by width; every other is a base with sizes of its own

# How our names begin, and how theirs do.
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


def from_release(path: str | Path) -> nn.Module:
    """The model of a released checkpoint, in eval mode; the kind is read from the keys, see the table above.

    The file is one of `torch.save` ({"model": state, ...} as DeiT writes it, or a bare state dict) or safetensors;
    of several sets of weights "model" is taken. The last norm of a classifier may be called norm or fc_norm. What
    the model does not use is named in one warning. Nothing is unpickled that could run code. Raises ModelError
    naming the file if it cannot be read, is of no known kind, lacks a tensor, or has one of another shape.
    """
    path = Path(path)
    tensors = Released(path, read_state(path))
    if any(name.startswith("conversion_function.") for name in tensors):
        return _tokenadapt(tensors)
    if any(name.startswith("mlm_layer.") for name in tensors):
        return tensors.fill(_mtm(tensors), MTM_NAMES)
    # After a mean over the patches the norm has another name in timm, and in some checkpoints.
    names = TOKEN_NAMES if "fc_norm.weight" in tensors else CLASSIFIER_NAMES
    if "token_emb.word_embeddings.weight" in tensors:
        return tensors.fill(_ids_classifier(tensors), names)
    if "patch_embed.proj.weight" in tensors:
        return tensors.fill(_map_classifier(tensors), names)
    raise ModelError(
        f"{path}: its tensors ({', '.join(list(tensors)[:3])}, ...) are of no released model: expected a SeiT or "
        "SeiT++ classifier, MTM or TokenAdapt"
    )


def to_release(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a seit_vit_* or mtm_vit_* classifier, an MTM or a TokenAdapt, under the released names.

    What the release holds and never uses is not written. Raises ModelError for another model, or for one that
    could not be read back: other heads than 64 channels wide (32 in MTM's decoder), no mean over the patches, a
    grid that is not square.
    """
    if isinstance(model, TokenAdapt):
        return tokenadapt_to_release(model)
    names = _exportable(model)
    return {
        renamed(name, names): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }


def save_release(model: nn.Module, path: str | Path) -> None:
    """Write {"model": `to_release(model)`} with `torch.save`, whole or not at all."""
    state = to_release(model)
    files.replace_file(Path(path), lambda temporary: torch.save({"model": state}, temporary))


def _map_classifier(tensors: Released) -> VisionTransformer:
    channels, kernel = tensors["patch_embed.proj.weight"].shape[1:3]
    stems = {geometry.kernel: name for name, geometry in STEMS.items()}
    if kernel not in stems:
        raise ModelError(f"{tensors.path}: stem of kernel {kernel}, expected one of {sorted(stems)}")
    stem, size = stems[kernel], tensors.size()
    return timm.create_model(
        f"seit_vit_{SIZE_NAMES.get(size['embed_dim'], 'base')}",
        img_size=tensors.side() * STEMS[stem].stride,
        in_chans=channels,
        stem=stem,
        num_classes=len(tensors["head.bias"]),
        **size,
    )


def _ids_classifier(tensors: Released) -> VisionTransformer:
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


def _mtm(tensors: Released) -> MTM:
    num_codes, code_dim = tensors["token_emb.word_embeddings.weight"].shape
    size, width, side = tensors.size(), len(tensors["decoder_embed.bias"]), tensors.side() * PATCH
    return MTM(
        f"mtm_vit_{SIZE_NAMES.get(size['embed_dim'], 'base')}",
        (side, side),
        num_codes,
        code_dim,
        decoder_width=width,
        decoder_depth=tensors.depth("decoder_blocks."),
        decoder_heads=tensors.heads(width, DECODER_HEAD),
        encoder_size=size,
    )


def _tokenadapt(tensors: Released) -> TokenAdapt:
    try:
        return tokenadapt_from_release(dict(tensors))
    except ModelError as error:
        raise ModelError(f"{tensors.path}: {error}") from error


def _exportable(model: nn.Module) -> dict[str, str]:
    """How the names of a model change. Raises ModelError if the release has no place for the model."""
    body = model.encoder if isinstance(model, MTM) else model
    stem = getattr(body, "patch_embed", None)
    if not isinstance(body, VisionTransformer) or not isinstance(stem, StemAdapter | TokenEmbed):
        raise ModelError(f"got a {type(model).__name__}, expected a seit_vit_*, mtm_vit_*, MTM or TokenAdapt")
    if stem.grid_size[0] != stem.grid_size[1]:
        raise ModelError(f"patches {stem.grid_size}: the released layout knows square grids only")
    _check_heads(body.blocks, HEAD)
    if isinstance(model, MTM):
        _check_heads(model.decoder_blocks, DECODER_HEAD)
        return MTM_NAMES
    if body.global_pool != "avg" or body.num_classes == 0:
        raise ModelError(f"pooling {body.global_pool!r} and {body.num_classes} classes: expected avg and a head")
    return CLASSIFIER_NAMES


def _check_heads(blocks: nn.Sequential, channels: int) -> None:
    found = blocks[0].attn.head_dim
    if found != channels:
        raise ModelError(
            f"heads of {found} channels: the released layout does not say how many heads there are, readers "
            f"take {channels} channels each"
        )
