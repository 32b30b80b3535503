"""Load tokenizers of every kind, those of seitpp and those of other projects, from a file or a folder."""

import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from seitpp.errors import refusing, suggest
from seitpp.tensors import is_checkpoint, load_checkpoint, load_tensors
from seitpp.tokenizers import dct, feature_kmeans, libraries, patch_kmeans, refined, vit_vqgan, vqgan
from seitpp.tokenizers.base import HEADER, Tokenizer, TokenizerError, TokenizerSpec, require_equal_shapes
from seitpp.tokenizers.dct import PatchDCT
from seitpp.tokenizers.feature_kmeans import FeatureKMeans
from seitpp.tokenizers.patch_kmeans import PatchKMeans
from seitpp.tokenizers.refined import RefinedPatchKMeans
from seitpp.tokenizers.vit_vqgan import ViTVQGAN
from seitpp.tokenizers.vqgan import VQGAN

Kind = Literal[
    "patch_kmeans",
    "patch_dct",
    "patch_kmeans_refined",
    "feature_kmeans",
    "vit_vqgan",
    "diffusers",
    "chameleon",
    "emu3",
    "janus",
    "taming",
    "mage",
    "llamagen",
    "cosmos",
]
KINDS: tuple[str, ...] = get_args(Kind)
OWN = {patch_kmeans.KIND: PatchKMeans, dct.KIND: PatchDCT, refined.KIND: RefinedPatchKMeans}
LIBRARIES = (libraries.DIFFUSERS, *libraries.FAMILIES)
# Keys under which training scripts keep the weights: averaged ones first.
NESTS = ("ema", "state_dict", "model")
# What these checkpoints hold besides tensors: a class of Lightning, used as a key, for which an empty class stands
# in, and the arguments of a training script.
HARMLESS = (
    type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"}),
    Namespace,
)


def load(name_or_path: str | Path, kind: str | None = None) -> Tokenizer:
    """Load a tokenizer in eval mode, and in fp32 unless it is TorchScript.

    | kind | file or folder |
    |---|---|
    | `patch_kmeans`, `patch_dct`, `patch_kmeans_refined` | a file that `save` wrote |
    | `feature_kmeans` | a file that `save` wrote |
    | `vit_vqgan` | a file that `save` wrote, or a checkpoint of enhancing-transformers |
    | `diffusers` | the folder of a VQModel or of a pipeline that has one, or the weights in it |
    | `chameleon`, `emu3`, `janus` | the folder of the VQVAE of transformers, or of the whole model |
    | `taming`, `mage`, `llamagen` | a checkpoint of a VQGAN |
    | `cosmos` | a folder with encoder.jit and decoder.jit |

    The kind is found from the file unless it is given. TorchScript is code and is loaded only if `kind` is
    "cosmos". Raises TokenizerError, which names the file, if it is missing or damaged, holds anything else, or
    has values that are not finite.
    """
    tokenizer = _load(Path(name_or_path), kind)
    if not all(torch.isfinite(table).all() for table in tokenizer.books.tables):
        raise TokenizerError(f"{name_or_path}: a codebook with values that are not finite; name another file")
    for name, tensor in tokenizer.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise TokenizerError(f"{name_or_path}: {name} has values that are not finite; name another file")
    return tokenizer


def _load(path: Path, kind: str | None) -> Tokenizer:
    if kind is not None and kind not in KINDS:
        near = suggest(kind, KINDS)
        raise TokenizerError(f"unknown kind of tokenizer {kind!r}: expected one of {_kinds()}{near}")
    if not path.exists():
        raise TokenizerError(f"no tokenizer file at {path}: expected a file or a folder of {_kinds()}")
    if kind is None and (path.is_dir() or _beside_config(path)):
        kind = libraries.kind_of_folder(path if path.is_dir() else path.parent)
        if kind is None and path.is_dir():
            raise TokenizerError(f"{path}: holds no known tokenizer, expected one of {_kinds()}")
        if kind == libraries.COSMOS:
            raise _is_code(path)
    if kind == libraries.COSMOS:
        return libraries.load_cosmos(path)
    if path.is_file() and not (kind in LIBRARIES and _beside_config(path)):
        return _load_file(path, kind)
    if kind == libraries.DIFFUSERS:
        return libraries.load_diffusers(path)
    if kind in libraries.FAMILIES:
        return libraries.load_transformers(path, kind)
    raise TokenizerError(f"{path} is a folder: expected the file of a {kind} tokenizer")


