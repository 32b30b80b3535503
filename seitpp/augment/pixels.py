"""Views of pixels, for models that are fine-tuned from tokens to images.

The crops come from the loader (`augment.boxes`); what follows is made of whole batches on their device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seitpp.augment.keyed import Keys
from seitpp.augment.mix import Mix, SoftLabels

# Of ImageNet's pixels, as timm's models take them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# 3-Augment (DeiT III, arXiv 2204.07118), its strengths from the authors' published code and commands.
SOLARIZE_THRESHOLD = 128 / 255
BLUR_SIGMA = (0.1, 2.0)  # in pixels
BLUR_RADIUS = 6  # taps on either side: three deviations of the strongest blur
JITTER = 0.3
BRIGHTNESS, CONTRAST, SATURATION = range(3)


class PixelView(nn.Module):
    """Horizontal flip, 3-Augment, CutMix and Mixup of cropped images, each draw one image's own.

    `cutmix` and `mixup` are the alphas of their Beta laws, 0: none; `three_augment` turns that off or on.
    """

    def __init__(self, cutmix: float = 1.0, mixup: float = 0.0, three_augment: bool = True):
        super().__init__()
        self.three_augment, self.normalize, self.mix = three_augment, EvalPixelView(), Mix(cutmix, mixup)

    def forward(self, images: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, SoftLabels]:
        """(B, 3, H, W) uint8, (B,) int64, keys of the B images -> (B, 3, H, W) float32 normalized, mixed labels.

        Raises PairingError, if anything is mixed.
        """
        flipped = (keys.uniform("flip", 1) < 0.5).view(-1, 1, 1, 1)
        images = torch.where(flipped, images.flip(3), images).float() / 255
        if self.three_augment:
            images = three_augment(images, keys)
        return self.mix(self.normalize.standardize(images), labels, keys)

    def extra_repr(self) -> str:
        return f"flip p=0.5, three_augment={self.three_augment}"


class EvalPixelView(nn.Module):
    """Images less ImageNet's mean, divided by its deviation, channel by channel."""

    def __init__(self):
        super().__init__()
        # Buffers lie on the device already: constants made in a step would be copied there, and waited for.
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> the same shape, float32 normalized."""
        return self.standardize(images.float() / 255)

    def standardize(self, images: Tensor) -> Tensor:
        """The same of (B, 3, H, W) float in [0, 1]."""
        return (images - self.mean) / self.std


def three_augment(images: Tensor, keys: Keys) -> Tensor:
    """Gray, solarized or blurred, one of the three for each image; then color jitter (DeiT III, 3-Augment).

    `images` (B, 3, H, W) float in [0, 1], keys of the same B images -> the same shape and range.
    """
    which, strength = keys.uniform("three_augment", 2).unbind(dim=1)
    which = (3 * which).long().view(-1, 1, 1, 1)
    blurred = gaussian_blur(images, BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * strength)
    solarized = torch.where(images < SOLARIZE_THRESHOLD, images, 1 - images)
    chosen = torch.where(which == 0, grayscale(images), torch.where(which == 1, solarized, blurred))
    return color_jitter(chosen, keys)


def color_jitter(images: Tensor, keys: Keys, strength: float = JITTER) -> Tensor:
    """Change brightness, contrast and saturation, each image by factors and in an order of its own.

    The factors are uniform in 1 +- `strength`, as in torchvision's ColorJitter: `images` (B, 3, H, W) float in
    [0, 1] -> the same shape and range. Each change is a step from an anchor through the image: from black, from
    the mean of its gray, from its gray. So they differ in the anchor alone.
    """
    draws = keys.uniform("color_jitter", 6)
    factors, order = 1 + strength * (2 * draws[:, :3] - 1), draws[:, 3:].argsort(dim=1)
    for change in order.split(1, dim=1):
        factor, change = factors.gather(1, change).view(-1, 1, 1, 1), change.view(-1, 1, 1, 1)
        gray = grayscale(images)
        anchor = torch.where(change == CONTRAST, gray.mean(dim=(2, 3), keepdim=True), gray)
        anchor = anchor.masked_fill(change == BRIGHTNESS, 0)
        images = torch.lerp(anchor.expand_as(images), images, factor).clamp(0, 1)
    return images


def grayscale(images: Tensor) -> Tensor:
    """Luma of (B, 3, H, W) float -> (B, 1, H, W) (ITU-R 601-2, as Pillow)."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image by its own deviation: (B, C, H, W) float, `sigma` (B,) in pixels -> the same shape.

    The edge is repeated outside. Taps beyond `BLUR_RADIUS` are left out.
    """
    batch, channels = images.shape[:2]
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    weights = (-0.5 * (taps / sigma.unsqueeze(1)).square()).softmax(dim=1).repeat_interleave(channels, dim=0)
    lines = F.pad(images, [BLUR_RADIUS] * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
    for kernel in (weights.view(-1, 1, 1, len(taps)), weights.view(-1, 1, len(taps), 1)):
        lines = F.conv2d(lines, kernel, groups=batch * channels)
    return lines.view_as(images)
