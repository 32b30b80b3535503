"""Half precision, fp16 with its loss scale and bf16: what they learn, skipped updates, exact resume, no waits."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from support.faults import in_child
from support.running import distributed, fsdp, metrics, recipe, unlabeled_digits
from support.tiny_run import STEPS, TINY_RUN, Accident, overflow, same_run, train
from torch.utils._python_dispatch import TorchDispatchMode

from seitpp.data.digits import digits
from seitpp.engine.folder import RunError
from seitpp.engine.precision import check_precision

FIRST_SCALE = 2.0**16


def in_half(folder: Path, accident: Accident, precision: str = "fp16", **settings) -> int:
    """Train in a process of its own, since Accelerate keeps to the first precision of a process; its status."""
    digits()

    def child() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        train(folder, accident, precision=precision, **settings)

    return in_child(child, folder.with_name("log"))


def two_overflows(step: int, micro: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
    """An accident: the gradients of updates 5 and 9 are too large for fp16."""
    return overflow(loss) if step in (4, 8) else loss


def sent(number: int, at: int) -> Accident:
    """The same, and a signal to itself in the update after `at` of them."""

    def accident(step: int, micro: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
        if step == at:
            os.kill(os.getpid(), number)
        return two_overflows(step, micro, rank, loss)

    return accident


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbs but for its overflows."""
    folder = tmp_path_factory.mktemp("fp16") / "run"
    assert in_half(folder, two_overflows) == 0, folder.with_name("log").read_text()
    return folder


def test_an_update_that_overflows_is_skipped_and_counts(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["skipped"]] == [5, 9]
    expected = [FIRST_SCALE / (1 if step <= 5 else 2 if step <= 9 else 4) for step in range(1, STEPS + 1)]
    assert [line["loss_scale"] for line in lines] == expected
    assert all((line["grad_norm"] == 0) == bool(line["skipped"]) for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * step for step in range(1, STEPS + 1)])


def test_a_skipped_update_changes_neither_weights_nor_optimizer(tmp_path: Path) -> None:
    """Checkpoints before and after it differ in the loss scale, and in the moving average, which goes on."""
    saved = []
    for step in (4, 5):
        assert in_half(tmp_path / "run", sent(signal.SIGTERM, step - 1)) == 1  # stopped, and says so
        folder = tmp_path / f"run/checkpoints/step-{step:08d}"
        names = ("model", "optimizer", "ema", "scaler")
        saved.append({name: load_file(folder / f"{name}.safetensors") for name in names})
    before, after = saved
    for name in ("model", "optimizer"):
        assert all(torch.equal(value, before[name][key]) for key, value in after[name].items()), name
    assert before["scaler"] == {"scale": FIRST_SCALE, "growth_tracker": 4}
    assert after["scaler"] == {"scale": FIRST_SCALE / 2, "growth_tracker": 0}
    average = before["ema"]["3.weight"].lerp(before["model"]["3.weight"], 0.1)
    torch.testing.assert_close(after["ema"]["3.weight"], average)


@pytest.mark.parametrize(("accumulation", "places"), [(1, (3, 4, 5, 11)), (2, (5, 9))])
def test_killed_and_resumed_gives_the_same_bits(whole: Path, tmp_path: Path, accumulation: int, places) -> None:
    """Killed before, in and after an overflow, whose scale the checkpoint has or has not seen."""
    if accumulation > 1:  # sums in another order: a run of its own to compare with
        whole = tmp_path / "whole"
        assert in_half(whole, two_overflows, accumulation=accumulation) == 0
    for place in places:
        killed = in_half(tmp_path / "run", sent(signal.SIGKILL, place), accumulation=accumulation)
        assert killed == -signal.SIGKILL
    log = tmp_path / "log"
    assert in_half(tmp_path / "run", two_overflows, accumulation=accumulation) == 0, log.read_text()
    same_run(tmp_path / "run", whole)
    last = f"checkpoints/step-{STEPS:08d}/scaler.safetensors"
    assert load_file(tmp_path / "run" / last) == load_file(whole / last)


