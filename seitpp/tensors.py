"""Files of tensors: safetensors with a JSON header, and checkpoints of `torch.save`, loaded without running code.

The caller passes the class of the error to raise. Also the copy of a batch to a device.
"""

import io
import json
import math
import pickletools
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from seitpp.errors import UserError, check_version, reason, refusing
from seitpp.files import BoundedFile, parse_json, replace_bytes

ADVICE = "save its state dict alone, as safetensors, where you trust the file"
VERSION = 1  # of the headers, as a number in each; a reader refuses larger ones, and none is 1
# What a checkpoint may call to make memory of any size; torch allows it, and no state dict does it.
MAKERS = (" bytearray", "Tensor")
NUMBERS = ("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4")  # operations of a pickle
SLACK = 1 << 22  # of the sum of the numbers in a bare pickle, for those that are no sizes
MAGIC = 0x1950A86A20F9469CFC6C  # the number at the beginning of a bare pickle of torch.save


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
    metadata = {key: json.dumps({**header, "version": VERSION})}
    # Its save_file reports a full disk as an error of its own kind, without the number of the system's.
    replace_bytes(path, safetensors.torch.save(copies, metadata))


def load_tensors(
    path: Path, key: str, error: type[UserError], *, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[Any, dict[str, Tensor]]:
    """Load the header under `key`, None if there is none, and the wanted tensors of a safetensors file.

    `wanted` selects tensors by name. Raises `error` with the path if the file cannot be read, or if a newer
    version of this library has written it.
    """
    with (
        undisturbed(),
        refusing(error, f"{path} cannot be read", "a whole safetensors file"),
        safe_open(path, "pt") as file,
    ):
        header = parse_json((file.metadata() or {}).get(key, "null"))
        tensors = {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    if isinstance(header, dict):
        check_version(header.pop("version", 1), VERSION, path=path, error=error)
    return header, tensors


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block.

    While torch makes a tensor of a safetensors file, it turns a KeyboardInterrupt into an error about the file.
    """
    if threading.current_thread() is not threading.main_thread():  # others receive no signals
        yield
        return
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def built_for(tensors: int) -> Iterator[None]:
    """Stop building modules, by a ValueError, as soon as they have far more parameters than a file has tensors.

    A header can ask for any number of layers, which take time even without memory.
    """
    found = 0

    def count(module: nn.Module, name: str, parameter: object) -> None:
        nonlocal found
        found += 1
        if found > 2 * tensors + 100:
            raise ValueError(f"a network of more than {found - 1:,} parameters for {tensors:,} tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def header_keys(path: Path) -> set[str]:
    """Return the metadata keys of a safetensors file; an empty set for another kind of file."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.metadata() or {})
    except SafetensorError:
        return set()


def is_checkpoint(path: Path) -> bool:
    """Whether a file starts like one of `torch.save`: a zip archive or a bare pickle.

    The first bytes of a safetensors file are the size of its header, which may look like either.
    """
    with path.open("rb") as file:
        start = file.read(9)
    safe = start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    return start[:2] in (b"PK", b"\x80\x02") and not safe


def load_checkpoint(
    path: Path, error: type[UserError], *, harmless: tuple[type, ...] = (), advice: str = ADVICE
) -> Any:
    """Load a `torch.save` file of tensors, plain containers and numbers, and instances of the classes `harmless`.

    Nothing else is unpickled, and tensors of a zip archive are read from disk only when they are used. Raises
    `error` with the path and `advice` if the file is damaged, holds anything else, is compressed, or asks for more
    memory than its size.
    """
    try:
        archive = zipfile.is_zipfile(path)
        (_check_archive if archive else _check_bare)(path)
        with torch.serialization.safe_globals(list(harmless)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        for tensor in _tensors_in(content):
            _check_dense(tensor)
        return content
    except MemoryError:
        raise
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
    lines = str(problem).strip().splitlines()
    line = next((line for line in lines if "WeightsUnpickler error" in line), lines[0] if lines else "")
    return line.split(". Please use")[0].strip() or reason(problem)


def _tensors_in(content: Any) -> Iterator[Tensor]:
    """Yield each tensor of nested containers, also of some that hold themselves or one part many times."""
    seen, waiting = set(), [content]
    while waiting:
        part = waiting.pop()
        if torch.is_tensor(part):
            yield part
        elif isinstance(part, Mapping | list | tuple) and id(part) not in seen:
            seen.add(id(part))
            waiting += part.values() if isinstance(part, Mapping) else part


def _check_dense(tensor: Tensor) -> None:
    """Raise ValueError for a tensor that has more values than its file: a copy of it could fill the memory."""
    if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} that is not stored as such")


def _check_archive(path: Path) -> None:
    """Raise ValueError for a zip archive that torch.save does not write, and which could fill the memory."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed entries")
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                _check_pickle(io.BytesIO(archive.read(name)), most=math.inf)


def _check_bare(path: Path) -> None:
    """Raise ValueError for a bare pickle of torch.save that names far more values than its file can have.

    The number of values of each tensor is in it, and torch makes memory for them before it reads any.
    """
    with BoundedFile(path) as file:
        for _ in range(5):  # the magic number, two pickles about versions, the content, the names of its tensors
            _check_pickle(file, most=16 * file.size + SLACK)


def _check_pickle(file: BinaryIO, *, most: float) -> None:
    """Read the operations of one pickle, without executing any, and raise ValueError if it asks for memory.

    `most` is for the sum of its numbers.
    """
    total = 0
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL" and argument.endswith(MAKERS):
            raise ValueError(f"a call of {argument}")
        if operation.name in NUMBERS and argument != MAGIC:
            total += abs(argument)
        if total > most:
            raise ValueError("numbers of values that are larger than the file")
