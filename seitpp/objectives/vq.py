"""Training a ViT-VQGAN: its losses, the networks that two of them need, and the restart of dead codes.

| term | weight | what |
|---|---|---|
| pixels | 1 | mean squared error |
| codebook | 1 | rows to features; with 0.25 features to rows (`ViTVQGAN.forward`) |
| perceptual | 0.1 | distance of VGG16 features; only with a file of VGG16 weights |
| adversarial | 0.1 | the discriminator's opinion of the reconstruction; only with a discriminator |
| discriminator | 1 | the discriminator's own hinge loss; it moves nothing but the discriminator |

The discriminator shares AdamW with the tokenizer. AdamW treats each parameter by itself, so this is what two
optimizers with the same settings do, both updated from the same forward.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kornia.metrics import ssim
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torchvision.models import vgg16

from seitpp.augment import Keys
from seitpp.tensors import load_state_dict
from seitpp.tokenizers import TokenizerError, ViTVQGAN, restart_dead_codes

WEIGHTS = {"pixels": 1.0, "codebook": 1.0, "perceptual": 0.1, "adversarial": 0.1, "discriminator": 1.0}
# Tokens a code on average from one restart to the next: a code that is used 4 times or more is not dead.
TOKENS_PER_CODE = 200
RESTART_UNTIL = 0.8  # of the training; the rest lets the last restarted codes settle
VGG_BLOCKS = (4, 9, 16, 23, 30)  # of torchvision's vgg16().features: the end of each block, before it is pooled
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VQOutput(NamedTuple):
    """What a forward gives: `images` (B, 3, h, w) not clamped, `ids` (B, H, W), `vectors` (B, D, H, W), and the
    losses () that only the networks themselves can make: codebook, and with a discriminator its two."""

    images: Tensor
    ids: Tensor
    vectors: Tensor
    losses: dict[str, Tensor]


class VQTraining(nn.Module):
    """A tokenizer in training, its discriminator if there is one, and what a resumed run must know.

    `counts` (K,) int64 are the tokens of each code since the last restart, over all processes; `restarted` ()
    is the number of codes restarted so far. Both are buffers, so checkpoints carry them.
    """

    def __init__(self, tokenizer: ViTVQGAN, discriminator: nn.Module | None = None):
        super().__init__()
        self.tokenizer, self.discriminator = tokenizer, discriminator
        self.register_buffer("counts", torch.zeros(tokenizer.spec.num_codes, dtype=torch.long))
        self.register_buffer("restarted", torch.zeros((), dtype=torch.long))

    def forward(self, images: Tensor) -> VQOutput:
        """Images (B, 3, height, width) in [0, 1] -> reconstruction and losses."""
        made = self.tokenizer(images)
        losses = {"codebook": made.loss}
        if self.discriminator is not None:
            # The tokenizer is judged by a discriminator that this term does not move.
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            losses["adversarial"] = -functional_call(self.discriminator, frozen, (made.images,)).mean()
            real, fake = self.discriminator(images), self.discriminator(made.images.detach())
            losses["discriminator"] = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        return VQOutput(made.images, made.ids, made.vectors, losses)

    @torch.no_grad()
    def count(self, counts: Tensor) -> Tensor:
        """Remember the counts (K,) of a batch, all its processes together; the batch's perplexity ()."""
        self.counts += counts
        return torch.special.entr(counts / counts.sum()).sum().exp()

    @torch.no_grad()
    def restart(self, vectors: Tensor, seed: int, step: int, optimizer: Optimizer) -> None:
        """Move codes under 2 % of the mean use since the last restart onto random `vectors` (B, D, H, W), with
        moments of 0 in the AdamW `optimizer`.

        The choice is keyed by (seed, step): with the vectors of all processes it is the same on each.
        """
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        candidates = vectors.permute(0, 2, 3, 1).flatten(0, 2)
        codebook = self.tokenizer.codebook
        self.restarted += restart_dead_codes(codebook, self.counts, candidates, generator, optimizer)
        self.counts.zero_()


def step_seed(seed: int, step: int) -> int:
    """A generator's seed that belongs to a step: 24 random bits twice."""
    high, low = Keys(seed, 0, torch.tensor([step])).uniform("restart", 2)[0].double().mul(2**24).long().tolist()
    return high << 24 | low


