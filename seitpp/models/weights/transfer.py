"""Initialize a classifier for fine-tuning: the weights of a trained model with a new head."""

from typing import Literal

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.utils import freeze
from torch import nn

from seitpp.errors import suggest
from seitpp.models.mtm import MTM
from seitpp.models.stem import ModelError
from seitpp.models.weights.classifiers import check_saving, classifier_spec
from seitpp.models.weights.pretrained import input_kind

HEAD_STD = 2e-5  # standard deviation of the weights of the new head (SeiT++ release)
PIXEL_VITS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}


def classifier_from(
    source: nn.Module,
    num_classes: int,
    *,
    img_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    **overrides,
) -> nn.Module:
    """Return a classifier with the weights of `source`, an MTM or timm classifier (ViT, ResNet), and a new head.

    The weights of the head are new (truncated normal, std 2e-5); for an MTM so is the last LayerNorm, which in a
    classifier follows the mean over the patches. Positions are trained; they are resampled bicubically if the grid
    `img_size` (None: that of the source) differs. `overrides` are passed to `timm.create_model`, for example
    `token_drop_rate`. Raises ModelError for another `source`.
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
    *,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    **overrides,
) -> VisionTransformer:
    """Return a timm ViT for images of `img_size` pixels, with the weights of a ViT for tokens and a new head.

    As `classifier_from`, but the stem is new too: patches of 16 x 16 pixels (SeiT, "token to pixel"). A ViT for
    pixels keeps its stem. Raises ModelError if `source` is not a ViT.
    """
    body = source.encoder if isinstance(source, MTM) else source
    if not isinstance(body, VisionTransformer):
        raise ModelError(f"got a {type(body).__name__}, expected a ViT: only a ViT can get a stem for pixels")
    if input_kind(body) == "pixels":
        return classifier_from(body, num_classes, img_size=img_size, drop_path_rate=drop_path_rate, **overrides)
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


def new_pixel_classifier(
    name: str,
    num_classes: int,
    *,
    img_size: tuple[int, int] = (224, 224),
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """Return the ViT or ResNet `name` of timm's registry, for images of `img_size` pixels, with random weights.

    A ResNet takes images of any size. Raises ModelError for a name that is not in the registry, for another kind
    of model, and for one that could not be saved.
    """
    if name not in timm.list_models():  # create_model would look for other names on the network
        close = suggest(name, timm.list_models("vit_*_patch*") + timm.list_models("resnet*"))
        raise ModelError(f"--model {name}: timm has no such network, expected a ViT or ResNet{close}")
    with torch.device("meta"):
        kind = timm.create_model(name)
    if input_kind(kind) != "pixels":
        raise ModelError(f"--model {name} takes tokens, expected a ViT or ResNet of timm for pixels")
    sizes = {"img_size": img_size} if isinstance(kind, VisionTransformer) else {}
    model = timm.create_model(name, num_classes=num_classes, drop_path_rate=drop_path_rate, **sizes)
    check_saving(model)
    return model


def set_trainable(model: nn.Module, trained: Literal["all", "attention", "head"]) -> None:
    """Freeze all parameters that are not trained; "attention" also trains the positions and the head.

    The running statistics of frozen batch norms do not change until `timm.utils.unfreeze(model)`. Raises
    ModelError if `trained` is "attention" and the model is not a ViT.
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
    """Copy the tensors, except those with a prefix in `new`, the head, and for an MTM the last norm."""
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
