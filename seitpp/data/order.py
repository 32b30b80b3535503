"""The order of training images: which images a step has depends only on the seed and the step."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from seitpp.errors import UserError

TURN = 1 << 40  # larger than any index of an image
MANY = 2**26  # images whose permutation is no longer made as a whole: it would take 512 MiB and seconds
ROUNDS = 8  # of the network that permutes; four are enough for random functions (Luby and Rackoff, 1988)


class Permutation(Sequence[int]):
    """A random permutation of 0 .. n - 1, of which any part is found without the rest, in time linear in the part.

    It is a Feistel network on numbers of an even number of bits, whose function is the mixer of splitmix64. What
    it sends beyond n - 1 goes through it again until it is within (cycle walking). `stream` are numbers below 2^64
    that choose it, with the `seed`.
    """

    def __init__(self, n: int, seed: int, stream: tuple[int, int] = (0, 0)):
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        philox = np.random.Philox(key=[seed, stream[0]], counter=[0, 0, 0, 1 + stream[1]])
        self._keys = philox.random_raw(ROUNDS)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, place: int | slice) -> Any:
        """Return what is at one place, an int, or at several, (m,) int64. Raises IndexError."""
        if isinstance(place, slice):
            return self(np.arange(*place.indices(self.n)))
        return int(self(np.array([range(self.n)[place]]))[0])

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return what is at `positions` (m,) of the permutation: (m,) int64."""
        found = self._encrypted(positions.astype(np.uint64))
        while (outside := np.flatnonzero(found >= self.n)).size:
            found[outside] = self._encrypted(found[outside])
        return found.astype(np.int64)

    def _encrypted(self, numbers: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self._half) - np.uint64(1)
        left, right = numbers >> self._half, numbers & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        return left << self._half | right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 numbers, as splitmix64 does; products wrap around."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class BatchOrder:
    """The order of the training images: every epoch is a permutation, and its last incomplete batch is dropped.

    `batch_size` is that of the global batch. Raises UserError if the split has fewer images than one batch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int):
        if not 1 <= batch_size <= num_images:
            raise UserError(
                f"batch size {batch_size}: expected 1 to {num_images}, the number of images in the training split"
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.steps_per_epoch = num_images // batch_size
        self._epoch, self._order = None, None  # the last epoch that was asked for

    def steps(self, epochs: float) -> int:
        """Return the number of training steps of `epochs` epochs, rounded."""
        return round(epochs * self.steps_per_epoch)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Return the permutation (num_images,) int64 of the images in an epoch."""
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_images)

    def part(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the images (n,) int64 at the positions start .. stop - 1 of an epoch."""
        if self._epoch != epoch:
            self._order, self._epoch = self.epoch_order(epoch), epoch
        return self._order[start:stop]

    def micro_batches(self, steps: range, *, rank: int, ranks: int, accumulation: int) -> Iterator[np.ndarray]:
        """Yield the image indices (n,) int64 of this rank for each micro-batch of `steps`.

        A step has `accumulation` micro-batches of n = batch size / (ranks x accumulation) images per rank.
        """
        size = self.batch_size // (ranks * accumulation)
        for step in steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            for micro in range(accumulation):
                start = position * self.batch_size + (micro * ranks + rank) * size
                yield self.part(epoch, start, start + size)


class BalancedOrder(BatchOrder):
    """An order in which every class is equally often in an epoch, which has as many images as without it.

    `labels` (N,) int64 are the classes of all images. With C classes that occur, an epoch has N / C images of
    each, one more of randomly chosen ones. It shows the images of a rare class several times, each equally often
    up to one, and a part of those of a frequent class, another part in each epoch. It depends on (seed, epoch).

    It consists of draws: the index of an image plus TURN times the number of its earlier draws in the epoch.
    `DrawnImages` reads them. Raises UserError as BatchOrder does.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int):
        super().__init__(len(labels), batch_size, seed)
        _, images = np.unique(labels, return_counts=True)
        self.classes = np.split(np.argsort(labels, kind="stable"), np.cumsum(images)[:-1])

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Return the draws (num_images,) int64 of an epoch."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        least, rest = divmod(self.num_images, len(self.classes))
        sizes = np.full(len(self.classes), least)
        sizes[generator.permutation(len(sizes))[:rest]] += 1
        draws = [_draws(images, size, generator) for images, size in zip(self.classes, sizes, strict=True)]
        return generator.permutation(np.concatenate(draws))


