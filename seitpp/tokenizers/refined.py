"""The offline tokenizer with learned corrections, which use the neighborhood that k-means on patches ignores.

One transformer on windows of 8 x 8 tokens corrects the features, another one the decoded pixels. Both corrections
start at zero, so training starts from PCA and k-means. With windows one can train on small crops and tokenize any
image; attention over 1,024 tokens would dominate the time on a CPU. A window that extends beyond the lower or the
right edge of the grid is filled up with the tokens at the edge.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seitpp.tokenizers.base import TokenizerSpec
from seitpp.tokenizers.counts import code_counts, restart_dead_codes, tally
from seitpp.tokenizers.patch_kmeans import PatchKMeans, patch_values
from seitpp.tokenizers.transformer import Transformer, TransformerShape, sincos_positions

KIND = "patch_kmeans_refined"
WINDOW = 8  # tokens along one side of a window
SHAPE = TransformerShape(64, 2, 1, 128)
BETA = 0.25  # weight of the commitment loss
# Mean number of tokens per code between searches for dead codes. 2 % of it, the limit for a dead code, is 4
# tokens, so that a code which is merely rare is seldom restarted.
TOKENS_PER_CODE = 200
RESTART_UNTIL = 0.8  # fraction of the training; in the rest the last restarted codes settle


class WindowCorrection(nn.Module):
    """A transformer within each window of 8 x 8 tokens: (B, H, W, inputs) -> (B, H, W, outputs).

    Its output is zero before training.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.embed = nn.Linear(inputs, SHAPE.width)
        self.register_buffer("positions", sincos_positions((WINDOW, WINDOW), SHAPE.width), persistent=False)
        self.transformer = Transformer(SHAPE)
        self.out = nn.Linear(SHAPE.width, outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        rows, columns = (-(-side // WINDOW) for side in (height, width))
        if height % WINDOW or width % WINDOW:
            margins = (0, columns * WINDOW - width, 0, rows * WINDOW - height)
            tokens = F.pad(tokens.permute(0, 3, 1, 2), margins, mode="replicate").permute(0, 2, 3, 1)
        windows = rearrange(tokens, "b (h p) (w q) c -> b h w (p q) c", p=WINDOW, q=WINDOW)
        mixed = self.transformer(self.embed(windows.flatten(0, 2)) + self.positions)
        whole = rearrange(self.out(mixed), "(b h w) (p q) c -> b (h p) (w q) c", h=rows, w=columns, p=WINDOW)
        return whole[:, :height, :width]


class RefinedPatchKMeans(PatchKMeans):
    """PatchKMeans with corrections of the features and of the decoded pixels, and a trained codebook.

    The constant channel is not corrected.
    """

    def __init__(self, spec: TokenizerSpec):
        super().__init__(spec)
        values = patch_values(spec)
        del self.codebook
        self.codebook = nn.Parameter(torch.zeros(spec.num_codes, spec.code_dim))
        self.encoder = WindowCorrection(values, spec.code_dim - 1)
        self.decoder = WindowCorrection(spec.code_dim, values)

    @property
    def side_multiple(self) -> int:
        """The number of pixels along a side of a window, so that images of any size consist of whole windows."""
        return WINDOW * self.spec.patch

    def features(self, images: Tensor) -> Tensor:
        """Compute the feature map (B, D, H, W) of images (B, C, height, width); the last channel is constant."""
        patches = (self._patches(self._model_input(images)) - self.mean) / self.scale
        correction = self.encoder(patches).permute(0, 3, 1, 2)
        return super().features(images) + F.pad(correction, (0, 0, 0, 0, 0, 1))

    def _patches_of(self, rows: Tensor) -> Tensor:
        return super()._patches_of(rows) + self.decoder(rows) * self.scale

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the training loss () of images (B, C, height, width), ids (B, H, W) and features (B, H, W, D).

        The loss is the codebook loss plus 0.25 times the sum of the commitment loss and the squared error of the
        pixels, in units of the features' mean square, with straight-through gradients. With this equal weight, the
        gradients of the pixel error and the commitment loss cancel for a linear decoder; a larger weight of the
        pixels pushes features away from their codes (0.2 dB worse).
        """
        maps = self.features(images)
        ids = self.quantize(maps)
        vectors, rows = maps.permute(0, 2, 3, 1), self._scaled_rows(ids)
        codebook, commitment = F.mse_loss(rows, vectors.detach()), F.mse_loss(vectors, rows.detach())
        decoded = self._images(self._patches_of(vectors + (rows - vectors).detach()))
        values_per_feature = patch_values(self.spec) / (self.spec.code_dim - 1)
        pixels = F.mse_loss(decoded, images) / self.scale.square() * values_per_feature
        return codebook + BETA * (commitment + pixels), ids, vectors.detach()

    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        self.codebook = nn.Parameter(rows)


def refine(
    tokenizer: PatchKMeans,
    images: Tensor,
    *,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> RefinedPatchKMeans:
    """Train corrections on images (N, C, any, any) in [0, 1], which are resized to the tokenizer's image size.

    For images of 256 pixels it is cheap to train on 64-pixel crops: call `set_image_size(64)` before and
    `set_image_size(256)` after. With `steps=0` the result tokenizes as `tokenizer` does; else its codes are
    renumbered by their frequency in `images`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        refined = RefinedPatchKMeans(replace(tokenizer.spec, kind=KIND))
    refined.load_state_dict(tokenizer.state_dict(), strict=False)  # the state of `tokenizer` has no corrections
    refined.to(tokenizer.codebook.device)
    if steps:
        prepared = refined.preprocess(images)
        _train(refined, prepared, steps, batch_size, learning_rate, torch.Generator().manual_seed(seed))
        _renumber(refined, prepared, batch_size)
    return refined.eval()


def _train(
    refined: RefinedPatchKMeans, images: Tensor, steps: int, batch_size: int, learning_rate: float, generator
) -> None:
    optimizer = torch.optim.AdamW(refined.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    device = refined.codebook.device
    counts = torch.zeros(refined.spec.num_codes, dtype=torch.long, device=device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        loss, ids, vectors = refined(images[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        counts += tally(ids, len(counts))
        if counts.sum() >= TOKENS_PER_CODE * len(counts) and step < RESTART_UNTIL * steps:
            candidates = vectors.flatten(0, 2)
            restart_dead_codes(refined.codebook, counts, candidates, generator=generator, optimizer=optimizer)
            counts.zero_()


@torch.no_grad()
def _renumber(refined: RefinedPatchKMeans, images: Tensor, batch_size: int) -> None:
    device = refined.codebook.device
    ids = torch.cat([refined.encode(part.to(device)) for part in images.split(batch_size)])
    counts = code_counts(ids, refined.spec.num_codes)
    refined.codebook.copy_(refined.codebook[counts.argsort(descending=True, stable=True)])