def restart_due(step: int, steps: int, tokens: int, num_codes: int) -> bool:
    """Whether dead codes are restarted in `step` of `steps`, each of `tokens` tokens: every 200 tokens a code,
    until the last fifth. A pure function of the step, so that a resumed run does not have to ask.
    """
    window = math.ceil(TOKENS_PER_CODE * num_codes / tokens)
    return (step + 1) % window == 0 and step < RESTART_UNTIL * steps


def vq_losses(output: VQOutput, images: Tensor, perceptual: nn.Module | None) -> dict[str, Tensor]:
    """Every term () by its name; the loss is their sum with `WEIGHTS`."""
    losses = {"pixels": F.mse_loss(output.images, images), **output.losses}
    if perceptual is not None:
        losses["perceptual"] = perceptual(output.images, images)
    return losses


def weighted_sum(losses: dict[str, Tensor]) -> Tensor:
    """The loss () of `vq_losses`."""
    return sum(WEIGHTS[name] * value for name, value in losses.items())


def quality(decoded: Tensor, images: Tensor) -> Tensor:
    """PSNR in dB (100 for an exact image) and SSIM (windows of 11 x 11) of each image: (B, 2)."""
    errors = (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return torch.stack([-10 * errors.log10(), ssim(decoded, images, 11).mean(dim=(1, 2, 3))], dim=1)


class VGGDistance(nn.Module):
    """Distance of VGG16 features (LPIPS with all its linear weights equal, arXiv 1801.03924); not trained.

    At the end of each of the five blocks features are normalised over channels; squared differences are summed
    over channels, averaged over places, images and blocks. `path` is torchvision's file of VGG16 weights, which
    is not unpickled. Raises TokenizerError naming the file if it is missing or holds anything else.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        if not Path(path).is_file():
            raise TokenizerError(f"no VGG16 weights at {path}: expected torchvision's vgg16 file")
        tensors = load_state_dict(Path(path), TokenizerError, lambda name: name.startswith("features."))
        with torch.device("meta"):  # the layers without numbers: these come from the file
            features = vgg16(weights=None).features
        named = {name.removeprefix("features."): tensor.float().clone() for name, tensor in tensors.items()}
        try:
            features.load_state_dict(named, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise TokenizerError(f"{path} holds no VGG16 weights of torchvision: {reason}") from error
        self.blocks = nn.ModuleList(
            features[start:end] for start, end in zip((0, *VGG_BLOCKS), VGG_BLOCKS, strict=False)
        )
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(-1, 1, 1))
        self.requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Two batches (B, 3, h, w) around [0, 1], at least 16 pixels a side -> ()."""
        a, b = ((batch - self.mean) / self.std for batch in (images, targets))
        distance = a.new_zeros(())
        for block in self.blocks:
            a, b = block(a), block(b)
            distance = distance + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean()
        return distance / len(self.blocks)


class Downsample(nn.Module):
    """A residual block that halves the sides: (B, inputs, s, s) -> (B, outputs, s / 2, s / 2)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.second = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        changed = F.leaky_relu(self.second(F.leaky_relu(self.first(maps), 0.2)), 0.2)
        # Means of 2 x 2 stand in for StyleGAN2's wider blur; the factor keeps the variance of the sum.
        return F.avg_pool2d(changed + self.skip(maps), 2) / math.sqrt(2)


class Discriminator(nn.Module):
    """One opinion (B, 1) of images (B, 3, side, side): large where they look real.

    The residual discriminator of StyleGAN2 (arXiv 1912.04958) without its minibatch statistic, which would make
    an opinion depend on the other images of a process, and without its penalty on gradients. A stage of s x s
    pixels has 16384 / s channels, at most `widest`; `side` is halved while it is above 4.
    """

    def __init__(self, side: int, widest: int = 512):
        super().__init__()
        sides = [side]
        while sides[-1] > 4:
            sides.append(sides[-1] // 2)
        widths = [min(widest, 16384 // s) for s in sides]
        self.colours = nn.Conv2d(3, widths[0], 1)
        self.stages = nn.Sequential(*map(Downsample, widths, widths[1:]))
        self.mix = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * sides[-1] ** 2, widths[-1])
        self.opinion = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stages(F.leaky_relu(self.colours(images * 2 - 1), 0.2))
        maps = F.leaky_relu(self.mix(maps), 0.2)
        return self.opinion(F.leaky_relu(self.hidden(maps.flatten(1)), 0.2))
