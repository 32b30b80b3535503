"""Lookups in the codebook for whole batches on their device: ids to vectors, and vectors to the nearest ids."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Integer
from torch import Tensor

# Size of a chunk of the token x code similarity matrix: 64 MiB in fp32 on a CPU; 512 MiB on other devices, where
# many small chunks would be slow.
LOOKUP_CELLS, DEVICE_LOOKUP_CELLS = 1 << 24, 1 << 27
LOOKUPS = ("cosine", "euclidean")


def embed(
    ids: Integer[Tensor, "batch height width"], codebook: Float[Tensor, "codes dim"]
) -> Float[Tensor, "batch dim height width"]:
    """Return the code vectors of the ids as maps, channels-last in memory."""
    return F.embedding(ids.long(), codebook).permute(0, 3, 1, 2)


def nearest(
    maps: Float[Tensor, "batch dim height width"], codebook: Float[Tensor, "codes dim"], lookup: str = "cosine"
) -> Int64[Tensor, "batch height width"]:
    """Return the id of the code nearest to each vector; of equally near codes, the smallest id.

    `lookup` "cosine": the largest cosine similarity, both sides L2-normalized (SeiT release); "euclidean": the
    smallest distance. Computed in fp32, since half precision changes ids, and in chunks, which limits the memory
    for the token x code matrix.
    """
    batch, dim, height, width = maps.shape
    with full_precision(maps.device):
        vectors = maps.detach().float().permute(0, 2, 3, 1).reshape(-1, dim)
        rows = codebook.detach().float()
        if lookup == "cosine":
            vectors, rows = F.normalize(vectors, dim=1), F.normalize(rows, dim=1)
            offsets = rows.new_zeros(())
        else:  # |z - c|^2 is smallest where z c - |c|^2 / 2 is largest; adding |z|^2 would only lose precision
            offsets = rows.square().sum(dim=1) / -2
        cells = LOOKUP_CELLS if maps.device.type == "cpu" else DEVICE_LOOKUP_CELLS
        chunks = vectors.split(max(1, cells // len(rows)))
        ids = torch.cat([torch.addmm(offsets, chunk, rows.T).argmax(dim=1) for chunk in chunks])
    return ids.view(batch, height, width)


def synonyms(codebook: Float[Tensor, "codes dim"], n: int = 5) -> Int64[Tensor, "codes neighbors"]:
    """Return the n other codes nearest to each code by Euclidean distance, nearest first (SeiT, Token-EDA).

    There are at most K - 1 of them. Distances are computed from fp32 differences, not by a matrix product, whose
    rounding would change the order of codes that are close together.
    """
    rows = codebook.detach().float()
    codes = torch.arange(len(rows), device=rows.device)
    neighbors = []
    for chunk in codes.split(max(1, LOOKUP_CELLS // len(rows))):
        distances = torch.cdist(rows[chunk], rows, compute_mode="donot_use_mm_for_euclid_dist")
        distances[chunk - chunk[0], chunk] = torch.inf
        neighbors.append(distances.topk(min(n, len(rows) - 1), largest=False).indices)
    return torch.cat(neighbors)


def codebook_fingerprint(codebook: Float[np.ndarray, "codes dim"]) -> str:
    """Return the SHA-256 of a codebook as hex: ids have the same meaning only if their fingerprints are equal."""
    rows = np.ascontiguousarray(codebook, dtype="<f4")
    return hashlib.sha256(f"{rows.shape}".encode() + rows.tobytes()).hexdigest()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn autocast and TF32 off in a with-block: half precision changes ids (fp16 0.2 % of them, bf16 1.9 %)."""
    if torch.compiler.is_compiling():  # a compiled graph cannot change the TF32 flags
        with torch.autocast(device.type, enabled=False):
            yield
        return
    before = _tf32_settings()
    _set_tf32(("ieee", "ieee") if isinstance(before[0], str) else (False, False))
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _set_tf32(before)


def _tf32_settings() -> tuple:
    """Both settings, by the old names unless the new ones are in use: torch raises an error if they are mixed."""
    try:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


def _set_tf32(settings: tuple) -> None:
    matmul, convolution = settings
    if isinstance(matmul, str):
        torch.backends.cuda.matmul.fp32_precision = matmul
        torch.backends.cudnn.conv.fp32_precision = convolution
    else:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = convolution
