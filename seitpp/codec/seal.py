"""The two bytes before a body that show damage: entropy-coded bits decode to some ids whatever is done to them."""

from binascii import crc_hqx

from seitpp.codec.base import CodecError, check_num_tokens


class Seal:
    """A CRC-16 of the codec's table, the number of tokens and the body, written before the body."""

    def __init__(self, table: bytes) -> None:
        self._start = crc_hqx(table, 0xFFFF)

    def check(self, body: bytes, num_tokens: int) -> int:
        """The check in front of `body`, 0 .. 65,535."""
        return crc_hqx(body, crc_hqx(num_tokens.to_bytes(4, "little"), self._start))

    def close(self, body: bytes, num_tokens: int) -> bytes:
        """The payload of `body`."""
        return self.check(body, num_tokens).to_bytes(2, "little") + body

    def open(self, data: bytes | memoryview, num_tokens: int) -> bytes:
        """The body of a payload. Raises CodecError unless it was written for this table and number of tokens."""
        check_num_tokens(num_tokens)
        check, body = int.from_bytes(data[:2], "little"), bytes(data[2:])
        # The length: one byte of 0 could pass for a check of 0.
        if len(data) < 2 or check != self.check(body, num_tokens):
            raise CodecError("check does not match: damaged, or written with another table or number of tokens")
        return body
