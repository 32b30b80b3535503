"""The loss of TokenAdapt: from the vectors Z(x) of an image, g(A(f(Z(x)))) predicts the tokens of A(x)."""

from copy import deepcopy
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from seitpp.errors import UserError
from seitpp.tokenizers import Tokenizer


class TokenizerPair(NamedTuple):
    """One tokenizer at two image sizes: `whole` images (S x S pixels) and `augmented` ones (S' x S')."""

    whole: Tokenizer
    augmented: Tokenizer


def tokenizer_pair(tokenizer: Tokenizer, image_size: int, crop: int) -> TokenizerPair:
    """Copy `tokenizer` for images of `image_size` pixels, and for augmented images of `crop` x `crop` tokens.

    Raises UserError if the crop is larger than the image, TokenizerError if the tokenizer does not support a size.
    """
    sizes = image_size, crop * tokenizer.spec.patch
    if sizes[1] > sizes[0]:
        raise UserError(
            f"got a crop of {crop} tokens, which is {sizes[1]} pixels, expected at most the {sizes[0]} pixels of "
            "an image: pass a smaller crop or larger images"
        )
    pair = TokenizerPair(deepcopy(tokenizer), deepcopy(tokenizer))
    for copy, size in zip(pair, sizes, strict=True):
        copy.set_image_size(size)
    return pair


def adapt_loss(
    logits: Float[Tensor, "batch codes height width"], ids: Int64[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over all tokens, in nats; `ids` are the tokens of A(x)."""
    return F.cross_entropy(logits.float(), ids)
