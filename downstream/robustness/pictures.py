"""A picture of corrupted images beside what their tokens decode to."""

from collections.abc import Sequence

import torch
from torch import Tensor

from downstream.robustness.classifiers import TokenClassifier
from downstream.robustness.corruptions import CorruptedImages
from seitpp.images.batches import ImageDataset
from seitpp.plots import paint_codes
from seitpp.tokenizers import Tokenizer, TokenizerError

SHOWN, SEVERITY = 3, 3


def corrupted_rows(
    images: ImageDataset, classifier: torch.nn.Module, names: Sequence[str], *, seed: int, device: torch.device
) -> dict[str, list[Tensor]]:
    """Return rows of images (C, height, width) in [0, 1] by name: three images, clean and at severity 3.

    Where there is a tokenizer, each is followed by what its tokens decode to.
    """
    spread = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().long().tolist()
    titled = {"clean": images}
    titled |= {name: CorruptedImages(images, name, SEVERITY, seed=seed) for name in names}
    rows = {}
    for name, shown in titled.items():
        pixels = shown.__getitems__(spread).images.to(device).float() / 255
        pairs = [pixels]
        if isinstance(classifier, TokenClassifier):
            pairs.append(_decoded(classifier.tokenizer, pixels))
        rows[name.replace("_", " ")] = [part[place].cpu() for place in range(len(pixels)) for part in pairs]
    return rows


def _decoded(tokenizer: Tokenizer, pixels: Tensor) -> Tensor:
    """Decode the tokens of images, or paint their codes if the tokenizer has no decoder."""
    ids = tokenizer.encode(pixels)
    try:
        return tokenizer.decode(ids)
    except TokenizerError:
        return paint_codes(ids, tokenizer.books)
