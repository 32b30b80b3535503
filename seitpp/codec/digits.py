"""Tokens of several digits: each digit's plane is encoded by itself, one after the other."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt16

from seitpp.codec.base import Codec, CodecError, check_num_tokens

SIZE_BYTES = 5  # of the size of a plane's payload, seven bits each: payloads are shorter than 2^31 bytes


class DigitsCodec:
    """A codec of tokens with several digits, of one codec for each: the ids are all digits 0, all digits 1, .."""

    def __init__(self, codecs: Sequence[Codec]) -> None:
        """codecs: those of the digits, all of the same name."""
        self.codecs = tuple(codecs)
        self.name = self.codecs[0].name
        self.num_codes = max(codec.num_codes for codec in self.codecs)

    def encode(self, ids: Integer[np.ndarray, " tokens"]) -> bytes:
        """Return the bytes of the planes. Raises ValueError if they are not 1-D, equally long and valid."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.size % len(self.codecs):
            raise ValueError(f"ids: got {ids.shape}, expected the planes of {len(self.codecs)} digits, flattened")
        *first, last = map(
            lambda codec, plane: codec.encode(plane), self.codecs, ids.reshape(len(self.codecs), -1)
        )
        return b"".join(size + payload for payload in first for size in [_varint(len(payload))]) + last

    def decode(self, data: bytes | memoryview, num_tokens: int) -> UInt16[np.ndarray, " {num_tokens}"]:
        """Return the planes. Raises CodecError if a payload or its size is damaged."""
        check_num_tokens(num_tokens)
        data, planes = memoryview(data), np.empty((len(self.codecs), num_tokens // len(self.codecs)), np.uint16)
        for codec, plane in zip(self.codecs[:-1], planes, strict=False):
            size, data = _read_varint(data)
            if size > len(data):
                raise CodecError(f"a plane of {size} bytes, but {len(data)} follow: truncated")
            plane[:] = codec.decode(data[:size], plane.size)
            data = data[size:]
        planes[-1] = self.codecs[-1].decode(data, planes.shape[1])
        return planes.ravel()


def _varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low]) if not rest else bytes([low | 128]) + _varint(rest)


def _read_varint(data: memoryview) -> tuple[int, memoryview]:
    """Return the number at the beginning of the bytes, and what follows."""
    number = 0
    for place, byte in enumerate(data[:SIZE_BYTES]):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            if byte == 0 and place:
                raise CodecError("size of a plane: it has bytes that no encoder writes: damaged")
            return number, data[place + 1 :]
    raise CodecError("size of a plane: it is cut off or too long: damaged")
