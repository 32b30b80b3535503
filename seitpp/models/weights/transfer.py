"""Where fine-tuning starts: a classifier with the weights of another model and a new head."""

from typing import Literal

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.utils import freeze
from torch import nn

from seitpp.models.mtm import MTM
from seitpp.models.stem import ModelError
from seitpp.models.weights.classifiers import classifier_spec
from seitpp.models.weights.pretrained import input_kind

HEAD_STD = 2e-5  # of the new head's weights (SeiT++ release)
PIXEL_VITS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}


def classifier_from(
    source: nn.Module,
    num_classes: int,
    img_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    **overrides,
) -> nn.Module:
    """A classifier of the source's tokens: `source` is an MTM, or a classifier made by timm (ViT or ResNet).

    Everything is taken over but the head, whose weights are new (truncated normal, std 2e-5), and for an MTM the
    last LayerNorm, which here follows the mean over the patches. Positions are trained; where the grid `img_size`
    (None: the source's) differs, they are resampled bicubically. `overrides` go to `timm.create_model`, for
    example `token_drop_rate`. Raises ModelError if `source` is no such model.
    """
    body = source.encoder if isinstance(source, MTM) else source
    spec = classifier_spec(body)
    arguments = {**spec.arguments, "num_classes": num_classes, "drop_path_rate": drop_path_rate, **overrides}
    if isinstance(body, VisionTransformer):
        arguments |= {"global_pool": "avg", "img_size": img_size or spec.arguments["img_size"]}
    return _transfer(body, timm.create_model(spec.name, **arguments), new=())


def pixel_classifier_from(
    source: nn.Module,
    num_classes: int,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    **overrides,
) -> VisionTransformer:
    """A timm ViT of pixels (B, 3, `img_size`, `img_size`) from one of tokens (SeiT, "token to pixel").

    As `classifier_from`, but the stem is new too: an embedding of 16 x 16 pixels. A ViT of pixels keeps its own.
    Raises ModelError if `source` is not a ViT.
    """
    body = source.encoder if isinstance(source, MTM) else source
    if not isinstance(body, VisionTransformer):
        raise ModelError(f"got a {type(body).__name__}, expected a ViT: only its stem can be exchanged for pixels")
    if input_kind(body) == "pixels":
        return classifier_from(body, num_classes, img_size, drop_path_rate, **overrides)
    sizes = {name: classifier_spec(body).arguments[name] for name in ("embed_dim", "depth", "num_heads")}
    model = timm.create_model(
        PIXEL_VITS.get(body.embed_dim, "vit_base_patch16_224"),
        num_classes=num_classes,
        img_size=img_size,
        drop_path_rate=drop_path_rate,
        global_pool="avg",
        **{**sizes, **overrides},
    )
    return _transfer(body, model, new=("patch_embed.",))


def set_trainable(model: nn.Module, trained: Literal["all", "attention", "head"]) -> None:
    """Freeze what is not to be trained: nothing, all but attention, positions and head, or all but the head.

    Running statistics of frozen batch norms stay as they are, until `timm.utils.unfreeze(model)`. Raises
    ModelError for the attention of a ResNet.
    """
    if trained == "all":
        return
    if trained == "attention" and not isinstance(model, VisionTransformer):
        raise ModelError(f"got a {type(model).__name__}, which has no attention: train all or the head")
    freeze(model)
    head = model.pretrained_cfg["classifier"] + "."
    attention = (".attn.", "pos_embed") if trained == "attention" else ()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(head) or any(part in name for part in attention)


@torch.no_grad()
def _transfer(source: nn.Module, target: nn.Module, new: tuple[str, ...]) -> nn.Module:
    """Every tensor but those that begin like one of `new`, the head, and a norm that has another place."""
    head = target.pretrained_cfg["classifier"]
    new = (*new, f"{head}.")
    if getattr(source, "global_pool", None) == "token":
        new = (*new, "norm.", "fc_norm.")
    tensors = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith(new)}
    if "pos_embed" in tensors:
        old_size, new_size = source.patch_embed.grid_size, target.patch_embed.grid_size
        tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], new_size, old_size)
    missing, unexpected = target.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name.startswith(new) for name in missing), (missing, unexpected)
    nn.init.trunc_normal_(target.get_classifier().weight, std=HEAD_STD)
    nn.init.zeros_(target.get_classifier().bias)
    return target
