"""Run a recipe from the command line: parse flags, rehearse with `--dry-run`, and print errors as one line."""

import atexit
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from seitpp.engine.config import AUTO, Config, RunConfig, TrainConfig, load_config, named_settings, parse
from seitpp.engine.folder import CONFIG
from seitpp.engine.peers import ending_together
from seitpp.engine.repeat import PRESET
from seitpp.engine.signals import Stopped
from seitpp.engine.system import launched_processes
from seitpp.errors import UserError, fail, fail_by_system, flush_output, keeping_interrupts, prepare_text
from seitpp.export import EXPORTED, export_model

CPU_IMAGES = 8  # images at a time per process in a dry run on a CPU
SUGGESTIONS = 4  # the most settings that an out-of-memory error suggests


def run_recipe(
    main: Callable[[Config], None],
    presets: Mapping[str, Config],
    default: str,
    *,
    settle: Callable[[Config, Collection[str]], Config] | None = None,
) -> None:
    """Parse the command line and call `main`.

    `settle` chooses the settings of preset AUTO that are not named on the command line. An error that the user can
    fix, or one of the operating system, is printed as one line on stderr, with exit status 2. A run stopped by a
    signal exits with 128 plus its number. The other processes of the launch end, too.
    """
    config = None
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C at the very end is a traceback
    try:
        with keeping_interrupts():
            prepare_text()
            config = parse(presets, default, sys.argv[1:])
            PRESET.set(presets.get(getattr(config, "preset", "")))
            if settle and config.preset == AUTO and "--config" not in sys.argv:
                config = _settled(config, named_settings(sys.argv[1:]) & vars(config).keys(), settle)
            with ending_together():
                if isinstance(config, RunConfig) and config.dry_run:
                    rehearse(main, config)
                else:
                    main(config)
            flush_output()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.status)
    except UserError as error:
        traceback.clear_frames(
            error.__traceback__
        )  # ends the workers now: with the interpreter they would be loud
        fail(str(UserError(_one_line(error.args[0]))))
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        fail_by_system(error)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(config, TrainConfig) or not _is_out_of_memory(error):
            raise
        fail(f"out of memory: {_fewer_images(config)}")
    finally:
        _end_workers()


def _end_workers() -> None:
    """Kill the data loading processes that an error or a signal has left.

    They leave signals to the run, so the interpreter would wait for them for ever.
    """
    if left := multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler raises an error for each
        for process in left:
            process.kill()


def _settled(config: Config, named: set[str], settle: Callable[[Config, Collection[str]], Config]) -> Config:
    """Take the settings of the run that is resumed, so that it goes on as it began, else choose them."""
    path = Path(config.out or "") / CONFIG
    stored = load_config(type(config), path) if config.resume and config.out and path.is_file() else None
    if stored is None or stored.preset != AUTO:
        return settle(config, named)
    return dataclasses.replace(stored, **{name: getattr(config, name) for name in named})


def _one_line(message: str) -> str:
    """Return what follows the traceback in the message of an error that a data loading process raised."""
    _, frame, error = message.strip().rpartition("\n    ")  # of the last line of code
    return re.sub(r"^[\w.]+: ", "", error.partition("\n")[2]) if frame else message


def rehearse(main: Callable[[Config], None], config: Config) -> None:
    """Try all parts of a run: train one step, save, evaluate and report; resume for a second step; export.

    The files are in a temporary folder, which is deleted. In a dry run, `Run` trains one step per call of `main`
    and evaluates on few images.
    """
    started = time.perf_counter()
    if not torch.cuda.is_available():
        images = CPU_IMAGES * launched_processes() * (config.accumulation or 1)
        config = dataclasses.replace(config, batch_size=min(config.batch_size, images))
    with tempfile.TemporaryDirectory(prefix="seitpp-dry-run-") as folder:
        out = Path(folder) / "run"
        for resume in (False, True):
            main(dataclasses.replace(config, out=str(out), resume=resume))
        if os.environ.get("RANK", "0") != "0":
            return
        parts = ["started", "saved", "resumed", "evaluated", "reported"]
        if json.loads((out / "result.json").read_bytes())["recipe"] in EXPORTED:
            export_model(out, Path(folder) / "exported")
            parts.append("exported")
    print(f"dry run: {', '.join(parts)} in {time.perf_counter() - started:.0f} s; no files are kept")


def _is_out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError is for devices only; on a CPU and a Mac's GPU torch raises a plain RuntimeError.
    words = ("can't allocate memory", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _fewer_images(config: TrainConfig) -> str:
    """Suggest settings for the same global batch with fewer images at a time, where the recipe has such."""
    if "accumulation" not in {field.name for field in dataclasses.fields(config)}:
        return f"got a batch of {config.batch_size} images: pass a smaller --batch-size"
    if config.accumulation is None and torch.cuda.is_available():
        return "the chosen number of images at a time does not fit: pass --accumulation larger than the chosen one"
    processes, accumulation = launched_processes(), config.accumulation or 1
    images = config.batch_size // (processes * accumulation)
    fewer = [size for size in range(images - 1, 0, -1) if images % size == 0][:SUGGESTIONS]
    flags = ", ".join(
        f"--batch-size {config.batch_size} --accumulation {accumulation * images // size} ({size})"
        for size in fewer
    )
    got = f"got {images} images at a time on each of {processes} process(es)"
    return f"{got}: for the same updates with fewer, pass {flags}" if flags else f"{got}: use a smaller model"
