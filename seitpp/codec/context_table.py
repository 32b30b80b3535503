"""The learned table of the codec "context" and its bytes: docs/format.md, "Table of the codec context"."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8, Int64, Integer

from seitpp.codec.base import MAX_CODES, PIECE, CodecError

MAX_CLASSES = 256
# Components of a vector: limits the size of the table for large code dimensions, and keeps scores in 32 bits.
MAX_COMPONENTS = 32
# Limit of the sum of the counts, so that weights stay below 2^53.
MAX_SUM = 2**32 - 1
# Kinds of steps, each with its own tables: diagonal and direct, at stride 1 and at larger strides.
KINDS = 4


class ContextTable(NamedTuple):
    """The centers of the classes and the counts of their tables, all integers.

    There are kinds * classes tables; table t = kind * classes + class has the counts of the keys
    t * K .. t * K + K - 1.
    """

    vectors: Int8[np.ndarray, "codes components"]  # a quantized projection of the codebook
    centers: Int8[np.ndarray, "classes components"]
    static: Int64[np.ndarray, " codes"]  # how often each code occurs
    keys: Integer[np.ndarray, " entries"]  # ascending: t * K + id, for the ids that occur in table t
    counts: Integer[np.ndarray, " entries"]  # >= 1: how often each of them occurs

    def weights(self, table: int) -> Int64[np.ndarray, " codes"] | None:
        """Return the weights of a table; None for one without counts.

        Absolute discounting: 3/4 is subtracted from every count, and their sum is distributed over all codes in
        proportion to the static counts plus one.
        """
        first = table * len(self.vectors)
        start, end = np.searchsorted(self.keys, [first, first + len(self.vectors)])
        if start == end:
            return None
        static = self.static + 1
        weights = (3 * (end - start) << 12) * static // static.sum()
        weights[self.keys[start:end] - first] += (4 * self.counts[start:end].astype(np.int64) - 3) << 12
        return weights

    def to_bytes(self) -> bytes:
        """Return the bytes that a store keeps as `codec.table`."""
        (num_codes, components), classes = self.vectors.shape, len(self.centers)
        tables, ids = np.divmod(self.keys, num_codes)
        sizes = np.bincount(tables, minlength=KINDS * classes)
        first = np.diff(tables, prepend=-1) > 0
        gaps = np.where(first, ids, np.diff(ids, prepend=0) - 1)
        header = b"".join(n.to_bytes(4, "little") for n in (num_codes, classes, components))
        numbers = np.concatenate([self.static, sizes, gaps, self.counts - 1])
        return header + self.vectors.tobytes() + self.centers.tobytes() + _to_varints(numbers)

    @classmethod
    def from_bytes(cls, data: bytes, num_codes: int) -> "ContextTable":
        """Parse the result of `to_bytes`. Raises CodecError unless it is a valid table of `num_codes` codes."""
        codes, classes, components = (int.from_bytes(data[i : i + 4], "little") for i in (0, 4, 8))
        start = 12 + (codes + classes) * components
        fits = 1 <= classes <= MAX_CLASSES and 1 <= components <= MAX_COMPONENTS and start <= len(data)
        if codes != num_codes or not fits:
            raise CodecError(
                f"context table of {len(data)} bytes: got {codes} codes, {classes} classes, {components} "
                f"components, expected {num_codes}, 1 .. {MAX_CLASSES} and 1 .. {MAX_COMPONENTS}"
            )
        rows = np.frombuffer(data, np.int8, start - 12, 12).reshape(-1, components)
        head, rest = _split(np.frombuffer(data, np.uint8, offset=start), num_codes + KINDS * classes)
        static, sizes = np.split(head.astype(np.int64), [num_codes])
        entries, given = int(sizes.sum()), _how_many(rest)
        if sizes.size != KINDS * classes or given != 2 * entries:
            raise CodecError(
                f"context table: got {head.size + given} numbers, expected another {entries} ids and counts"
            )
        gaps, counts = np.split(_from_varints(rest), [entries])
        total = int(counts.sum(dtype=np.int64)) + entries
        if max(static.sum(), total) > MAX_SUM:
            raise CodecError(
                f"context table: got counts of {static.sum()} and {total} tokens, expected at most {MAX_SUM}"
            )
        return cls(rows[:num_codes], rows[num_codes:], static, _keys(sizes, gaps, num_codes), counts + 1)


def _keys(sizes: np.ndarray, gaps: np.ndarray, num_codes: int) -> np.ndarray:
    """The keys of tables with `sizes` ids each, given the number of codes skipped before each id."""
    keys, end = np.empty(gaps.size, np.int32), 0
    for table, size in enumerate(sizes.tolist()):
        start, end = end, end + size
        ids = np.cumsum(gaps[start:end].astype(np.int64) + 1) - 1
        if size and ids[-1] >= num_codes:
            raise CodecError(f"context table: got id {ids[-1]}, expected 0 .. {num_codes - 1}")
        keys[start:end] = table * num_codes + ids
    return keys


def quantized(codebook: Float[np.ndarray, "codes dim"]) -> Int8[np.ndarray, "codes components"]:
    """Return the normalized rows of a codebook, projected on at most 32 principal components and quantized.

    Raises ValueError for a codebook that is not 2-D, has too many rows, or numbers that are not finite.
    """
    rows = np.asarray(codebook, np.float64)
    if rows.ndim != 2 or not 1 <= len(rows) <= MAX_CODES or not np.isfinite(rows).all():
        raise ValueError(f"codebook: got {rows.shape}, expected (K, D) finite numbers, 1 .. {MAX_CODES} rows")
    # Only the direction of a row is kept, as in the cosine lookup.
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1)
    rows = rows - rows.mean(axis=0)
    _, axes = np.linalg.eigh(rows.T @ rows)  # eigenvalues ascending
    vectors = rows @ axes[:, ::-1][:, :MAX_COMPONENTS]
    largest = np.abs(vectors).max() or 1.0  # 0 where all codes are the same
    return np.rint(vectors / largest * 127).astype(np.int8)


def _to_varints(numbers: np.ndarray) -> bytes:
    """LEB128: seven bits per byte, the lowest first; the high bit is set in all bytes but the last of a number."""
    shifted = numbers[:, None] >> np.arange(0, 35, 7)
    used = shifted > 0
    used[:, 0] = True
    more = np.append(used[:, 1:], np.zeros((len(numbers), 1), bool), axis=1)
    return (shifted & 127 | more << 7).astype(np.uint8)[used].tobytes()


def _split(data: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n numbers, or all if there are fewer, and the bytes of those after them."""
    if (data[-1:] >= 128).any():
        raise CodecError("context table: got a number that is cut off or longer than 5 bytes")
    last = np.flatnonzero(data[: 5 * n] < 128)[:n]
    end = int(last[-1]) + 1 if last.size else 0
    return _from_varints(data[:end]), data[end:]


def _how_many(data: np.ndarray) -> int:
    """The number of numbers, counted before memory is allocated for them."""
    return sum(np.count_nonzero(data[start : start + PIECE] < 128) for start in range(0, data.size, PIECE))


def _from_varints(data: np.ndarray) -> np.ndarray:
    """(n,) uint32. Raises CodecError if a number is longer than 5 bytes or too large."""
    numbers, filled, start = np.empty(_how_many(data), np.uint32), 0, 0
    while start < data.size:
        last = np.flatnonzero(data[start : start + PIECE] < 128)
        first = np.append(-1, last)[:-1] + 1
        sizes = last - first + 1
        if not last.size or (sizes > 5).any():
            raise CodecError("context table: got a number that is cut off or longer than 5 bytes")
        piece = data[start : start + int(last[-1]) + 1]
        shift = 7 * (np.arange(piece.size) - np.repeat(first, sizes))
        values = np.add.reduceat((piece & 127).astype(np.int64) << shift, first)
        if (values > MAX_SUM).any():
            raise CodecError(f"context table: got a number {values.max()}, expected at most {MAX_SUM}")
        numbers[filled : filled + values.size] = values
        filled, start = filled + values.size, start + piece.size
    return numbers
