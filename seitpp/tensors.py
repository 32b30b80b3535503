"""Files of tensors: safetensors with a JSON header, and checkpoints of others, read without running code.

Whoever reads names the class of the error, so that it is one of their own.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seitpp.errors import UserError
from seitpp.files import replace_file

ADVICE = "save its state dict alone, as safetensors, where you trust the file"
ERRORS = (SafetensorError, json.JSONDecodeError, UnicodeDecodeError)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], key: str, header: Mapping[str, Any]) -> None:
    """Write tensors, and under `key` a `header` of anything JSON can hold, as one file, whole or not at all."""
    # Clones, since safetensors refuses tensors that share memory (as those of a deep copy can).
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    metadata = {key: json.dumps(header)}
    replace_file(path, lambda temporary: save_file(copies, temporary, metadata))


def load_tensors(
    path: Path, key: str, error: type[UserError], wanted: Callable[[str], bool] = lambda name: True
) -> tuple[Any, dict[str, Tensor]]:
    """The header under `key`, None without one, and the wanted tensors of a safetensors file.

    Raises `error` naming the file if it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(key, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except ERRORS as problem:
        raise error(f"{path} cannot be read: {problem}") from problem
    return header, tensors


def header_keys(path: Path) -> set[str]:
    """The keys of the headers of a safetensors file; none where it is another kind of file."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.metadata() or {})
    except SafetensorError:
        return set()


def is_checkpoint(path: Path) -> bool:
    """Whether a file looks like one of `torch.save` (a zip archive or a bare pickle), by its first bytes."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def load_checkpoint(
    path: Path, error: type[UserError], *, harmless: tuple[type, ...] = (), advice: str = ADVICE
) -> Any:
    """What `torch.save` wrote: tensors, plain containers and numbers, and instances of the classes `harmless`.

    Nothing else is unpickled, and tensors are read from disk as they are used, where the file allows it. Raises
    `error` naming the file, with `advice`, if it is damaged, holds anything else, or would unpack to more than its
    own size.
    """
    try:
        archive = zipfile.is_zipfile(path)
        if archive:
            _check_stored(path)
        with torch.serialization.safe_globals(list(harmless)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as problem:  # a damaged or hostile pickle can end in any of them
        raise error(
            f"{path} cannot be read as plain tensors, and is not unpickled since that could run code "
            f"({_reason(problem)}): {advice}"
        ) from problem


def load_state_dict(path: Path, error: type[UserError], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors of a file of `torch.save`: under `state_dict` if it has one (Lightning), or its own.

    Only these are read from disk. Raises `error` as `load_checkpoint`, and where there is no state dict.
    """
    content = load_checkpoint(path, error)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict):
        raise error(f"{path} holds a {type(tensors).__name__}, expected a state dict")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(name, str) and wanted(name) and torch.is_tensor(tensor)
    }


def _reason(problem: Exception) -> str:
    """One line of what torch says: what it met, rather than that it may be trusted."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    line = next((line for line in lines if "WeightsUnpickler error" in line), lines[0])
    return line.split(". Please use")[0].strip()


def _check_stored(path: Path) -> None:
    """torch.save never compresses, so a file unpacks to no more than its own size unless it is a bomb."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed entries")
