"""Augmentation of pixels for training tokenizers."""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from seitpp.augment.keyed import Keys


def crop_and_flip(
    images: UInt8[Tensor, "batch 3 side side"], keys: Keys, size: int
) -> Float32[Tensor, "batch 3 {size} {size}"]:
    """Cut a random window from each square image, flip it with probability 1/2, and scale it to [0, 1].

    There is no resize: it would make the images smoother than those that are tokenized later.
    """
    positions, line = images.shape[-1] - size + 1, torch.arange(size, device=images.device)
    top, left, coin = keys.uniform("crop_and_flip", 3).unbind(dim=1)
    rows = (top * positions).long().unsqueeze(1) + line
    mirrored = torch.where(coin.unsqueeze(1) < 0.5, line, line.flip(0))
    columns = (left * positions).long().unsqueeze(1) + mirrored
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images[batch, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).float() / 255
