"""The CRC-16 checksum stored in front of each payload: without it, damaged bits could decode to valid ids."""

from binascii import crc_hqx

from seitpp.codec.base import CodecError, check_num_tokens, check_size


class Checksum:
    """A CRC-16 of the codec's table, the number of tokens and the body, stored in two bytes before the body."""

    def __init__(self, table: bytes) -> None:
        self._start = crc_hqx(table, 0xFFFF)

    def of(self, body: bytes | memoryview, num_tokens: int) -> int:
        """Return the checksum of `body`, 0 .. 65,535."""
        return crc_hqx(body, crc_hqx(num_tokens.to_bytes(4, "little"), self._start))

    def wrap(self, body: bytes, num_tokens: int) -> bytes:
        """Return the payload of `body`: its checksum, then the body."""
        return self.of(body, num_tokens).to_bytes(2, "little") + body

    def unwrap(self, data: bytes | memoryview, num_tokens: int, *, most: int) -> memoryview:
        """Return the body of a payload, not copied.

        Raises CodecError if its checksum, table or number of tokens is wrong, or it has more than `most` bytes.
        """
        check_num_tokens(num_tokens)
        check_size(len(data), num_tokens, 2 + most)
        stored, body = int.from_bytes(data[:2], "little"), memoryview(data)[2:]
        # Without the test of the length, a single byte 0 could pass for a checksum of 0.
        if len(data) < 2 or stored != self.of(body, num_tokens):
            raise CodecError("checksum does not match: damaged, or written with another table or number of tokens")
        return body
