"""A run that is killed, stopped, starved of disk or broken anywhere, and started again with the same command."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.faults import BROKEN_DISK, NO_SPACE, REMOVALS, Fault, die, faulty, in_child
from support.forks import run_forks
from support.paths import RECIPES
from support.running import distributed, metrics, torchrun
from support.tiny_run import BATCH, CHECKPOINT_STEPS, STEPS, TINY_RUN, same_run, train
from torch import nn

from seitpp.data.digits import digits
from seitpp.engine import checkpoint
from seitpp.engine.distributed import OptimizerState
from seitpp.engine.folder import RunError
from seitpp.engine.signals import Stopped


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    digits()
    assert in_child(partial(train, folder), folder.with_name("log")) == 0
    return folder


# ------------------------------------------------------------------------------------------------- kills


def at(step: int, micro: int, act: Callable[[], None]) -> Callable:
    """An accident of `train` that calls `act` there."""

    def accident(now: int, part: int, _: int, loss: torch.Tensor) -> torch.Tensor:
        if (now, part) == (step, micro):
            act()
        return loss

    return accident


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Before the first update, inside an accumulation window, in mid-epoch, at the end of an epoch and after it, and in
# the last step; of the last two, the second before the run has come as far as the first.
@pytest.mark.parametrize(
    ("accumulation", "places"),
    [
        (1, [(0, 0)]),
        (2, [(7, 1)]),
        (1, [(8, 0)]),
        (1, [(11, 0)]),
        (1, [(12, 0)]),
        (1, [(STEPS - 1, 0)]),
        (1, [(7, 0), (6, 0), (13, 0)]),
    ],
)
def test_killed_at_a_step_and_resumed_gives_the_same_bits(whole, tmp_path, accumulation: int, places) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    if accumulation > 1:  # sums in another order: a run of its own to compare with
        whole = tmp_path / "whole"
        assert in_child(partial(train, whole, accumulation=accumulation), log) == 0
    for place in places:
        killed = partial(train, folder, at(*place, kill), accumulation=accumulation)
        assert in_child(killed, log) == -signal.SIGKILL
    assert in_child(partial(train, folder, accumulation=accumulation), log) == 0, log.read_text()
    same_run(folder, whole)


def under(fault: Fault, number: int, folder: Path) -> None:
    with faulty(number, fault):
        train(folder)


def test_killed_at_any_file_operation_and_resumed_gives_the_same_bits(whole, tmp_path) -> None:
    log = tmp_path / "log"
    with faulty(10**9, die) as counting:
        train(tmp_path / "counted")
    for number in range(0, len(counting.names), len(counting.names) // 12):
        folder = tmp_path / f"killed-{number}"
        assert in_child(partial(under, die, number, folder), log) == -signal.SIGKILL
        assert in_child(partial(train, folder), log) == 0, log.read_text()
        same_run(folder, whole)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(whole, tmp_path) -> None:
    with faulty(10**9, die) as counting:
        train(tmp_path / "counted")
    for number in range(0, len(counting.names), len(counting.names) // 6):
        folder = tmp_path / f"full-{number}"
        with pytest.raises(RunError, match="No space left on device"):
            under(NO_SPACE, number, folder)
        train(folder)
        same_run(folder, whole)


# --------------------------------------------------------------------------------- the publisher by itself


def tiny_tensors(step: int) -> checkpoint.Groups:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    return checkpoint.tensors_of(model, OptimizerState(torch.optim.AdamW(model.parameters())), ema=None)


def save(folder: Path, step: int) -> None:
    checkpoint.save(folder, step, data_fingerprint="store", tensors=tiny_tensors(step))


def check(folder: Path, steps: set[int]) -> None:
    """There is a whole checkpoint of one of `steps`, and LATEST names a whole one."""
    found = checkpoint.load(checkpoint.newest(folder))
    assert found.step in steps and found.tensors["model"]["weight"].eq(found.step).all()
    named = checkpoint.load(folder / (folder / "LATEST").read_text())
    assert named.step in steps


@pytest.mark.parametrize("fault", [die, NO_SPACE, BROKEN_DISK], ids=["kill", "ENOSPC", "EIO"])
def test_at_every_operation_of_the_publisher_a_whole_checkpoint_is_there(tmp_path, fault: Fault) -> None:
    before = tmp_path / "before"
    for step in (1, 2):
        save(before, step)
    with faulty(10**9, fault) as counting:
        save(shutil.copytree(before, tmp_path / "counted"), 3)
    assert len(counting.names) > 25
    for number in range(len(counting.names)):
        folder = shutil.copytree(before, tmp_path / f"at-{number}")

        def broken(number: int = number, folder: Path = folder) -> None:
            with faulty(number, fault):
                save(folder, 3)

        if fault is die:
            assert in_child(broken, tmp_path / "log") == -signal.SIGKILL
        elif fault is NO_SPACE and set(counting.names[number:]) <= set(REMOVALS):
            broken()  # a full disk lets one remove
        else:
            expected = "saving step 3 .*last good checkpoint is step-0"
            with pytest.raises(checkpoint.CheckpointError, match=expected) as error:
                broken()
            assert "\n" not in str(error.value)
        check(folder, {2, 3})
        save(folder, 3)
        check(folder, {3})
        assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-00000002", "step-00000003"]


# ----------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_stops(whole, tmp_path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(
        Stopped, match=rf"stopped after step 8, which is saved: go on with --resume --out {folder}"
    ) as e:
        train(folder, at(7, 0, lambda: os.kill(os.getpid(), number)))
    assert e.value.status == 128 + number
    assert (folder / "checkpoints/LATEST").read_text() == "step-00000008" and len(metrics(folder)) == 8
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(folder)
    same_run(folder, whole)


def test_a_second_signal_stops_at_once(tmp_path) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    killed = in_child(partial(train, tmp_path / "run", at(7, 0, twice)), tmp_path / "log")
    assert killed == -signal.SIGTERM
    assert (tmp_path / "run/checkpoints/LATEST").read_text() == "step-00000006"
    assert "a second signal stops at once" in (tmp_path / "log").read_text()


# -------------------------------------------------------------------------------- what goes wrong in training


def test_what_is_not_finite_leaves_its_batch(tmp_path) -> None:
    def broken(step: int, micro: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
        return loss * float("nan") if step == 6 else loss

    folder = tmp_path / "run"
    with pytest.raises(
        RunError, match=r"loss is nan at step 7 on rank 0: stopped; its images are in .*step-00000006"
    ):
        train(folder, broken)
    batch = load_file(folder / "broken-step-00000007-rank-0.safetensors")
    assert len(batch["indices"]) == BATCH and batch["ids"].dtype == torch.uint16
    assert (folder / "checkpoints/LATEST").read_text() == "step-00000006"


def test_two_processes_stop_together(whole, tmp_path) -> None:
    """On a signal to one of them, and at a loss that is not finite on one of them; with the same bits as one."""
    folder = tmp_path / "run"
    stopped = torchrun(2, TINY_RUN, folder, "--dropout", 0, "--term", 4, 1)
    assert "stopped after step 5, which is saved" in stopped.stderr
    assert len(metrics(folder)) == 5 and (folder / "checkpoints/LATEST").read_text() == "step-00000005"
    broken = distributed(2, TINY_RUN, folder, "--dropout", 0, "--nan", 9, 1)
    assert ": loss is nan at step 10 on rank 1: stopped; its images are in" in broken.stderr
    batch = load_file(folder / "broken-step-00000010-rank-1.safetensors")
    assert len(batch["indices"]) == BATCH // 2
    assert (folder / "checkpoints/LATEST").read_text() == "step-00000009"
    # One process finishes what two have begun, and has learned what one alone learns.
    train(folder, dropout=0.0)
    train(tmp_path / "alone", dropout=0.0)
    for line, alone in zip(metrics(folder), metrics(tmp_path / "alone"), strict=True):
        assert line["loss"] == pytest.approx(alone["loss"], abs=1e-6)


def test_a_folder_in_use_is_refused(tmp_path) -> None:
    """While a run of another process lives in it, and no longer."""
    folder = tmp_path / "run"

    def second() -> None:
        refused = in_child(partial(train, folder), tmp_path / "log")
        (tmp_path / "status").write_text(str(refused))

    train(folder, at(5, 0, second))
    assert (tmp_path / "status").read_text() == "1" and "is in use by process" in (tmp_path / "log").read_text()


def test_out_of_memory_names_the_ways_out(tmp_path) -> None:
    limited = (
        "import resource, runpy, sys; import torch, timm, sklearn, kornia, accelerate, matplotlib.pyplot;"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096;"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    (tmp_path / "limited.py").write_text(limited)
    large, pixels = ["--batch-size", 1024, "--model", "seit_vit_tiny"], ["--input", "pixels", "--size", 1024]
    for name, flags, advice in (
        (
            "seit_train",
            large,
            "got 1024 images at a time on each of 1 process(es): for the same updates with fewer, pass "
            "--batch-size 1024 --accumulation 2 (512), --batch-size 1024 --accumulation 4 (256)",
        ),
        ("continual", [*pixels, "--memory", 0], "got a batch of 10 images: pass a smaller --batch-size"),
    ):
        line = [RECIPES / f"{name}.py", "smoke", *flags, "--out", tmp_path / name]
        finished = run_forks(tmp_path / "limited.py", *line)
        assert finished.returncode == 2, finished.stderr
        assert finished.stderr.splitlines()[-1].startswith(f"error: out of memory: {advice}")


def test_runs_as_they_were_logged(whole) -> None:
    assert json.loads((whole / "result.json").read_text())["steps"] == STEPS
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert kept == ["LATEST", f"step-{STEPS // CHECKPOINT_STEPS * CHECKPOINT_STEPS:08d}", f"step-{STEPS:08d}"]
