"""Static-table asymmetric numeral systems (ANS): within half a per cent of the entropy of the counts.

The coder is constriction's; docs/format.md gives its arithmetic, so that the bytes can be read without it.
Source of the method: Duda, arXiv 0902.0271; of the coder: Bamler, arXiv 2201.01741.
"""

from binascii import crc_hqx
from collections.abc import Sequence

import constriction
import numpy as np

from seitpp.codec.base import CodecError, check_counts, check_ids, check_num_codes, check_num_tokens

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
        # The arithmetic needs two codes: a lone one is coded as the first of two, which costs no bits.
        table = counts if num_codes > 1 else np.append(counts, 0)
        self._model = Categorical(table.astype(np.float64), perfect=False)
        self._table_check = crc_hqx(num_codes.to_bytes(4, "little") + counts.astype("<u8").tobytes(), 0xFFFF)

    def encode(self, ids: np.ndarray) -> bytes:
        """Payload of 1-D integer ids in 0 .. num_codes - 1. Raises ValueError for anything else."""
        ids = check_ids(ids, self.num_codes)
        coder = AnsCoder()
        coder.encode_reverse(ids, self._model)
        body = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
        return self._check(body, ids.size).to_bytes(2, "little") + body

    def decode(self, data: bytes | memoryview, num_tokens: int) -> np.ndarray:
        """The (num_tokens,) uint16 ids, all below num_codes. Raises CodecError if the payload is damaged."""
        check_num_tokens(num_tokens)
        check, body = int.from_bytes(data[:2], "little"), bytes(data[2:])
        # The length: one byte of 0 could pass for a check of 0.
        if len(data) < 2 or check != self._check(body, num_tokens):
            raise CodecError("check does not match: damaged, or written with another table or number of tokens")
        if body[-1:] == b"\0" or (self.num_codes == 1 and body):
            raise CodecError("payload is not canonical: it has bytes that no encoder writes")
        coder = AnsCoder(np.frombuffer(body + bytes(-len(body) % 4), "<u4"))
        ids = coder.decode(self._model, num_tokens)
        if not coder.is_empty():
            raise CodecError(f"payload holds more than {num_tokens} tokens")
        return ids.astype(np.uint16)

    def _check(self, body: bytes, num_tokens: int) -> int:
        """CRC-16 of table, length and body, because an ANS stream itself decodes whatever is done to it."""
        return crc_hqx(body, crc_hqx(num_tokens.to_bytes(4, "little"), self._table_check))
