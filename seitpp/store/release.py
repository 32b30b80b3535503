"""Import and export of the released token files of SeiT.

NAME-token.data.bin.gz    gzip of one byte stream: the escape-coded images, one after the other
NAME-token.index.npy.gz   gzip of an .npy file: (N + 1,) integers, the start of each image and the end of the last
NAME-label.txt            a class id on each line
codebook.ckpt             torch.save of a plain (K, D) float32 tensor

The files are not trusted: nothing but a tensor is unpickled, the labels bound the size of the index and the index
that of the stream before these are decompressed, and only one image of the stream is in memory at a time.
"""

import gzip
import io
import math
import os
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64
from tqdm import tqdm

from seitpp import codec as codecs
from seitpp.errors import UserError
from seitpp.files import new_folder, write_file
from seitpp.store import layout
from seitpp.store.reader import TokenStore
from seitpp.store.writer import StoreWriter

DATA, INDEX, LABELS = "-token.data.bin.gz", "-token.index.npy.gz", "-label.txt"
CODEBOOK = "codebook.ckpt"
ADVICE = f"use the {CODEBOOK} of the release"
# Other files of the release, which are not imported: synonyms follow from the codebook, and the tokenizer is a
# pickle that needs its source code.
LEFT_OUT = ("synonyms.json", "tokenizer.ckpt")
# Last word of NAME: name of the split.
SPLITS = {"train": "train", "val": "validation"}

ESCAPE = 255
BATCH_TOKENS = 2**21
LINE = 64  # bytes; longer than any label
NPY_HEADER = 2**14


class Plan(NamedTuple):
    """The files of a split; image i is the bytes offsets[i] : offsets[i + 1] of the decompressed file `data`."""

    data: Path
    grid: tuple[int, int]
    offsets: Int64[np.ndarray, " offsets"]
    labels: Int64[np.ndarray, " images"]


Source = str | os.PathLike[str]


class ReleaseError(UserError):
    """Raised for missing, damaged or inconsistent released files, and for a store that they cannot represent."""


def import_release(
    source: Source | Sequence[Source],
    out: str | os.PathLike[str],
    *,
    grid: tuple[int, int] | None = None,
    codec: str = "ans",
) -> Path:
    """Convert released files to the store `out`, a new folder, and return its absolute path.

    source: the folder of the files, or NAME-token.data.bin.gz files, each in one folder with its index and its
    labels, the first also with codebook.ckpt. If NAME ends in the word "train" or "val", the split is "train" or
    "validation", else NAME with "_" for special characters. grid: (height, width) in tokens, square by default.
    Raises ReleaseError that names the file and the image; `out` is not created then.
    """
    releases = _find(source)
    codebook = read_codebook(next(iter(releases.values())).parent / CODEBOOK)
    # All cheap checks come before the first image.
    plans = {split: _plan(data, grid, len(codebook)) for split, data in releases.items()}
    with new_folder(out) as folder:
        for split, plan in plans.items():
            with StoreWriter(folder, codebook=codebook, grid=plan.grid, codec=codec, split=split) as writer:
                for ids, labels in _batches(plan, len(codebook), split):
                    writer.add_batch(ids, labels)
    return Path(out).resolve()


