"""The loss of TokenAdapt: from the vectors Z(x) of an image, g(A(f(Z(x)))) predicts the tokens of A(x)."""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor

from seitpp.errors import UserError
from seitpp.objectives.mtm import token_losses
from seitpp.tokenizers import Tokenizer


class TokenizerPair(NamedTuple):
    """One tokenizer at two image sizes: `whole` images (S x S pixels) and `augmented` ones (S' x S')."""

    whole: Tokenizer
    augmented: Tokenizer


def tokenizer_pair(tokenizer: Tokenizer, image_size: int, crop: int) -> TokenizerPair:
    """Copy `tokenizer` for images of `image_size` pixels, and for augmented images of `crop` x `crop` tokens.

    Raises UserError if the crop is larger than the image, TokenizerError if the tokenizer does not support a size.
    """
    if tokenizer.spec.sequence:
        raise UserError(
            f"the {tokenizer.spec.kind} tokenizer makes sequences without rows and columns: expected a grid of "
            "tokens, which can be augmented as images are"
        )
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
    logits: Float[Tensor, "batch codes height width"],
    ids: Int64[Tensor, "batch *digits height width"],
    sizes: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over all tokens, in nats.

    `ids` are the tokens of A(x), `sizes` as in `likeliest`.
    """
    return token_losses(logits, ids, sizes).mean()
