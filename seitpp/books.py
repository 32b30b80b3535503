"""What the digits of a token mean: one or several tables of vectors, and how their rows make one vector.

A token of a plain codebook has one digit, its id. With more than 65,536 codes it has two, the id in base r; with a
product quantizer one for each part of the vector, with a residual quantizer one for each of its terms.
docs/format.md, "Version 3", is the normative description.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Float32, Int64, Integer

from seitpp.errors import UserError

Combine = Literal["index", "concat", "sum"]
MAX_SIZE = 2**16  # values of a digit, which is stored as 16 bits
MAX_DIGITS = 64


class BooksError(UserError):
    """Raised for tables that cannot be the books of one token."""


class Books(NamedTuple):
    """The tables of a token's digits, and how they combine.

    "index": one table (K, D); the digits are those of a row in base r. A plain codebook has one.
    "concat": the vector is the rows of all tables, one after the other. "sum": it is their sum.
    `sizes` has the number of values of each digit.
    """

    tables: tuple[Float32[np.ndarray, "codes dim"], ...]
    combine: Combine
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, codebook: "Books | Float[np.ndarray, 'codes dim']") -> "Books":
        """Return the books of a codebook (K, D): one digit for up to 65,536 codes, two in base r above.

        Raises BooksError unless it has rows of finite numbers.
        """
        if isinstance(codebook, Books):
            return codebook
        table = np.asarray(codebook, np.float32)
        _check_table(table)
        return cls((table,), "index", index_sizes(len(table)))

    @classmethod
    def join(cls, tables: Sequence[Float[np.ndarray, "_ _"]], combine: Literal["concat", "sum"]) -> "Books":
        """Return the books of a product ("concat") or residual ("sum") quantizer with a table for each digit.

        Raises BooksError for 1 or more than 64 tables, for one that is too large, for numbers that are not finite,
        and for tables of other dimensions than the first whose rows are to be added.
        """
        rows = tuple(np.asarray(table, np.float32) for table in tables)
        if combine not in ("concat", "sum") or not 2 <= len(rows) <= MAX_DIGITS:
            raise BooksError(
                f"books: got {len(rows)} tables to combine by {combine!r}, expected 2 .. {MAX_DIGITS} tables and "
                "concat or sum"
            )
        for table in rows:
            _check_table(table)
            if len(table) > MAX_SIZE:
                raise BooksError(
                    f"books: got a table of {len(table)} rows, expected at most {MAX_SIZE} for a digit"
                )
        if combine == "sum" and len({table.shape[1] for table in rows}) > 1:
            raise BooksError(f"books: got {[table.shape for table in rows]} to add, expected equal dimensions")
        return cls(rows, combine, tuple(map(len, rows)))

    @property
    def digits(self) -> int:
        """The number of digits of a token."""
        return len(self.sizes)

    @property
    def planes(self) -> tuple[int, ...]:
        """The axis of the digits in the shape of ids: () for one digit, (Q,) for Q digits."""
        return () if self.digits == 1 else (self.digits,)

    @property
    def dim(self) -> int:
        """The dimension of a token's vector."""
        dims = [table.shape[1] for table in self.tables]
        return sum(dims) if self.combine == "concat" else dims[0]

    @property
    def rows(self) -> int:
        """The number of rows of all tables."""
        return sum(map(len, self.tables))

    @property
    def num_codes(self) -> int | tuple[int, ...]:
        """The number of codes, or of tokens with several digits the values of each; what models are built with."""
        return self.sizes if self.digits > 1 else self.sizes[0]

    def only_table(self, purpose: str) -> Float32[np.ndarray, "codes dim"]:
        """Return the codebook (K, D) of tokens that are one id. Raises BooksError for several digits."""
        if self.digits > 1:
            raise BooksError(f"{purpose} takes tokens of one id, got {self.digits} digits: take another tokenizer")
        return self.tables[0]

    def split(self, ids: Integer[np.ndarray, "..."]) -> Integer[np.ndarray, "digits ..."]:
        """Return the digits of the rows `ids` of the one table of "index", which are not checked."""
        return np.stack(np.divmod(ids, self.sizes[1])) if self.digits == 2 else np.asarray(ids)[None]

    def joined(self, planes: Integer[np.ndarray, "digits ..."]) -> Int64[np.ndarray, "..."]:
        """Return the rows of the one table of "index" that have these digits; the inverse of `split`."""
        high, *low = planes.astype(np.int64)
        return high * self.sizes[1] + low[0] if low else high

    def digit_tables(self) -> tuple[Float32[np.ndarray, "_ _"], ...]:
        """Return a vector for each value of each digit: of its table, with two digits of "index" a mean."""
        if self.combine != "index" or self.digits == 1:
            return self.tables
        (table,), digits = self.tables, self.split(np.arange(self.rows))
        means = []
        for digit, size in zip(digits, self.sizes, strict=True):
            order = np.argsort(digit, kind="stable")
            starts = np.searchsorted(digit[order], np.arange(size))
            sums = np.add.reduceat(table[order].astype(np.float64), starts)
            means.append((sums / np.bincount(digit, minlength=size)[:, None]).astype(np.float32))
        return tuple(means)

    def problem(self, planes: Integer[np.ndarray, "images digits ..."]) -> tuple[int, str] | None:
        """Return the first image with a digit out of range and what is wrong with it, None if all are in range."""
        for number, size in enumerate(self.sizes):
            digit, axes = planes[:, number], tuple(range(1, planes.ndim - 1))
            wrong = ((digit < 0) | (digit >= size)).any(axis=axes)
            if wrong.any():
                image, values = int(wrong.argmax()), digit[wrong.argmax()]
                if self.digits == 1:
                    return image, f"ids {values.min()} .. {values.max()}, but the codebook has {size} codes"
                return image, f"digit {number} is {values.min()} .. {values.max()}, expected 0 .. {size - 1}"
        if self.combine == "index" and self.digits > 1:
            ids = self.joined(np.moveaxis(planes, 1, 0))
            if (wrong := (ids >= self.rows).any(axis=tuple(range(1, ids.ndim)))).any():
                image = int(wrong.argmax())
                return image, f"digits of id {ids[image].max()}, but the codebook has {self.rows} codes"
        return None

    def describe(self) -> dict[str, Any] | None:
        """Return the entry `digits` of tokens.json, None for a token of one digit."""
        if self.digits == 1:
            return None
        tables = [list(table.shape) for table in self.tables]
        return {"combine": self.combine, "sizes": list(self.sizes), "tables": tables}