def export_release(store: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write every split of `store` as released files into `out`, a new folder, and return its absolute path.

    The released format cannot represent class names, tokenizer and additional columns: they are omitted.
    Raises ReleaseError if images have different grids, StoreError for a damaged store and for images without a
    label or with several; `out` is not created then.
    """
    import torch

    from seitpp.tensors import checkpoint_bytes

    document = layout.read_document(Path(store))
    if document["grid"] is None:
        raise ReleaseError(f"{store}: got images of different grids, expected one grid; tokenize them at one size")
    if layout.version_of(document) > 2:
        raise ReleaseError(
            f"{store}: tokens of several digits or a sequence, expected a grid of ids; keep the store"
        )
    with new_folder(out) as folder:
        folder.mkdir()
        for split in document["splits"]:
            source = TokenStore(store, split)
            source.require_classes("a released file")
            _write_split(source, folder)
        codebook = layout.load_codebook(Path(store) / layout.CODEBOOK)
        write_file(folder / CODEBOOK, checkpoint_bytes(torch.from_numpy(codebook.copy())))
    return Path(out).resolve()


def _find(source: Source | Sequence[Source]) -> dict[str, Path]:
    """Return {split: data file}, the training split first, since the codec uses the counts of the first split."""
    sources = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(path) for path in source]
    paths = [path for item in sources for path in (sorted(item.glob(f"*{DATA}")) if item.is_dir() else [item])]
    for path in paths:
        if not path.name.endswith(DATA) or not path.is_file():
            raise ReleaseError(f"{path}: expected a file NAME{DATA}, or the folder of such files")
    if not paths:
        raise ReleaseError(f"{sources[0]}: no file NAME{DATA} there; name the folder of the release")
    releases: dict[str, Path] = {}
    for path in paths:
        split = _split_name(path.name.removesuffix(DATA))
        if split in releases:
            raise ReleaseError(
                f"{releases[split]} and {path}: both are the split {split!r}; import them separately"
            )
        releases[split] = path
    return dict(sorted(releases.items(), key=lambda item: item[0] != "train"))


def _split_name(name: str) -> str:
    return SPLITS.get(re.split(r"[-_.]", name)[-1], re.sub(r"[^A-Za-z0-9_]", "_", name))


def _beside(data: Path, suffix: str) -> Path:
    path = data.with_name(data.name.removesuffix(DATA) + suffix)
    if not path.is_file():
        raise ReleaseError(f"{path}: missing, expected beside {data.name}; download it")
    return path


def _plan(data: Path, grid: tuple[int, int] | None, num_codes: int) -> Plan:
    """Read the labels, then the index, whose length they determine, and check the lengths of all images."""
    labels = _read_labels(_beside(data, LABELS))
    offsets = _read_index(_beside(data, INDEX), len(labels))
    grid = grid or _square(data, offsets, num_codes)
    _check_lengths(data, offsets, math.prod(grid), num_codes)
    return Plan(data, grid, offsets, labels)


def _batches(plan: Plan, num_codes: int, title: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids (n, H, W) uint16 and labels (n,) with a progress bar; the end of the stream is checked last."""
    rows = max(1, BATCH_TOKENS // math.prod(plan.grid))
    # A second iterator over tqdm would close the progress bar.
    images = iter(tqdm(_images(plan, num_codes), title, len(plan.labels), unit=" images", disable=None))
    for start in range(0, len(plan.labels), rows):
        ids = np.stack(list(islice(images, rows)))
        yield ids.reshape(-1, *plan.grid), plan.labels[start : start + rows]
    next(images, None)


def _read_labels(path: Path) -> np.ndarray:
    """Read class ids, (N,) int64. Raises ReleaseError that names the first invalid line."""
    labels = array("q")
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, LINE), b""), 1):
            text = line.strip()
            if not text.isdigit() or len(text) > 18:
                raise ReleaseError(f"{path}, line {number}: got {line[:24]!r}, expected a class id, 0 or more")
            labels.append(int(text))
    if not labels:
        raise ReleaseError(f"{path}: empty, expected a class id on each line")
    return np.array(labels, np.int64)


