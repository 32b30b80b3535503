"""What changes the colors of an image, on its map: Emb-Noise (SeiT) and ColorAdapt (SeiT++)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from seitpp.augment.keyed import Keys
from seitpp.augment.mix import partners

EPSILON = 1e-4  # the least deviation that is divided by: a constant channel stays finite
NOISE_SCALE, NOISE_STD = 1.0, 1.0


def emb_noise(maps: Tensor, keys: Keys, scale: float = NOISE_SCALE, std: float = NOISE_STD) -> Tensor:
    """z + n_channel * scale + n_full * std: maps (B, D, H, W) float -> the same shape and dtype (SeiT, Emb-Noise).

    n_channel is one value of N(0, 1) for each channel of an image, n_full one for each number of its map.
    """
    batch, channels, height, width = maps.shape
    draws = keys.normal("emb_noise", channels * (1 + height * width))
    channel, full = draws[:, :channels], draws[:, channels:]
    # Channels last, as maps lie in memory.
    full = full.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)
    noise = full.mul_(std).add_(channel.reshape(batch, channels, 1, 1) * scale)
    return noise.to(maps.dtype).add_(maps)


def color_adapt(maps: Tensor, partner: Tensor) -> Tensor:
    """Give each channel of a map the mean and deviation over space that it has in the partner's map (ColorAdapt).

    C(Zi, Zj) = sigma(Zj) * (Zi - mu(Zi)) / sigma(Zi) + mu(Zj): maps (B, D, H, W) float, `partner` (B,) int64, the
    place j of each image's partner in the batch -> maps. A channel that is constant in Zi becomes mu(Zj).
    """
    mean = maps.mean(dim=(2, 3), keepdim=True)
    centerd = maps - mean
    # Ten times as quick as torch.std_mean on a CPU, and as exact, since the mean is taken off first.
    deviation = centerd.square().mean(dim=(2, 3), keepdim=True).sqrt()
    return centerd * (deviation[partner] / deviation.clamp(min=EPSILON)) + mean[partner]


@dataclass(frozen=True)
class ColorRates:
    """How often each acts. One draw of an image decides: Emb-Noise acts on the lowest `emb_noise` of the draws,
    ColorAdapt on the highest `color_adapt`, so never both on an image, since they sum to at most 1.

    `whole_grid`: where supervised training applies them, to the grid before it is cropped (SeiT++) or to the crop
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
# As a setting of a recipe; each view says what it is without.
ColorPreset = Literal["paper", "release", "seitpp", "seitpp_every_image", "coloradapt"]


class ColorAugment(nn.Module):
    """Emb-Noise or ColorAdapt, each on its share of the images, which are never the same.

    `rates`: "paper" (SeiT), "release" (its later release), "seitpp" (SeiT++, fine-tuning: the release chooses the
    op of a batch with 0.75 and 0.25 and lets it act on half of the images), "seitpp_every_image" (0.75 and 0.25
    read as shares of the images) or "coloradapt" (SeiT++, pre-training).
    """

    def __init__(self, rates: ColorPreset = "paper"):
        super().__init__()
        self.rates = COLOR_RATES[rates]

    def forward(self, maps: Tensor, keys: Keys) -> Tensor:
        """Maps (B, D, H, W), keys of the same B images -> maps. Raises PairingError, if ColorAdapt is on."""
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
