"""How close decoded tokens come to images, and what of TokenAdapt stands beside direct augmentation."""

from typing import NamedTuple

import torch
from kornia.metrics import ssim
from torch import Tensor

from seitpp.augment.geometry import Geometry, apply_geometry
from seitpp.augment.maps import center_window
from seitpp.codebook import embed
from seitpp.models.tokenadapt import TokenAdapt
from seitpp.objectives.adapt import TokenizerPair
from seitpp.tokenizers import Tokenizer

# What `compare` gives of each image: token accuracies in percent, and PSNR in dB.
MEASURES = (
    "accuracy_tokenadapt",
    "accuracy_direct",
    "accuracy_unchanged",
    "psnr_tokenadapt",
    "psnr_direct",
    "psnr_true_tokens",
)


def quality(decoded: Tensor, images: Tensor) -> Tensor:
    """PSNR in dB (100 for an exact image) and SSIM (windows of 11 x 11) of each image: (B, 2)."""
    errors = (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return torch.stack([-10 * errors.log10(), ssim(decoded, images, 11).mean(dim=(1, 2, 3))], dim=1)


def token_accuracy(predicted: Tensor, ids: Tensor) -> Tensor:
    """The fraction of equal tokens of each image, in [0, 1]: two (B, H', W') -> (B,) float32."""
    return (predicted == ids).float().mean(dim=(1, 2))


def augment_directly(ids: Tensor, geometry: Geometry, tokenizer: Tokenizer) -> Tensor:
    """The yardstick: A on the vectors of the tokens themselves, then the tokenizer's nearest code.

    Ids (B, H, W) of whole images -> (B, H', W') int64. Where A fills with zeros the code is arbitrary; with the
    vector of black instead, 1.0 points more tokens were right on photographs and 0.9 dB were won.
    """
    return tokenizer.quantize(apply_geometry(embed(ids, tokenizer.codebook), geometry))


class Augmented(NamedTuple):
    """x (B, 3, S, S), A(x) (B, 3, S', S'), the tokens `ids` (B, H', W') of A(x), and what stands for them: those
    of TokenAdapt, those of direct augmentation, and the central window of the tokens of x."""

    originals: Tensor
    images: Tensor
    ids: Tensor
    tokenadapt: Tensor
    direct: Tensor
    unchanged: Tensor


@torch.no_grad()
def augment_in_every_way(
    model: TokenAdapt, tokenizers: TokenizerPair, originals: Tensor, geometry: Geometry
) -> Augmented:
    """Images (B, 3, S, S) in [0, 1] and one draw of A for each."""
    ids = tokenizers.whole.encode(originals)
    images = apply_geometry(originals, geometry).clamp(0, 1)
    adapted = model(embed(ids, tokenizers.whole.codebook), geometry).argmax(dim=1)
    direct = augment_directly(ids, geometry, tokenizers.whole)
    unchanged = center_window(ids, direct.shape[1:])
    return Augmented(originals, images, tokenizers.augmented.encode(images), adapted, direct, unchanged)


def compare(made: Augmented, tokenizer: Tokenizer) -> Tensor:
    """`MEASURES` of each image, (B, 6) float32. PSNR is that of decoded tokens to A(x)."""
    accuracies = [100 * token_accuracy(ids, made.ids) for ids in (made.tokenadapt, made.direct, made.unchanged)]
    decoded = [tokenizer.decode(ids) for ids in (made.tokenadapt, made.direct, made.ids)]
    return torch.stack(accuracies + [quality(images, made.images)[:, 0] for images in decoded], dim=1)