def _read_index(path: Path, images: int) -> np.ndarray:
    """Read (images + 1,) int64 offsets, from 0, strictly increasing. Raises ReleaseError for anything else."""
    limit = NPY_HEADER + 8 * (images + 1)
    try:
        with gzip.open(path) as stream:
            raw = stream.read(limit + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ReleaseError(f"{path}: damaged gzip file ({error}); download it again") from error
    shape, dtype, start = _npy_header(path, raw)
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ReleaseError(f"{path}: got {dtype} {shape}, expected a 1-D array of integers")
    if shape[0] != images + 1:
        raise ReleaseError(
            f"{path}: {shape[0] - 1} images, but the labels are {images}; take files of the same release"
        )
    if len(raw) != start + shape[0] * dtype.itemsize:
        raise ReleaseError(f"{path}: shorter or longer than its {shape[0]} offsets; download it again")
    offsets = np.frombuffer(raw, dtype, offset=start).astype(np.int64)
    if offsets[0] != 0:
        raise ReleaseError(f"{path}: starts at {offsets[0]}, expected 0; download it again")
    wrong = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if wrong.size:
        image = wrong[0]
        raise ReleaseError(
            f"{path}, image {image}: bytes {offsets[image]} to {offsets[image + 1]}, expected a later end; "
            "download it again"
        )
    return offsets


def _npy_header(path: Path, raw: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Parse the header of an .npy file: shape, dtype and length of the header. The array is not read."""
    stream = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except Exception as error:  # numpy parses the header as Python source, which fails in many ways
        reason = str(error).strip().splitlines()[:1]
        raise ReleaseError(f"{path}: holds no .npy array ({' '.join(reason)}); download it again") from error
    return shape, dtype, stream.tell()


def _square(data: Path, offsets: np.ndarray, num_codes: int) -> tuple[int, int]:
    """Infer the grid of square images from the first image: every byte but an escape ends a token."""
    longest = codecs.MAX_TOKENS * _longest_token(num_codes)
    if offsets[1] > longest:
        raise ReleaseError(f"{data}, image 0: {offsets[1]} bytes by its index, expected at most {longest}")
    with _unpacking(data, "image 0"), gzip.open(data) as stream:
        payload = np.frombuffer(stream.read(int(offsets[1])), np.uint8)
    tokens = int(np.count_nonzero(payload != ESCAPE))
    side = math.isqrt(tokens)
    if side == 0 or side * side != tokens:
        raise ReleaseError(
            f"{data}, image 0: {tokens} tokens, which is no square; name the grid if the images are not square, "
            "else download the file again"
        )
    return side, side


def _longest_token(num_codes: int) -> int:
    return 1 + (num_codes - 1) // ESCAPE


def _check_lengths(data: Path, offsets: np.ndarray, tokens: int, num_codes: int) -> None:
    """Check, before anything is decompressed, that the bytes of each image can hold its tokens."""
    lengths, longest = np.diff(offsets), tokens * _longest_token(num_codes)
    wrong = np.flatnonzero((lengths < tokens) | (lengths > longest))
    if wrong.size:
        image = wrong[0]
        raise ReleaseError(
            f"{_beside(data, INDEX)}, image {image}: {lengths[image]} bytes, expected {tokens} .. {longest} for "
            f"{tokens} tokens of {num_codes} codes; take files of the same release"
        )


@contextmanager
def _unpacking(data: Path, where: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise ReleaseError(f"{data}, {where}: damaged gzip file ({error}); download it again") from error


def _images(plan: Plan, num_codes: int) -> Iterator[np.ndarray]:
    """Yield the (H * W,) uint16 ids of each image. Raises ReleaseError that names a damaged image."""
    codec, tokens = codecs.build("escape", num_codes), math.prod(plan.grid)
    data, _, offsets, _ = plan
    with gzip.open(data) as stream:
        for image, length in enumerate(np.diff(offsets)):
            with _unpacking(data, f"image {image}"):
                payload = stream.read(int(length))
            if len(payload) < length:
                raise ReleaseError(f"{data}, image {image}: the stream ends before it; download it again")
            try:
                ids = codec.decode(payload, tokens)
            except codecs.CodecError as error:
                raise ReleaseError(f"{data}, image {image}: {error}; take files of the same release") from error
            yield ids
        with _unpacking(data, "after the last image"):
            rest = stream.read(1)
        if rest:
            raise ReleaseError(
                f"{data}: goes on after byte {offsets[-1]}, where its index ends; take files of the same release"
            )


def read_codebook(path: Path) -> Float32[np.ndarray, "codes dim"]:
    """Read a codebook from the codebook.ckpt of a release or the codebook.safetensors of a store.

    Raises ReleaseError or StoreError unless the file is one of these; nothing but a plain tensor is unpickled.
    """
    if not path.is_file():
        raise ReleaseError(f"{path}: missing, expected a {CODEBOOK} or a {layout.CODEBOOK}; download it")
    return layout.load_codebook(path) if path.suffix == ".safetensors" else _read_tensor(path)


def _read_tensor(path: Path) -> np.ndarray:
    import torch

    from seitpp.tensors import load_checkpoint

    tensor = load_checkpoint(path, ReleaseError, advice=ADVICE)
    if not isinstance(tensor, torch.Tensor):
        raise ReleaseError(
            f"{path}: holds a {type(tensor).__name__}, expected a tensor (codes, dimension); {ADVICE}"
        )
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype == torch.float32
    # A tensor with a stride of 0 may be larger than its storage.
    if not plain or tensor.ndim != 2 or tensor.numel() * 4 > tensor.untyped_storage().nbytes():
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ReleaseError(f"{path}: holds {got}, expected a plain float32 tensor (codes, dimension); {ADVICE}")
    return tensor.detach().contiguous().numpy()


def _write_split(store: TokenStore, folder: Path) -> None:
    codec = codecs.build("escape", store.num_codes)
    name = {split: name for name, split in SPLITS.items()}.get(store.split, store.split)
    ends = array("q", [0])
    with gzip.GzipFile(folder / (name + DATA), "wb", compresslevel=6, mtime=0) as stream:
        for ids, _ in tqdm(store, desc=store.split, unit=" images", disable=None):
            payload = codec.encode(ids.ravel())
            stream.write(payload)
            ends.append(ends[-1] + len(payload))
    with gzip.GzipFile(folder / (name + INDEX), "wb", compresslevel=6, mtime=0) as stream:
        np.save(stream, np.array(ends, np.int64), allow_pickle=False)
    write_file(folder / (name + LABELS), "".join(f"{label}\n" for label in store.labels.tolist()).encode())
