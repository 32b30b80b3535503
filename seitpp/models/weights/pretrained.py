"""Load a trained model from the folder of a run, a model file of this library, or an official checkpoint."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from seitpp.models.mtm import MTM
from seitpp.models.resnet import TokenResNet
from seitpp.models.stem import ModelError, StemAdapter
from seitpp.models.tokenadapt import TokenAdapt
from seitpp.models.vit import SIZES, TokenEmbed
from seitpp.models.weights.classifiers import Loaded, load_classifier, read_model, write_model
from seitpp.models.weights.rebuild import (
    Check,
    checked,
    is_codes,
    is_fraction,
    is_object,
    is_pair,
    is_side,
    is_size,
    is_text,
    one_of,
    optional,
    rebuild,
)
from seitpp.models.weights.release import from_release
from seitpp.tensors import header_keys

AVERAGED = "model_ema.safetensors"  # in the folder of a run, the moving average of the weights
# What the headers of both models of masked token modeling may hold.
ENCODER_SIZE = dict.fromkeys(("embed_dim", "depth", "num_heads"), is_size)
MTM_SETTINGS = {
    "encoder": one_of(*(f"mtm_vit_{size}" for size in SIZES)),
    "grid": is_pair,
    **dict.fromkeys(("code_dim", "decoder_width", "decoder_depth", "decoder_heads"), is_size),
    "num_codes": is_codes,
    "patch_size": is_side,
    "dropout": is_fraction,
    "encoder_size": optional(is_object),
}
TOKENADAPT_SETTINGS = {
    **dict.fromkeys(("grid", "crop"), is_pair),
    **dict.fromkeys(("code_dim", "width", "heads", "mlp"), is_size),
    "num_codes": is_codes,
}
HEADER = {"settings": is_object, "codebook": optional(is_text)}
KINDS = ("mtm", "classifier", "tokenadapt")  # kinds of model files of this library


def save_pretrained(path: Path, model: MTM | TokenAdapt, codebook: str) -> None:
    """Write the weights and settings to one safetensors file; `codebook` is the fingerprint of the codebook."""
    kind = "mtm" if isinstance(model, MTM) else "tokenadapt"
    write_model(path, model, kind=kind, header={"settings": model.settings, "codebook": codebook})


def load_pretrained(path: str | Path, ema: bool = True) -> Loaded:
    """Load the classifier or masked token model at `path`, in eval mode.

    From the folder of a run, model_ema.safetensors is loaded if it exists and `ema` is true, else
    model.safetensors. The codebook and class names of an official checkpoint are unknown (None); the TokenAdapt in
    it is loaded by `load_pretrained_tokenadapt`. Raises ModelError naming the file if it is missing, cannot be
    read, or holds only a TokenAdapt.
    """
    path = model_file(Path(path), ema)
    kind = _own_kind(path)
    if kind == "mtm":
        return load_mtm(path)
    if kind == "classifier":
        return load_classifier(path)
    model = None if kind == "tokenadapt" else from_release(path)
    if model is None or isinstance(model, TokenAdapt):
        raise ModelError(f"{path} holds a TokenAdapt: expected a classifier or a masked token model")
    return Loaded(model)


def load_pretrained_tokenadapt(path: str | Path) -> Loaded:
    """Load the TokenAdapt at `path`, in eval mode; the codebook of an official one is unknown (None).

    `path` is the folder of a tokenadapt_train run, its model file, or an official checkpoint of a TokenAdapt, or
    of an MTM or SeiT++ classifier with its TokenAdapt. Raises ModelError naming the file if there is none in it.
    """
    path = model_file(Path(path), ema=False)
    if _own_kind(path) is None:
        return Loaded(from_release(path, "tokenadapt"))
    return load_tokenadapt(path)


def load_mtm(path: Path) -> Loaded:
    """Load a masked token model that `save_pretrained` wrote.

    Raises ModelError naming the file if it is missing, damaged or of another kind.
    """
    header, tensors = read_model(path, "mtm", "the model.safetensors of a pre-training run")
    settings = _settings(path, header, MTM_SETTINGS)
    size = checked(path, settings.get("encoder_size") or {}, ENCODER_SIZE)
    depth = max(size.get("depth", 0), settings.get("decoder_depth", 0))
    return Loaded(rebuild(path, partial(MTM, **settings), tensors, depth=depth), header["codebook"])


def load_tokenadapt(path: Path) -> Loaded:
    """Load a TokenAdapt that `save_pretrained` wrote.

    Raises ModelError naming the file if it is missing, damaged or of another kind.
    """
    header, tensors = read_model(path, "tokenadapt", "the model.safetensors of a tokenadapt_train run")
    settings = _settings(path, header, TOKENADAPT_SETTINGS)
    return Loaded(rebuild(path, partial(TokenAdapt, **settings), tensors, depth=1), header["codebook"])


def _settings(path: Path, header: object, checks: Mapping[str, Check]) -> dict[str, Any]:
    return checked(path, checked(path, header, HEADER, needs=("settings", "codebook"))["settings"], checks)


def model_file(path: Path, ema: bool = True) -> Path:
    """Return the file that `load_pretrained` loads: in a folder, the moving average if it exists and `ema`."""
    if not path.is_dir():
        return path
    averaged = path / AVERAGED
    return averaged if ema and averaged.is_file() else path / "model.safetensors"


def input_kind(model: nn.Module) -> Literal["ids", "maps", "pixels"]:
    """Return the input of a classifier: ids (B, H, W), maps (B, D, H, W), or images (B, 3, H, W)."""
    stem = getattr(model, "patch_embed", None)
    if isinstance(stem, TokenEmbed):
        return "ids"
    return "maps" if isinstance(stem, StemAdapter) or isinstance(model, TokenResNet) else "pixels"


def input_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the input (height, width) of a ViT, in tokens or pixels; None for a ResNet, which takes any size."""
    return tuple(model.patch_embed.img_size) if isinstance(model, VisionTransformer) else None


def _own_kind(path: Path) -> str | None:
    """Return the kind of a model file of this library, one of KINDS, or None for another file."""
    if not path.is_file():
        raise ModelError(f"no model file at {path}: expected a run's folder or a model file")
    return next((kind for kind in KINDS if kind in header_keys(path)), None)
