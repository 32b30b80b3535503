"""A balanced order has every class equally often, on any number of processes; weights have mean 1."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.data import global_batches

from seitpp import StoreWriter, TokenStore
from seitpp.augment import RandomBoxes
from seitpp.data.dataset import Chosen, DrawnImages, TokenDataset, training_loader
from seitpp.data.order import TURN, BalancedOrder, BatchOrder
from seitpp.engine.classes import balanced, class_counts, class_weights
from seitpp.errors import UserError
from seitpp.images.batches import ImageDataset
from seitpp.images.sources import open_source

LABELS = np.repeat([4, 0, 2], [90, 3, 7])  # class 4 has 90 of 100 images; 1 and 3 have none


def written(path: Path, labels: list, multi_label: bool = False) -> TokenStore:
    ids = np.arange(len(labels)).reshape(-1, 1, 1) % 8 * np.ones((1, 2, 2), int)
    with StoreWriter(
        path, codebook=np.eye(8, 4), grid=(2, 2), class_names=list("abcde"), multi_label=multi_label
    ) as w:
        w.add_batch(ids, labels)
    return TokenStore(path)


def test_every_class_is_equally_often_in_an_epoch() -> None:
    order = BalancedOrder(LABELS, batch_size=24, seed=5)
    assert order.steps_per_epoch == 4
    epochs = [order.epoch_order(epoch) for epoch in range(3)]
    for draws in epochs:
        images, turns = draws % TURN, draws // TURN
        shares = np.bincount(LABELS[images], minlength=5)
        assert shares.sum() == 100 and sorted(shares) == [0, 0, 33, 33, 34]
        times = np.bincount(images, minlength=100)
        for label in (0, 2, 4):
            assert np.ptp(times[label == LABELS]) <= 1, "images of a class are equally often drawn"
        assert len(set(draws)) == 100, "no draw is made twice"
        assert all(sorted(turns[images == image]) == list(range(times[image])) for image in set(images))
        assert len(set(LABELS[images[:20]])) == 3, "in a random order"
    assert len({tuple(draws) for draws in epochs}) == 3
    frequent = [set(draws[LABELS[draws % TURN] == 4]) for draws in epochs]
    assert len(frequent[0] | frequent[1] | frequent[2]) > 50, "another part in each epoch"
    assert np.array_equal(BalancedOrder(LABELS, 24, seed=5).epoch_order(1), epochs[1])
    assert not np.array_equal(BalancedOrder(LABELS, 24, seed=6).epoch_order(1), epochs[1])


def test_a_balanced_order_does_not_depend_on_processes_or_the_first_step() -> None:
    order = BalancedOrder(LABELS, batch_size=24, seed=5)
    one = global_batches(order, range(10), ranks=1, accumulation=1)
    for ranks, accumulation in [(2, 1), (2, 3)]:
        assert global_batches(order, range(10), ranks, accumulation) == one
    assert global_batches(order, range(3, 10), 2, 1) == one[3:]


def ordered(images, data, balance: str, *, batch_size: int, seed: int = 0):
    settings = {"class_balance": balance, "batch_size": batch_size, "seed": seed, "window_shards": None}
    return balanced(images, data, SimpleNamespace(**settings), device=torch.device("cpu"))


@pytest.mark.parametrize("workers", [0, 1])
def test_draws_are_read_as_images_with_random_numbers_of_their_own(tmp_path: Path, workers: int) -> None:
    store = written(tmp_path / "store", LABELS.tolist())
    chosen = Chosen(TokenDataset(store), np.arange(60, 100))  # 30, 3 and 7 images
    data = ordered(chosen, store, "sampling", batch_size=20, seed=1)
    loader = training_loader(data.images, data.order, range(2), rank=0, ranks=1, accumulation=1, workers=workers)
    batches = list(loader)
    indices, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("indices", "labels"))
    assert isinstance(data.images, DrawnImages) and len(set(indices.tolist())) == 40
    assert np.array_equal(labels, LABELS[indices % TURN]) and indices.max() > TURN and (indices % TURN).min() >= 60
    assert np.array_equal(torch.cat([batch.ids for batch in batches])[:, 0, 0], (indices % TURN) % 8)
    assert sorted(labels.bincount().tolist()) == [0, 0, 13, 13, 14]


def test_pictures_that_are_drawn_again_are_cropped_otherwise(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / ("rare" if number < 2 else "usual")
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(256, size=(24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    source = open_source(str(tmp_path))
    images = Chosen(ImageDataset(source, (8, 8), RandomBoxes(0, (8, 8), (0.2, 1.0))), np.arange(12))
    data = ordered(images, source, "sampling", batch_size=12)
    loader = training_loader(data.images, data.order, range(1), rank=0, ranks=1, accumulation=1, workers=0)
    (batch,) = loader
    assert batch.labels.bincount().tolist() == [6, 6]
    for one in (0, 1):
        crops = batch.images[batch.indices % TURN == one]
        assert len(crops) == 3 and len({bytes(crop.numpy()) for crop in crops}) == 3
    weighted = ordered(images, source, "weights", batch_size=12)
    assert weighted.class_weights.tolist() == pytest.approx([3, 0.6])


def test_weights_are_inverse_frequencies_with_mean_1(tmp_path: Path) -> None:
    store = written(tmp_path / "one", LABELS.tolist())
    data = ordered(TokenDataset(store), store, "weights", batch_size=10)
    assert type(data.order) is BatchOrder and data.class_weights.dtype == torch.float32
    weights = data.class_weights.numpy()
    assert weights[LABELS].mean() == pytest.approx(1) and weights[1] == weights[3] == 1
    assert weights[0] / weights[4] == pytest.approx(30) and weights[0] / weights[2] == pytest.approx(7 / 3)
    part = ordered(Chosen(TokenDataset(store), np.arange(80, 100)), store, "weights", batch_size=10)
    assert (part.class_weights[0] / part.class_weights[4]).item() == pytest.approx(10 / 3), (
        "of the images trained on"
    )
    assert ordered(TokenDataset(store), store, "none", batch_size=10).class_weights is None
    assert class_weights(np.array([5, 5])).tolist() == [1, 1]


def test_images_with_several_classes_count_for_each(tmp_path: Path) -> None:
    store = written(tmp_path / "several", [(0, 1), (1,), (), (1, 4)] * 1250, multi_label=True)
    images = TokenDataset(store)
    assert class_counts(images, store).tolist() == [1250, 3750, 0, 0, 1250]
    assert class_counts(Chosen(images, np.arange(3)), store).tolist() == [1, 2, 0, 0, 0]
    with pytest.raises(UserError, match=r"--class-balance sampling .*several.*pass --class-balance weights"):
        ordered(images, store, "sampling", batch_size=4)
