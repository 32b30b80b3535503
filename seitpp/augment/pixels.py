"""Views of pixels, for models that are trained on tokens and fine-tuned on images.

The loader crops the images (`augment.boxes`); the rest is computed for whole batches on their device.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from seitpp.augment.keyed import Keys
from seitpp.augment.mix import Labels, Mix, SoftLabels

# Mean and standard deviation of ImageNet's pixels, as in timm.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# 3-Augment (DeiT III, arXiv 2204.07118), with the strengths of the authors' published code and commands.
SOLARIZE_THRESHOLD = 128 / 255
BLUR_SIGMA = (0.1, 2.0)  # in pixels
BLUR_RADIUS = 6  # in pixels: three standard deviations of the strongest blur
JITTER = 0.3
BRIGHTNESS, CONTRAST, SATURATION = range(3)


class PixelView(nn.Module):
    """Horizontal flip, 3-Augment, normalization, CutMix and Mixup of cropped images, sampled per image.

    `cutmix` and `mixup` are the alphas of their Beta distributions, 0 turns them off. `flip` is the probability
    that an image is mirrored.
    """

    def __init__(self, cutmix: float = 1.0, mixup: float = 0.0, *, three_augment: bool = True, flip: float = 0.5):
        super().__init__()
        self.flip, self.three_augment = flip, three_augment
        self.normalize, self.mix = EvalPixelView(), Mix(cutmix, mixup)

    def forward(
        self, images: UInt8[Tensor, "batch 3 height width"], labels: Labels, keys: Keys
    ) -> tuple[Float32[Tensor, "batch 3 height width"], SoftLabels]:
        """Return the augmented, normalized images and their labels; `keys` are those of the same images.

        Raises PairingError if CutMix or Mixup is on and the batch is no multiple of 4.
        """
        if self.flip:
            flipped = (keys.uniform("flip", 1) < self.flip).view(-1, 1, 1, 1)
            images = torch.where(flipped, images.flip(3), images)
        images = images.float() / 255
        if self.three_augment:
            images = three_augment(images, keys)
        return self.mix(self.normalize.standardize(images), labels, keys)

    def extra_repr(self) -> str:
        return f"flip p={self.flip:g}, three_augment={self.three_augment}"


class EvalPixelView(nn.Module):
    """Normalization of images: subtract ImageNet's mean, divide by its standard deviation, per channel."""

    def __init__(self):
        super().__init__()
        # Buffers are on the device; constants created in a step would be copied to it, a sync in every step.
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch 3 height width"]:
        """Return the normalized images."""
        return self.standardize(images.float() / 255)

    def standardize(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Normalize images that are already in [0, 1]."""
        return (images - self.mean) / self.std


def three_augment(
    images: Float[Tensor, "batch 3 height width"], keys: Keys
) -> Float[Tensor, "batch 3 height width"]:
    """Apply grayscale, solarization or blur to each image, then color jitter (DeiT III, 3-Augment).

    Images are in [0, 1], before and after; `keys` are those of the same images.
    """
    choice, strength = keys.uniform("three_augment", 2).unbind(dim=1)
    choice = (3 * choice).long().view(-1, 1, 1, 1)
    blurred = gaussian_blur(images, BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * strength)
    solarized = torch.where(images < SOLARIZE_THRESHOLD, images, 1 - images)
    chosen = torch.where(choice == 0, grayscale(images), torch.where(choice == 1, solarized, blurred))
    return color_jitter(chosen, keys)


def color_jitter(
    images: Float[Tensor, "batch 3 height width"], keys: Keys, strength: float = JITTER
) -> Float[Tensor, "batch 3 height width"]:
    """Change brightness, contrast and saturation by random factors, in a random order per image.

    The factors are uniform in 1 +- `strength`, as in torchvision's ColorJitter. Images are in [0, 1], before and
    after. Each change interpolates between an anchor and the image: black for brightness, the mean of the
    grayscale image for contrast, the grayscale image for saturation.
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


def grayscale(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Return the luma of RGB images (ITU-R 601-2, as in Pillow)."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def gaussian_blur(
    images: Float[Tensor, "batch channels height width"], sigma: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Blur each image with its own standard deviation `sigma` in pixels.

    The image is padded with its edge values. The kernel is cut off at `BLUR_RADIUS`.
    """
    batch, channels = images.shape[:2]
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    weights = (-0.5 * (taps / sigma.unsqueeze(1)).square()).softmax(dim=1).repeat_interleave(channels, dim=0)
    lines = F.pad(images, [BLUR_RADIUS] * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
    for kernel in (weights.view(-1, 1, 1, len(taps)), weights.view(-1, 1, len(taps), 1)):
        lines = F.conv2d(lines, kernel, groups=batch * channels)
    return lines.view_as(images)
