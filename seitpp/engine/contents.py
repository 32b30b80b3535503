"""Fingerprints of what a setting points to: stores, models, files and sets of images can be copied and moved."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from seitpp import files
from seitpp.store import layout
from seitpp.store.fingerprint import store_fingerprint

SIZED = 1000  # files of a set of images whose sizes are compared; the names of all are


def content_fingerprint(path: str) -> str | None:
    """Return a fingerprint of the store, the run, the file or the folder at `path`.

    It is that of a store's content, and the SHA-256 of a file or of the model files in the folder of a run. Of any
    other folder, such as a set of images, it covers the names of all files and the sizes of about 1,000 of them;
    of a file of 4 GiB and more its size, its first MiB and its last. Returns None if there is nothing, or for the
    address of a hub or a bucket. Raises StoreError for a damaged store.
    """
    where = Path(path)
    if "://" in path or not os.path.exists(path):  # noqa: PTH110  # False for what can be no path, too
        return None
    if where.is_file():
        return _of_file(where)
    if (where / layout.DOCUMENT).is_file():
        return store_fingerprint(where, layout.read_document(where))
    models = sorted(where.glob("model*.safetensors"))
    if models:
        return _digest(f"{model.name} {files.sha256(model)}" for model in models)
    return _of_listing(where)


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    if size < 4 << 30:
        return files.sha256(path)
    with path.open("rb") as file:
        first = file.read(files.CHUNK)
        file.seek(-files.CHUNK, os.SEEK_END)
        return _digest([str(size), hashlib.sha256(first + file.read()).hexdigest()])


def _of_listing(folder: Path) -> str:
    names = sorted(_names(folder, ""))
    sized = names[:: max(1, len(names) // SIZED)]
    return _digest([*names, *(f"{name} {(folder / name).stat().st_size}" for name in sized)])


def _names(folder: Path, prefix: str) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it, without hidden ones; no link is followed up."""
    with os.scandir(folder) as entries:
        for entry in entries:
            loop = entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve())
            if entry.name.startswith(".") or loop:
                continue
            if entry.is_dir():
                yield from _names(Path(entry.path), f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name


def _digest(lines: Iterator[str] | list[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