def test_gradients_that_always_overflow_end_the_run_and_a_loss_that_is_not_finite_does(tmp_path: Path) -> None:
    def always(step: int, micro: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
        return overflow(loss, 1e30)

    assert in_half(tmp_path / "run", always, steps=22, checkpoint_steps=22) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert "RunError: the loss scale fell to 0.5 at step 18: gradients overflow in fp16 at any scale" in last
    assert last.endswith("pass --precision bf16 or no")

    def broken(step: int, micro: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
        return loss * float("nan") if step == 6 else loss

    assert in_half(tmp_path / "other", broken) == 1
    assert "RunError: loss is nan at step 7 on rank 0" in (tmp_path / "log").read_text()


def test_two_processes_skip_together(tmp_path: Path) -> None:
    """An overflow on one of them; they learn what one process learns."""
    folder = tmp_path / "run"
    arguments = ["--dropout", 0, "--precision", "fp16", "--overflow", 4, 1]
    finished = distributed(2, TINY_RUN, folder, *arguments)
    assert finished.returncode == 0, finished.stderr

    def all_of_it(step: int, micro: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
        return overflow(loss) if step == 4 else loss

    assert in_half(tmp_path / "alone", all_of_it, dropout=0.0) == 0
    for line, alone in zip(metrics(folder), metrics(tmp_path / "alone"), strict=True):
        assert line["loss"] == pytest.approx(alone["loss"], abs=2e-4)
        assert (line["skipped"], line["loss_scale"]) == (alone["skipped"], alone["loss_scale"])


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a tensor that becomes a number."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_an_update_waits_for_nothing(tmp_path: Path, precision: str) -> None:
    """Between two lines of the log, from the loss of an update to that of the next one."""
    waits = Waits()

    def accident(step: int, micro: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
        if step == 3:
            waits.__enter__()
        if step == 7:
            waits.__exit__(None, None, None)
            (tmp_path / "waits").write_text(str(waits.count))
        return loss

    quiet = {"log_steps": 100, "checkpoint_steps": 100, "evaluation_steps": 100}
    assert in_half(tmp_path / "run", accident, precision, **quiet) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "waits").read_text() == "0"


def test_half_precision_learns_what_float32_learns(tmp_path: Path) -> None:
    """A masked token model of three blocks, half an epoch of the digits."""
    module, losses, store = recipe("mtm_pretrain"), {}, unlabeled_digits(tmp_path / "store", 1437)
    smoke = replace(module.PRESETS["smoke"], store=store, dropout=0.0, epochs=0.5, warmup_epochs=0.2)
    for precision in ("no", "bf16", "fp16"):
        config = replace(smoke, precision=precision, out=str(tmp_path / precision))

        def child(config=config) -> None:
            AcceleratorState._reset_state(reset_partial_state=True)
            module.main(config)

        assert in_child(child, tmp_path / "log") == 0, (tmp_path / "log").read_text()
        losses[precision] = [line["loss"] for line in metrics(tmp_path / precision)]
    assert losses["no"][-1] < losses["no"][0] - 0.05
    for precision, difference in (("bf16", 0.01), ("fp16", 0.002)):
        assert losses[precision] != losses["no"]
        assert losses[precision] == pytest.approx(losses["no"], abs=difference)


def test_fsdp_skips_together_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The overflow is on one process, and each sees the gradients of a part of the weights only."""
    folder, last = tmp_path / "run", f"checkpoints/step-{STEPS:08d}"
    line = [TINY_RUN, folder, "--dropout", 0, "--precision", "fp16", "--overflow", 16, 1]
    finished = fsdp(*line, layer="Linear")
    assert finished.returncode == 0, finished.stderr
    lines, weights = metrics(folder), (folder / last / "model.safetensors").read_bytes()
    # FSDP sums gradients in fp16, where the first scale is too large for the first ones.
    assert [line["step"] for line in lines if line["skipped"]] == [1, STEPS]
    assert load_file(folder / last / "scaler.safetensors")["scale"] == FIRST_SCALE / 4
    assert lines[-1]["loss"] < lines[0]["loss"]
    shutil.rmtree(folder / last)
    finished = fsdp(*line, layer="Linear")
    assert finished.returncode == 0, finished.stderr
    assert (folder / last / "model.safetensors").read_bytes() == weights
    assert [line["loss"] for line in metrics(folder)] == [line["loss"] for line in lines]


def test_a_precision_that_the_device_or_the_launch_lacks_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    gpu = torch.device("cuda")
    with pytest.raises(RunError, match=r"bf16 on Tesla V100-SXM2-32GB, which has no bfloat16 .*--precision fp16$"):
        check_precision("bf16", gpu, zero=False)
    with pytest.raises(RunError, match="fp16 with DeepSpeed"):
        check_precision("fp16", gpu, zero=True)
    for precision in ("no", "fp16"):
        check_precision(precision, gpu, zero=False)
    check_precision("bf16", torch.device("cpu"), zero=False)
