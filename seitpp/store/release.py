"""SeiT's released token files, in and out.

NAME-token.data.bin.gz    gzip of one byte stream: the escape-coded images, one after the other
NAME-token.index.npy.gz   gzip of an .npy file: (N + 1,) integers, where each image begins and the last one ends
NAME-label.txt            a class id on each line
codebook.ckpt             torch.save of a bare (K, D) float32 tensor

Files of others are hostile until shown otherwise: nothing is unpickled but a tensor, what is decompressed is
bounded by what the other files say (labels -> index -> stream), and only an image at a time is held of the stream.
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
from tqdm import tqdm

from seitpp import codec as codecs
from seitpp.errors import UserError
from seitpp.files import new_folder
from seitpp.store import layout
from seitpp.store.reader import TokenStore
from seitpp.store.writer import StoreWriter

DATA, INDEX, LABELS = "-token.data.bin.gz", "-token.index.npy.gz", "-label.txt"
CODEBOOK = "codebook.ckpt"
# Beside them in the release. Synonyms follow from the codebook; the tokenizer is a pickle that needs its source.
LEFT_OUT = ("synonyms.json", "tokenizer.ckpt")
# Last word of NAME -> split.
SPLITS = {"train": "train", "val": "validation"}

ESCAPE = 255
BATCH_TOKENS = 2**21
LINE = 64  # longer than any label
NPY_HEADER = 2**14


class Plan(NamedTuple):
    """Image i of a split is bytes offsets[i] .. offsets[i + 1] of the stream in `data`: an H x W `grid` of ids."""

    data: Path
    grid: tuple[int, int]
    offsets: np.ndarray
    labels: np.ndarray


Source = str | os.PathLike[str]


class ReleaseError(UserError):
    """Released files that are missing, damaged, or do not go together; a store that they cannot hold."""


def import_release(
    source: Source | Sequence[Source],
    out: str | os.PathLike[str],
    *,
    grid: tuple[int, int] | None = None,
    codec: str = "ans",
) -> Path:
    """Make the store `out`, a new folder, of released files; its absolute path.

    source: the folder of the files, or the NAME-token.data.bin.gz files, each with its index and labels beside it
    and codebook.ckpt beside the first. NAME is or ends in "train" or "val", else the split is called NAME.
    grid: (height, width); without it images are square.
    Raises ReleaseError naming file and image; nothing of `out` is left then.
    """
    releases = _find(source)
    codebook = read_codebook(next(iter(releases.values())).parent / CODEBOOK)
    # All that is cheap to check comes before the first image.
    plans = {split: _plan(data, grid, len(codebook)) for split, data in releases.items()}
    with new_folder(out) as made:
        for split, plan in plans.items():
            with StoreWriter(made, codebook=codebook, grid=plan.grid, codec=codec, split=split) as writer:
                for ids, labels in _batches(plan, len(codebook), split):
                    writer.add_batch(ids, labels)
    return Path(out).resolve()


def export_release(store: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write every split of the folder `store` as released files into `out`, a new folder; its absolute path.

    Class names, tokenizer and other columns have no place in these files.
    Raises ReleaseError for images of different grids, StoreError for a damaged store; `out` is not made then.
    """
    import torch

    document = layout.read_document(Path(store))
    if document["grid"] is None:
        raise ReleaseError(f"{store}: its images have different grids, released files hold one for all")
    with new_folder(out) as made:
        made.mkdir()
        for split in document["splits"]:
            _write_split(TokenStore(store, split), made)
        codebook = layout.read_codebook(Path(store), document)
        torch.save(torch.from_numpy(codebook.copy()), made / CODEBOOK)
    return Path(out).resolve()


def _find(source: Source | Sequence[Source]) -> dict[str, Path]:
    """Split -> its data file, the training split first, since the codec's table is made of the first."""
    given = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(path) for path in source]
    found = [path for item in given for path in (sorted(item.glob(f"*{DATA}")) if item.is_dir() else [item])]
    for path in found:
        if not path.name.endswith(DATA) or not path.is_file():
            raise ReleaseError(f"{path}: expected a file NAME{DATA}, or the folder of such files")
    if not found:
        raise ReleaseError(f"{given[0]}: no file NAME{DATA} there; name the folder of the release")
    releases: dict[str, Path] = {}
    for path in found:
        split = _split_name(path.name.removesuffix(DATA))
        if split in releases:
            raise ReleaseError(f"{releases[split]} and {path}: both are the split {split!r}; import them apart")
        releases[split] = path
    return dict(sorted(releases.items(), key=lambda item: item[0] != "train"))


