"""Training and judging TokenAdapt: g(A(f(Z(x)))) is to give the tokens of A(x)."""

from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seitpp.augment.geometry import Geometry, apply_geometry
from seitpp.augment.maps import centre_window
from seitpp.codebook import embed
from seitpp.errors import UserError
from seitpp.models.tokenadapt import TokenAdapt
from seitpp.objectives.vq import quality
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


class TokenizerPair(NamedTuple):
    """One tokenizer at two sizes: of whole images (S x S pixels) and of augmented ones (S' x S')."""

    whole: Tokenizer
    augmented: Tokenizer


def tokenizer_pair(tokenizer: Tokenizer, image_size: int, crop: int) -> TokenizerPair:
    """Copies of `tokenizer` for images of `image_size` pixels and for grids of `crop` tokens a side.

    Raises UserError if the crop is larger than the image, TokenizerError if the tokenizer cannot take a size.
    """
    sizes = image_size, crop * tokenizer.spec.patch
    if sizes[1] > sizes[0]:
        raise UserError(
            f"a crop of {crop} tokens is {sizes[1]} pixels of images of {sizes[0]}: expected at most as many"
        )
    pair = TokenizerPair(deepcopy(tokenizer), deepcopy(tokenizer))
    for copy, size in zip(pair, sizes, strict=True):
        copy.set_image_size(size)
    return pair


def adapt_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy over tokens, in nats: `logits` (B, K, H', W'), `ids` (B, H', W') int64 of A(x) -> ()."""
    return F.cross_entropy(logits.float(), ids)


def token_accuracy(predicted: Tensor, ids: Tensor) -> Tensor:
    """Share of equal tokens of each image, in [0, 1]: two (B, H', W') -> (B,) float32."""
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
    unchanged = centre_window(ids, direct.shape[1:])
    return Augmented(originals, images, tokenizers.augmented.encode(images), adapted, direct, unchanged)


def compare(made: Augmented, tokenizer: Tokenizer) -> Tensor:
    """`MEASURES` of each image, (B, 6) float32. PSNR is that of decoded tokens to A(x)."""
    accuracies = [100 * token_accuracy(ids, made.ids) for ids in (made.tokenadapt, made.direct, made.unchanged)]
    decoded = [tokenizer.decode(ids) for ids in (made.tokenadapt, made.direct, made.ids)]
    return torch.stack(accuracies + [quality(images, made.images)[:, 0] for images in decoded], dim=1)
