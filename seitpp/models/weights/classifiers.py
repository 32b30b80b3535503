"""The model files of this library: safetensors with a JSON header from which the model is built again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from seitpp.models.stem import STEMS, ModelError, StemAdapter
from seitpp.models.vit import PATCH, TokenEmbed
from seitpp.models.weights.rebuild import (
    checked,
    is_codes,
    is_count,
    is_object,
    is_pair,
    is_side,
    is_size,
    is_text,
    is_texts,
    one_of,
    optional,
    rebuild,
)
from seitpp.tensors import load_tensors, save_tensors

# What the header of a classifier may hold; anything else could make timm read files or ask the network.
SPEC = {"name": is_text, "arguments": is_object}
ARGUMENTS = {
    **dict.fromkeys(("img_size", "patch_size"), is_side),
    **dict.fromkeys(("in_chans", "embed_dim", "depth", "num_heads"), is_size),
    "num_codes": is_codes,
    "num_classes": is_count,
    "global_pool": one_of("", "avg", "token"),
    "stem": one_of(*STEMS),
}
HEADER = {
    "spec": is_object,
    "codebook": optional(is_text),
    "class_names": optional(is_texts),
    "window": optional(is_pair),
    "multi_label": lambda value: isinstance(value, bool),
}


def write_model(path: Path, model: nn.Module, *, kind: str, header: Mapping[str, Any]) -> None:
    """Write the tensors of a model and a `header` of JSON values; `read_model` checks the `kind`."""
    save_tensors(path, model.state_dict(), key=kind, header=header)


def read_model(path: Path, kind: str, expected: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file that `write_model` wrote.

    Error messages name what file was `expected`. Raises ModelError if the file is missing, damaged or of another
    kind.
    """
    if not path.is_file():
        raise ModelError(f"no model file at {path}: expected {expected}")
    header, tensors = load_tensors(path, kind, ModelError)
    if header is None:
        raise ModelError(f"{path} is of another kind: expected {expected}")
    return header, tensors


@dataclass(frozen=True)
class ClassifierSpec:
    """The arguments with which timm.create_model builds the model again, without dropout and drop path."""

    name: str
    arguments: dict[str, Any]


class Loaded(NamedTuple):
    """A loaded model and what its file says about it."""

    model: nn.Module  # in eval mode
    codebook: str | None = None  # fingerprint of the codebook; None: a model for pixels, or unknown
    class_names: list[str] | None = None  # None: the training data had none
    spec: ClassifierSpec | None = None  # None: not written by save_classifier
    # Height and width of the central window of tokens on which the model was evaluated; None: its input size.
    window: tuple[int, int] | None = None
    multi_label: bool = False  # trained on images with several classes: each logit is that of one class alone


def classifier_spec(model: nn.Module) -> ClassifierSpec:
    """Return the name and sizes of a timm ViT or ResNet, after any `set_input_size` or `reset_classifier`.

    Raises ModelError for another kind of model.
    """
    if isinstance(model, VisionTransformer):
        arguments = _vit_arguments(model)
    elif isinstance(model, ResNet):
        arguments = {"in_chans": model.conv1.in_channels}
    else:
        raise ModelError(f"got a {type(model).__name__}, expected a ViT or ResNet from timm.create_model")
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
        codes = list(stem.sizes) if len(stem.sizes) > 1 else stem.sizes[0]
        patch = {} if stem.patch_size == (PATCH, PATCH) else {"patch_size": list(stem.patch_size)}
        return {**arguments, "num_codes": codes, **patch}
    return {**arguments, "patch_size": list(stem.patch_size)}


def check_saving(model: nn.Module) -> ClassifierSpec:
    """Return the spec of a classifier that `save_classifier` can write.

    Raises ModelError if its file could not be loaded, because the model has more settings than its name and sizes.
    """
    spec = classifier_spec(model)
    with torch.device("meta"):
        rebuilt = timm.create_model(spec.name, **spec.arguments)
    if _shapes(rebuilt) != _shapes(model):
        raise ModelError(f"{spec} builds other tensors than this model's: expected a model without other settings")
    return spec


def save_classifier(
    path: Path,
    model: nn.Module,
    codebook: str | None,
    *,
    class_names: Sequence[str] | None,
    window: tuple[int, int] | None = None,
    multi_label: bool = False,
) -> None:
    """Write a classifier: seit_vit_*, seit_resnet*, mtm_vit_*, or one of timm's for pixels.

    `codebook`, the fingerprint of the codebook, `class_names`, `window` and `multi_label` are described
    at `Loaded`. Raises ModelError as `check_saving` does.
    """
    spec = check_saving(model)
    names = None if class_names is None else list(class_names)
    header = {"spec": asdict(spec), "codebook": codebook, "class_names": names, "window": window}
    if multi_label:  # left out otherwise: files of other models have the same bytes as before
        header["multi_label"] = True
    write_model(path, model, kind="classifier", header=header)


def load_classifier(path: Path) -> Loaded:
    """Load a classifier that `save_classifier` wrote, without dropout and drop path.

    Raises ModelError if the file is missing, damaged, of another kind, or holds a model that timm does not know.
    """
    header, tensors = read_model(path, "classifier", "a classifier that save_classifier wrote")
    checked(path, header, HEADER, needs=("spec", "codebook"))
    spec = ClassifierSpec(**checked(path, header["spec"], SPEC, needs=("name", "arguments")))
    checked(path, spec.arguments, ARGUMENTS)
    if not timm.is_model(spec.name):  # create_model would look for other names on the network
        raise ModelError(f"{path} holds a {spec.name}, expected a model of timm or seitpp.models: update both")
    build = partial(timm.create_model, spec.name, **spec.arguments)
    model = rebuild(path, build, tensors, depth=spec.arguments.get("depth", 0))
    window = tuple(header["window"]) if header.get("window") else None
    multi_label = header.get("multi_label", False)
    return Loaded(model, header["codebook"], header.get("class_names"), spec, window, multi_label)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
