"""ANS with a probability table chosen by the neighbors of a token: smaller than the entropy of the counts.

The tokens of an image are coded coarse to fine. In each step a token has up to four neighbors that are coded
before it; their mean vector selects one of up to 256 classes, and the class selects a table. Tokens of one step
and class are coded in one call. Tables are selected by integer arithmetic, so that encoder and decoder agree on
every machine.
Source of the smoothing: absolute discounting, Ney, Essen and Kneser 1994.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Integer, UInt16

from seitpp.codec.ans_coder import (
    Categorical,
    body_of,
    categorical,
    coder_of,
    most_bytes,
    seed_of,
    seed_size,
    seeded,
)
from seitpp.codec.base import MAX_TOKENS, CodecError, check_ids, check_num_codes
from seitpp.codec.checksum import Checksum
from seitpp.codec.context_table import KINDS, MAX_CLASSES, ContextTable, quantized

# Strides from coarse to fine. At a larger stride tokens are too far apart to predict each other.
STRIDES = (4, 2, 1)
# Offsets (y, x) of the neighbors in units of the stride: of diagonal steps, then of direct steps.
OFFSETS = (((-1, -1), (-1, 1), (1, -1), (1, 1)), ((-1, 0), (0, -1), (0, 1), (1, 0)))
# Number of tokens classified at once: few enough for their scores to stay in the CPU's cache.
CHUNK = 512
# Places of a grid that are looked at together. The neighbors of a larger grid are found anew for each image, in
# blocks of this size: those of 2^24 tokens would take 670 MB.
BLOCK = 2**18
# A codec keeps tables of this many probabilities (4 bytes each), and of 16 for each byte of the learned table: a
# byte of it can ask for a table of 65,536. Where there are more, it makes them again.
KEPT, KEPT_PER_BYTE = 2**24, 16
# About this many tokens are enough for k-means to learn the centers.
SAMPLE = 2**16


class Block(NamedTuple):
    """Some tokens of a step; positions are indices into the flattened grid."""

    positions: Int64[np.ndarray, " tokens"]  # ascending
    neighbors: Int64[np.ndarray, "4 tokens"]  # H * W for a neighbor outside the grid


class Step:
    """The tokens that are coded together, after their neighbors: in the middle of four others, or between two."""

    def __init__(self, stride: int, direct: bool, *, grid: tuple[int, int]) -> None:
        # Neighbors that are farther away predict less, so they have tables of their own.
        self.kind = direct + 2 * (stride > 1)
        self._stride, self._direct, self._grid = stride, direct, grid
        self._size = grid[0] * grid[1]
        self._kept = list(self._made()) if self._size <= BLOCK else None

    def blocks(self) -> Sequence[Block] | Iterator[Block]:
        """Return the tokens, row by row."""
        return self._made() if self._kept is None else self._kept

    def _made(self) -> Iterator[Block]:
        # Only the rows and columns of the stride.
        size = math.prod(-(-side // self._stride) for side in self._grid)
        for start in range(0, size, BLOCK):
            yield self._block(np.arange(start, min(start + BLOCK, size)))

    def _block(self, places: np.ndarray) -> Block:
        (height, width), stride = self._grid, self._stride
        y, x = np.divmod(places, -(-width // stride))
        chosen = np.flatnonzero((y ^ x if self._direct else y & x) & 1)
        y, x = y[chosen] * stride, x[chosen] * stride
        neighbors = np.empty((4, y.size), np.int64)
        for around, (down, right) in zip(neighbors, OFFSETS[self._direct], strict=True):
            rows, columns = y + down * stride, x + right * stride
            inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
            around[:] = np.where(inside, rows * width + columns, self._size)
        return Block(y * width + x, neighbors)


class ContextCodec:
    """ANS codec for images of one grid with the tables of a `ContextTable`; unseen codes can be encoded."""

    name = "context"

    def __init__(self, num_codes: int, grid: Sequence[int] | None, table: bytes | None) -> None:
        """grid: (H, W); table: `ContextCodec.learn(...).table`. Raises ValueError if one is missing or invalid."""
        check_num_codes(num_codes)
        if grid is None or table is None:
            raise ValueError(
                f"codec 'context': got grid {grid} and {'no' if table is None else 'a'} table, "
                "expected a grid and a learned table; see ContextCodec.learn"
            )
        height, width = grid
        if not (height >= 1 and width >= 1 and height * width <= MAX_TOKENS):
            raise ValueError(f"grid: got {height} x {width}, expected 1 .. {MAX_TOKENS} tokens")
        self.num_codes = num_codes
        self.grid = (height, width)
        self.table = table
        self._tables = tables = ContextTable.from_bytes(table, num_codes)
        self._static = categorical(tables.static + 1)
        self._num_classes = len(tables.centers)
        self._models: list[Categorical | None] = [None] * (KINDS * self._num_classes)
        self._made, self._kept = 0, (KEPT + KEPT_PER_BYTE * len(table)) // num_codes
        self._scores = _scores(tables.vectors, tables.centers)
        self._coarse, self._steps = _steps(self.grid)
        self._seed = min(seed_size(num_codes), height * width)
        self._checksum = Checksum(b"".join(side.to_bytes(4, "little") for side in self.grid) + table)

    @classmethod
    def learn(
        cls, grids: Integer[np.ndarray, "images height width"], codebook: Float[np.ndarray, "codes dim"]
    ) -> "ContextCodec":
        """Learn the tables from the ids of sample images; a few thousand are enough. Needs scikit-learn.

        The table takes about 2 bytes for each code that occurs in a class. Raises ValueError for ids that are not
        rows of the codebook, for a codebook with numbers that are not finite, and for more than 2^32 - 1 tokens.
        """
        grids, num_codes = np.asarray(grids), len(codebook)
        if grids.ndim != 3 or not 0 < grids.size < 2**32:
            raise ValueError(f"grids: got {grids.shape}, expected (N, H, W) with 1 .. {2**32 - 1} tokens")
        vectors = quantized(codebook)
        images = [check_ids(grid.ravel(), num_codes) for grid in grids]
        _, steps = _steps(grids.shape[1:])
        centers = _learn_centers(images, steps, vectors)
        scores = _scores(vectors, centers)
        keys = [np.empty(0, np.int64)]
        for ids in images:
            padded = np.append(ids, num_codes)
            for step, block in _blocks(steps):
                tables = step.kind * len(centers) + _classes(padded, block.neighbors, scores).astype(np.int64)
                keys.append(tables * num_codes + ids[block.positions])
        static = np.bincount(np.concatenate(images), minlength=num_codes)
        table = ContextTable(vectors, centers, static, *np.unique(np.concatenate(keys), return_counts=True))
        return cls(num_codes, grids.shape[1:], table.to_bytes())

    def encode(self, ids: Integer[np.ndarray, " tokens"]) -> bytes:
        """Return the payload of H * W ids in 0 .. num_codes - 1, row by row. Raises ValueError for other ids."""
        ids = check_ids(ids, self.num_codes)
        if ids.size != self.grid[0] * self.grid[1]:
            raise ValueError(f"ids: got {ids.size} tokens, expected {self.grid[0]} x {self.grid[1]}")
        groups = list(self._order(np.append(ids, np.int32(self.num_codes))))
        seed = np.concatenate([positions for model, positions in groups if model is None])
        coder = seeded(ids[seed], self.num_codes)
        # The coder is a stack: the tokens that are decoded first are pushed last.
        for model, positions in reversed(groups):
            if model is not None:
                coder.encode_reverse(ids[positions], model)
        return self._checksum.wrap(body_of(coder), ids.size)

    def decode(self, data: bytes | memoryview, num_tokens: int) -> UInt16[np.ndarray, " {num_tokens}"]:
        """Return the ids, all below num_codes, row by row.

        Raises CodecError if the payload is damaged or num_tokens is not H * W.
        """
        if num_tokens != self.grid[0] * self.grid[1]:
            raise CodecError(f"number of tokens: got {num_tokens}, expected {self.grid[0]} x {self.grid[1]}")
        coder = coder_of(self._checksum.unwrap(data, num_tokens, most=most_bytes(num_tokens)), self.num_codes)
        seed = seed_of(coder, self.num_codes, self._seed)
        ids = np.full(num_tokens + 1, self.num_codes, np.int32)
        for model, positions in self._order(ids):
            if model is None:
                ids[positions] = np.fromiter(seed, np.int32, positions.size)
            else:
                ids[positions] = coder.decode(model, positions.size)
        return ids[:-1].astype(np.uint16)

    def _order(self, ids: np.ndarray) -> Iterator[tuple[Categorical | None, np.ndarray]]:
        """Groups of (model, positions) in the order of decoding; the last tokens, the seed, have no model.

        `ids` (H * W + 1,) ends with K; the tokens of a group must be in it before the next group is requested.
        """
        coded = ids.size - 1 - self._seed
        for positions, groups in self._groups(ids):
            start = 0
            for model, end in groups:
                if end <= coded:
                    yield model, positions[start:end]
                else:
                    cut = max(start, coded)
                    yield model, positions[start:cut]
                    yield None, positions[cut:end]
                start = end
            coded -= positions.size

    def _groups(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Iterable[tuple[Categorical, int]]]]:
        """Of each step, positions sorted by class, then row by row; and (model, end) of each class.

        Of a large grid, those of each class and block by themselves.
        """
        yield self._coarse, [(self._static, self._coarse.size)]
        for step in self._steps:
            first = step.kind * self._num_classes
            blocks = [_by_class(ids, block, self._scores) for block in step.blocks()]
            if len(blocks) == 1:
                positions, used, ends = blocks[0]
                yield positions, zip([self._model(first + number) for number in used], ends, strict=True)
                continue
            pieces = [dict(zip(used, pairwise([0, *ends]), strict=True)) for _, used, ends in blocks]
            for number in sorted(set().union(*pieces)):
                for (positions, *_), piece in zip(blocks, pieces, strict=True):
                    start, end = piece.get(number, (0, 0))
                    yield positions[start:end], [(self._model(first + number), end - start)]

    def _model(self, table: int) -> Categorical:
        """Return the probabilities of a table, made when it is first needed."""
        model = self._models[table]
        if model is None:
            if self._made >= self._kept:
                self._models, self._made = [None] * len(self._models), 0
            weights = self._tables.weights(table)
            model = self._models[table] = self._static if weights is None else categorical(weights)
            self._made += 1
        return model


def _steps(grid: tuple[int, int]) -> tuple[np.ndarray, list[Step]]:
    """The positions that are coded first, without neighbors, and the steps that follow."""
    height, width = grid
    rows, columns = (np.arange(0, side, 2 * STRIDES[0]) for side in grid)
    steps = [Step(stride, direct, grid=(height, width)) for stride in STRIDES for direct in (False, True)]
    return (rows[:, None] * width + columns).ravel(), steps


def _blocks(steps: list[Step]) -> Iterator[tuple[Step, Block]]:
    return ((step, block) for step in steps for block in step.blocks())


def _by_class(ids: np.ndarray, block: Block, scores: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
    """The positions of a block sorted by class, then row by row; the classes that occur, and where each ends."""
    classes = _classes(ids, block.neighbors, scores)
    sizes = np.bincount(classes)
    used = np.flatnonzero(sizes)
    positions = block.positions[np.argsort(classes, kind="stable")]
    return positions, used.tolist(), np.cumsum(sizes[used]).tolist()


def _scores(vectors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """(K + 1, classes) int32: |center|^2 - 2 center . vector; the last row, for "no neighbor", is zeros.

    The sum over n neighbors is n times the squared distance of their mean to the center, up to a constant.
    """
    # As float64, in which whole numbers of this size are exact, since its products are the fast ones.
    centers = centers.astype(np.float64)
    squares = (centers * centers).sum(axis=1)
    scores = np.zeros((len(vectors) + 1, len(centers)), np.int32)
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK].astype(np.float64)
        scores[start : start + len(part)] = squares - 2 * part @ centers.T
    return scores


def _classes(padded: np.ndarray, neighbors: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(n,) uint8: the class nearest to the mean of each token's (4, n) neighbors; the smallest of equal ones."""
    classes = np.empty(neighbors.shape[1], np.uint8)
    for start in range(0, classes.size, CHUNK):
        ids = padded[neighbors[:, start : start + CHUNK]]
        total = scores.take(ids[0], axis=0)
        for row in ids[1:]:
            total += scores.take(row, axis=0)
        classes[start : start + CHUNK] = total.argmin(axis=1)
    return classes


def _learn_centers(images: list[np.ndarray], steps: list[Step], vectors: np.ndarray) -> np.ndarray:
    """(classes, d) int8: k-means of the mean neighbor vectors of some images."""
    # Imported here, since it takes a second and only learning needs it.
    from sklearn.cluster import MiniBatchKMeans

    rows = np.append(vectors, np.zeros((1, vectors.shape[1]), np.int8), axis=0).astype(np.float32)
    sampled = images[:: -(-len(images) * images[0].size // SAMPLE)]
    means = [rows[-1:]]  # k-means needs a point, even if the grid has one token and so no neighbors
    for ids in sampled:
        padded = np.append(ids, len(vectors))
        for _, block in _blocks(steps):
            around = padded[block.neighbors]
            present = (around < len(vectors)).sum(axis=0)
            means.append(rows[around].sum(axis=0) / present[:, None])
    points = np.concatenate(means)
    classes = min(MAX_CLASSES, len(np.unique(points, axis=0)))
    kmeans = MiniBatchKMeans(classes, batch_size=4096, max_iter=30, n_init=1, random_state=0).fit(points)
    return np.rint(kmeans.cluster_centers_).astype(np.int8)
