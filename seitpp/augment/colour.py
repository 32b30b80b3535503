"""What changes the colours of an image, on its map: Emb-Noise (SeiT) and ColorAdapt (SeiT++)."""

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
    centred = maps - mean
    # Ten times as quick as torch.std_mean on a CPU, and as exact, since the mean is taken off first.
    deviation = centred.square().mean(dim=(2, 3), keepdim=True).sqrt()
    return centred * (deviation[partner] / deviation.clamp(min=EPSILON)) + mean[partner]


@dataclass(frozen=True)
class ColourRates:
    """How often each acts. One draw of an image decides: Emb-Noise acts on the lowest `emb_noise` of the draws,
    ColorAdapt on the highest `color_adapt`, so never both on an image, since they sum to at most 1.
    """

    emb_noise: float
    color_adapt: float


COLOUR_RATES = {
    "paper": ColourRates(emb_noise=0.5, color_adapt=0.0),
    "release": ColourRates(emb_noise=0.25, color_adapt=0.125),
    "seitpp": ColourRates(emb_noise=0.75, color_adapt=0.25),
    "coloradapt": ColourRates(emb_noise=0.0, color_adapt=0.5),
}


class ColourAugment(nn.Module):
    """Emb-Noise or ColorAdapt, each on its share of the images, which are never the same.

    `rates`: "paper" (SeiT), "release" (its later release), "seitpp" (SeiT++, fine-tuning) or "coloradapt" (SeiT++,
    pre-training).
    """

    def __init__(self, rates: Literal["paper", "release", "seitpp", "coloradapt"] = "paper"):
        super().__init__()
        self.rates = COLOUR_RATES[rates]

    def forward(self, maps: Tensor, keys: Keys) -> Tensor:
        """Maps (B, D, H, W), keys of the same B images -> maps. Raises PairingError, if ColorAdapt is on."""
        draw = keys.uniform("colour", 1).view(-1, 1, 1, 1)
        coloured = maps
        if self.rates.emb_noise:
            coloured = torch.where(draw < self.rates.emb_noise, emb_noise(maps, keys), coloured)
        if self.rates.color_adapt:
            adapted = color_adapt(maps, partners(keys.indices))
            coloured = torch.where(draw >= 1 - self.rates.color_adapt, adapted, coloured)
        return coloured

    def extra_repr(self) -> str:
        return f"{self.rates}, scale={NOISE_SCALE}, std={NOISE_STD}"
