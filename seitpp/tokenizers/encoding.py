"""From decoded images of any sizes to ids."""

import numpy as np
import torch

from seitpp.images.batches import DecodedBatch
from seitpp.tokenizers.base import Tokenizer


def encode(tokenizer: Tokenizer, decoded: DecodedBatch, device: torch.device) -> list[np.ndarray]:
    """Ids (h, w) uint16 of every image; images of the same size go through the tokenizer together."""
    parts = decoded.pixels.split([3 * height * width for height, width in decoded.sizes])
    ids = {}
    for size in dict.fromkeys(decoded.sizes):
        same = [number for number, other in enumerate(decoded.sizes) if other == size]
        images = torch.stack([parts[number].view(3, *size) for number in same]).to(device, non_blocking=True)
        with tokenizer.at_size(size):
            encoded = tokenizer.encode(images.float() / 255).cpu().numpy().astype(np.uint16)
        ids.update(zip(same, encoded, strict=True))
    return [ids[number] for number in range(len(parts))]
