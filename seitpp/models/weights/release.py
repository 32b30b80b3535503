"""The released checkpoints of SeiT and SeiT++, in and out.

| kind              | told by                             | ours       | takes                    | holds besides |
|-------------------|-------------------------------------|------------|--------------------------|---------------|
| MTM               | mlm_layer.*                         | MTM        | ids (B, H, W), mask plan | a TokenAdapt  |
| SeiT++ classifier | token_emb.*                         | mtm_vit_*  | ids (B, H, W)            | a TokenAdapt  |
| SeiT classifier   | patch_embed.proj alone              | seit_vit_* | map (B, D, H, W)         |               |
| TokenAdapt        | conversion_function.*, no cls_token | TokenAdapt | map (B, D, H, W)         |               |

As published, an MTM or a SeiT++ classifier carries the TokenAdapt that it was trained with; `from_release` gives
one or the other of it. An MTM also carries `decoder_pos_embed`, fixed positions of the decoder that it never uses.

Sizes are read from the tensors, but for the heads: the released models have 64 channels a head, 32 in MTM's
decoder. Grids are square.
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
from seitpp.models.mtm import MTM
from seitpp.models.stem import STEMS, ModelError, StemAdapter
from seitpp.models.tokenadapt import TokenAdapt
from seitpp.models.vit import PATCH, TokenEmbed
from seitpp.models.weights.state import ReleasedState, read_state, renamed
from seitpp.tokenizers.transformer import HEAD, sincos_positions

DECODER_HEAD = 32  # channels of an attention head of MTM's decoder
SIZE_NAMES = {192: "tiny", 384: "small"}  # by width; every other is a base with sizes of its own

# How the names of a kind begin: by which it is told, the first that fits, and of which it needs a tensor each.
TOLD_BY = {
    "MTM": "mlm_layer.",
    "SeiT++ classifier": "token_emb.",
    "SeiT classifier": "patch_embed.proj.",
    "TokenAdapt": ("conversion_function.", "reverse_transform."),
}
ENCODER = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.")
DECODER = ("mask_token_label", "decoder_embed.", "decoder_pos_embed_learned", "decoder_blocks.", "decoder_norm.")
PARTS = {
    "MTM": (*ENCODER, "token_emb.", "norm.", *DECODER, "mlm_layer."),
    "SeiT++ classifier": (*ENCODER, "token_emb.", "head."),
    "SeiT classifier": (*ENCODER, "head."),
    "TokenAdapt": TOLD_BY["TokenAdapt"],
}
UNUSED_POSITIONS = "decoder_pos_embed"

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
# Released tensors whose shapes are the sizes of the model.
SIZED = (
    "conversion_function.0.weight",
    "conversion_function.1.de_pos_embedding",
    "conversion_function.1.transformer.layers.0.0.fn.to_qkv.weight",
    "conversion_function.1.transformer.layers.0.1.fn.net.0.weight",
    "reverse_transform.0.en_pos_embedding",
    "reverse_transform.1.weight",
)


def from_release(path: str | Path, part: Literal["model", "tokenadapt"] = "model") -> nn.Module:
    """The model of a released checkpoint, in eval mode; the kind is read from the keys, see the table above.

    `part="tokenadapt"` takes the TokenAdapt out of a file that holds another model too. The file is one of
    `torch.save` ({"model": state, ...} as DeiT writes it, or a bare state dict) or safetensors; of several sets of
    weights "model" is taken. The last norm of a classifier may be called norm or fc_norm. What the model does not
    use is named in one warning, but for what the table says is there. Nothing is unpickled that could run code.
    Raises ModelError naming the file if it cannot be read, is of no known kind, lacks a tensor, or has one of
    another shape.
    """
    path = Path(path)
    state = read_state(path)
    kind = _kind(path, state) if part == "model" else "TokenAdapt"
    if kind == "TokenAdapt" and "cls_token" in state:
        state = {name: tensor for name, tensor in state.items() if name.startswith(TOLD_BY[kind])}
    tensors = ReleasedState(path, kind, state)
    tensors.need(PARTS[kind])
    model, names = _empty(tensors)
    return tensors.fill(model, names, _known(tensors))


def to_release(model: nn.Module, tokenadapt: TokenAdapt | None = None) -> dict[str, Tensor]:
    """The state dict of a seit_vit_* or mtm_vit_* classifier, an MTM or a TokenAdapt: released names and shapes.

    With `tokenadapt` an MTM or mtm_vit_* classifier is as published, its TokenAdapt beside it. Raises ModelError
    for another model, for a TokenAdapt of other codes, or for a model that could not be read back: other heads
    than 64 channels wide (32 in MTM's decoder), no mean over the patches, a grid that is not square.
    """
    names = _exportable(model)
    state = {renamed(name, names): tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    if isinstance(model, MTM):
        state["mlm_layer.bias"] = state["mlm_layer.bias"].view(1, 1, -1)
        state[UNUSED_POSITIONS] = _unused_positions(model)
    if tokenadapt is not None:
        _check_beside(model, tokenadapt)
        state |= to_release(tokenadapt)
    return state


def save_release(model: nn.Module, path: str | Path, tokenadapt: TokenAdapt | None = None) -> None:
    """Write {"model": `to_release(model, tokenadapt)`} with `torch.save`, whole or not at all."""
    state = to_release(model, tokenadapt)
    files.replace_file(Path(path), lambda temporary: torch.save({"model": state}, temporary))


def _kind(path: Path, state: dict[str, Tensor]) -> str:
    """The first in TOLD_BY of which there is a name."""
    for kind, prefix in TOLD_BY.items():
        if any(name.startswith(prefix) for name in state) and not (kind == "TokenAdapt" and "cls_token" in state):
            return kind
    raise ModelError(
        f"{path}: its tensors ({', '.join(list(state)[:3])}, ...) are of no released model: expected a SeiT or "
        "SeiT++ classifier, MTM or TokenAdapt"
    )


def _empty(tensors: ReleasedState) -> tuple[nn.Module, dict[str, str]]:
    """A model of the kind and the sizes of `tensors`, and how its names change."""
    if tensors.kind == "TokenAdapt":
        return TokenAdapt(**_tokenadapt_sizes(tensors)), TOKENADAPT_NAMES
    if tensors.kind == "MTM":
        return _mtm(tensors), MTM_NAMES
    # After a mean over the patches the norm has another name in timm, and in some checkpoints.
    names = TOKEN_NAMES if "fc_norm.weight" in tensors else CLASSIFIER_NAMES
    return (_ids_classifier if tensors.kind == "SeiT++ classifier" else _map_classifier)(tensors), names


def _known(tensors: ReleasedState) -> set[str]:
    """What a file as published has and its model does not use: a TokenAdapt counts if it is whole."""
    known, beside = {UNUSED_POSITIONS} if tensors.kind == "MTM" else set(), _tokenadapt_tensors()
    return known | beside if beside <= tensors.keys() else known


def _map_classifier(tensors: ReleasedState) -> VisionTransformer:
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
    """How the names of a model change. Raises ModelError if the release has no place for the model."""
    if isinstance(model, TokenAdapt):
        return TOKENADAPT_NAMES
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


def _unused_positions(model: MTM) -> Tensor:
    """(1, 1 + L, decoder width): sin-cos, zeros for cls, as the encoder's."""
    positions = torch.zeros_like(model.decoder_pos_embed, device="cpu")
    positions[0, 1:] = sincos_positions(model.encoder.patch_embed.grid_size, positions.shape[-1])
    return positions


def _check_beside(model: nn.Module, tokenadapt: TokenAdapt) -> None:
    stem = getattr(model.encoder if isinstance(model, MTM) else model, "patch_embed", None)
    if not isinstance(stem, TokenEmbed):
        raise ModelError("a TokenAdapt is published beside an MTM or a mtm_vit_* classifier: expected one of them")
    expected, found = stem.token_emb.num_embeddings, tokenadapt.settings["num_codes"]
    if found != expected:
        raise ModelError(
            f"a TokenAdapt of {found} codes, the model beside it has {expected}: expected equal codebooks"
        )


def _tokenadapt_tensors() -> set[str]:
    """The names of all tensors of a released TokenAdapt, whatever its sizes."""
    with torch.device("meta"):
        return {renamed(name, TOKENADAPT_NAMES) for name in TokenAdapt().state_dict()}


def _tokenadapt_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of TokenAdapt from the shapes of the released tensors in `SIZED`; grids are square."""
    embed, whole, qkv, mlp, augmented, head = (tensors[name].shape for name in SIZED)
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
