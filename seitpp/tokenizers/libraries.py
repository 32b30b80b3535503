"""Tokenizers of diffusers, transformers and Cosmos, from the folders in which they are distributed.

The libraries are imported when such a folder is loaded. Nothing is unpickled, and nothing is downloaded.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seitpp.errors import refusing
from seitpp.files import parse_json
from seitpp.tensors import built_for, load_state_dict, load_tensors
from seitpp.tokenizers.adapters import NETWORK, Adapter, ChameleonVQ, DiffusersVQ, Emu3VQ, JanusVQ, TorchScriptVQ
from seitpp.tokenizers.base import HEADER, TokenizerError, TokenizerSpec, fp32_copies, require_equal_shapes

DIFFUSERS, COSMOS = "diffusers", "cosmos"
DIFFUSERS_CLASS = "VQModel"
WEIGHTS = "diffusion_pytorch_model"  # begin of the names of weights of diffusers
INSIDE = "vqmodel."  # prefix of the tokenizer's tensors in a language model of transformers
COSMOS_FILES = ("encoder.jit", "decoder.jit")
PROBE = 64  # side in pixels of the image that shows the patch of a TorchScript encoder


class Family(NamedTuple):
    """A tokenizer of transformers: the name of its class there, and its adapter."""

    network: str
    adapter: Callable[[Any], Adapter]


FAMILIES = {
    "chameleon": Family("ChameleonVQVAE", ChameleonVQ),
    "emu3": Family("Emu3VQVAE", Emu3VQ),
    "janus": Family("JanusVQVAE", JanusVQ),
}
SAVED = ("diffusers_vq", *(f"{kind}_vq" for kind in FAMILIES))  # kinds in headers of saved adapters


def kind_of_folder(folder: Path) -> str | None:
    """Return what a folder holds: "diffusers", "chameleon", "emu3", "janus" or "cosmos", else None."""
    if (folder / COSMOS_FILES[0]).exists():
        return COSMOS
    if _vq_folder(folder):
        return DIFFUSERS
    model_type = str(_config(folder).get("model_type", ""))
    return next((kind for kind in FAMILIES if model_type.split("_")[0] == kind), None)


def load_diffusers(path: Path) -> Adapter:
    """Load a `VQModel` from its folder, the folder of a pipeline that has one, or the weights in its folder.

    Raises TokenizerError if diffusers is not installed, or if the folder is incomplete.
    """
    folder = path if path.is_dir() else path.parent
    if (vq := _vq_folder(folder)) is None:
        raise TokenizerError(f"{folder}: no config.json of a diffusers {DIFFUSERS_CLASS}: name its folder")
    names = [path.name] if path.is_file() else sorted(file.name for file in vq.glob(f"{WEIGHTS}*"))
    name = next((name for name in names if name.endswith(".safetensors")), names[0] if names else "")
    if not name.startswith(f"{WEIGHTS}."):
        raise TokenizerError(f"{vq}: no weights named {WEIGHTS}: save the model by save_pretrained()")
    if name.endswith(".safetensors"):
        _, tensors = load_tensors(vq / name, HEADER, TokenizerError)
    else:
        tensors = load_state_dict(vq / name, TokenizerError, lambda _: True)
    network = _network(DIFFUSERS, _config(vq), path, tensors=len(tensors))
    with _loading(path):
        network._fix_state_dict_keys_on_load(tensors)  # which were other ones in older versions
    return _adapter(DIFFUSERS, _filled(network, tensors, path), path)


def load_transformers(path: Path, kind: str) -> Adapter:
    """Load the tokenizer of a family from its own folder, or from that of the whole language model.

    Raises TokenizerError if transformers is not installed, or if the folder is another one or incomplete.
    """
    folder = path if path.is_dir() else path.parent
    config, found = _config(folder), kind_of_folder(folder)
    if found != kind:
        raise TokenizerError(f"{folder}: expected the config.json of a transformers {FAMILIES[kind].network}")
    whole = "vq_config" in config
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_tensors(file, HEADER, TokenizerError, wanted=lambda name: not whole or INSIDE in name)[1]
    for file in [] if tensors else sorted(folder.glob("pytorch_model*.bin")):
        tensors |= load_state_dict(file, TokenizerError, lambda name: not whole or INSIDE in name)
    tensors = {name.split(INSIDE, 1)[-1]: tensor for name, tensor in tensors.items()}
    network = _network(kind, config["vq_config"] if whole else config, path, tensors=len(tensors))
    return _adapter(kind, _filled(network, tensors, path), path)


def load_cosmos(path: Path) -> Adapter:
    """Load a discrete image tokenizer of Cosmos, encoder.jit and decoder.jit, from its folder.

    TorchScript is code, which runs: the caller must have been told to trust the folder. Raises TokenizerError if
    a file is missing or cannot be run.
    """
    folder = path if path.is_dir() else path.parent
    with _loading(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch advises against TorchScript
            encoder, decoder = (torch.jit.load(folder / name, map_location="cpu") for name in COSMOS_FILES)
        weights = [*encoder.parameters(), *encoder.buffers()]
        dtype = next((tensor.dtype for tensor in weights if tensor.is_floating_point()), torch.float32)
        with torch.no_grad():
            output = encoder(torch.zeros(1, 3, PROBE, PROBE, dtype=dtype))
        ids = output if isinstance(output, Tensor) else output[0]
        patch = PROBE // ids.shape[-1]
    return TorchScriptVQ(encoder, decoder, patch=patch)


def rebuild(header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Adapter:
    """Rebuild an adapter from the header and the tensors of a file that it saved.

    Raises TokenizerError if the library is not installed, or if the file is incomplete.
    """
    spec = TokenizerSpec.from_json({key: value for key, value in header.items() if key != NETWORK})
    kind = spec.kind.removesuffix("_vq")
    weights = {name[len("model.") :]: part for name, part in tensors.items() if name.startswith("model.")}
    network = _network(kind, header.get(NETWORK) or {}, path, tensors=len(weights))
    return _adapter(kind, _filled(network, weights, path), path).restore(spec, tensors, str(path))


def _vq_folder(folder: Path) -> Path | None:
    """The folder itself if it holds a VQModel, or the one within the folder of a pipeline that does."""
    folders = [folder, *sorted(part for part in folder.iterdir() if part.is_dir())]
    return next((part for part in folders if _config(part).get("_class_name") == DIFFUSERS_CLASS), None)


def _config(folder: Path) -> dict[str, Any]:
    """The content of config.json; empty if there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    with refusing(TokenizerError, f"{file} cannot be read as JSON", "the config of a network"):
        values = parse_json(file.read_bytes())
    return values if isinstance(values, dict) else {}


