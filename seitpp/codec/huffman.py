"""Canonical Huffman code of the ids: the second stage of SeiT's storage, without the first (the escape code).

The paper applies Huffman to the bytes of the escape code. Applied to the ids it is never longer, since an escaped
id then has one code word instead of two, and it works for any number of codes. The decoder looks up the length of
the code word at every bit of the body at once; only the walk from word to word is a loop over tokens.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from jaxtyping import Int64, Integer, UInt16

from seitpp.codec.base import PIECE, CodecError, check_counts, check_ids, check_num_codes, counts_bytes
from seitpp.codec.checksum import Checksum

# No code word is longer: every weight is at least 2^-22 of their sum, and a word of n bits needs a sum of at
# least the (n + 1)-th Fibonacci number times the smallest weight.
WINDOW = 32


class HuffmanCodec:
    """Canonical Huffman codec from integer counts; codes with a count of 0 have a code word, too."""

    name = "huffman"

    def __init__(self, num_codes: int, counts: Sequence[int] | Integer[np.ndarray, " {num_codes}"] | None) -> None:
        """counts: `num_codes` integers >= 0, not all zero. Raises ValueError otherwise."""
        check_num_codes(num_codes)
        counts = check_counts(counts, num_codes)
        self.num_codes = num_codes
        self._checksum = Checksum(counts_bytes(counts))
        self._lengths = word_lengths(counts)
        self._longest = int(self._lengths.max())
        # Codes sorted by the length of their words; in this order the words, padded to WINDOW bits, ascend.
        self._order = np.argsort(self._lengths, kind="stable")
        sizes = np.int64(1) << (WINDOW - self._lengths[self._order])
        starts = np.cumsum(sizes) - sizes
        self._words = np.empty(num_codes, ">u4")
        self._words[self._order] = starts
        # For each word length that occurs: the first padded word of that length, and its position in the order.
        self._steps, self._ranks = np.unique(self._lengths[self._order], return_index=True)
        self._first = starts[self._ranks]

    def encode(self, ids: Integer[np.ndarray, " tokens"]) -> bytes:
        """Return the payload of ids in 0 .. num_codes - 1. Raises ValueError if `ids` are not 1-D and valid."""
        ids = check_ids(ids, self.num_codes)
        parts, bits = [], np.empty(0, np.uint8)
        for start in range(0, ids.size, PIECE):
            bits = np.append(bits, self._bits(ids[start : start + PIECE]))
            whole = bits.size // 8 * 8  # the bits after the last whole byte go on in the next piece
            parts.append(np.packbits(bits[:whole]).tobytes())
            bits = bits[whole:]
        return self._checksum.wrap(b"".join(parts) + np.packbits(bits).tobytes(), ids.size)

    def decode(self, data: bytes | memoryview, num_tokens: int) -> UInt16[np.ndarray, " {num_tokens}"]:
        """Return the ids, all below num_codes. Raises CodecError if the payload is damaged."""
        body = self._checksum.unwrap(data, num_tokens, most=-(-num_tokens * self._longest // 8))
        if self.num_codes == 1:
            return np.zeros(num_tokens, np.uint16)
        ids = np.empty(num_tokens, np.uint16)
        token = end = 0  # the next token, and the bit that it starts at
        for first in range(0, len(body), PIECE):
            if token == num_tokens:
                break
            windows = _windows(body[first : first + PIECE + WINDOW // 8])[: 8 * PIECE]
            kinds = np.searchsorted(self._first, windows, side="right") - 1
            starts, end = _walk(self._steps[kinds].tolist(), end - 8 * first, num_tokens - token)
            end += 8 * first
            kinds = kinds[starts]
            ranks = (windows[starts] - self._first[kinds]) >> (WINDOW - self._steps[kinds])
            ids[token : token + len(starts)] = self._order[self._ranks[kinds] + ranks]
            token += len(starts)
        _check_end(body, end, token=token, num_tokens=num_tokens)
        return ids

    def _bits(self, ids: np.ndarray) -> np.ndarray:
        bits = np.unpackbits(self._words[ids].view(np.uint8)).reshape(-1, WINDOW)
        return bits[np.arange(WINDOW) < self._lengths[ids, None]]


def word_lengths(counts: Integer[np.ndarray, " codes"]) -> Int64[np.ndarray, " codes"]:
    """Return the length of each code word in bits, 0 for a single code.

    The two nodes of smallest weight are merged until one is left. Of equal weights, codes come before merged
    nodes, codes in the order of their ids, merged nodes in that of their creation.
    """
    num_codes = len(counts)
    weights = np.maximum(counts, max(1, int(counts.sum()) >> 20)).tolist()
    heap = list(zip(weights, range(num_codes), strict=True))
    heapify(heap)
    parents = [0] * (2 * num_codes - 1)
    for node in range(num_codes, 2 * num_codes - 1):
        (light, first), (heavy, second) = heappop(heap), heappop(heap)
        parents[first] = parents[second] = node
        heappush(heap, (light + heavy, node))
    depths = [0] * (2 * num_codes - 1)
    for node in reversed(range(2 * num_codes - 2)):
        depths[node] = depths[parents[node]] + 1
    return np.array(depths[:num_codes], np.int64)


def _windows(body: memoryview) -> np.ndarray:
    """(8 * len(body),) int64: the WINDOW bits that start at each bit of the body, zeros after its end."""
    padded = np.frombuffer(bytes(body) + bytes(4), np.uint8).astype(np.int64)
    size = len(body)
    five = np.zeros(size, np.int64)
    for i in range(5):
        five = five << 8 | padded[i : i + size]
    return (five[:, None] >> np.arange(8, 0, -1) & (2**WINDOW - 1)).ravel()


def _walk(lengths: list[int], position: int, num_tokens: int) -> tuple[list[int], int]:
    """The first bits of up to `num_tokens` tokens from `position` on, and the end of the last one.

    `lengths` has the length of the word that would start at each bit.
    """
    starts, size = [], len(lengths)
    for _ in range(num_tokens):
        if position >= size:
            break
        starts.append(position)
        position += lengths[position]
    return starts, position


def _check_end(body: memoryview, end: int, *, token: int, num_tokens: int) -> None:
    """Raise CodecError unless all tokens end at the bit `end`, less than a byte before the end of `body`."""
    size = 8 * len(body)
    if end > size:
        raise CodecError(f"body of {len(body)} bytes ends in token {token - 1}: truncated")
    if token < num_tokens:
        raise CodecError(f"body of {len(body)} bytes ends before token {token}, expected {num_tokens}: truncated")
    if end <= size - 8 or (end < size and body[-1] & (2 ** (size - end) - 1)):
        raise CodecError(f"payload holds more than {num_tokens} tokens: damaged")
