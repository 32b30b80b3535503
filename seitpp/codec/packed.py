"""Fixed-width codec: every token takes the bits that the largest id needs. A plain baseline without a table."""

import numpy as np
from jaxtyping import Integer, UInt16

from seitpp.codec.base import PIECE, CodecError, check_below, check_ids, check_num_codes
from seitpp.codec.checksum import Checksum


class PackedCodec:
    """Codec of ceil(log2 num_codes) bits per token, highest bit first; with a single code, a token takes none."""

    name = "packed"

    def __init__(self, num_codes: int) -> None:
        check_num_codes(num_codes)
        self.num_codes = num_codes
        self._width = (num_codes - 1).bit_length()
        self._checksum = Checksum(num_codes.to_bytes(4, "little"))

    def encode(self, ids: Integer[np.ndarray, " tokens"]) -> bytes:
        """Return the payload of ids in 0 .. num_codes - 1. Raises ValueError if `ids` are not 1-D and valid."""
        ids = check_ids(ids, self.num_codes)
        pieces = (ids[start : start + PIECE] for start in range(0, ids.size, PIECE))
        return self._checksum.wrap(b"".join(map(self._pack, pieces)), ids.size)

    def decode(self, data: bytes | memoryview, num_tokens: int) -> UInt16[np.ndarray, " {num_tokens}"]:
        """Return the ids, all below num_codes. Raises CodecError if the payload is damaged."""
        size = -(-num_tokens * self._width // 8)
        body = self._checksum.unwrap(data, num_tokens, most=size)
        if len(body) != size:
            raise CodecError(f"body of {len(body)} bytes, expected {size} for {num_tokens} tokens")
        ids = np.empty(num_tokens, np.uint16)
        for start in range(0, num_tokens, PIECE):
            piece = ids[start : start + PIECE]
            first = start * self._width // 8  # whole, since PIECE is a multiple of 8
            piece[:] = self._unpack(body[first : first - (-piece.size * self._width // 8)], piece.size)
            check_below(piece, self.num_codes, first=start)
        return ids

    def _pack(self, ids: np.ndarray) -> bytes:
        bits = np.unpackbits(ids.astype(">u2").view(np.uint8)).reshape(-1, 16)
        return np.packbits(bits[:, 16 - self._width :]).tobytes()

    def _unpack(self, body: memoryview, num_tokens: int) -> np.ndarray:
        flat, size = np.unpackbits(np.frombuffer(body, np.uint8)), num_tokens * self._width
        if flat[size:].any():
            raise CodecError("payload is not canonical: the bits after its last token are not zero")
        bits = np.zeros((num_tokens, 16), np.uint8)
        bits[:, 16 - self._width :] = flat[:size].reshape(num_tokens, self._width)
        return np.packbits(bits).view(">u2")
