"""Training of a ViT-VQGAN: its losses, and the restart of dead codes.

| term | weight | meaning |
|---|---|---|
| pixels | 1 | mean squared error |
| codebook | 1 | moves codes to features and, with weight 0.25, features to codes (`ViTVQGAN.forward`) |
| perceptual | 0.1 | distance of VGG16 features; only with a file of VGG16 weights |
| adversarial | 0.1 | minus the discriminator's score of the reconstruction; only with a discriminator |
| discriminator | 1 | hinge loss of the discriminator; its gradients reach only the discriminator |

The discriminator and the tokenizer are trained by one AdamW. AdamW updates each parameter independently, so this
equals two optimizers with the same settings.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Integer
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from seitpp.augment import Keys
from seitpp.tokenizers import ViTVQGAN, restart_dead_codes

WEIGHTS = {"pixels": 1.0, "codebook": 1.0, "perceptual": 0.1, "adversarial": 0.1, "discriminator": 1.0}
# Average number of tokens per code between two restarts: a code that is used 4 times or more (2 %) is not dead.
TOKENS_PER_CODE = 200
RESTART_UNTIL = 0.8  # fraction of the training; in the rest the last restarted codes converge


class VQOutput(NamedTuple):
    """The reconstruction `images`, not clamped, the `ids` and `vectors` of its tokens, and the first losses.

    `losses` has the term codebook, and with a discriminator the terms adversarial and discriminator.
    """

    images: Float[Tensor, "batch channels height width"]
    ids: Int64[Tensor, "batch rows columns"]
    vectors: Float[Tensor, "batch dim rows columns"]
    losses: dict[str, Float[Tensor, ""]]


class VQTraining(nn.Module):
    """A tokenizer in training, an optional discriminator, and the state of the restarts.

    `counts` (K,) int64 is the number of tokens of each code since the last restart, over all processes;
    `restarted` () is the number of codes restarted so far. Both are buffers, so that checkpoints store them.
    """

    def __init__(self, tokenizer: ViTVQGAN, discriminator: nn.Module | None = None):
        super().__init__()
        self.tokenizer, self.discriminator = tokenizer, discriminator
        self.register_buffer("counts", torch.zeros(tokenizer.spec.num_codes, dtype=torch.long))
        self.register_buffer("restarted", torch.zeros((), dtype=torch.long))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> VQOutput:
        """Reconstruct images in [0, 1] and compute the losses of the forward pass."""
        output = self.tokenizer(images)
        losses = {"codebook": output.loss}
        if self.discriminator is not None:
            # The adversarial loss must not train the discriminator, so its parameters are detached.
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            losses["adversarial"] = -functional_call(self.discriminator, frozen, (output.images,)).mean()
            real, fake = self.discriminator(images), self.discriminator(output.images.detach())
            losses["discriminator"] = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        return VQOutput(output.images, output.ids, output.vectors, losses=losses)

    @torch.no_grad()
    def count(self, counts: Integer[Tensor, " codes"]) -> Float[Tensor, ""]:
        """Add the counts of a batch, summed over all processes, and return the perplexity of the batch."""
        self.counts += counts
        return torch.special.entr(counts / counts.sum()).sum().exp()

    @torch.no_grad()
    def restart(
        self, vectors: Float[Tensor, "batch dim height width"], *, seed: int, step: int, optimizer: Optimizer
    ) -> None:
        """Replace codes used less than 2 % of the mean since the last restart by random `vectors`.

        Their moments in the AdamW `optimizer` are reset to 0. The random numbers depend on (seed, step), so all
        processes choose the same vectors if they pass those gathered from all processes.
        """
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        candidates = vectors.permute(0, 2, 3, 1).flatten(0, 2)
        codebook = self.tokenizer.codebook
        self.restarted += restart_dead_codes(
            codebook, self.counts, candidates, generator=generator, optimizer=optimizer
        )
        self.counts.zero_()


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step for a torch.Generator: two times 24 random bits."""
    high, low = Keys(seed, 0, torch.tensor([step])).uniform("restart", 2)[0].double().mul(2**24).long().tolist()
    return high << 24 | low


def restart_due(step: int, *, steps: int, tokens: int, num_codes: int) -> bool:
    """Return whether dead codes are restarted in `step` of `steps`, each of `tokens` tokens.

    Codes are restarted every 200 tokens per code, until the last fifth of the training. The answer depends on the
    arguments only, so that a resumed run restarts codes in the same steps.
    """
    window = math.ceil(TOKENS_PER_CODE * num_codes / tokens)
    return (step + 1) % window == 0 and step < RESTART_UNTIL * steps


def vq_losses(
    output: VQOutput, images: Float[Tensor, "batch channels height width"], perceptual: nn.Module | None = None
) -> dict[str, Float[Tensor, ""]]:
    """Return all terms of the loss by name; `weighted_sum` adds them up."""
    losses = {"pixels": F.mse_loss(output.images, images), **output.losses}
    if perceptual is not None:
        losses["perceptual"] = perceptual(output.images, images)
    return losses


def weighted_sum(losses: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Return the training loss: the sum of the terms of `vq_losses`, weighted by `WEIGHTS`."""
    return sum(WEIGHTS[name] * value for name, value in losses.items())
