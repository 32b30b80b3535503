"""Files that are there whole or not at all: every durable write of the project goes through this module.

A file is written beside its target, synced, and renamed over it; a folder is filled beside its target, synced
file by file, and renamed. Nothing here imports torch.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from seitpp.errors import UserError

CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """SHA-256 of a file as hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file's or a folder's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write and sync a new file where nobody looks yet: in a folder that is published later."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends. Several processes may do so at the same time."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise
    sync(path.parent)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path` in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors writes 0600
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_json(path: Path, value: object) -> None:
    """Write a JSON file in one step, indented, with a newline at its end."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def publish_folder(staging: Path, target: Path) -> None:
    """Sync every file and folder under `staging`, then rename it to `target`, which must not exist."""
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~_umask())
        sync(path)
    sync(staging)
    staging.rename(target)
    sync(target.parent)


@contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `out` to fill; published as `out` when the with-block ends, removed if it fails.

    Raises UserError if `out` exists.
    """
    target = Path(out).resolve()
    if target.exists():
        raise UserError(f"{target}: exists already and nothing is overwritten; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging / "made"
        publish_folder(staging / "made", target)
    finally:
        remove_folder(staging)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; one that is not there is no error."""
    if path.exists():
        shutil.rmtree(path)


def empty_folder(path: Path) -> None:
    """Make a folder, or remove what is in it."""
    path.mkdir(parents=True, exist_ok=True)
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
