"""Augmentations of pixels, for the training of tokenizers."""

import torch
from torch import Tensor

from seitpp.augment.keyed import Keys


def crop_and_flip(images: Tensor, keys: Keys, size: int) -> Tensor:
    """A random window of (B, 3, side, side) uint8, mirrored or not -> (B, 3, size, size) float in [0, 1].

    Pixels are taken as they are: a resize would train on smoother images than are tokenized later.
    """
    places, line = images.shape[-1] - size + 1, torch.arange(size, device=images.device)
    top, left, coin = keys.uniform("crop_and_flip", 3).unbind(dim=1)
    rows = (top * places).long().unsqueeze(1) + line
    mirrored = torch.where(coin.unsqueeze(1) < 0.5, line, line.flip(0))
    columns = (left * places).long().unsqueeze(1) + mirrored
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images[batch, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).float() / 255
