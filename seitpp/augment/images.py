"""Augmentation of pixels for training tokenizers."""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from seitpp.augment.keyed import Keys


def crop_and_flip(
    images: UInt8[Tensor, "batch channels any_height any_width"], keys: Keys, size: int | tuple[int, int]
) -> Float32[Tensor, "batch channels height width"]:
    """Cut a random window of `size` from each image, flip it with probability 1/2, and scale it to [0, 1].

    `size` is (height, width) in pixels, or one side of a square.

    There is no resize: it would make the images smoother than those that are tokenized later.
    """
    sides = (size, size) if isinstance(size, int) else size
    down, across = (torch.arange(side, device=images.device) for side in sides)
    below, beside = (whole - side + 1 for whole, side in zip(images.shape[2:], sides, strict=True))
    top, left, coin = keys.uniform("crop_and_flip", 3).unbind(dim=1)
    rows = (top * below).long().unsqueeze(1) + down
    mirrored = torch.where(coin.unsqueeze(1) < 0.5, across, across.flip(0))
    columns = (left * beside).long().unsqueeze(1) + mirrored
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images[batch, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).float() / 255
