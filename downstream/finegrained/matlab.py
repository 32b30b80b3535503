"""Read lists of numbers, texts and structs from MATLAB files of version 5, as some data sets have their labels.

A file may be a stranger's: nothing is allocated by the size that it claims, and classes of objects are refused.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HEADER = 128  # bytes of a file before its variables, the last four with its version and its byte order
MOST = 1 << 26  # bytes of a file, and of all its variables without compression
MATRIX, COMPRESSED = 14, 15
# Types of stored data, and the classes of matrices that are read.
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
CELL, STRUCT, CHARACTERS, NUMERIC = 1, 2, 4, range(6, 16)


def read_variables(path: Path) -> dict[str, Any]:
    """Return the variables of a file by name.

    A matrix of numbers is the list of its values column by column, integers where they are whole. A matrix of
    characters, which has one row, is a text. A matrix of cells is the list of their values, one of structs a list
    of {field: value}. Raises ValueError or zlib.error for a file that is cut, damaged, of another version, or
    larger than 64 MiB without compression, and OSError if there is none.
    """
    with path.open("rb") as file:
        data = memoryview(file.read(MOST + 1))
    mark = bytes(data[HEADER - 4 : HEADER])
    if mark not in (b"\x00\x01IM", b"\x01\x00MI"):
        raise ValueError(f"{path.name} is no MATLAB file of version 5, which begins with its mark")
    order, left, variables = "<" if mark.endswith(b"IM") else ">", MOST, {}
    for kind, content in _elements(data[HEADER:], order, padded=False):
        if kind == COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(content, left + 1)
            ((kind, content),) = _elements(memoryview(unpacked), order)
        left -= len(content)
        if left < 0:
            raise ValueError(f"{path.name} has more than {MOST:,} bytes")
        if kind != MATRIX:
            raise ValueError(f"{path.name} has data of type {kind} for a variable")
        name, value = _matrix(content, order)
        variables[name] = value
    return variables


def _elements(data: memoryview, order: str, *, padded: bool = True) -> Iterator[tuple[int, memoryview]]:
    """Yield the type and the content of the elements that follow each other in `data`."""
    while len(data):
        (tag,) = struct.unpack_from(f"{order}I", data)
        if tag >> 16:  # a small element, whose size and content are in the same eight bytes
            kind, size, start = tag & 0xFFFF, tag >> 16, 4
        else:
            kind, size, start = *struct.unpack_from(f"{order}II", data), 8
        if start + size > len(data) or (start == 4 and size > 4):
            raise ValueError(f"an element of {size:,} bytes where {len(data) - start:,} are left")
        yield kind, data[start : start + size]
        end = start + size
        data = data[end + (-end % 8 if padded or kind != COMPRESSED else 0) :]


def _matrix(content: memoryview, order: str) -> tuple[str, Any]:
    """Return the name and the value of a matrix."""
    if not len(content):
        return "", []
    parts = _elements(content, order)
    flags, shape, (_, name) = _numbers(next(parts), order), _numbers(next(parts), order), next(parts)
    kind, count = flags[0] & 0xFF, math.prod(shape)
    return bytes(name).decode("latin-1"), _value(kind, shape, count, parts=parts, order=order)


def _value(kind: int, shape: list[int], count: int, *, parts: Iterator[tuple[int, memoryview]], order: str) -> Any:
    if kind in NUMERIC:
        values = _numbers(next(parts), order)
        if len(values) != count:
            raise ValueError(f"{len(values):,} numbers for a matrix of {shape}")
        return values
    if kind == CHARACTERS:
        return _text(next(parts), shape, order)
    if kind == CELL:
        values = [_nested(part, order) for part in parts]
        if len(values) != count:
            raise ValueError(f"{len(values):,} cells for a matrix of {shape}")
        return values
    if kind != STRUCT:
        raise ValueError(f"a matrix of class {kind}, expected numbers, characters, cells or structs")
    (longest,), (_, table) = _numbers(next(parts), order), next(parts)
    names = [
        bytes(table[at : at + longest]).split(b"\0")[0].decode("latin-1") for at in range(0, len(table), longest)
    ]
    values = [_nested(part, order) for part in parts]
    if len(values) != count * len(names) or not names:
        raise ValueError(f"{len(values):,} values for a matrix of {shape} of structs of {len(names):,} fields")
    rows = range(0, len(values), len(names))
    return [dict(zip(names, values[at : at + len(names)], strict=True)) for at in rows]


def _nested(part: tuple[int, memoryview], order: str) -> Any:
    kind, content = part
    if kind != MATRIX:
        raise ValueError(f"data of type {kind} for a cell")
    return _matrix(content, order)[1]


def _numbers(part: tuple[int, memoryview], order: str) -> list[int]:
    kind, content = part
    values = np.frombuffer(content, np.dtype(NUMBERS[kind]).newbyteorder(order))
    if values.dtype.kind == "f" and np.isfinite(values).all() and (values == values.round()).all():
        return [int(value) for value in values.tolist()]
    return values.tolist()


def _text(part: tuple[int, memoryview], shape: list[int], order: str) -> str:
    kind, content = part
    if shape[0] > 1:
        raise ValueError(f"characters in a matrix of {shape}, expected one row")
    encoding = TEXTS[kind]
    ends = {"<": "-le", ">": "-be"}[order] if encoding in ("utf-16", "utf-32") else ""
    return bytes(content).decode(encoding + ends)
