"""Tokenizer files: safetensors with the spec in the header; checkpoints of others only without unpickling."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seitpp.files import replace_file
from seitpp.tokenizers.base import Tokenizer, TokenizerError

HEADER = "tokenizer"  # the key of the spec in the safetensors metadata


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write one safetensors file with the spec in its header, whole or not at all."""
    # Clones, since safetensors refuses tensors that share memory (as those of a deep copy can).
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tokenizer.state_dict().items()}
    metadata = {HEADER: json.dumps(asdict(tokenizer.spec))}
    replace_file(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


def is_checkpoint(path: Path) -> bool:
    """Whether a file looks like one of `torch.save` (a zip archive or a bare pickle), by its first bytes."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def read_safetensors(path: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The spec in the header ({} without one) and the wanted tensors. Raises TokenizerError naming the file."""
    try:
        with safe_open(path, "pt") as file:
            spec = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}") from error
    if not isinstance(spec, dict):
        raise TokenizerError(f"{path} cannot be read as a tokenizer: its header holds {spec!r}")
    return spec, tensors


def read_checkpoint(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors of a file of `torch.save`: under `state_dict` if it has one (Lightning), or its own.

    Nothing is unpickled but tensors and plain containers, and only the wanted tensors are read from disk.
    Raises TokenizerError naming the file if it is damaged or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile pickle can end in any of them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenizerError(
            f"{path} cannot be read as a checkpoint of plain tensors, and is not unpickled since that could run "
            f"code ({reason}): save its state dict alone, as safetensors, where you trust the file"
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict):
        raise TokenizerError(f"{path} holds a {type(tensors).__name__}, expected a state dict of a tokenizer")
    return {
        name: t for name, t in tensors.items() if isinstance(name, str) and wanted(name) and torch.is_tensor(t)
    }