def _split_name(name: str) -> str:
    return SPLITS.get(re.split(r"[-_.]", name)[-1], re.sub(r"[^A-Za-z0-9_]", "_", name))


def _beside(data: Path, suffix: str) -> Path:
    path = data.with_name(data.name.removesuffix(DATA) + suffix)
    if not path.is_file():
        raise ReleaseError(f"{path}: missing, expected beside {data.name}")
    return path


def _plan(data: Path, grid: tuple[int, int] | None, num_codes: int) -> Plan:
    """Labels, then the index, whose length they bound, then the lengths of the images, which the index bounds."""
    labels = _read_labels(_beside(data, LABELS))
    offsets = _read_index(_beside(data, INDEX), len(labels))
    grid = grid or _square(data, offsets, num_codes)
    _check_lengths(data, offsets, math.prod(grid), num_codes)
    return Plan(data, grid, offsets, labels)


def _batches(plan: Plan, num_codes: int, title: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids (n, H, W) uint16 and labels (n,), with a progress bar; at the end the stream's checksum is compared."""
    rows = max(1, BATCH_TOKENS // math.prod(plan.grid))
    # One iterator, since each further one would close the bar.
    images = iter(tqdm(_images(plan, num_codes), title, len(plan.labels), unit=" images", disable=None))
    for start in range(0, len(plan.labels), rows):
        ids = np.stack(list(islice(images, rows)))
        yield ids.reshape(-1, *plan.grid), plan.labels[start : start + rows]
    next(images, None)


def _read_labels(path: Path) -> np.ndarray:
    """(N,) int64 class ids. Raises ReleaseError naming the line that is none."""
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
    """(images + 1,) int64 offsets, from 0, strictly increasing. Raises ReleaseError for anything else."""
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
        raise ReleaseError(f"{path}: not as long as its {shape[0]} offsets; download it again")
    offsets = np.frombuffer(raw, dtype, offset=start).astype(np.int64)
    if offsets[0] != 0:
        raise ReleaseError(f"{path}: starts at {offsets[0]}, expected 0; download it again")
    falling = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if falling.size:
        at = falling[0]
        raise ReleaseError(
            f"{path}, image {at}: bytes {offsets[at]} to {offsets[at + 1]}, expected a later end; download it"
        )
    return offsets


def _npy_header(path: Path, raw: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and length of the header of an .npy file. Nothing is allocated, and no object is made."""
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
    """The grid of square images with as many tokens as the first has: all bytes but the escapes end a token."""
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
    """Before anything is decompressed: no image may claim more or fewer bytes than its tokens can take."""
    lengths, longest = np.diff(offsets), tokens * _longest_token(num_codes)
    wrong = np.flatnonzero((lengths < tokens) | (lengths > longest))
    if wrong.size:
        at = wrong[0]
        raise ReleaseError(
            f"{_beside(data, INDEX)}, image {at}: {lengths[at]} bytes, expected {tokens} .. {longest} for "
            f"{tokens} tokens of {num_codes} codes; take files of the same release"
        )


@contextmanager
def _unpacking(data: Path, where: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise ReleaseError(f"{data}, {where}: damaged gzip file ({error}); download it again") from error


def _images(plan: Plan, num_codes: int) -> Iterator[np.ndarray]:
    """The (H * W,) uint16 ids of each image. Raises ReleaseError naming the image where the stream is damaged."""
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


def read_codebook(path: Path) -> np.ndarray:
    """(K, D) float32, of the release's codebook.ckpt or of a store's codebook.safetensors.

    Raises ReleaseError or StoreError unless the file is one of these; nothing is unpickled but a bare tensor.
    """
    if not path.is_file():
        raise ReleaseError(f"{path}: missing, expected a released {CODEBOOK} or a store's {layout.CODEBOOK}")
    return layout.load_codebook(path) if path.suffix == ".safetensors" else _read_tensor(path)


def _read_tensor(path: Path) -> np.ndarray:
    import torch

    from seitpp.tensors import load_checkpoint

    tensor = load_checkpoint(path, ReleaseError, advice=f"take the {CODEBOOK} of the release")
    if not isinstance(tensor, torch.Tensor):
        raise ReleaseError(f"{path}: holds a {type(tensor).__name__}, expected a bare tensor (codes, dimension)")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype == torch.float32
    # A tensor with a stride of 0 claims more than the file holds.
    if not plain or tensor.ndim != 2 or tensor.numel() * 4 > tensor.untyped_storage().nbytes():
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ReleaseError(f"{path}: holds {got}, expected a plain float32 tensor (codes, dimension)")
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
    (folder / (name + LABELS)).write_text("".join(f"{label}\n" for label in store.labels.tolist()))
