"""Ids <-> bytes: entropy coding of the tokens of one image."""

from collections.abc import Sequence

import numpy as np

from seitpp.codec.ans import AnsCodec
from seitpp.codec.base import MAX_CODES, MAX_TOKENS, Codec, CodecError

CODECS = {
    "ans": AnsCodec,
}

__all__ = ["CODECS", "MAX_CODES", "MAX_TOKENS", "AnsCodec", "Codec", "CodecError", "build"]


def build(name: str, num_codes: int, counts: Sequence[int] | np.ndarray | None = None) -> Codec:
    """The codec called `name` for ids 0 .. num_codes - 1.

    counts: (num_codes,) integers, how often each code occurs; needed by "ans", which makes its table of them.
    Raises ValueError for an unknown name and for counts that make no table.
    """
    if name not in CODECS:
        raise ValueError(f"codec: got {name!r}, expected one of {', '.join(map(repr, CODECS))}")
    return CODECS[name](num_codes, counts)