def _draws(images: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    turns = range(-(-size // len(images)))
    return np.concatenate([generator.permutation(images) + turn * TURN for turn in turns])[:size]


class WindowOrder(BatchOrder):
    """An order that reads few shards at a time: of a store in a bucket, or of very many images.

    In each epoch the shards are permuted and cut into windows of `window` shards, and the images of a window are
    permuted together. `rows` (S,) are the numbers of images of all shards. Where an image is follows from (seed,
    epoch, position): any number of processes makes the same batches, and nothing is kept but a number for each
    shard. Its price: the images of a batch come from `window` shards, so shards have to be mixed (`seitpp
    reshuffle`).
    """

    def __init__(self, rows: Sequence[int] | np.ndarray, batch_size: int, seed: int, *, window: int):
        self.rows = np.asarray(rows, np.int64)
        super().__init__(int(self.rows.sum()), batch_size, seed)
        self.window = window
        self._starts = np.cumsum(self.rows) - self.rows  # the first image of each shard

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Return the permutation (num_images,) int64 of the images in an epoch."""
        return self.part(epoch, 0, self.num_images)

    def shards(self, epoch: int) -> np.ndarray:
        """Return the shards (S,) int64 in the order in which an epoch comes to them."""
        if self._epoch != epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            shards = random.permutation(len(self.rows))
            self._order, self._epoch = (shards, np.cumsum(self.rows[shards])), epoch
        return self._order[0]

    def window_at(self, epoch: int, position: int) -> int:
        """Return the number of the window in which a position of an epoch is."""
        shard = np.searchsorted(self._ends(epoch), position, side="right")
        return int(shard) // self.window

    def part(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the images (n,) int64 at the positions start .. stop - 1 of an epoch."""
        ends, parts = self._ends(epoch), []
        while start < stop:
            window = self.window_at(epoch, start)
            chosen = slice(window * self.window, (window + 1) * self.window)
            first = int(ends[chosen.start - 1]) if window else 0
            below = ends[chosen] - first  # in the window, the end of each of its shards
            upto = min(stop, first + int(below[-1]))
            permutation = Permutation(int(below[-1]), self.seed, (epoch, window))
            inside = permutation(np.arange(start - first, upto - first))
            place = np.searchsorted(below, inside, side="right")
            shards = self.shards(epoch)[chosen][place]
            parts.append(self._starts[shards] + inside - (below[place] - self.rows[shards]))
            start = upto
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _ends(self, epoch: int) -> np.ndarray:
        """Return where each shard ends (S,) int64 in the order in which an epoch comes to them."""
        self.shards(epoch)
        return self._order[1]


def image_order(
    num_images: int,
    batch_size: int,
    seed: int,
    *,
    rows: Sequence[int] | np.ndarray = (),
    window: int | None = None,
) -> BatchOrder:
    """Return the order of the images of a training: a permutation in each epoch, or one of windows of shards.

    `rows` are the numbers of images of the shards, `window` the number of shards whose images are permuted
    together; None, or at least all shards: all images. Raises UserError as BatchOrder does.
    """
    if window is not None and window < len(rows):
        return WindowOrder(rows, batch_size, seed, window=window)
    if num_images > MANY:
        return WindowOrder([num_images], batch_size, seed, window=1)
    return BatchOrder(num_images, batch_size, seed)
