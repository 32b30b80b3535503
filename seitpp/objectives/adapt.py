"""Training and judging TokenAdapt: g(A(f(Z(x)))) is to give the tokens of A(x)."""

from copy import deepcopy
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from seitpp.errors import UserError
from seitpp.tokenizers import Tokenizer


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
