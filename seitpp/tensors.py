"""Files of tensors: safetensors with a JSON header, and checkpoints of `torch.save`, loaded without running code.

The caller passes the class of the error to raise. Also the copy of a batch to a device.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seitpp.errors import UserError
from seitpp.files import replace_bytes

ADVICE = "save its state dict alone, as safetensors, where you trust the file"
ERRORS = (SafetensorError, json.JSONDecodeError, UnicodeDecodeError)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for the copy if the memory is pinned.

    For the GPU of a Mac it waits, since the copy may else read memory that is in other use by then
    (pytorch/pytorch#189690), and uint16, which this GPU does not have (pytorch/pytorch#159076), becomes int32.
    """
    if torch.device(device).type == "mps":
        return (tensor.int() if tensor.dtype == torch.uint16 else tensor).to(device)
    return tensor.to(device, non_blocking=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, key: str, header: Mapping[str, Any]) -> None:
    """Write tensors, and a JSON `header` under `key` of the metadata, as one safetensors file, atomically."""
    # Cloned, since safetensors rejects tensors that share memory (as those of a deep copy can).
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    # Its save_file reports a full disk as an error of its own kind, without the number of the system's.
    replace_bytes(path, safetensors.torch.save(copies, {key: json.dumps(header)}))


def load_tensors(
    path: Path, key: str, error: type[UserError], *, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[Any, dict[str, Tensor]]:
    """Load the header under `key`, None if there is none, and the wanted tensors of a safetensors file.

    `wanted` selects tensors by name. Raises `error` with the path if the file cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(key, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except ERRORS as problem:
        raise error(f"{path} cannot be read: {problem}: expected a whole safetensors file") from problem
    return header, tensors


def header_keys(path: Path) -> set[str]:
    """Return the metadata keys of a safetensors file; an empty set for another kind of file."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.metadata() or {})
    except SafetensorError:
        return set()


def is_checkpoint(path: Path) -> bool:
    """Whether a file starts like one of `torch.save`: a zip archive or a bare pickle."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def load_checkpoint(
    path: Path, error: type[UserError], *, harmless: tuple[type, ...] = (), advice: str = ADVICE
) -> Any:
    """Load a `torch.save` file of tensors, plain containers and numbers, and instances of the classes `harmless`.

    Nothing else is unpickled, and tensors of a zip archive are read from disk only when they are used. Raises
    `error` with the path and `advice` if the file is damaged, holds anything else, or is compressed.
    """
    try:
        archive = zipfile.is_zipfile(path)
        if archive:
            _check_stored(path)
        with torch.serialization.safe_globals(list(harmless)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        for tensor in _tensors_in(content):
            _check_dense(tensor)
        return content
    except Exception as problem:  # a damaged or malicious pickle can raise any exception
        raise error(
            f"{path} cannot be read as plain tensors, and is not unpickled since that could run code "
            f"({_reason(problem)}): {advice}"
        ) from problem


def checkpoint_bytes(content: Any) -> bytes:
    """Return the file of `torch.save`, which reports a full disk as an error of its own kind."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_state_dict(path: Path, error: type[UserError], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Load the wanted tensors of a `torch.save` file: those under `state_dict` if there is one (Lightning), else
    all.

    `wanted` selects tensors by name. Raises `error` as `load_checkpoint`, and if the file holds no state dict.
    """
    content = load_checkpoint(path, error)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict):
        raise error(f"{path}: got a {type(tensors).__name__}, expected a state dict: {ADVICE}")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(name, str) and wanted(name) and torch.is_tensor(tensor)
    }


def _reason(problem: Exception) -> str:
    """The line of torch's message that says what was rejected, without its advice to trust the file."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    line = next((line for line in lines if "WeightsUnpickler error" in line), lines[0])
    return line.split(". Please use")[0].strip()


def _tensors_in(content: Any) -> Iterator[Tensor]:
    if torch.is_tensor(content):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors_in(part)


def _check_dense(tensor: Tensor) -> None:
    """Raise ValueError for a tensor that has more values than its file: a copy of it could fill the memory."""
    if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} that is not stored as such")


def _check_stored(path: Path) -> None:
    """Raise ValueError for a compressed archive: torch.save never compresses, so it could be a zip bomb."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed entries")
