"""Tables given the neighbors: well below the entropy of the counts, which a static-table coder cannot pass.

The tokens of an image are coded coarse to fine. In each step tokens lie amid four known ones; the mean vector
of those chooses one of up to 256 classes, and the class a table. Tokens of one step and one class are coded in
one call. Everything that chooses a table is integers, so encoder and decoder agree on every machine.
Source of the smoothing: absolute discounting, Ney, Essen and Kneser 1994.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from seitpp.codec.ans_coder import Categorical, body_of, categorical, coder_of, seed_of, seed_size, seeded
from seitpp.codec.base import MAX_TOKENS, CodecError, check_ids, check_num_codes
from seitpp.codec.checksum import Checksum
from seitpp.codec.context_table import MAX_CLASSES, ContextTable, quantized

# The finest step has stride 1; tokens between multiples of the coarsest are too far apart to tell of each other.
STRIDES = (4, 2, 1)
MARGIN = STRIDES[0]
# Where the neighbors of a step lie, in strides: diagonal, then direct.
OFFSETS = (((-1, -1), (-1, 1), (1, -1), (1, 1)), ((-1, 0), (0, -1), (0, 1), (1, 0)))
# Tokens whose classes are found at once: what that takes stays in the cache.
CHUNK = 512
# About so many tokens are enough to place the centers.
SAMPLE = 2**16


class Step(NamedTuple):
    """Tokens that are coded together, given known neighbors."""

    kind: int  # 0 diagonal, 1 direct, both at stride 1; 2 and 3 the same at larger strides
    places: np.ndarray  # (n,) flat places of the tokens, ascending
    neighbors: np.ndarray  # (4, n) flat places of their neighbors; H * W where the grid ends


class ContextCodec:
    """Codes images of one grid with the tables of a `ContextTable`; codes never seen can still be encoded."""

    name = "context"

    def __init__(self, num_codes: int, grid: Sequence[int] | None, table: bytes | None) -> None:
        """grid: (H, W); table: what `learn(..).table` held. Raises ValueError if they do not go together."""
        check_num_codes(num_codes)
        if grid is None or table is None:
            raise ValueError("codec 'context': expected a grid and a learned table; see ContextCodec.learn")
        height, width = grid
        if not (height >= 1 and width >= 1 and height * width <= MAX_TOKENS):
            raise ValueError(f"grid: got {height} x {width}, expected 1 .. {MAX_TOKENS} tokens")
        self.num_codes = num_codes
        self.grid = (height, width)
        self.table = table
        tables = ContextTable.from_bytes(table, num_codes)
        self._static = categorical(tables.static + 1)
        self._models = [self._static if w is None else categorical(w) for w in tables.weights()]
        self._num_classes = len(tables.centers)
        self._scores = _scores(tables.vectors, tables.centers)
        self._coarse, self._steps = _steps(height, width)
        self._seed = min(seed_size(num_codes), height * width)
        self._checksum = Checksum(b"".join(side.to_bytes(4, "little") for side in self.grid) + table)

    @classmethod
    def learn(cls, grids: np.ndarray, codebook: np.ndarray) -> "ContextCodec":
        """The codec for images like `grids` (N, H, W), any integers in 0 .. K - 1, of `codebook` (K, D) float.

        Needs scikit-learn. Tables take about 2 bytes for each code that is seen in a class; some thousand images
        are enough. Raises ValueError for ids that are no codes and for more than 2^32 - 1 tokens.
        """
        grids, num_codes = np.asarray(grids), len(codebook)
        if grids.ndim != 3 or not 0 < grids.size < 2**32:
            raise ValueError(f"grids: got {grids.shape}, expected (N, H, W) with 1 .. {2**32 - 1} tokens")
        vectors = quantized(codebook)
        images = [check_ids(grid.ravel(), num_codes) for grid in grids]
        _, steps = _steps(*grids.shape[1:])
        centers = _learn_centers(images, steps, vectors)
        scores = _scores(vectors, centers)
        keys = [np.empty(0, np.int64)]
        for ids in images:
            known = np.append(ids, num_codes)
            for step in steps:
                tables = step.kind * len(centers) + _classes(known, step.neighbors, scores).astype(np.int64)
                keys.append(tables * num_codes + ids[step.places])
        static = np.bincount(np.concatenate(images), minlength=num_codes)
        table = ContextTable(vectors, centers, static, *np.unique(np.concatenate(keys), return_counts=True))
        return cls(num_codes, grids.shape[1:], table.to_bytes())

    def encode(self, ids: np.ndarray) -> bytes:
        """Payload of H * W integer ids in 0 .. num_codes - 1, row by row. Raises ValueError for anything else."""
        ids = check_ids(ids, self.num_codes)
        if ids.size != self.grid[0] * self.grid[1]:
            raise ValueError(f"ids: got {ids.size} tokens, expected {self.grid[0]} x {self.grid[1]}")
        groups = list(self._order(np.append(ids, np.int32(self.num_codes))))
        coder = seeded(ids[np.concatenate([places for model, places in groups if model is None])], self.num_codes)
        # A stack: what is decoded first goes in last.
        for model, places in reversed(groups):
            if model is not None:
                coder.encode_reverse(ids[places], model)
        return self._checksum.wrap(body_of(coder), ids.size)

    def decode(self, data: bytes | memoryview, num_tokens: int) -> np.ndarray:
        """The (num_tokens,) uint16 ids, all below num_codes, row by row.

        Raises CodecError if the payload is damaged or num_tokens is not H * W.
        """
        if num_tokens != self.grid[0] * self.grid[1]:
            raise CodecError(f"number of tokens: got {num_tokens}, expected {self.grid[0]} x {self.grid[1]}")
        coder = coder_of(self._checksum.unwrap(data, num_tokens), self.num_codes)
        seed = seed_of(coder, self.num_codes, self._seed)
        known = np.full(num_tokens + 1, self.num_codes, np.int32)
        for model, places in self._order(known):
            if model is None:
                known[places] = np.fromiter(seed, np.int32, places.size)
            else:
                known[places] = coder.decode(model, places.size)
        return known[:-1].astype(np.uint16)

    def _order(self, known: np.ndarray) -> Iterator[tuple[Categorical | None, np.ndarray]]:
        """(model, places) of all tokens in the order of decoding; the last ones, the seed, have no model.

        `known` must hold the tokens of each group when the next is asked for.
        """
        coded = known.size - 1 - self._seed
        for places, groups in self._groups(known):
            start = 0
            for model, end in groups:
                if end <= coded:
                    yield model, places[start:end]
                else:
                    cut = max(start, coded)
                    yield model, places[start:cut]
                    yield None, places[cut:end]
                start = end
            coded -= places.size

    def _groups(self, known: np.ndarray) -> Iterator[tuple[np.ndarray, Iterable[tuple[Categorical, int]]]]:
        """Of each step the places, by class and then row by row, and the model of each class and its end there."""
        yield self._coarse, [(self._static, self._coarse.size)]
        for step in self._steps:
            classes = _classes(known, step.neighbors, self._scores)
            sizes = np.bincount(classes)
            used = np.flatnonzero(sizes)
            models = [self._models[step.kind * self._num_classes + number] for number in used.tolist()]
            ends = np.cumsum(sizes[used]).tolist()
            yield step.places[np.argsort(classes, kind="stable")], zip(models, ends, strict=True)


def _steps(height: int, width: int) -> tuple[np.ndarray, list[Step]]:
    """The places that are coded first, without neighbors, and the steps that follow."""
    places = np.arange(height * width).reshape(height, width)
    padded = np.pad(places, MARGIN, constant_values=height * width)
    steps = []
    y, x = np.indices((height, width))
    for stride in STRIDES:
        on = (y % stride == 0) & (x % stride == 0)
        odd_y, odd_x = y // stride % 2 == 1, x // stride % 2 == 1
        for direct, chosen in enumerate((on & odd_y & odd_x, on & (odd_y != odd_x))):
            rows, columns = np.nonzero(chosen)
            if rows.size:
                around = [
                    padded[rows + MARGIN + dy * stride, columns + MARGIN + dx * stride]
                    for dy, dx in OFFSETS[direct]
                ]
                # Neighbors that are farther away tell less: they have tables of their own.
                steps.append(Step(direct + 2 * (stride > 1), places[chosen], np.stack(around)))
    return places[:: 2 * MARGIN, :: 2 * MARGIN].ravel(), steps


def _scores(vectors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """(K + 1, classes) int32: |center|^2 - 2 center . vector; zeros for "no neighbor", the last row.

    Summed over n neighbors this is n times the squared distance of their mean to the center, up to a constant.
    """
    vectors, centers = vectors.astype(np.int64), centers.astype(np.int64)
    scores = (centers * centers).sum(axis=1) - 2 * vectors @ centers.T
    return np.append(scores, np.zeros((1, len(centers)), np.int64), axis=0).astype(np.int32)


def _classes(known: np.ndarray, neighbors: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(n,) uint8: the class nearest to the mean of a token's (4, n) neighbors; the first of equal ones."""
    classes = np.empty(neighbors.shape[1], np.uint8)
    for start in range(0, classes.size, CHUNK):
        ids = known[neighbors[:, start : start + CHUNK]]
        total = scores.take(ids[0], axis=0)
        for row in ids[1:]:
            total += scores.take(row, axis=0)
        classes[start : start + CHUNK] = total.argmin(axis=1)
    return classes


def _learn_centers(images: list[np.ndarray], steps: list[Step], vectors: np.ndarray) -> np.ndarray:
    """(classes, d) int8: k-means of the mean neighbor vectors of some images."""
    # Only learning needs it, and it takes a second to import.
    from sklearn.cluster import MiniBatchKMeans

    rows = np.append(vectors, np.zeros((1, vectors.shape[1]), np.int8), axis=0).astype(np.float32)
    sampled = images[:: -(-len(images) * images[0].size // SAMPLE)]
    means = [rows[-1:]]  # a grid of one token has no neighbors, and k-means needs a point
    for ids in sampled:
        known = np.append(ids, len(vectors))
        for step in steps:
            around = known[step.neighbors]
            present = (around < len(vectors)).sum(axis=0)
            means.append(rows[around].sum(axis=0) / present[:, None])
    points = np.concatenate(means)
    classes = min(MAX_CLASSES, len(np.unique(points, axis=0)))
    kmeans = MiniBatchKMeans(classes, batch_size=4096, max_iter=30, n_init=1, random_state=0).fit(points)
    return np.rint(kmeans.cluster_centers_).astype(np.int8)
