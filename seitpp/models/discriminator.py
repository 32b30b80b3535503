"""The discriminator of adversarial tokenizer training."""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Downsample(nn.Module):
    """A residual block that halves height and width."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.second = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(
        self, maps: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs height//2 width//2"]:
        changed = F.leaky_relu(self.second(F.leaky_relu(self.first(maps), 0.2)), 0.2)
        # A 2 x 2 average replaces the wider blur of StyleGAN2. The sum of two terms is divided by sqrt(2) to keep
        # the variance.
        return F.avg_pool2d(changed + self.skip(maps), 2) / math.sqrt(2)


class Discriminator(nn.Module):
    """The residual discriminator of StyleGAN2 (arXiv 1912.04958): one score per image, high for real images.

    It has no minibatch statistic, which would make a score depend on the other images of the process, and no
    gradient penalty. The images are in [0, 1] and have `size` (height, width), or one side of a square, in pixels;
    each stage halves both sides, until the shorter one is at most 4. A stage whose shorter side is s has 16384 / s
    channels, at most `widest`.
    """

    def __init__(self, size: int | tuple[int, int], widest: int = 512, *, channels: int = 3):
        super().__init__()
        sizes = [(size, size) if isinstance(size, int) else size]
        while min(sizes[-1]) > 4:
            sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
        widths = [min(widest, 16384 // min(s)) for s in sizes]
        self.colors = nn.Conv2d(channels, widths[0], 1)
        self.stages = nn.Sequential(*map(Downsample, widths, widths[1:]))
        self.mix = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * sizes[-1][0] * sizes[-1][1], widths[-1])
        self.opinion = nn.Linear(widths[-1], 1)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1"]:
        maps = self.stages(F.leaky_relu(self.colors(images * 2 - 1), 0.2))
        maps = F.leaky_relu(self.mix(maps), 0.2)
        return self.opinion(F.leaky_relu(self.hidden(maps.flatten(1)), 0.2))