def _load_file(path: Path, kind: str | None) -> Tokenizer:
    header, tensors = _read(path)
    found = _kind_of(header, tensors)
    if found is None or kind not in (None, found.removesuffix("_vq")):
        says = f"its header says {header.get('kind')!r}" if header else "its header says None"
        raise TokenizerError(f"{path} holds no known tokenizer: {says}, expected one of {kind or _kinds()}")
    if found == feature_kmeans.KIND:
        return FeatureKMeans.rebuild(header, tensors, path)
    if found == vit_vqgan.KIND:
        return ViTVQGAN.from_tensors(tensors, header, path)
    if found in vqgan.KINDS:
        return VQGAN.rebuild(header, tensors, path) if header else VQGAN.from_tensors(tensors, path)
    if found in libraries.SAVED:
        return libraries.rebuild(header, tensors, path)
    return _own(TokenizerSpec.from_json(header), tensors, path)


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The header of a file, None for a checkpoint, and its tensors, with the names of the network itself."""
    if not is_checkpoint(path):
        header, tensors = load_tensors(path, HEADER, TokenizerError)
        if header is not None and not isinstance(header, dict):
            raise TokenizerError(f"{path}: its header is a {type(header).__name__}, expected that of a tokenizer")
        return header, tensors
    if _is_torchscript(path):
        raise _is_code(path)
    content = load_checkpoint(path, TokenizerError, harmless=HARMLESS)
    for key in NESTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: got a {type(content).__name__}, expected a state dict of a tokenizer")
    return None, {key: part for key, part in content.items() if isinstance(key, str) and isinstance(part, Tensor)}


def _kind_of(header: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> str | None:
    if header:
        known = (*OWN, feature_kmeans.KIND, vit_vqgan.KIND, *vqgan.KINDS, *libraries.SAVED)
        return header["kind"] if header.get("kind") in known else None
    return vit_vqgan.KIND if vit_vqgan.CODEBOOK in tensors else vqgan.kind_of(tensors)


def _beside_config(path: Path) -> bool:
    """Whether a file is that of a library, which keeps its config in the same folder."""
    return (
        path.stem.split(".")[0] in (libraries.WEIGHTS, "model", "pytorch_model")
        and (path.parent / "config.json").exists()
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with (
        refusing(TokenizerError, f"{path} cannot be read", "a whole zip archive"),
        zipfile.ZipFile(path) as archive,
    ):
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _is_code(path: Path) -> TokenizerError:
    return TokenizerError(
        f"{path} is TorchScript, which is code: if you trust it, name its kind (--tokenizer-kind cosmos)"
    )


def _kinds() -> str:
    return ", ".join(KINDS)


def _own(spec: TokenizerSpec, tensors: dict[str, Tensor], path: Path) -> Tokenizer:
    make = OWN[spec.kind]
    complaint = f"{path} is not a complete {spec.kind} tokenizer"
    if spec.code_dim < 2:
        raise TokenizerError(f"{complaint}: codes of dimension {spec.code_dim}, expected 2 or more")
    with refusing(TokenizerError, complaint, "one that can be built by its header"):
        with torch.device("meta"):  # nothing is allocated unchecked, since the header can claim any size
            require_equal_shapes(make(spec).state_dict(), tensors, complaint)
        tokenizer = make(spec)
        tokenizer.load_state_dict(tensors)
    if not (tokenizer.scale > 0).all():
        raise TokenizerError(f"{complaint}: a scale of {tokenizer.scale.min().item()}, expected more than 0")
    return tokenizer.eval()
