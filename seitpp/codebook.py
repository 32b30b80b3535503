"""What an id means: rows of the codebook, looked up and found again, for whole batches on their device."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Cells of the token x code similarity matrix that are held at once: 64 MiB in fp32 on a CPU, else 512 MiB, so that
# a device is not given its work in pieces.
LOOKUP_CELLS, DEVICE_LOOKUP_CELLS = 1 << 24, 1 << 27
LOOKUPS = ("cosine", "euclidean")


def embed(ids: Tensor, codebook: Tensor) -> Tensor:
    """Ids (B, H, W) of any integer dtype, codebook (K, D) -> map (B, D, H, W), a channels-last view."""
    return F.embedding(ids.long(), codebook).permute(0, 3, 1, 2)


def nearest(maps: Tensor, codebook: Tensor, lookup: str = "cosine") -> Tensor:
    """Ids of the code nearest to each vector.

    `maps` (B, D, H, W) float, `codebook` (K, D) float -> (B, H, W) int64. "cosine": the largest cosine
    similarity, both sides L2-normalized (SeiT release); "euclidean": the smallest distance. Always fp32, since
    half precision changes ids, and in chunks, so that the token x code matrix stays bounded. Among equals the
    smallest id.
    """
    batch, dim, height, width = maps.shape
    with full_precision(maps.device):
        vectors = maps.detach().float().permute(0, 2, 3, 1).reshape(-1, dim)
        rows = codebook.detach().float()
        if lookup == "cosine":
            vectors, rows = F.normalize(vectors, dim=1), F.normalize(rows, dim=1)
            offsets = rows.new_zeros(())
        else:  # |z - c|^2 is smallest where z c - |c|^2 / 2 is largest; |z|^2 would only cost digits
            offsets = rows.square().sum(dim=1) / -2
        cells = LOOKUP_CELLS if maps.device.type == "cpu" else DEVICE_LOOKUP_CELLS
        chunks = vectors.split(max(1, cells // len(rows)))
        ids = torch.cat([torch.addmm(offsets, chunk, rows.T).argmax(dim=1) for chunk in chunks])
    return ids.view(batch, height, width)


def synonyms(codebook: Tensor, n: int = 5) -> Tensor:
    """The n codes nearest to each code by Euclidean distance, nearest first, never itself (SeiT, Token-EDA).

    `codebook` (K, D) float -> (K, min(n, K - 1)) int64. Distances are those of fp32 differences, not of a matrix
    product, whose rounding would reorder codes that lie close together.
    """
    rows = codebook.detach().float()
    itself = torch.arange(len(rows), device=rows.device)
    found = []
    for chunk in itself.split(max(1, LOOKUP_CELLS // len(rows))):
        distances = torch.cdist(rows[chunk], rows, compute_mode="donot_use_mm_for_euclid_dist")
        distances[chunk - chunk[0], chunk] = torch.inf
        found.append(distances.topk(min(n, len(rows) - 1), largest=False).indices)
    return torch.cat(found)


def codebook_fingerprint(codebook: np.ndarray) -> str:
    """SHA-256 of a codebook (K, D) as hex: ids mean the same only under equal fingerprints."""
    rows = np.ascontiguousarray(codebook, dtype="<f4")
    return hashlib.sha256(f"{rows.shape}".encode() + rows.tobytes()).hexdigest()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast and TF32 off: half precision changes ids (fp16 0.2 % of them, bf16 1.9 %)."""
    if torch.compiler.is_compiling():  # a graph cannot change the TF32 flags
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
    """Both settings, by the older names unless somebody has used the newer ones: torch refuses a mix."""
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
