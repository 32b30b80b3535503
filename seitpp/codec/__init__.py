"""Lossless compression of the token ids of one image to bytes, and back."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from seitpp.codec.ans import AnsCodec
from seitpp.codec.base import MAX_CODES, MAX_TOKENS, Codec, CodecError
from seitpp.codec.context import ContextCodec
from seitpp.codec.digits import DigitsCodec
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
    "DigitsCodec",
    "EscapeCodec",
    "HuffmanCodec",
    "PackedCodec",
    "build",
    "build_digits",
]


def build_digits(
    name: str,
    sizes: Sequence[int],
    counts: Sequence[Sequence[int] | Integer[np.ndarray, " _"]],
    *,
    grid: Sequence[int] | None = None,
    tables: Sequence[bytes] | None = None,
) -> Codec:
    """Return the codec called `name` for tokens whose digit q is in 0 .. sizes[q] - 1.

    The counts, and the tables of "context", are those of each digit. Raises ValueError as `build` does.
    """
    learned = tables or [None] * len(sizes)
    if len(learned) != len(sizes) or len(counts) != len(sizes):
        raise ValueError(
            f"codec: got {len(counts)} counts and {len(learned)} tables, expected {len(sizes)} of each"
        )
    codecs = [
        build(name, size, count, grid=grid, table=table)
        for size, count, table in zip(sizes, counts, learned, strict=True)
    ]
    return codecs[0] if len(codecs) == 1 else DigitsCodec(codecs)


def build(
    name: str,
    num_codes: int,
    counts: Sequence[int] | Integer[np.ndarray, " {num_codes}"] | None = None,
    *,
    grid: Sequence[int] | None = None,
    table: bytes | None = None,
) -> Codec:
    """Return the codec called `name` for ids 0 .. num_codes - 1.

    counts: how often each code occurs; "ans" and "huffman" compute their tables from it.
    grid: (H, W) of every image, and table: the bytes learned by `ContextCodec.learn`; "context" needs both.
    Every data set has counts and a grid, so every codec accepts them; only "context" accepts a table.
    Raises ValueError if the name is unknown or an argument that the codec needs is missing or invalid.
    """
    if name not in CODECS:
        raise ValueError(f"codec: got {name!r}, expected one of {', '.join(map(repr, CODECS))}")
    if name == "context":
        return ContextCodec(num_codes, grid, table)
    if table is not None:
        raise ValueError(f"codec {name!r}: got a table of {len(table)} bytes, but only 'context' has one")
    return CODECS[name](num_codes, counts) if name in ("ans", "huffman") else CODECS[name](num_codes)
