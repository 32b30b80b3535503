"""SeiT's byte code: an id below 255 is one byte, and every byte 0xFF before it adds 255.

The bytes equal those of the released files, so there is no checksum: a damaged byte below 0xFF decodes to another
id unnoticed. Source: the SeiT release, whose decoder stops at id 509; this one has no such limit.
"""

import numpy as np
from jaxtyping import Integer, UInt16

from seitpp.codec.base import (
    PIECE,
    CodecError,
    check_below,
    check_ids,
    check_num_codes,
    check_num_tokens,
    check_size,
)

ESCAPE = 0xFF


class EscapeCodec:
    """Byte codec without a table: ids 0 .. 254 take one byte, the next 255 ids take two, and so on."""

    name = "escape"

    def __init__(self, num_codes: int) -> None:
        check_num_codes(num_codes)
        self.num_codes = num_codes

    def encode(self, ids: Integer[np.ndarray, " tokens"]) -> bytes:
        """Return the bytes of ids in 0 .. num_codes - 1. Raises ValueError if `ids` are not 1-D and valid."""
        escapes, last = np.divmod(check_ids(ids, self.num_codes), ESCAPE)
        ends = np.cumsum(escapes + 1, dtype=np.int64)
        stream = np.full(int(ends[-1]) if ends.size else 0, ESCAPE, np.uint8)
        stream[ends - 1] = last
        return stream.tobytes()

    def decode(self, data: bytes | memoryview, num_tokens: int) -> UInt16[np.ndarray, " {num_tokens}"]:
        """Return the ids, all below num_codes.

        Raises CodecError if the bytes do not hold exactly `num_tokens` valid ids; other damage is not detected.
        """
        check_num_tokens(num_tokens)
        check_size(len(data), num_tokens, num_tokens * ((self.num_codes - 1) // ESCAPE + 1))
        stream = np.frombuffer(data, np.uint8)
        ids = np.empty(num_tokens, np.uint16)
        token, last = 0, -1  # the next token, and where the one before it ends
        for start in range(0, stream.size, PIECE):
            ends = np.flatnonzero(stream[start : start + PIECE] != ESCAPE)[: num_tokens - token] + start
            if ends.size:
                piece = np.diff(ends, prepend=last) * ESCAPE - ESCAPE + stream[ends]
                check_below(piece, self.num_codes, first=token)
                ids[token : token + ends.size] = piece
                token, last = token + ends.size, int(ends[-1])
        if token < num_tokens:
            cut = "inside" if stream.size and stream[-1] == ESCAPE else "before"
            raise CodecError(f"{stream.size} bytes end {cut} token {token}, expected {num_tokens}: truncated")
        if last + 1 < stream.size:
            raise CodecError(f"byte {last + 1}: the {num_tokens} tokens end here, of {stream.size} bytes: damaged")
        return ids
