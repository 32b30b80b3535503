"""Views of pixels, for models that are fine-tuned from tokens to images."""

import torch
from torch import Tensor, nn

from seitpp.augment.keyed import Keys
from seitpp.augment.maps import centre_window, crop_resize, random_resized_boxes
from seitpp.augment.mix import Mix, SoftLabels

# Of ImageNet's pixels, as timm's models take them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PixelView(nn.Module):
    """Random resized crop, horizontal flip, CutMix and Mixup of images, each draw one image's own.

    `size` side of the crop in pixels; `scale` range of the crop's share of the image; `cutmix` and `mixup` the
    alphas of their Beta laws, 0: none.
    """

    def __init__(
        self, size: int, scale: tuple[float, float] = (0.08, 1.0), cutmix: float = 1.0, mixup: float = 0.8
    ):
        super().__init__()
        self.size, self.scale, self.mix = size, scale, Mix(cutmix, mixup)

    def forward(self, images: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, SoftLabels]:
        """(B, 3, H, W) uint8, (B,) int64, keys of the B images -> (B, 3, size, size) normalised, mixed labels."""
        boxes = random_resized_boxes(keys, images.shape[-2:], self.scale)
        cropped = crop_resize(images.float() / 255, boxes, self.size)
        mirrored = (keys.uniform("flip", 1) < 0.5).view(-1, 1, 1, 1)
        return self.mix(normalised(torch.where(mirrored, cropped.flip(3), cropped)), labels, keys)

    def extra_repr(self) -> str:
        return f"random resized crop, size={self.size}, scale={self.scale}; flip p=0.5"


class EvalPixelView(nn.Module):
    """The central `size` x `size` pixels, normalised."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 3, size, size) float."""
        return normalised(centre_window(images, (self.size, self.size)).float() / 255)

    def extra_repr(self) -> str:
        return f"central window, size={self.size}"


def normalised(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] less ImageNet's mean, divided by its deviation, channel by channel."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std
