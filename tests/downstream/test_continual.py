"""Continual learning in parts: bytes, the memory, the order, tasks and their figures, batch norm on processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.forks import run_forks
from support.running import places
from torch import nn

from downstream.continual.order import ReplayOrder
from downstream.continual.sizes import images_held, pixel_bytes, token_bytes
from downstream.continual.tasks import classes_seen, divide_classes, figures, images_of, task_accuracies
from seitpp import StoreWriter, TokenStore
from seitpp.books import Books
from seitpp.data.digits import DigitsSource, digits
from seitpp.engine.evaluate import Predictions
from seitpp.engine.ranges import parse_bytes
from seitpp.errors import UserError

LABELS = np.random.default_rng(0).integers(6, size=400)
TASKS = images_of(LABELS, [np.array([4, 1]), np.array([0, 5]), np.array([2, 3])])
BATCH, CAPACITY, SEED = 8, 30, 3


def replay(capacity: int = CAPACITY, seed: int = SEED) -> ReplayOrder:
    return ReplayOrder(TASKS, BATCH, seed, capacity=capacity)


def batches(order: ReplayOrder, start: int = 0, **where: int) -> list[list[int]]:
    steps = range(start, order.steps_per_epoch)
    where = {"rank": 0, "ranks": 1, "accumulation": 1, **where}
    return [batch.tolist() for batch in order.micro_batches(steps, **where)]


# Bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("574MB", 574_000_000), ("574.2MiB", 602_092_339), ("24.6kB", 24_600), ("0", 0), ("12", 12)),
        *(("1 GiB", 2**30), ("0.5kb", 500), ("602.112MB", 602_112_000)),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text, "--memory") == expected


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1e3", "5 apples", "nan", "1.MB"])
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match=r"--memory .*: expected a number of bytes such as 574MB"):
        parse_bytes(text, "--memory")


def test_the_arithmetic_of_the_paper(tmp_path: Path) -> None:
    """574.2 MiB = 1,000 pixel images, 494.9 MiB = all token images of ImageNet-100; 147 to 1; 150,528 B."""
    with StoreWriter(tmp_path / "store", codebook=np.eye(2, dtype=np.float32), grid=(32, 32)) as writer:
        writer.add(np.zeros((32, 32), np.uint16), 0)
    tokens, digits_source = token_bytes(TokenStore(tmp_path / "store"), "paper"), DigitsSource("train")
    pixels, values = (pixel_bytes((3, 224, 224), digits_source, count) for count in ("paper", "uint8"))
    assert (pixels, values, tokens, pixels / tokens) == (602_112, 150_528, 4096, 147)
    assert [round(size / 2**20, 1) for size in (1000 * pixels, 126_689 * tokens)] == [574.2, 494.9]
    assert images_held(parse_bytes("602.112MB", ""), pixels, "paper") == 1000
    assert images_held(1000 * pixels, tokens, "paper") == 147_000 > 126_689


def test_honest_counts_are_of_the_data(tmp_path: Path) -> None:
    store, source = TokenStore(digits().store), DigitsSource("train")
    encoded = [len(store.codec.encode(store[index][0].ravel())) for index in range(len(store))]
    assert token_bytes(store, "stored") == sum(encoded) / len(store) + 8
    assert token_bytes(store, "paper") == 256
    files = [len(source.read(index).data) for index in range(len(source))]
    assert pixel_bytes((3, 32, 32), source, "jpeg") == sum(files) / len(files)
    with StoreWriter(
        tmp_path / "digits", codebook=Books.join(np.eye(2)[None].repeat(3, 0), "sum"), grid=(4, 4)
    ) as new:
        new.add(np.zeros((3, 4, 4), np.uint16), 0)
    assert token_bytes(TokenStore(tmp_path / "digits"), "paper") == 4 * 3 * 16
    assert images_held(0, 256, "paper") == 0 and images_held(256, 256, "paper") == 1
    with pytest.raises(
        UserError, match="--memory of 255 bytes: expected 0, or at least the 256 bytes of one image"
    ):
        images_held(255, 256, "paper")


# Memory and order


def test_each_image_of_each_task_comes_once_in_the_order_of_the_tasks() -> None:
    order = replay()
    seen = np.concatenate([batch[:BATCH] for batch in batches(order)])
    parts = np.split(seen, [BATCH * end for end in order.ends])[:-1]
    for part, task in zip(parts, TASKS, strict=True):
        assert len(part) == len(task) // BATCH * BATCH == len(set(part)) and set(part) <= set(task.tolist())
        assert part.tolist() != np.sort(part).tolist()
    assert (
        batches(order) != batches(replay(seed=4)) and order.steps_per_epoch == order.ends[-1] == len(seen) // BATCH
    )
    counts = [order.tasks_seen(step) for step in (0, 1, order.ends[0], order.ends[0] + 1, order.ends[2])]
    assert counts == [1, 1, 1, 2, 3]


def test_the_memory_has_the_largest_keys_and_what_is_drawn_is_in_it() -> None:
    order, found = replay(), batches(replay())
    for step, batch in enumerate(found):
        past = [image for earlier in found[:step] for image in earlier[:BATCH]]
        memory = order.memory(step).tolist()
        # A reservoir: each image keeps its key, so what is in the memory stays unless CAPACITY larger ones come.
        assert len(memory) == min(CAPACITY, len(past)) and set(memory) <= set(past)
        assert set(memory) - set(order.memory(step + 1).tolist()) <= set(memory[-BATCH:])
        drawn = batch[BATCH:]
        assert len(drawn) == (BATCH if step else 0) == len(set(drawn)) and set(drawn) <= set(memory)
        assert memory == ReplayOrder(TASKS, BATCH, SEED, capacity=400).memory(step).tolist()[:CAPACITY]


def test_the_memory_is_a_uniformly_random_part() -> None:
    """Over 300 seeds each image of the pass is in it with the same probability, also one of the first task."""
    held, came = np.zeros(400), np.zeros(400)
    for seed in range(300):
        order = replay(seed=seed)
        held[order.memory(order.steps_per_epoch)] += 1
        came[order.epoch_order(0)] += 1
    share = [held[task].sum() / came[task].sum() for task in TASKS]
    assert share == pytest.approx([CAPACITY / order.num_images] * 3, rel=0.1)
    assert held.std() < 1.3 * held.mean() ** 0.5, "that of a Poisson distribution"


def test_small_and_no_memories() -> None:
    assert all(len(batch) == BATCH for batch in batches(replay(0)))
    assert [batch[:BATCH] for batch in batches(replay(3))] == batches(replay(0))
    for batch in batches(replay(3))[1:]:
        _, times = np.unique(batch[BATCH:], return_counts=True)
        assert sorted(times) == [2, 3, 3], "fewer than a batch: equally often, up to one"


def test_processes_micro_batches_and_resumed_runs_see_the_same() -> None:
    order, whole = replay(), batches(replay())
    for ranks, accumulation in ((2, 1), (2, 2)):
        parts = [batches(order, rank=rank, ranks=ranks, accumulation=accumulation) for rank in range(ranks)]
        for step, batch in enumerate(whole):
            mine = [part[accumulation * step :][:accumulation] for part in parts]
            assert sorted(image for micro in mine for one in micro for image in one) == sorted(batch)
            assert len({len(one) for micro in mine for one in micro}) == 1, "gradients are means over equal parts"
    for start in (0, 1, 17, order.ends[1]):
        assert batches(order, start) == whole[start:], "after a kill"


def test_a_task_without_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="task 2 of 2 has 7 training images, expected at least the 8 of a batch"):
        ReplayOrder([np.arange(9), np.arange(7)], 8, 0, capacity=1)


# Tasks and figures


def test_classes_are_divided_by_the_list_or_by_the_seed() -> None:
    assert [part.tolist() for part in divide_classes(7, 3, None)] == [[0, 1, 2], [3, 4], [5, 6]]
    shuffled = [np.concatenate(divide_classes(50, 5, seed)).tolist() for seed in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] != shuffled[2] and sorted(shuffled[0]) == list(range(50)) != shuffled[0]
    with pytest.raises(UserError, match="--tasks 8: expected 1 to 7, the number of classes"):
        divide_classes(7, 8, None)


def test_accuracies_of_tasks() -> None:
    """Classes 3 and 1, then 0: class 2 was not seen."""
    tasks = [np.array([3, 1]), np.array([0])]
    chosen = classes_seen(tasks, 4)
    assert chosen.outputs.tolist() == [3, 1, 0] and chosen.labels.tolist() == [2, 1, -1, 0]
    predictions = Predictions(torch.tensor([[0], [2], [1], [2], [0], [2]]), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert task_accuracies(predictions, tasks) == [50.0, 50.0]


def test_figures_of_a_matrix_by_hand() -> None:
    """Task 1 fell from its best, 90, to 50, task 2 from 60, its own, to 70; they were learned with 80 and 60."""
    found = figures([[80.0], [90.0, 60.0], [50.0, 70.0, 96.0]])
    assert found == {
        "average_accuracy": pytest.approx((50 + 70 + 96) / 3),
        "forgetting": pytest.approx(((90 - 50) + (60 - 70)) / 2),
        "backward_transfer": pytest.approx(((50 - 80) + (70 - 60)) / 2),
    }
    assert figures([[42.0]]) == {"average_accuracy": 42.0, "forgetting": None, "backward_transfer": None}


# Batch norm

NORM_SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from downstream.continual.norm import GlobalBatchNorm
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
norm, x = GlobalBatchNorm(5), torch.randn(8, 5, 3, 4).mul(3).add(7)
with torch.no_grad():
    norm.weight.uniform_(); norm.bias.uniform_()
weight = torch.randn(8, 5, 3, 4)
part = x[rank::2].clone().requires_grad_()
wrapped = DistributedDataParallel(norm)
out = wrapped(part)
(out * weight[rank::2]).mean().backward()
found = {"out": out, "input": part.grad / 2, "weight": norm.weight.grad, "bias": norm.bias.grad,
         "mean": norm.running_mean, "var": norm.running_var, "batches": norm.num_batches_tracked}
torch.save(found, f"{sys.argv[1]}-{rank}")
dist.destroy_process_group()
"""


def test_batch_norm_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """Outputs, gradients and running statistics are those of torch's on the whole batch."""
    script = tmp_path / "norm.py"
    script.write_text(NORM_SCRIPT)
    done = run_forks(script, tmp_path / "found", environments=places(2))
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    norm, x = nn.BatchNorm2d(5), torch.randn(8, 5, 3, 4).mul(3).add(7).requires_grad_()
    with torch.no_grad():
        norm.weight.uniform_()
        norm.bias.uniform_()
    out = norm(x)
    (out * torch.randn(8, 5, 3, 4)).mean().backward()
    for rank in range(2):
        found = torch.load(f"{tmp_path}/found-{rank}", weights_only=True)
        expected = {
            "out": out[rank::2],
            "input": x.grad[rank::2],
            "weight": norm.weight.grad,
            "bias": norm.bias.grad,
        }
        expected |= {"mean": norm.running_mean, "var": norm.running_var, "batches": norm.num_batches_tracked}
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
