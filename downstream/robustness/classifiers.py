"""Classifiers of images in [0, 1] with gradients of the pixels, also through a tokenizer.

A tokenizer has no gradient of its own, because the nearest code does not change with a small change of a feature.
The forward pass here is always the real one, with the nearest codes; only the backward pass has a surrogate:

| surrogate          | model of maps: as if its input were  | model of ids: as if its embedded ids were           |
|--------------------|--------------------------------------|-----------------------------------------------------|
| straight_through   | the features z of the tokenizer      | s(z) @ table: the one-hot ids passed to the scores  |
| softmax            | softmax(s(z) / T) @ codebook         | softmax(s(z) / T) @ table                           |

`s(z)` are the scores of the codes whose largest one is the nearest code: the cosine similarities, or for euclidean
tokenizers minus the squared distance in units of the mean squared length of a code (up to a number that all codes
of a token share, which changes neither the nearest code nor the softmax). `table` are the model's own embeddings.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.robustness.extra import RobustnessError
from seitpp.augment import EvalPixelView, EvalView
from seitpp.augment.maps import center_window, crop_resize, same_boxes
from seitpp.codebook import full_precision
from seitpp.tokenizers import Tokenizer

Surrogate = Literal["straight_through", "softmax"]
SURROGATES: tuple[Surrogate, ...] = ("straight_through", "softmax")
TEMPERATURE = 0.01


class PixelClassifier(nn.Module):
    """A classifier of pixels: images (B, 3, height, width) in [0, 1] -> logits, of the classes `outputs` alone."""

    def __init__(self, model: nn.Module, outputs: Tensor | None):
        super().__init__()
        self.model, self.outputs, self.view = model.requires_grad_(False), outputs, EvalPixelView()

    def forward(self, images: Tensor) -> Tensor:
        with full_precision(images.device):
            return chosen(self.model(self.view.standardize(images)), self.outputs)


class TokenClassifier(nn.Module):
    """A classifier of tokens behind its tokenizer: images (B, C, height, width) in [0, 1] -> logits.

    The logits are those of the classes `outputs` alone, if they are given. `surrogate` is what the backward pass
    sees (see the top of the file) and can be changed at any time.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, view: EvalView, *, outputs: Tensor | None = None):
        super().__init__()
        self.model, self.tokenizer = model.requires_grad_(False), tokenizer.requires_grad_(False)
        self.view, self.outputs = view, outputs
        self.surrogate: Surrogate = "straight_through"

    def forward(self, images: Tensor) -> Tensor:
        with full_precision(images.device):
            features = self.tokenizer.features(images).float()
            inputs = self.view(self.tokenizer.quantize(features))
            if not features.requires_grad:
                return chosen(self.model(inputs), self.outputs)
            features = center_window(features, self.view.window)
            through = self._through_maps if self.view.codebook is not None else self._through_ids
            return chosen(through(inputs, features), self.outputs)

    def ids(self, images: Tensor) -> Tensor:
        """Return the ids (B, H, W) that the model sees: those of the central window."""
        return center_window(self.tokenizer.encode(images), self.view.window)

    def _through_maps(self, inputs: Tensor, features: Tensor) -> Tensor:
        maps = features
        if self.surrogate == "softmax":
            maps = (self._weights(features) @ self.tokenizer.codebook.float()).permute(0, 3, 1, 2)
        if self.view.size is not None:
            numbers = torch.arange(len(maps), device=maps.device)
            maps = crop_resize(maps, same_boxes(numbers, (0, 0, *self.view.window)), self.view.size)
        return self.model(inputs + only_gradient(maps))

    def _through_ids(self, inputs: Tensor, features: Tensor) -> Tensor:
        embedding = self.model.patch_embed.token_emb
        weights = self._weights(features) if self.surrogate == "softmax" else self._scores(features)
        vectors = weights @ embedding.weight
        handle = embedding.register_forward_hook(lambda *call: call[2] + only_gradient(vectors))
        try:
            return self.model(inputs)
        finally:
            handle.remove()

    def _weights(self, features: Tensor) -> Tensor:
        return (self._scores(features) / TEMPERATURE).softmax(dim=-1)

    def _scores(self, features: Tensor) -> Tensor:
        """Return the scores (B, H, W, K) of all codes for a feature map (B, D, H, W)."""
        vectors, rows = features.permute(0, 2, 3, 1), self.tokenizer.codebook.float()
        if self.tokenizer.spec.lookup == "cosine":
            return F.normalize(vectors, dim=-1) @ F.normalize(rows, dim=-1).T
        squares = rows.square().sum(dim=1)
        return (2 * vectors @ rows.T - squares) / squares.mean()


def chosen(logits: Tensor, outputs: Tensor | None) -> Tensor:
    """Return the logits of the classes `outputs`, of all if it is None."""
    return logits.float() if outputs is None else logits.float()[:, outputs]


def only_gradient(values: Tensor) -> Tensor:
    """Return zeros whose gradient is passed on to `values`."""
    return values - values.detach()


def check_differentiable(tokenizer: Tokenizer, device: torch.device) -> None:
    """Raise RobustnessError unless a tokenizer gives tokens one id, and gradients pass through its features."""
    spec = tokenizer.spec
    if len(tokenizer.books.sizes) > 1:
        raise RobustnessError(
            f"the {spec.kind} tokenizer gives a token {len(tokenizer.books.sizes)} digits, attacks expect one id: "
            "leave attacks out of --suite"
        )
    images = torch.full((1, spec.channels, *spec.image_size), 0.5, device=device, requires_grad=True)
    tokenizer.requires_grad_(False)
    with torch.enable_grad():
        differentiable = tokenizer.features(images).requires_grad
    if not differentiable:
        raise RobustnessError(
            f"the {spec.kind} tokenizer gives ids without features that have gradients, which attacks need: leave "
            "attacks out of --suite, or take a tokenizer whose features are known (vit_vqgan, vqgan, patch_kmeans)"
        )
