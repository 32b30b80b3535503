"""Orders of very many images: parts of a permutation without the rest, and windows of shards."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seitpp import StoreWriter, TokenStore
from seitpp.data import order as orders
from seitpp.data.dataset import Chosen, TokenDataset, _MicroBatches, order_of, rows_by_shard
from seitpp.data.order import BatchOrder, Permutation, WindowOrder, image_order
from seitpp.errors import UserError
from seitpp.store import spec

ROWS = [5, 9, 1, 7, 7, 3, 8]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.integers(0, 50), st.integers(0, 50))
def test_every_image_is_there_once_and_any_part_is_that_of_the_whole(
    n: int, seed: int, epoch: int, part: int
) -> None:
    permutation = Permutation(n, seed, (epoch, part))
    whole = permutation(np.arange(n))
    assert sorted(whole.tolist()) == list(range(n)) and len(permutation) == n
    chosen = np.random.default_rng(seed).integers(n, size=10)
    assert np.array_equal(permutation(chosen), whole[chosen])


def test_permutations_look_random() -> None:
    """Of 4 numbers, each of the 24 permutations is as frequent as the others; neighbors are no neighbors."""
    found = np.array([Permutation(4, seed, (seed % 7, seed % 5))(np.arange(4)) for seed in range(4800)])
    counts = np.unique(found @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 200) ** 2 / 200).sum() < 49.7  # chi-square of 23 degrees, p = 0.001
    large = Permutation(10**9, 1)(np.arange(100_000))
    assert len(np.unique(large)) == 100_000 and abs(np.corrcoef(large[1:], large[:-1])[0, 1]) < 0.02
    assert abs(large.mean() / 5e8 - 1) < 0.01 and large.max() < 10**9


def test_different_streams_are_different() -> None:
    found = {
        Permutation(50, seed, (epoch, window))(np.arange(50)).tobytes()
        for seed in range(5)
        for epoch in range(5)
        for window in range(5)
    }
    assert len(found) == 125


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_an_epoch_has_every_image_once_and_a_window_only_its_shards(window: int) -> None:
    order = WindowOrder(ROWS, 4, 3, window=window)
    ends = np.cumsum(ROWS)
    for epoch in (0, 1):
        images = order.epoch_order(epoch)
        assert sorted(images.tolist()) == list(range(40))
        shards, start = order.shards(epoch), 0
        assert sorted(shards.tolist()) == list(range(7))
        for number, first in enumerate(range(0, 7, window)):
            own = set(shards[first : first + window].tolist())
            stop = start + sum(ROWS[shard] for shard in own)
            assert set(np.searchsorted(ends, images[start:stop], side="right").tolist()) == own
            assert {order.window_at(epoch, start), order.window_at(epoch, stop - 1)} == {number}
            start = stop
    assert not np.array_equal(order.epoch_order(0), order.epoch_order(1))


def test_parts_and_any_number_of_processes_give_the_same_batches() -> None:
    order = WindowOrder(ROWS, 12, 3, window=2)
    assert order.steps_per_epoch == 3
    whole = order.epoch_order(1)
    for start in range(0, 40, 7):
        assert np.array_equal(
            WindowOrder(ROWS, 12, 3, window=2).part(1, start, start + 5), whole[start : start + 5]
        )
    steps = range(2, 6)
    one = list(order.micro_batches(steps, rank=0, ranks=1, accumulation=1))
    assert np.array_equal(one[1], whole[:12]) and len(one) == 4
    for ranks, accumulation in ((2, 1), (3, 2)):
        parts = [
            order.micro_batches(steps, rank=rank, ranks=ranks, accumulation=accumulation) for rank in range(ranks)
        ]
        joined = [np.concatenate(step) for step in zip(*parts, strict=True)]
        micro = np.concatenate(joined).reshape(len(steps), -1)
        assert np.array_equal(micro, np.stack(one))


def test_the_shards_of_this_window_and_the_next_are_asked_for() -> None:
    order, asked = WindowOrder(ROWS, 4, 3, window=2), []
    share = {"rank": 0, "ranks": 1, "accumulation": 1}
    batches = list(_MicroBatches(order, range(20), **share, coming=lambda shards: asked.append(shards.tolist())))
    assert len(batches) == 20 and len(asked) == 8, "an epoch of 10 steps has 4 windows"
    shards = order.shards(0).tolist()
    assert asked[:4] == [shards[0:4], shards[2:6], shards[4:7], shards[6:7]]
    ends = np.cumsum(ROWS)
    seen = set(np.searchsorted(ends, batches[0], side="right").tolist())
    assert seen <= set(asked[0][:2])


def test_an_order_is_chosen_by_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(image_order(40, 4, 0, rows=ROWS)) is BatchOrder
    assert type(image_order(40, 4, 0, rows=ROWS, window=7)) is BatchOrder, "one window: the order of a local store"
    assert image_order(40, 4, 0, rows=ROWS, window=6).window == 6
    monkeypatch.setattr(orders, "MANY", 39)
    large = image_order(40, 4, 0, rows=ROWS)
    assert large.window == 1 and sorted(large.epoch_order(0).tolist()) == list(range(40))
    with pytest.raises(UserError, match="batch size 41"):
        image_order(40, 41, 0, rows=ROWS, window=2)


def test_the_order_of_a_part_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "SHARD_IMAGES", 10)
    codebook = np.arange(8, dtype=np.float32).reshape(4, 2)
    with StoreWriter(tmp_path / "s", codebook=codebook, grid=(1, 2)) as writer:
        writer.add_batch(np.zeros((45, 1, 2), int), [0] * 45)
    images = TokenDataset(TokenStore(tmp_path / "s"))
    assert rows_by_shard(images).tolist() == [10, 10, 10, 10, 5]
    part = Chosen(images, np.array([0, 9, 10, 29, 44]))
    assert rows_by_shard(part).tolist() == [2, 1, 1, 0, 1]
    order = order_of(part, batch_size=1, seed=0, window=2)
    assert sorted(order.epoch_order(0).tolist()) == [0, 1, 2, 3, 4]
    assert type(order_of(images, batch_size=5, seed=0, window=None)) is BatchOrder
