"""Asymmetric numeral systems (ANS) with one static table: within 0.5 % of the entropy of the counts."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt16

from seitpp.codec.ans_coder import body_of, categorical, coder_of, most_bytes, seed_of, seed_size, seeded
from seitpp.codec.base import PIECE, check_counts, check_ids, check_num_codes, counts_bytes
from seitpp.codec.checksum import Checksum


class AnsCodec:
    """ANS codec with one table for all tokens, from integer counts; codes with a count of 0 can be encoded."""

    name = "ans"

    def __init__(self, num_codes: int, counts: Sequence[int] | Integer[np.ndarray, " {num_codes}"] | None) -> None:
        """counts: `num_codes` integers >= 0, not all zero. Raises ValueError otherwise."""
        check_num_codes(num_codes)
        counts = check_counts(counts, num_codes)
        self.num_codes = num_codes
        self._model = categorical(counts)
        self._seed = seed_size(num_codes)
        self._checksum = Checksum(counts_bytes(counts))

    def encode(self, ids: Integer[np.ndarray, " tokens"]) -> bytes:
        """Return the payload of ids in 0 .. num_codes - 1. Raises ValueError if `ids` are not 1-D and valid."""
        ids = check_ids(ids, self.num_codes)
        coded = max(0, ids.size - self._seed)
        coder = seeded(ids[coded:], self.num_codes)
        coder.encode_reverse(ids[:coded], self._model)
        return self._checksum.wrap(body_of(coder), ids.size)

    def decode(self, data: bytes | memoryview, num_tokens: int) -> UInt16[np.ndarray, " {num_tokens}"]:
        """Return the ids, all below num_codes. Raises CodecError if the payload is damaged."""
        body = self._checksum.unwrap(data, num_tokens, most=most_bytes(num_tokens))
        coder = coder_of(body, self.num_codes)
        coded = max(0, num_tokens - self._seed)
        ids = np.empty(num_tokens, np.uint16)
        for start in range(0, coded, PIECE):
            end = min(start + PIECE, coded)
            ids[start:end] = coder.decode(self._model, end - start)
        ids[coded:] = list(seed_of(coder, self.num_codes, num_tokens - coded))
        return ids