def index_sizes(num_codes: int) -> tuple[int, ...]:
    """Return the number of values of each digit of a code of one table."""
    if num_codes <= MAX_SIZE:
        return (num_codes,)
    radix = math.isqrt(num_codes - 1) + 1
    return -(-num_codes // radix), radix


def is_digits(entry: Any, *, rows: int, dim: int) -> bool:
    """Return whether `entry` can be `digits` of tokens.json, beside `num_codes` rows and `code_dim`."""
    if not isinstance(entry, dict) or set(entry) != {"combine", "sizes", "tables"}:
        return False
    combine, sizes, tables = entry["combine"], entry["sizes"], entry["tables"]
    if combine not in get_args(Combine) or not isinstance(sizes, list) or not isinstance(tables, list):
        return False
    if not 2 <= len(sizes) <= MAX_DIGITS or not all(type(size) is int and 1 <= size <= MAX_SIZE for size in sizes):
        return False
    if not all(
        isinstance(one, list) and len(one) == 2 and all(type(n) is int and n > 0 for n in one) for one in tables
    ):
        return False
    if combine == "index":
        return tables == [[rows, dim]] and rows > MAX_SIZE and tuple(sizes) == index_sizes(rows)
    dims = [one[1] for one in tables]
    fits = sum(dims) == dim if combine == "concat" else set(dims) == {dim}
    return fits and sum(sizes) == rows and [one[0] for one in tables] == sizes


def _check_table(table: np.ndarray) -> None:
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise BooksError(f"codebook: got shape {table.shape}, expected (codes, dimension), all finite")
