"""Tokenize batches of decoded images that differ in size."""

import numpy as np
import torch
from torch import Tensor

from seitpp.images.batches import DecodedBatch
from seitpp.tensors import to_device
from seitpp.tokenizers.base import Tokenizer


def encode(tokenizer: Tokenizer, decoded: DecodedBatch, device: torch.device) -> list[np.ndarray]:
    """Return the ids (H, W) or (Q, H, W) uint16 of each image. Images of equal size are encoded together.

    The images must have the channels of the tokenizer.
    """
    channels = tokenizer.spec.channels
    if len(set(decoded.sizes)) == 1:  # no copy of the pixels, since they are one tensor already
        return list(_encode(tokenizer, decoded.pixels.view(-1, channels, *decoded.sizes[0]), device))
    parts = decoded.pixels.split([channels * height * width for height, width in decoded.sizes])
    ids = {}
    for size in dict.fromkeys(decoded.sizes):
        indices = [index for index, other in enumerate(decoded.sizes) if other == size]
        images = torch.stack([parts[index].view(channels, *size) for index in indices])
        ids.update(zip(indices, _encode(tokenizer, images, device), strict=True))
    return [ids[index] for index in range(len(parts))]


def _encode(tokenizer: Tokenizer, images: Tensor, device: torch.device) -> np.ndarray:
    """Return the ids (B, H, W) or (B, Q, H, W) uint16 of images (B, C, height, width) uint8."""
    height, width = images.shape[2:]
    with tokenizer.at_size((height, width)):
        return tokenizer.encode(to_device(images, device).float() / 255).cpu().numpy().astype(np.uint16)
