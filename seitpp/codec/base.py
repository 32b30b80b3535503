"""What all codecs have in common: the protocol, the error, and the validation of ids, lengths and counts."""

from typing import Protocol

import numpy as np
from jaxtyping import Int32, Int64, Integer, UInt16
from numpy.typing import ArrayLike

from seitpp.errors import UserError

MAX_CODES = 2**16
MAX_TOKENS = 2**24
# Below this, sums of counts are exact in float64.
MAX_COUNT_SUM = 2**53
# An image is decoded in pieces of this many tokens, so that what is needed beside its ids does not grow with it.
PIECE = 2**16


class CodecError(UserError):
    """Raised for bytes that are not a valid encoding of the expected number of tokens."""


class Codec(Protocol):
    """A codec turns the ids of one image into bytes and back; it is immutable and thread-safe."""

    name: str
    num_codes: int

    def encode(self, ids: Integer[np.ndarray, " tokens"]) -> bytes:
        """Return the bytes of ids in 0 .. num_codes - 1. Raises ValueError if `ids` are not 1-D and valid."""
        ...

    def decode(self, data: bytes | memoryview, num_tokens: int) -> UInt16[np.ndarray, " {num_tokens}"]:
        """Return the ids stored in `data`. Raises CodecError if the bytes are damaged."""
        ...


def check_ids(ids: ArrayLike, num_codes: int) -> Int32[np.ndarray, " tokens"]:
    """Return `ids` as int32. Raises ValueError unless they are 1-D integers in 0 .. num_codes - 1."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"ids: got {ids.ndim}-D {ids.dtype}, expected a 1-D array of integers")
    if ids.size > MAX_TOKENS:
        raise ValueError(f"ids: got {ids.size} tokens, expected at most {MAX_TOKENS} per image")
    if ids.size and (ids.max() >= num_codes or (ids.dtype.kind == "i" and ids.min() < 0)):
        raise ValueError(f"ids: got values {ids.min()} .. {ids.max()}, expected 0 .. {num_codes - 1}")
    return ids.astype(np.int32)


def check_num_tokens(num_tokens: int) -> None:
    """Raise CodecError for a number of tokens out of range, before memory is allocated for it."""
    if not 0 <= num_tokens <= MAX_TOKENS:
        raise CodecError(f"number of tokens: got {num_tokens}, expected 0 .. {MAX_TOKENS}")


def check_size(size: int, num_tokens: int, most: int) -> None:
    """Raise CodecError for a payload of more than `most` bytes, before it is read or memory allocated for it."""
    if size > most:
        raise CodecError(f"payload of {size} bytes, expected at most {most} for {num_tokens} tokens: damaged")


def check_num_codes(num_codes: int) -> None:
    """Raise ValueError unless ids below `num_codes` fit uint16."""
    if not 1 <= num_codes <= MAX_CODES:
        raise ValueError(f"number of codes: got {num_codes}, expected 1 .. {MAX_CODES}")


def check_counts(counts: ArrayLike | None, num_codes: int) -> Int64[np.ndarray, " {num_codes}"]:
    """Return `counts` as int64. Raises ValueError unless they are `num_codes` integers >= 0, not all zero."""
    if counts is None:
        raise ValueError(f"counts: got none, expected how often each of the {num_codes} codes occurs")
    counts = np.asarray(counts)
    if counts.shape != (num_codes,) or counts.dtype.kind not in "iu":
        raise ValueError(f"counts: got {counts.dtype} {counts.shape}, expected {num_codes} integers")
    total = sum(counts.tolist())
    if counts.min() < 0 or not 0 < total < MAX_COUNT_SUM:
        raise ValueError(
            f"counts: got a minimum of {counts.min()} and a sum of {total}, "
            f"expected no negative count and a sum of 1 .. {MAX_COUNT_SUM - 1}"
        )
    return counts.astype(np.int64)


def counts_bytes(counts: Integer[np.ndarray, " codes"]) -> bytes:
    """Return counts as checksums cover them: num_codes as u32, then each count as u64, little-endian."""
    return len(counts).to_bytes(4, "little") + counts.astype("<u8").tobytes()


def check_below(ids: Integer[np.ndarray, " tokens"], num_codes: int, *, first: int) -> None:
    """Raise CodecError for a decoded id that is not below `num_codes`; `first` is the position of ids[0]."""
    wrong = ids >= num_codes
    if wrong.any():
        token = int(wrong.argmax())
        raise CodecError(f"token {first + token}: id {ids[token]}, expected 0 .. {num_codes - 1}: damaged")
