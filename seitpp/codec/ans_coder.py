"""The ANS coder of the codecs "ans" and "context": a stack of tokens stored as one large integer.

The token that is pushed last is popped first. Pushed on an empty stack, the first token would take 24 bits
whatever its probability, so the integer starts as the tokens that are decoded last, written in base K: the seed.
The coder is constriction's; docs/format.md gives its arithmetic, so the bytes can be read without that library.
Source of the method: Duda, arXiv 0902.0271; of the coder: Bamler, arXiv 2201.01741.
"""

from collections.abc import Iterator

import constriction
import numpy as np
from jaxtyping import Integer

from seitpp.codec.base import CodecError

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical

WORD = np.dtype("<u4")
# The quantized probabilities of all codes sum to this.
TOTAL = 2**24


def categorical(weights: Integer[np.ndarray, " codes"]) -> Categorical:
    """Return the coder's probability table for integer weights, their sum below 2^53."""
    # The coder needs at least two codes: a single one gets a second of weight 0, which costs no bits.
    table = weights if len(weights) > 1 else np.append(weights, 0)
    return Categorical(table.astype(np.float64), perfect=False)


def seed_size(num_codes: int) -> int:
    """Return the number of seed tokens m: the smallest with K^m >= 2^24, or 1 if there is a single code."""
    return 1 if num_codes == 1 else next(m for m in range(25) if num_codes**m >= TOTAL)


def most_bytes(num_tokens: int) -> int:
    """Return an upper limit of the body of an image.

    A token has 24 bits at most, since no probability is below 1 / TOTAL, and less than one more for what divisions
    round; the seed has 40, and the rest of the last word is zeros that are removed.
    """
    return 4 * num_tokens + 8


def seeded(ids: Integer[np.ndarray, " seed"], num_codes: int) -> AnsCoder:
    """Return a coder that holds only the seed: the tokens of an image that are decoded last."""
    number = 0
    for i in reversed(ids.tolist()):
        number = number * num_codes + i
    return _coder(number.to_bytes(8, "little").rstrip(b"\0"))


def seed_of(coder: AnsCoder, num_codes: int, size: int) -> Iterator[int]:
    """Yield the `size` seed ids; the coder is read when the first is requested, after all other tokens.

    Raises CodecError if the coder holds more than the seed.
    """
    number = int.from_bytes(body_of(coder), "little")
    if number >= num_codes**size:
        raise CodecError("payload goes on after its last token: damaged")
    for _ in range(size):
        number, i = divmod(number, num_codes)
        yield i


def body_of(coder: AnsCoder) -> bytes:
    """Return the coder's content as the body of a payload."""
    return coder.get_compressed().astype(WORD, copy=False).tobytes().rstrip(b"\0")


def coder_of(body: memoryview, num_codes: int) -> AnsCoder:
    """Return the coder that holds `body`. Raises CodecError for a body that `body_of` never returns."""
    if len(body) and (body[-1] == 0 or num_codes == 1):
        raise CodecError("payload is not canonical: it has bytes that no encoder writes")
    return _coder(body)


def _coder(body: bytes | memoryview) -> AnsCoder:
    return AnsCoder(np.frombuffer(b"".join((body, bytes(-len(body) % 4))), WORD))
