"""SeiT's byte code: an id below 255 is one byte, and every byte 0xFF before it adds 255.

The stream is exactly that of the released files, so there are no check bytes: a changed byte below 0xFF is
another id, and nothing here can see it. Source: the SeiT release; its decoder stops at id 509, this one does not.
"""

import numpy as np

from seitpp.codec.base import CodecError, check_below, check_ids, check_num_codes, check_num_tokens

ESCAPE = 0xFF


class EscapeCodec:
    """One byte for each of the 255 most popular codes, two for the next 255, and so on; needs no table."""

    name = "escape"

    def __init__(self, num_codes: int) -> None:
        check_num_codes(num_codes)
        self.num_codes = num_codes

    def encode(self, ids: np.ndarray) -> bytes:
        """Bytes of 1-D integer ids in 0 .. num_codes - 1. Raises ValueError for anything else."""
        escapes, last = np.divmod(check_ids(ids, self.num_codes), ESCAPE)
        ends = np.cumsum(escapes + 1, dtype=np.int64)
        stream = np.full(int(ends[-1]) if ends.size else 0, ESCAPE, np.uint8)
        stream[ends - 1] = last
        return stream.tobytes()

    def decode(self, data: bytes | memoryview, num_tokens: int) -> np.ndarray:
        """The (num_tokens,) uint16 ids, all below num_codes.

        Raises CodecError for bytes that are not exactly that many codes; other damage goes unseen.
        """
        check_num_tokens(num_tokens)
        stream = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(stream != ESCAPE)
        if len(ends) < num_tokens:
            cut = "inside" if stream.size and stream[-1] == ESCAPE else "before"
            raise CodecError(f"{stream.size} bytes end {cut} token {len(ends)}, expected {num_tokens}: truncated")
        size = int(ends[num_tokens - 1]) + 1 if num_tokens else 0
        if size < stream.size:
            raise CodecError(f"byte {size}: the {num_tokens} tokens end here, of {stream.size} bytes")
        ids = np.diff(ends, prepend=-1) * ESCAPE - ESCAPE + stream[ends]
        check_below(ids, self.num_codes)
        return ids.astype(np.uint16)
