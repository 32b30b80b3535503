"""Color augmentations on maps of code vectors: Emb-Noise (SeiT) and ColorAdapt (SeiT++)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from seitpp.augment.keyed import Keys
from seitpp.augment.mix import partners

EPSILON = 1e-4  # the smallest standard deviation to divide by, so that a constant channel stays finite
NOISE_SCALE, NOISE_STD = 1.0, 1.0


def emb_noise(
    maps: Float[Tensor, "batch dim height width"],
    keys: Keys,
    *,
    scale: float = NOISE_SCALE,
    std: float = NOISE_STD,
) -> Float[Tensor, "batch dim height width"]:
    """Add noise, n_channel * scale + n_full * std, and keep the dtype (SeiT, Emb-Noise).

    n_channel ~ N(0, 1) is drawn once for each channel of an image, n_full ~ N(0, 1) for each number of its map.
    """
    batch, channels, height, width = maps.shape
    draws = keys.normal("emb_noise", channels * (1 + height * width))
    channel, full = draws[:, :channels], draws[:, channels:]
    # Channels last, the memory layout of maps.
    full = full.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)
    noise = full.mul_(std).add_(channel.reshape(batch, channels, 1, 1) * scale)
    return noise.to(maps.dtype).add_(maps)


def color_adapt(
    maps: Float[Tensor, "batch dim height width"], partner: Int64[Tensor, " batch"]
) -> Float[Tensor, "batch dim height width"]:
    """Replace the mean and standard deviation of each channel by those of the partner's map (SeiT++, ColorAdapt).

    C(Zi, Zj) = sigma(Zj) * (Zi - mu(Zi)) / sigma(Zi) + mu(Zj), mu and sigma over space. `partner` holds the
    position j of each image's partner in the batch. A channel that is constant in Zi becomes mu(Zj).
    """
    mean = maps.mean(dim=(2, 3), keepdim=True)
    centered = maps - mean
    # Ten times as fast as torch.std_mean on a CPU, and as exact, since the mean is subtracted first.
    deviation = centered.square().mean(dim=(2, 3), keepdim=True).sqrt()
    return centered * (deviation[partner] / deviation.clamp(min=EPSILON)) + mean[partner]


@dataclass(frozen=True)
class ColorRates:
    """The probabilities of Emb-Noise and ColorAdapt, which sum to at most 1: an image gets at most one of the two.

    `whole_grid`: supervised training applies them to the whole grid before the crop (SeiT++), else to the crop
    (SeiT).
    """

    emb_noise: float
    color_adapt: float
    whole_grid: bool


COLOR_RATES = {
    "paper": ColorRates(emb_noise=0.5, color_adapt=0.0, whole_grid=False),
    "release": ColorRates(emb_noise=0.25, color_adapt=0.125, whole_grid=False),
    "seitpp": ColorRates(emb_noise=0.375, color_adapt=0.125, whole_grid=True),
    "seitpp_every_image": ColorRates(emb_noise=0.75, color_adapt=0.25, whole_grid=True),
    "coloradapt": ColorRates(emb_noise=0.0, color_adapt=0.5, whole_grid=True),
}
# The names of the presets, as recipes accept them.
ColorPreset = Literal["paper", "release", "seitpp", "seitpp_every_image", "coloradapt"]


class ColorAugment(nn.Module):
    """Emb-Noise or ColorAdapt, each on a fraction of the images, never both on the same image.

    `rates`: "paper" (SeiT), "release" (the SeiT release), "seitpp" (SeiT++, fine-tuning: the release chooses one
    of the two for a batch with probabilities 0.75 and 0.25, and applies it to half of the images),
    "seitpp_every_image" (0.75 and 0.25 of the images) or "coloradapt" (SeiT++, pre-training).
    """

    def __init__(self, rates: ColorPreset = "paper"):
        super().__init__()
        self.rates = COLOR_RATES[rates]

    def forward(
        self, maps: Float[Tensor, "batch dim height width"], keys: Keys
    ) -> Float[Tensor, "batch dim height width"]:
        """Return the augmented maps. With ColorAdapt, raises PairingError if the batch is no multiple of 4."""
        draw = keys.uniform("colour", 1).view(-1, 1, 1, 1)
        colored = maps
        if self.rates.emb_noise:
            colored = torch.where(draw < self.rates.emb_noise, emb_noise(maps, keys), colored)
        if self.rates.color_adapt:
            adapted = color_adapt(maps, partners(keys.indices))
            colored = torch.where(draw >= 1 - self.rates.color_adapt, adapted, colored)
        return colored

    def extra_repr(self) -> str:
        return f"{self.rates}, scale={NOISE_SCALE}, std={NOISE_STD}"
