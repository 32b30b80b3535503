"""Static-table asymmetric numeral systems (ANS): within half a per cent of the entropy of the counts.

The coder is constriction's; docs/format.md gives its arithmetic, so that the bytes can be read without it.
Source of the method: Duda, arXiv 0902.0271; of the coder: Bamler, arXiv 2201.01741.
"""

from collections.abc import Sequence

import constriction
import numpy as np

from seitpp.codec.base import CodecError, check_counts, check_ids, check_num_codes, counts_bytes
from seitpp.codec.seal import Seal

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical


class AnsCodec:
    """One table for all tokens, made of integer counts; a code that never occurred can still be encoded."""

    name = "ans"

    def __init__(self, num_codes: int, counts: Sequence[int] | np.ndarray | None) -> None:
        """counts: (num_codes,) integers >= 0, not all zero. Raises ValueError otherwise."""
        check_num_codes(num_codes)
        counts = check_counts(counts, num_codes)
        self.num_codes = num_codes
        self._model = categorical(counts)
        self._seal = Seal(counts_bytes(counts))

    def encode(self, ids: np.ndarray) -> bytes:
        """Payload of 1-D integer ids in 0 .. num_codes - 1. Raises ValueError for anything else."""
        ids = check_ids(ids, self.num_codes)
        coder = AnsCoder()
        coder.encode_reverse(ids, self._model)
        return self._seal.close(stack_body(coder), ids.size)

    def decode(self, data: bytes | memoryview, num_tokens: int) -> np.ndarray:
        """The (num_tokens,) uint16 ids, all below num_codes. Raises CodecError if the payload is damaged."""
        coder = stack_of(self._seal.open(data, num_tokens), self.num_codes)
        ids = coder.decode(self._model, num_tokens)
        check_empty(coder, num_tokens)
        return ids.astype(np.uint16)


def categorical(weights: np.ndarray) -> Categorical:
    """The coder's table of (num_codes,) integer weights, their sum below 2^53."""
    # The arithmetic needs two codes: a lone one is coded as the first of two, which costs no bits.
    table = weights if len(weights) > 1 else np.append(weights, 0)
    return Categorical(table.astype(np.float64), perfect=False)


def stack_body(coder: AnsCoder) -> bytes:
    """What the coder holds, as the body of a payload."""
    return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def stack_of(body: bytes, num_codes: int) -> AnsCoder:
    """The coder that holds `body`. Raises CodecError for a body that `stack_body` never makes."""
    if body[-1:] == b"\0" or (num_codes == 1 and body):
        raise CodecError("payload is not canonical: it has bytes that no encoder writes")
    return AnsCoder(np.frombuffer(body + bytes(-len(body) % 4), "<u4"))


def check_empty(coder: AnsCoder, num_tokens: int) -> None:
    """Raises CodecError if something is left after the last token."""
    if not coder.is_empty():
        raise CodecError(f"payload holds more than {num_tokens} tokens")
