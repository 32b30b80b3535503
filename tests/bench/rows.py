"""What a row of gpu.py is: a process of its own, in which recipes run until they have made so many updates."""

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

# bf16 FLOP/s without sparsity, by NVIDIA's data sheets; the first name that fits counts.
DATA_SHEET = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12}
FORK = multiprocessing.get_context("fork")  # what is imported once is there in every process
GRACE, LOG = 30, 8000  # seconds in which a process that has said its last ends; characters of a log that are kept

HEADER = "| row | what | measured |\n|---|---|---|\n"
Lines = Iterator[tuple[str, dict[str, Any]]]  # what was measured, and its figures by name


class Enough(Exception):
    """A run has made the updates that are measured."""


class Trained(NamedTuple):
    """A run that was cut short: its lines of metrics.jsonl, and what the recipe's `main` held then."""

    records: list[dict]
    held: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where the rows read and write, and whether all is tiny."""

    folder: Path
    small: bool

    def of(self, full: Any, small: Any) -> Any:
        """The one of the two that counts here."""
        return small if self.small else full


def open_recipe(name: str) -> SimpleNamespace:
    """The names that a script of recipes/ defines."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / f"recipes/{name}.py"), run_name=name))


def train(
    at: Bench, recipe: str, *words: object, steps: int, out: Path | None = None, kill: int | None = None
) -> Trained:
    """Run a recipe in this process up to update `steps`; or kill the process after update `kill`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()  # the run before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    module, update = open_recipe(recipe), Training.update
    words = [*words, "--out", out or tempfile.mkdtemp(dir=at.folder)]

    def counted(training: Training, *arguments: object, **metrics: object) -> None:
        update(training, *arguments, **metrics)
        if training.step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if training.step == steps:
            raise Enough

    try:
        with patch.object(Training, "update", counted):
            module.main(parse(module.PRESETS, "digits", list(map(str, words))))
    except Enough as enough:
        frames = (frame for frame, _ in traceback.walk_tb(enough.__traceback__))
        held = next(dict(frame.f_locals) for frame in frames if frame.f_code.co_name == "main")
    return Trained(held["run"].log.read(), held)


def rate(at: Bench, recipe: str, words: list, batch: int) -> tuple[dict[str, float], dict[str, Any]]:
    """What a run logs of its speed in a second stretch of updates, and what it held."""
    updates = at.of(max(8, 4096 // batch), 1)
    never = ["--checkpoint-epochs", 1000, "--evaluation-epochs", 1000]
    tiny = at.of([], ["--precision", "no", "--workers", 0])
    words = [*words, *never, *tiny, "--batch-size", batch, "--accumulation", 1, "--log-steps", updates]
    records, held = train(at, recipe, *words, steps=2 * updates)
    last, run = records[-1], held["run"]
    figures = {"images/s": last["images_per_second"]}
    if "mfu" in last:
        figures["MFU"] = last["mfu"]
        peak = next((peak for name, peak in DATA_SHEET.items() if name in device_name(run.device)), None)
        if peak:
            figures["MFU by data sheet"] = run.flops_per_image * last["images_per_second"] / peak
    return {**figures, "data wait %": 100 * last["data_wait"], "peak GiB": last["memory_gib"]}, held


def losses_of(run: Path) -> list[float]:
    """Of every update of a run, by its folder."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def seconds_of(function: Callable[[], torch.Tensor], calls: int) -> float:
    """Of one of so many calls, after one that does not count; the last result is waited for."""
    function().sum().item()
    start = time.perf_counter()
    for _ in range(calls):
        result = function()
    result.sum().item()
    return (time.perf_counter() - start) / calls


def apart(row: Callable[[Bench], Lines], at: Bench, seconds: float) -> dict[str, Any]:
    """Measure a row in a process of its own: its `lines`, the `seconds` it took, and the `error` that ended it or
    None, with the end of its `log`. This process must not have used torch.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    log, start = at.folder / f"{row.__name__}.log", time.monotonic()
    log.touch()
    process = FORK.Process(target=_send, args=(row, at, sender, log))
    process.start()
    sender.close()
    lines, error, ended = {}, f"stopped after {seconds:.0f} s", False
    try:
        while not ended and receiver.poll(max(0.0, start + seconds - time.monotonic())):
            got = receiver.recv()
            if isinstance(got, tuple):
                lines[got[0]] = got[1]
            else:
                error, ended = got, True
    except EOFError:
        error = "its process died"
    finally:
        process.join(GRACE if ended else 0)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    result = {"lines": lines, "seconds": time.monotonic() - start, "error": error}
    return {**result, "log": log.read_text()[-LOG:]} if error else result


def _send(row: Callable[[Bench], Lines], at: Bench, sender: Any, log: Path) -> None:
    """In the process of a row: send its lines, then None, or the error in one line."""
    os.setsid()  # with all that it starts it is a group, of which nothing stays
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            if torch.cuda._is_in_bad_fork():
                raise RuntimeError("CUDA was in use before this process was made")
            for line in row(at):
                sender.send(line)
            sender.send(None)
        except Exception as error:
            traceback.print_exc(file=file)
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            sender.send(kind + str(error).strip().split("\n")[0])


def shown(value: float | bool) -> str:
    """A figure for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table_lines(name: str, row: dict[str, Any]) -> str:
    """Markdown: a line for everything that was measured in a row, and for its error."""
    text = ""
    for line, figures in row["lines"].items():
        text += f"| {name} | {line} | {', '.join(f'{key} {shown(value)}' for key, value in figures.items())} |\n"
    return text + (f"| {name} | error | {row['error']} |\n" if row["error"] else "")
