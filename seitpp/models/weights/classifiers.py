"""Our own model files: one safetensors whose header says what the tensors are and how to make the model again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from seitpp.models.stem import ModelError, StemAdapter
from seitpp.models.vit import TokenEmbed
from seitpp.tensors import load_tensors, save_tensors


def write_model(path: Path, kind: str, model: nn.Module, header: Mapping[str, Any]) -> None:
    """Write a model's tensors, and `header`, anything JSON can hold, under the name `kind`."""
    save_tensors(path, model.state_dict(), key=kind, header=header)


def read_model(path: Path, kind: str, expected: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file of `write_model`; `expected` says in an error what the file should be.

    Raises ModelError naming the file if it is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise ModelError(f"no model file at {path}: expected {expected}")
    header, tensors = load_tensors(path, kind, ModelError)
    if header is None:
        raise ModelError(f"{path} is of another kind: expected {expected}")
    return header, tensors


@dataclass(frozen=True)
class ClassifierSpec:
    """`timm.create_model(name, **arguments)` makes the model again, without dropout and drop-path."""

    name: str
    arguments: dict[str, Any]


class Loaded(NamedTuple):
    """What every loader gives: the `model` in eval mode; the fingerprint of its `codebook` (None: a model of
    pixels, or not known); the `class_names` (None where its data had none); its `spec` (None for what
    `save_classifier` did not write); and the central `window` of tokens (height, width) on which it was evaluated
    (None: of the size of its input).
    """

    model: nn.Module
    codebook: str | None = None
    class_names: list[str] | None = None
    spec: ClassifierSpec | None = None
    window: tuple[int, int] | None = None


def classifier_spec(model: nn.Module) -> ClassifierSpec:
    """Name and sizes of a timm ViT or ResNet, read from the model as it is now.

    So what `set_input_size` or `reset_classifier` changed is in it. Raises ModelError for another kind of model.
    """
    if isinstance(model, VisionTransformer):
        arguments = _vit_arguments(model)
    elif isinstance(model, ResNet):
        arguments = {"in_chans": model.conv1.in_channels}
    else:
        raise ModelError(f"got a {type(model).__name__}, expected a ViT or ResNet that timm.create_model made")
    return ClassifierSpec(model.pretrained_cfg["architecture"], {**arguments, "num_classes": model.num_classes})


def _vit_arguments(model: VisionTransformer) -> dict[str, Any]:
    stem = model.patch_embed
    arguments = {
        "img_size": list(stem.img_size),
        "in_chans": stem.proj.in_channels,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "global_pool": model.global_pool,
    }
    if isinstance(stem, StemAdapter):
        return {**arguments, "stem": stem.stem}
    if isinstance(stem, TokenEmbed):
        return {**arguments, "num_codes": stem.token_emb.num_embeddings}
    return {**arguments, "patch_size": list(stem.patch_size)}


def save_classifier(
    path: Path,
    model: nn.Module,
    codebook: str | None,
    class_names: Sequence[str] | None,
    window: tuple[int, int] | None = None,
) -> None:
    """Write a classifier: seit_vit_*, seit_resnet*, mtm_vit_*, or a ViT of timm's own for pixels.

    `codebook` is the fingerprint of the codebook, None for pixels; `window` as in `Loaded`. Raises ModelError if
    the model is not one that its name and sizes make again, so that every file written can be read.
    """
    spec = classifier_spec(model)
    with torch.device("meta"):
        again = timm.create_model(spec.name, **spec.arguments)
    if _shapes(again) != _shapes(model):
        raise ModelError(f"{spec} does not make the same tensors again: expected a model without other settings")
    names = None if class_names is None else list(class_names)
    header = {"spec": asdict(spec), "codebook": codebook, "class_names": names, "window": window}
    write_model(path, "classifier", model, header)


def load_classifier(path: Path) -> Loaded:
    """A classifier that `save_classifier` wrote, without dropout and drop-path.

    Raises ModelError naming the file if it is missing, damaged, of another kind, or of a model unknown here.
    """
    header, tensors = read_model(path, "classifier", "a classifier that save_classifier wrote")
    spec = ClassifierSpec(**header["spec"])
    if not timm.is_model(spec.name):  # create_model would look for other names on the network
        raise ModelError(f"{path} holds a {spec.name}, which neither timm nor seitpp.models knows")
    model = timm.create_model(spec.name, **spec.arguments)
    model.load_state_dict(tensors)
    window = tuple(header["window"]) if header["window"] else None
    return Loaded(model.eval(), header["codebook"], header["class_names"], spec, window)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
