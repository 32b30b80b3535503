"""Batches of a store: the images of a training step depend only on (seed, epoch, step).

The images of a global batch and their order do not depend on the number of processes, on gradient accumulation, or
on the workers of the data loader.
"""

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from seitpp.data.order import TURN, BatchOrder, WindowOrder, image_order
from seitpp.errors import UserError
from seitpp.images.batches import already_a_batch
from seitpp.store import TokenStore
from seitpp.tensors import to_device

WINDOW = 64  # shards of a store in a bucket whose images are shuffled together
FRACTION_KEY = 1 << 40  # larger than any epoch, the other numbers used with the seed


class Batch(NamedTuple):
    """A batch of a store: `indices` (B,) int64 in the split, `ids` (B, H, W) uint16, `labels` (B,) int64.

    A label is -1 where it is not known. Of a store whose images have several classes, `labels` are (B, classes)
    uint8: 1 for each class of the image, 0 for the others, and 255 for all where they are not known.
    """

    indices: Tensor
    ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device, without waiting for the copy if the memory is pinned."""
        return Batch(*(to_device(tensor, device) for tensor in self))


class MicroBatch(list[int]):
    """The indices of the images of one micro-batch, and the `epoch` to which it belongs.

    A training loader passes it to the dataset. Since workers live for many epochs, a dataset needs the epoch to
    draw new random numbers for an image in every epoch. `turns` (n,) int64 are how often each image was drawn
    before in the epoch, in a BalancedOrder; None: never.
    """

    def __init__(self, indices: Iterable[int], epoch: int, turns: np.ndarray | None = None):
        super().__init__(indices)
        self.epoch, self.turns = epoch, turns

    def draws(self) -> Tensor:
        """Return the numbers (n,) int64 on which the random numbers of the images depend, as in BalancedOrder."""
        indices = torch.tensor(self)
        return indices if self.turns is None else indices + torch.from_numpy(self.turns * TURN)


class TokenDataset(Dataset):
    """A torch dataset of the images of a store, read in whole batches."""

    def __init__(self, store: TokenStore):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = np.asarray(indices, dtype=np.int64)
        labels = self.store.multi_hot(chosen) if self.store.multi_label else self.store.labels_of(chosen)
        return Batch(*map(torch.from_numpy, (chosen, self.store.ids(chosen), labels)))


class Chosen(Dataset):
    """A subset of a dataset, with increasing `indices` (n,) int64; batches hold indices of the whole dataset."""

    def __init__(self, dataset: Dataset, indices: np.ndarray):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: list[int]) -> Any:
        chosen = self.indices[indices].tolist()
        if isinstance(indices, MicroBatch):
            chosen = MicroBatch(chosen, indices.epoch, indices.turns)
        return self.dataset.__getitems__(chosen)


def indices_within(dataset: Dataset) -> np.ndarray:
    """Return the indices (n,) int64 of a dataset's images in the whole one from which they were chosen."""
    if isinstance(dataset, Chosen):
        return indices_within(dataset.dataset)[dataset.indices]
    return np.arange(len(dataset))


def store_of(dataset: Dataset) -> TokenStore | None:
    """Return the store of a dataset of tokens, or of a part of it; None for others."""
    while isinstance(dataset, Chosen):
        dataset = dataset.dataset
    return getattr(dataset, "store", None)


def rows_by_shard(dataset: Dataset) -> np.ndarray:
    """Return how many images of a dataset of a store lie in each shard (S,) int64."""
    if isinstance(dataset, Chosen):
        ends = np.cumsum(rows_by_shard(dataset.dataset))
        return np.diff(np.searchsorted(dataset.indices, ends), prepend=0)
    return dataset.store.shard_rows


def order_of(dataset: Dataset, *, batch_size: int, seed: int, window: int | None) -> BatchOrder:
    """Return the order of the images of a dataset of a store, permuted in windows of `window` shards.

    If it is None, in windows of 64 shards of a store in a bucket, and all together of one on disk. Raises
    UserError as BatchOrder does.
    """
    if window is None and store_of(dataset).is_remote:
        window = WINDOW
    return image_order(len(dataset), batch_size, seed, rows=rows_by_shard(dataset), window=window)


