"""Measure each row of gpu.py in a separate process, in which recipes run for a given number of updates."""

import gc
import json
import multiprocessing
import os
import runpy
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState

from seitpp.engine.config import parse
from seitpp.engine.system import device_name
from seitpp.engine.training import Training
from seitpp.errors import UserError

# bf16 FLOP/s without sparsity from NVIDIA's data sheets; the first name contained in the device's name is used.
DATA_SHEET = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12}
FORK = multiprocessing.get_context("fork")  # a process inherits the imports
GRACE, LOG = 30, 8000  # seconds for a process to end after its last message; characters of a log that are kept

HEADER = "| row | what | measured |\n|---|---|---|\n"
Lines = Iterator[tuple[str, dict[str, Any]]]  # what was measured, and its figures (name -> value)


class Enough(Exception):
    """Raised in a run after the last update that is measured."""


class Trained(NamedTuple):
    """A run that was stopped early: its lines of metrics.jsonl, and the local variables of the recipe's `main`."""

    records: list[dict]
    variables: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """The folder in which the rows read and write, and whether everything is tiny."""

    folder: Path
    small: bool

    def pick(self, full: Any, small: Any) -> Any:
        """Return `small` in a tiny benchmark, else `full`."""
        return small if self.small else full


def open_recipe(name: str) -> SimpleNamespace:
    """Load a script of recipes/ and return its global names as attributes."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / f"recipes/{name}.py"), run_name=name))


def train(
    bench: Bench, recipe: str, *arguments: object, steps: int, out: Path | None = None, kill: int | None = None
) -> Trained:
    """Run a recipe in this process until update `steps`, or kill this process after update `kill`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()  # the previous run
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    module, update = open_recipe(recipe), Training.update
    arguments = [*arguments, "--out", out or tempfile.mkdtemp(dir=bench.folder)]

    def counted(training: Training, *losses: object, **metrics: object) -> None:
        update(training, *losses, **metrics)
        if training.step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if training.step == steps:
            raise Enough

    try:
        with patch.object(Training, "update", counted):
            module.main(parse(module.PRESETS, "digits", list(map(str, arguments))))
    except Enough as enough:
        frames = (frame for frame, _ in traceback.walk_tb(enough.__traceback__))
        variables = next(dict(frame.f_locals) for frame in frames if frame.f_code.co_name == "main")
    return Trained(variables["run"].log.read(), variables)


def rate(bench: Bench, recipe: str, arguments: list, *, batch: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Run a recipe; return the speed logged for the second half of its updates, and the variables of `main`."""
    updates = bench.pick(max(8, 4096 // batch), 1)
    never = ["--checkpoint-epochs", 1000, "--evaluation-epochs", 1000]
    tiny = bench.pick([], ["--precision", "no", "--workers", 0])
    arguments = [*arguments, *never, *tiny, "--batch-size", batch, "--accumulation", 1, "--log-steps", updates]
    records, variables = train(bench, recipe, *arguments, steps=2 * updates)
    last, run = records[-1], variables["run"]
    figures = {"images/s": last["images_per_second"]}
    if "mfu" in last:
        figures["MFU"] = last["mfu"]
        peak = next((peak for name, peak in DATA_SHEET.items() if name in device_name(run.device)), None)
        if peak:
            figures["MFU by data sheet"] = run.flops_per_image * last["images_per_second"] / peak
    return {**figures, "data wait %": 100 * last["data_wait"], "peak GiB": last["memory_gib"]}, variables


def losses_of(run: Path) -> list[float]:
    """Return the loss of every update of the run in this folder."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def seconds_of(function: Callable[[], torch.Tensor], calls: int) -> float:
    """Return the mean seconds per call over `calls` calls, after one warm-up call; waits for the device."""
    function().sum().item()
    start = time.perf_counter()
    for _ in range(calls):
        result = function()
    result.sum().item()
    return (time.perf_counter() - start) / calls


def apart(row: Callable[[Bench], Lines], bench: Bench, seconds: float) -> dict[str, Any]:
    """Measure a row in a separate process, which is killed after `seconds`.

    Returns its `lines`, the `seconds` it took and its `error` or None; after an error also the end of its `log`.
    The calling process must not have used CUDA.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    log, start = bench.folder / f"{row.__name__}.log", time.monotonic()
    log.touch()
    process = FORK.Process(target=_send, args=(row, bench, sender, log))
    process.start()
    sender.close()
    lines, error, ended = {}, f"stopped after {seconds:.0f} s", False
    try:
        while not ended and receiver.poll(max(0.0, start + seconds - time.monotonic())):
            message = receiver.recv()
            if isinstance(message, tuple):
                lines[message[0]] = message[1]
            else:
                error, ended = message, True
    except EOFError:
        error = "its process died"
    finally:
        process.join(GRACE if ended else 0)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    result = {"lines": lines, "seconds": time.monotonic() - start, "error": error}
    return {**result, "log": log.read_text()[-LOG:]} if error else result


def _send(row: Callable[[Bench], Lines], bench: Bench, sender: Any, log: Path) -> None:
    """Run in the process of a row: send its lines, then None, or the error in one line."""
    os.setsid()  # a process group, so that all its children can be killed with it
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            if torch.cuda._is_in_bad_fork():
                raise RuntimeError("CUDA was in use before this process was forked")
            for line in row(bench):
                sender.send(line)
            sender.send(None)
        except Exception as error:
            traceback.print_exc(file=file)
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            sender.send(kind + str(error).strip().split("\n")[0])


def shown(value: float | bool) -> str:
    """Format a figure for the table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table_lines(name: str, row: dict[str, Any]) -> str:
    """Return a row as lines of the Markdown table: one per measurement, and one for the error if there is one."""
    text = ""
    for line, figures in row["lines"].items():
        text += f"| {name} | {line} | {', '.join(f'{key} {shown(value)}' for key, value in figures.items())} |\n"
    return text + (f"| {name} | error | {row['error']} |\n" if row["error"] else "")
