"""Ids <-> bytes: entropy coding of the tokens of one image."""

from collections.abc import Sequence

import numpy as np

from seitpp.codec.ans import AnsCodec
from seitpp.codec.base import MAX_CODES, MAX_TOKENS, Codec, CodecError
from seitpp.codec.context import ContextCodec
from seitpp.codec.escape import EscapeCodec
from seitpp.codec.huffman import HuffmanCodec
from seitpp.codec.packed import PackedCodec

CODECS = {
    "ans": AnsCodec,
    "context": ContextCodec,
    "huffman": HuffmanCodec,
    "packed": PackedCodec,
    "escape": EscapeCodec,
}

__all__ = [
    "CODECS",
    "MAX_CODES",
    "MAX_TOKENS",
    "AnsCodec",
    "Codec",
    "CodecError",
    "ContextCodec",
    "EscapeCodec",
    "HuffmanCodec",
    "PackedCodec",
    "build",
]


def build(
    name: str,
    num_codes: int,
    counts: Sequence[int] | np.ndarray | None = None,
    grid: Sequence[int] | None = None,
    table: bytes | None = None,
) -> Codec:
    """The codec called `name` for ids 0 .. num_codes - 1.

    counts: (num_codes,) integers, how often each code occurs; "ans" and "huffman" make their tables of them.
    grid: (H, W) of every image, and table: the bytes that `ContextCodec.learn` made; "context" needs both.
    Counts and grid are facts of a data set, so every codec takes them; a table only its own.
    Raises ValueError for an unknown name and for what a codec needs and does not get.
    """
    if name not in CODECS:
        raise ValueError(f"codec: got {name!r}, expected one of {', '.join(map(repr, CODECS))}")
    if name == "context":
        return ContextCodec(num_codes, grid, table)
    if table is not None:
        raise ValueError(f"codec {name!r}: got a table of {len(table)} bytes, but only 'context' has one")
    return CODECS[name](num_codes, counts) if name in ("ans", "huffman") else CODECS[name](num_codes)