def few_labels(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Choose `per_class` images of each class at random; return their increasing indices (n,) int64.

    `labels` (N,) int64 are those of all images, -1 where one has none: it is not chosen. Raises UserError if a
    class has fewer images.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(labels))
    chosen = [order[labels[order] == label][:per_class] for label in np.unique(labels[labels >= 0])]
    if min(map(len, chosen)) < per_class:
        raise UserError(
            f"{per_class} labels per class: one class has {min(map(len, chosen))} images; use fewer labels"
        )
    return np.sort(np.concatenate(chosen))


def fraction_of(num_images: int, fraction: float, seed: int) -> np.ndarray:
    """Choose a fraction of the images uniformly at random; return their increasing indices (n,) int64.

    With the same seed, a smaller fraction is a subset of a larger one. At least one image is chosen. Raises
    UserError unless 0 < `fraction` <= 1.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g}: expected a fraction of the images, more than 0 and at most 1")
    order = np.random.Generator(np.random.Philox(key=[seed, FRACTION_KEY])).permutation(num_images)
    return np.sort(order[: max(1, round(fraction * num_images))])


class DrawnImages(Dataset):
    """A dataset read by the draws of a BalancedOrder; the `indices` of its batches are the draws.

    So the random numbers of an image that is drawn several times in an epoch differ.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draws: MicroBatch) -> Any:
        turns, images = np.divmod(draws, TURN)
        batch = self.dataset.__getitems__(MicroBatch(images.tolist(), draws.epoch, turns))
        return batch._replace(indices=batch.indices + torch.from_numpy(turns * TURN))


class _MicroBatches(Sampler):
    """The micro-batches of a rank; with each new window, `coming` gets its shards and the next ones."""

    def __init__(
        self,
        order: BatchOrder,
        steps: range,
        *,
        rank: int,
        ranks: int,
        accumulation: int,
        coming: Callable[[np.ndarray], None] | None,
    ):
        self.order, self.steps, self.coming = order, steps, coming
        self.rank, self.ranks, self.accumulation = rank, ranks, accumulation

    def __iter__(self) -> Iterator[MicroBatch]:
        order, window = self.order, None
        places = (divmod(step, order.steps_per_epoch) for step in self.steps for _ in range(self.accumulation))
        micro_batches = order.micro_batches(
            self.steps, rank=self.rank, ranks=self.ranks, accumulation=self.accumulation
        )
        for one, (epoch, place) in zip(micro_batches, places, strict=True):
            if self.coming and isinstance(order, WindowOrder):
                now = epoch, order.window_at(epoch, place * order.batch_size)
                if now != window:
                    window = now
                    self.coming(order.shards(epoch)[now[1] * order.window :][: 2 * order.window])
            yield MicroBatch(one.tolist(), epoch)


def training_loader(
    dataset: Dataset,
    order: BatchOrder,
    steps: range,
    *,
    rank: int,
    ranks: int,
    accumulation: int,
    workers: int,
) -> DataLoader:
    """Return a data loader of the micro-batches of this rank for `steps`, which may span several epochs.

    The loader passes a `MicroBatch` to `dataset.__getitems__`, which returns the whole batch.
    """
    store = store_of(dataset)
    coming = store.prefetch if store is not None and store.is_remote else None
    share = {"rank": rank, "ranks": ranks, "accumulation": accumulation}
    return _loader(dataset, _MicroBatches(order, steps, **share, coming=coming), workers)


def evaluation_loader(dataset: Dataset, batch_size: int, *, rank: int, ranks: int, workers: int) -> DataLoader:
    """Return a data loader of every image once, in order: rank r loads the batches r, r + ranks, ...

    A batch thus holds the same images for any number of processes, and a model computes exactly the same outputs.
    """
    starts = range(rank * batch_size, len(dataset), ranks * batch_size)
    batches = [list(range(start, min(start + batch_size, len(dataset)))) for start in starts]
    return _loader(dataset, batches, workers)


def _leave_signals_to_the_run(_: int) -> None:
    # Terminals and schedulers also signal the workers, which must continue until the run has finished its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _loader(dataset: Dataset, batches: Sampler | list[list[int]], workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=already_a_batch,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_run,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),  # else each iterator draws from the global one
    )
