"""Ids <-> vectors, for whole batches on their device."""

import hashlib

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from seitpp.tokenizers.base import nearest

__all__ = ["codebook_fingerprint", "embed", "nearest"]


def embed(ids: Tensor, codebook: Tensor) -> Tensor:
    """Ids (B, H, W) of any integer dtype, codebook (K, D) -> map (B, D, H, W), a channels-last view."""
    return F.embedding(ids.long(), codebook).permute(0, 3, 1, 2)


def codebook_fingerprint(codebook: np.ndarray) -> str:
    """SHA-256 of a codebook (K, D) as hex: ids mean the same only under equal fingerprints."""
    rows = np.ascontiguousarray(codebook, dtype="<f4")
    return hashlib.sha256(f"{rows.shape}".encode() + rows.tobytes()).hexdigest()
