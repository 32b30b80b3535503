"""SeiT's byte code: an id below 255 is one byte, and every byte 0xFF before it adds 255.

The bytes equal those of the released files, so there is no checksum: a damaged byte below 0xFF decodes to another
id unnoticed. Source: the SeiT release, whose decoder stops at id 509; this one has no such limit.
"""

import numpy as np
from jaxtyping import Integer, UInt16

from seitpp.codec.base import CodecError, check_below, check_ids, check_num_codes, check_num_tokens

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
        stream = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(stream != ESCAPE)
        if len(ends) < num_tokens:
            cut = "inside" if stream.size and stream[-1] == ESCAPE else "before"
            raise CodecError(f"{stream.size} bytes end {cut} token {len(ends)}, expected {num_tokens}: truncated")
        size = int(ends[num_tokens - 1]) + 1 if num_tokens else 0
        if size < stream.size:
            raise CodecError(f"byte {size}: the {num_tokens} tokens end here, of {stream.size} bytes: damaged")
        ids = np.diff(ends, prepend=-1) * ESCAPE - ESCAPE + stream[ends]
        check_below(ids, self.num_codes)
        return ids.astype(np.uint16)