def _library(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise TokenizerError(f"{path} needs {name}, which cannot be imported: pip install {name}") from problem


def _network(kind: str, config: Mapping[str, Any], path: Path, *, tensors: int) -> nn.Module:
    """The network of a config for a file of so many tensors, without memory for its weights."""
    library = _library("diffusers" if kind == DIFFUSERS else "transformers", path)
    with _loading(path), torch.device("meta"), built_for(tensors):
        if kind == DIFFUSERS:
            return library.VQModel.from_config(dict(config))
        name = FAMILIES[kind].network
        made = getattr(library, f"{name}Config")
        # Its own settings alone: those of every network of transformers can name code, or files of the hub.
        own = made().to_dict().keys() - library.PreTrainedConfig().to_dict().keys()
        return getattr(library, name)(made(**{key: value for key, value in config.items() if key in own}))


def _adapter(kind: str, network: nn.Module, path: Path) -> Adapter:
    with _loading(path):
        return DiffusersVQ(network) if kind == DIFFUSERS else FAMILIES[kind].adapter(network)


def _filled(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    require_equal_shapes(network.state_dict(), tensors, f"{path} is not a complete {type(network).__name__}")
    network.load_state_dict(fp32_copies(tensors), assign=True)
    return network


def _loading(path: Path) -> AbstractContextManager[None]:
    return refusing(TokenizerError, f"{path} cannot be loaded", "what its library saved")
