"""Ids <-> vectors, for whole batches on their device."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seitpp.tokenizers.base import LOOKUP_CELLS, nearest

__all__ = ["codebook_fingerprint", "embed", "nearest", "synonyms"]


def embed(ids: Tensor, codebook: Tensor) -> Tensor:
    """Ids (B, H, W) of any integer dtype, codebook (K, D) -> map (B, D, H, W), a channels-last view."""
    return F.embedding(ids.long(), codebook).permute(0, 3, 1, 2)


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
