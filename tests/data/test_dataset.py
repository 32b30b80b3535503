"""The order of training images: the same for all launches, each image at most once in an epoch."""

import numpy as np
import pytest
import torch
from support.data import global_batches

from seitpp import TokenStore
from seitpp.data.dataset import TokenDataset, evaluation_loader, training_loader
from seitpp.data.digits import digits
from seitpp.data.order import BatchOrder
from seitpp.errors import UserError


def test_global_batches_do_not_depend_on_processes_or_accumulation() -> None:
    order = BatchOrder(103, batch_size=24, seed=5)
    one = global_batches(order, range(10), ranks=1, accumulation=1)
    for ranks, accumulation in [(2, 1), (1, 2), (2, 3), (4, 1)]:
        assert global_batches(order, range(10), ranks, accumulation) == one
    assert global_batches(order, range(3, 10), 2, 1) == one[3:]


def test_an_epoch_shows_an_image_at_most_once_and_epochs_differ() -> None:
    order = BatchOrder(103, batch_size=24, seed=5)
    assert order.steps_per_epoch == 4
    epochs = [np.concatenate(global_batches(order, range(at, at + 4), 1, 1)).tolist() for at in (0, 4)]
    assert all(len(set(epoch)) == 96 and set(epoch) <= set(range(103)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert global_batches(BatchOrder(103, 24, seed=6), range(1), 1, 1)[0] != epochs[0][:24]


def test_order_is_pinned() -> None:
    """A resume after an upgrade must see the same images: this is what numpy's Philox gives, for ever."""
    assert BatchOrder(10, 5, seed=1).epoch_order(2).tolist() == [1, 4, 5, 0, 7, 6, 8, 2, 3, 9]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_images_of_the_order(workers: int) -> None:
    store = TokenStore(digits().store, "train")
    order = BatchOrder(len(store), 64, seed=0)
    loader = training_loader(
        TokenDataset(store), order, range(20, 25), rank=1, ranks=2, accumulation=1, workers=workers
    )
    for batch, expected in zip(
        loader, order.micro_batches(range(20, 25), rank=1, ranks=2, accumulation=1), strict=True
    ):
        assert batch.indices.tolist() == expected.tolist()
        assert batch.ids.dtype == torch.uint16
        assert np.array_equal(batch.ids.numpy(), store.ids(expected))
        assert np.array_equal(batch.labels.numpy(), store.labels[expected])


def test_evaluation_shows_every_image_once() -> None:
    """In the same batches on any number of processes, some of which may have none."""
    dataset = TokenDataset(TokenStore(digits().store, "validation"))
    for ranks in (1, 7, 13):
        loaders = [evaluation_loader(dataset, 32, rank=rank, ranks=ranks, workers=0) for rank in range(ranks)]
        seen = sorted(batch.indices.tolist() for loader in loaders for batch in loader)
        assert seen == [list(range(start, min(start + 32, 360))) for start in range(0, 360, 32)]


def test_too_large_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="batch size 200: expected 1 to 103"):
        BatchOrder(103, 200, 0)
