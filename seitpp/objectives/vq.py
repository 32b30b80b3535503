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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from seitpp.augment import Keys
from seitpp.tokenizers import ViTVQGAN, restart_dead_codes

WEIGHTS = {"pixels": 1.0, "codebook": 1.0, "perceptual": 0.1, "adversarial": 0.1, "discriminator": 1.0}
# Tokens a code on average from one restart to the next: a code that is used 4 times or more is not dead.
TOKENS_PER_CODE = 200
RESTART_UNTIL = 0.8  # of the training; the rest lets the last restarted codes settle


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
        self.restarted += restart_dead_codes(
            codebook, self.counts, candidates, generator=generator, optimizer=optimizer
        )
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
