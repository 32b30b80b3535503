"""One door to every trained model: a run's folder, a model file of ours, an official checkpoint."""

from pathlib import Path
from typing import Literal

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from seitpp.models.mtm import MTM
from seitpp.models.resnet import TokenResNet
from seitpp.models.stem import ModelError, StemAdapter
from seitpp.models.tokenadapt import TokenAdapt
from seitpp.models.vit import TokenEmbed
from seitpp.models.weights.classifiers import Loaded, load_classifier, read_model, write_model
from seitpp.models.weights.release import from_release
from seitpp.tensors import header_keys

AVERAGED = "model_ema.safetensors"  # in a run's folder, the moving average of the weights
KINDS = ("mtm", "classifier", "tokenadapt")  # of our own files


def save_pretrained(path: Path, model: MTM | TokenAdapt, codebook: str) -> None:
    """Write weights and settings as one safetensors file; `codebook` is the fingerprint of the codebook."""
    kind = "mtm" if isinstance(model, MTM) else "tokenadapt"
    write_model(path, kind, model, {"settings": model.settings, "codebook": codebook})


def load_pretrained(path: str | Path, ema: bool = True) -> Loaded:
    """The classifier or masked token model at `path`, in eval mode.

    A folder is that of a run: its model_ema.safetensors, if there is one and `ema`, else its model.safetensors.
    Of an official checkpoint the codebook and the names of the classes are unknown (None); a TokenAdapt that it
    carries is left to `load_pretrained_tokenadapt`. Raises ModelError naming the file if there is none, if it
    cannot be read, or if it is a TokenAdapt alone.
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
    """The TokenAdapt at `path`; of an official one the codebook is not known.

    `path` is the folder of a tokenadapt_train run, its file, or an official checkpoint: of TokenAdapt alone, or of
    an MTM or SeiT++ classifier that carries one. Raises ModelError naming the file if there is none in it.
    """
    path = model_file(Path(path), ema=False)
    if _own_kind(path) is None:
        return Loaded(from_release(path, "tokenadapt"))
    return load_tokenadapt(path)


def load_mtm(path: Path) -> Loaded:
    """A model that `save_pretrained` wrote.

    Raises ModelError naming the file if it is missing, damaged or of another kind.
    """
    header, tensors = read_model(path, "mtm", "the model.safetensors of a pre-training run")
    model = MTM(**header["settings"])
    model.load_state_dict(tensors)
    return Loaded(model.eval(), header["codebook"])


def load_tokenadapt(path: Path) -> Loaded:
    """A model that `save_pretrained` wrote.

    Raises ModelError naming the file if it is missing, damaged or of another kind.
    """
    header, tensors = read_model(path, "tokenadapt", "the model.safetensors of a tokenadapt_train run")
    model = TokenAdapt(**header["settings"])
    model.load_state_dict(tensors)
    return Loaded(model.eval(), header["codebook"])


def model_file(path: Path, ema: bool = True) -> Path:
    """The file that `load_pretrained` takes: of a run's folder the moving average, if there is one and `ema`."""
    if not path.is_dir():
        return path
    averaged = path / AVERAGED
    return averaged if ema and averaged.is_file() else path / "model.safetensors"


def input_kind(model: nn.Module) -> Literal["ids", "maps", "pixels"]:
    """What a classifier is given: ids (B, H, W), maps (B, D, H, W), or images (B, 3, H, W)."""
    stem = getattr(model, "patch_embed", None)
    if isinstance(stem, TokenEmbed):
        return "ids"
    return "maps" if isinstance(stem, StemAdapter) or isinstance(model, TokenResNet) else "pixels"


def input_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) of a ViT's input, in its cells: tokens or pixels. None for a ResNet, which takes any."""
    return tuple(model.patch_embed.img_size) if isinstance(model, VisionTransformer) else None


def _own_kind(path: Path) -> str | None:
    """One of KINDS, or None for a file that no model here has written."""
    if not path.is_file():
        raise ModelError(f"no model file at {path}: expected a run's folder or a model file")
    return next((kind for kind in KINDS if kind in header_keys(path)), None)
