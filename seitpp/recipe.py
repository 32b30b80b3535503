"""How a recipe is started, rehearsed (`--dry-run`), and how it fails: one line on stderr that says what to do."""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from seitpp.engine.config import Config, RunConfig, TrainConfig, parse
from seitpp.engine.signals import Stopped
from seitpp.engine.system import launched_processes
from seitpp.errors import UserError, fail
from seitpp.export import EXPORTED, export_model

CPU_SHARE = 8  # images of a process at a time in a dry run, where no device says how many fit
MORE_ACCUMULATION = 4  # so many ways out of a full memory are named


def run_recipe(main: Callable[[Config], None], presets: Mapping[str, Config], default: str) -> None:
    """Parse the command line and call `main`.

    What the user can mend is one line on stderr and exit status 2; a run that a signal stopped exits with 128 +
    the number of the signal.
    """
    config = None
    try:
        config = parse(presets, default, sys.argv[1:])
        if isinstance(config, RunConfig) and config.dry_run:
            rehearse(main, config)
        else:
            main(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.status)
    except UserError as error:
        fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(config, TrainConfig) or not _is_out_of_memory(error):
            raise
        fail(f"out of memory: {_smaller_shares(config)}")


def rehearse(main: Callable[[Config], None], config: Config) -> None:
    """Train one step, save it, evaluate, write model and report; resume for a second step, and all of that again;
    then export the model.

    In a temporary folder, of which nothing is kept. `Run` trains one step at a time and judges few images then.
    """
    started = time.perf_counter()
    if not torch.cuda.is_available():
        share = CPU_SHARE * launched_processes() * (config.accumulation or 1)
        config = dataclasses.replace(config, batch_size=min(config.batch_size, share))
    with tempfile.TemporaryDirectory(prefix="seitpp-dry-run-") as folder:
        out = Path(folder) / "run"
        for resume in (False, True):
            main(dataclasses.replace(config, out=str(out), resume=resume))
        if os.environ.get("RANK", "0") != "0":
            return
        parts = ["begun", "saved", "resumed", "evaluated", "reported"]
        if json.loads((out / "result.json").read_text())["recipe"] in EXPORTED:
            export_model(out, Path(folder) / "exported")
            parts.append("exported")
    print(f"dry run: {', '.join(parts)} in {time.perf_counter() - started:.0f} s; nothing is kept")


def _is_out_of_memory(error: Exception) -> bool:
    # torch has a type of its own for devices only.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _smaller_shares(config: TrainConfig) -> str:
    """Ways to the same global batch with fewer images at a time."""
    if config.accumulation is None and torch.cuda.is_available():
        return "the images at a time that were chosen do not fit: pass a larger --accumulation than that"
    processes, accumulation = launched_processes(), config.accumulation or 1
    share = config.batch_size // (processes * accumulation)
    fewer = [size for size in range(share - 1, 0, -1) if share % size == 0][:MORE_ACCUMULATION]
    pairs = ", ".join(
        f"--batch-size {config.batch_size} --accumulation {accumulation * share // size} ({size})"
        for size in fewer
    )
    at_a_time = f"{share} images at a time on each of {processes} process(es)"
    return f"{at_a_time}; the same steps with fewer: {pairs}" if pairs else f"{at_a_time}: take a smaller model"
