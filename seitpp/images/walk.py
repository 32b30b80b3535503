"""One walk over a folder: image files, packed files, and a count of everything that is left out."""

# ruff: noqa: PTH116, PTH123, SIM905  # os.scandir gives strings, and a path for each file is not needed

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from seitpp.images.decode import ImageError, is_image
from seitpp.images.inventory import LeftOut

# Files with these suffixes are taken for images, and read as what they are when their turn comes.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .avif .avifs .gif .bmp .ppm .pgm .pbm .pnm .tif .tiff .jp2 .j2k .jpx "
    ".jpf .qoi .sgi .rgb .mpo .npy".split()
)
PACKED = (".tar", ".parquet", ".arrow")
# Files with these suffixes lie beside images and are none; other files are known by their content.
TEXT = frozenset(
    ".txt .csv .tsv .json .jsonl .xml .yaml .yml .md .html .htm .pdf .py .sh .log .mat .npz .pkl .pt .pth .h5 "
    ".cls .caption .zip .gz .tgz .rar .7z .db .ini .safetensors .ckpt .mp4 .avi .mov .lock .rst .toml .cfg .ipynb "
    ".eps .ps .svg".split()
)
HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")  # beside names that begin with a dot
HEAD = 4096  # bytes that tell a format
# Splits of a store, and the names that sets give to them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "eval"),
    "test": ("test", "testing"),
}


@dataclass
class Walked:
    """What a folder holds: `files`, the paths of images relative to it with "/", in the order of their parts.

    `folders` are the names of the folders right below it, `packed` the paths of tar, Parquet and Arrow files, and
    `left_out` counts the others.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def is_hidden(name: str) -> bool:
    """Return whether a name is one that file browsers and archivers hide."""
    return name.startswith(".") or name in HIDDEN


def walk(folder: str | Path, seen: Callable[[int], None] | None = None) -> Walked:
    """Walk over a folder once, with `os.scandir`; `seen` is called with the number of images of each folder.

    Hidden names are not entered. A symbolic link to a folder is followed once. A folder that cannot be opened is
    listed like an image that cannot be read. Raises ImageError for a link that leads to a folder around it.
    """
    walked = Walked()
    _walk(str(folder), "", walked, (_identity(str(folder)),), seen or (lambda images: None))
    return walked


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _walk(
    path: str, prefix: str, walked: Walked, above: tuple[tuple[int, int], ...], seen: Callable[[int], None]
) -> None:
    try:
        with os.scandir(path) as entries:
            listed = {entry.name: entry for entry in entries}
    except OSError:
        walked.files.append(prefix.rstrip("/"))  # reading it as an image fails, and says why
        return
    files, append = walked.files, walked.files.append
    start, inside = len(files), 0
    for name in sorted(listed):
        entry = listed[name]
        if name[0] == "." or name in HIDDEN:
            walked.left_out.add("hidden", prefix + name)
        elif _is_folder(entry):
            if not prefix:
                walked.folders.append(name)
            around = above
            if entry.is_symlink() or len(above) == 1:
                identity = _identity(entry.path)
                if identity in above:
                    raise ImageError(
                        f"{entry.path}: a link to a folder that it lies in, so that walking never ends; remove it"
                    )
                around = (*above, identity)
            before = len(files)
            _walk(entry.path, f"{prefix}{name}/", walked, around, seen)
            inside += len(files) - before
        else:
            dot = name.rfind(".")
            suffix = name[dot:].lower() if dot > 0 else ""
            if suffix in SUFFIXES:
                append(prefix + name)
            else:
                _other(entry, prefix + name, suffix, walked)
    seen(len(files) - start - inside)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _other(entry: os.DirEntry, name: str, suffix: str, walked: Walked) -> None:
    """Sort a file without an image's suffix: packed, an image by its content, or left out."""
    if suffix in PACKED:
        walked.packed.append(name)
    elif suffix in TEXT:
        walked.left_out.add(f"{suffix} file", name)
    else:
        try:
            with open(entry.path, "rb") as file:
                head = file.read(HEAD)
        except OSError:
            walked.files.append(name)
            return
        if is_image(head):
            walked.files.append(name)
        else:
            walked.left_out.add(f"{suffix} file" if suffix else "no image by its content", name)


def walk_names(names: Iterable[str]) -> Walked:
    """Sort the relative paths of files as `walk` does, by their names alone."""
    walked, folders = Walked(), set()
    for name in sorted(names, key=lambda name: name.split("/")):
        parts = name.split("/")
        if any(map(is_hidden, parts)):
            walked.left_out.add("hidden", name)
            continue
        folders.update(parts[:-1][:1])
        dot = parts[-1].rfind(".")
        suffix = parts[-1][dot:].lower() if dot > 0 else ""
        if suffix in SUFFIXES:
            walked.files.append(name)
        elif suffix in PACKED:
            walked.packed.append(name)
        else:
            walked.left_out.add(f"{suffix} file" if suffix else "no suffix of an image", name)
    walked.folders = sorted(folders)
    return walked


def store_split(name: str) -> str | None:
    """Return the split of a store that a name means: val is validation. None if it is no usual name of a split."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def find_split(there: Collection[str], split: str) -> str | None:
    """Return the name among `there` that means `split`: itself, or another name of the same split, or None."""
    if split in there:
        return split
    same = [name for name in there if store_split(name) is not None and store_split(name) == store_split(split)]
    return same[0] if len(same) == 1 else None


def looks_like_splits(names: Collection[str]) -> list[str]:
    """Return the names of splits among those of folders, if one is for training and others too, or all are such.

    A single folder called train beside others may well be a class.
    """
    splits = [name for name in names if store_split(name)]
    if "train" not in map(store_split, splits) or (len(splits) == 1 and len(names) > 1):
        return []
    return splits
