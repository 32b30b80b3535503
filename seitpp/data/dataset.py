"""From a store to batches: which images a step sees is a pure function of (seed, epoch, step).

Neither the number of processes, nor the accumulation, nor the loader's workers changes which images make up a
global batch, or in which order.
"""

import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from seitpp.errors import UserError
from seitpp.store import TokenStore

FRACTION_KEY = 1 << 40  # no epoch has this number


class Batch(NamedTuple):
    """Some images of a store: `indices` (B,) int64 in the split, `ids` (B, H, W) uint16, `labels` (B,) int64."""

    indices: Tensor
    ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; the copy does not wait for it."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class MicroBatch(list[int]):
    """The images that one process reads together, by their indices, and the `epoch` that shows them.

    A loader of training hands it to the dataset, whose workers live through many epochs: so what a dataset draws
    for an image while it reads it can be keyed by the epoch.
    """

    def __init__(self, indices: Iterable[int], epoch: int):
        super().__init__(indices)
        self.epoch = epoch


class TokenDataset(Dataset):
    """A store as a torch dataset that is asked for whole batches."""

    def __init__(self, store: TokenStore):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = np.asarray(indices, dtype=np.int64)
        return Batch(*map(torch.from_numpy, (chosen, self.store.ids(chosen), self.store.labels[chosen])))


class Chosen(Dataset):
    """Some images of a dataset; batches keep the images' own numbers. `indices` (n,) int64 are increasing."""

    def __init__(self, dataset: Dataset, indices: np.ndarray):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: list[int]) -> Any:
        chosen = self.indices[indices].tolist()
        if isinstance(indices, MicroBatch):
            chosen = MicroBatch(chosen, indices.epoch)
        return self.dataset.__getitems__(chosen)


def few_labels(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """The indices of `per_class` images of each class, chosen by `seed`; `labels` (N,) are those of all images.

    Raises UserError if a class has fewer images.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(labels))
    chosen = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    if min(map(len, chosen)) < per_class:
        raise UserError(f"{per_class} labels a class: one class has {min(map(len, chosen))} images")
    return np.sort(np.concatenate(chosen))


def fraction_of(num_images: int, fraction: float, seed: int) -> np.ndarray:
    """The indices of a share of the images, chosen by `seed` uniformly; a smaller share is a part of a larger one.

    Raises UserError unless 0 < `fraction` <= 1.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g}: expected a share of the images, more than 0 and at most 1")
    order = np.random.Generator(np.random.Philox(key=[seed, FRACTION_KEY])).permutation(num_images)
    return np.sort(order[: max(1, round(fraction * num_images))])


class BatchOrder:
    """The images of every global batch of a run. The remainder of an epoch that fills no batch is left out.

    `batch_size` is global. Raises UserError if the split has fewer images than one batch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int):
        if not 1 <= batch_size <= num_images:
            raise UserError(
                f"batch size {batch_size}: expected 1 to {num_images}, the images in the training split"
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.steps_per_epoch = num_images // batch_size

    def steps(self, epochs: float) -> int:
        """The number of updates of so many epochs, rounded."""
        return round(epochs * self.steps_per_epoch)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The permutation (num_images,) int64 of an epoch."""
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_images)

    def micro_batches(self, steps: range, rank: int, ranks: int, accumulation: int) -> Iterator[np.ndarray]:
        """This rank's indices for every micro-batch of `steps`, in order: batch / (ranks x accumulation) each."""
        size = self.batch_size // (ranks * accumulation)
        order, order_epoch = None, None
        for step in steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self.epoch_order(epoch), epoch
            for micro in range(accumulation):
                start = position * self.batch_size + (micro * ranks + rank) * size
                yield order[start : start + size]


class _MicroBatches(Sampler):
    def __init__(self, order: BatchOrder, steps: range, rank: int, ranks: int, accumulation: int):
        self.arguments = order, steps, rank, ranks, accumulation

    def __iter__(self) -> Iterator[MicroBatch]:
        order, steps, *rest, accumulation = self.arguments
        epochs = (step // order.steps_per_epoch for step in steps for _ in range(accumulation))
        micro_batches = order.micro_batches(steps, *rest, accumulation)
        return (MicroBatch(one.tolist(), epoch) for one, epoch in zip(micro_batches, epochs, strict=True))


def training_loader(
    dataset: Dataset, order: BatchOrder, steps: range, rank: int, ranks: int, accumulation: int, workers: int
) -> DataLoader:
    """A loader of this rank's micro-batches of `steps`, one after the other, across epochs.

    `dataset` makes a whole batch of a list of indices (`__getitems__`), which is a `MicroBatch`.
    """
    return _loader(dataset, _MicroBatches(order, steps, rank, ranks, accumulation), workers)


def evaluation_loader(dataset: Dataset, batch_size: int, rank: int, ranks: int, workers: int) -> DataLoader:
    """A loader of batches in the order of a dataset, every image once: rank r takes the batches r, r + ranks, ...

    So a batch holds the same images on any number of processes, and a model makes the same bits of it.
    """
    starts = range(rank * batch_size, len(dataset), ranks * batch_size)
    batches = [list(range(start, min(start + batch_size, len(dataset)))) for start in starts]
    return _loader(dataset, batches, workers)


def _already_a_batch(batch: Batch) -> Batch:
    return batch


def _leave_signals_to_the_run(_: int) -> None:
    # A terminal or a scheduler sends them to the workers too, who must go on until the run has finished its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _loader(dataset: Dataset, batches: Sampler | list[list[int]], workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_already_a_batch,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_run,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),  # else each iterator draws from the global generator
    )
