"""Tokenize batches of decoded images that differ in size."""

import numpy as np
import torch

from seitpp.images.batches import DecodedBatch
from seitpp.tensors import to_device
from seitpp.tokenizers.base import Tokenizer


def encode(tokenizer: Tokenizer, decoded: DecodedBatch, device: torch.device) -> list[np.ndarray]:
    """Return the ids (H, W) uint16 of each image. Images of equal size are encoded together.

    The images must have the channels of the tokenizer.
    """
    channels = tokenizer.spec.channels
    parts = decoded.pixels.split([channels * height * width for height, width in decoded.sizes])
    ids = {}
    for size in dict.fromkeys(decoded.sizes):
        indices = [index for index, other in enumerate(decoded.sizes) if other == size]
        images = to_device(torch.stack([parts[index].view(channels, *size) for index in indices]), device)
        with tokenizer.at_size(size):
            encoded = tokenizer.encode(images.float() / 255).cpu().numpy().astype(np.uint16)
        ids.update(zip(indices, encoded, strict=True))
    return [ids[index] for index in range(len(parts))]
