"""The coder of both ANS codecs: a stack of tokens that is one long number. What is pushed last is popped first.

In an empty coder the first token takes 24 bits, whatever its probability. So the tokens that would be pushed first
begin the number as its digits to the base K: they are the seed.
The coder is constriction's; docs/format.md gives its arithmetic, so that the bytes can be read without it.
Source of the method: Duda, arXiv 0902.0271; of the coder: Bamler, arXiv 2201.01741.
"""

from collections.abc import Iterator

import constriction
import numpy as np

from seitpp.codec.base import CodecError

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical

WORD = np.dtype("<u4")
# What the probabilities of all codes sum to.
TOTAL = 2**24


def categorical(weights: np.ndarray) -> Categorical:
    """The coder's table of (num_codes,) integer weights, their sum below 2^53."""
    # The arithmetic needs two codes: a lone one is coded as the first of two, which costs no bits.
    table = weights if len(weights) > 1 else np.append(weights, 0)
    return Categorical(table.astype(np.float64), perfect=False)


def seed_size(num_codes: int) -> int:
    """Tokens of the seed, of an image that has so many: the fewest with K^m >= 2^24; 1 of a lone code."""
    return 1 if num_codes == 1 else next(m for m in range(25) if num_codes**m >= TOTAL)


def seeded(ids: np.ndarray, num_codes: int) -> AnsCoder:
    """The coder that holds the seed only: (m,) ids, the last tokens of an image."""
    number = 0
    for i in reversed(ids.tolist()):
        number = number * num_codes + i
    return _coder(number.to_bytes(8, "little").rstrip(b"\0"))


def seed_of(coder: AnsCoder, num_codes: int, size: int) -> Iterator[int]:
    """The `size` ids that the coder holds when the first of them is asked for.

    Raises CodecError if it holds anything else.
    """
    number = int.from_bytes(body_of(coder), "little")
    if number >= num_codes**size:
        raise CodecError("payload goes on after its last token")
    for _ in range(size):
        number, i = divmod(number, num_codes)
        yield i


def body_of(coder: AnsCoder) -> bytes:
    """What the coder holds, as the body of a payload."""
    return coder.get_compressed().astype(WORD, copy=False).tobytes().rstrip(b"\0")


def coder_of(body: bytes, num_codes: int) -> AnsCoder:
    """The coder that holds `body`. Raises CodecError for a body that `body_of` never makes."""
    if body[-1:] == b"\0" or (num_codes == 1 and body):
        raise CodecError("payload is not canonical: it has bytes that no encoder writes")
    return _coder(body)


def _coder(body: bytes) -> AnsCoder:
    return AnsCoder(np.frombuffer(body + bytes(-len(body) % 4), WORD))
