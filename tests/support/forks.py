"""Python programs in forks of this process: with an id, signals and an exit status of their own, and no imports.

A fork does what `python SCRIPT ARGUMENTS` does, without the ten seconds and more that its imports take. It ends as
a process of multiprocessing ends; one that ends as an interpreter does is a job of forked_recipes.py.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

import torch
from accelerate.state import AcceleratorState, GradientState

# The first backward pass of a process starts a thread for each of its devices, and after that its forks can have
# no backward pass. Fake tensors let torch take a GPU to be there, so the first one is here, before any of them.
torch.zeros(1, requires_grad=True).sum().backward()

LIMIT = 240  # seconds that a program may take
FILES = ("stdout", "stderr")

Environment = Mapping[str, str]  # what is other than in that of this process
SAME: Environment = {}
HERE = Path()


def start(
    script: Path, *arguments: object, logs: Path, environment: Environment = SAME, cwd: Path = HERE
) -> BaseProcess:
    """Begin a program, whose output is appended to the files `stdout` and `stderr` of the folder `logs`."""
    line = [str(script), *map(str, arguments)]
    process = multiprocessing.get_context("fork").Process(target=_program, args=(line, logs, environment, cwd))
    process.start()
    return process


def _program(line: list[str], logs: Path, environment: Environment, cwd: Path) -> None:
    for descriptor, name in enumerate(FILES, 1):
        os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.setsid()
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update(environment)
    os.chdir(cwd)
    AcceleratorState._reset_state(reset_partial_state=True)  # that of what this process has run before
    GradientState._reset_state()
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")


def ended(processes: Sequence[BaseProcess]) -> int:
    """Wait for the processes of a program; return the exit status of the first that failed, else 0.

    It is negative for a signal. What does not end is killed.
    """
    deadline = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return next((process.exitcode for process in processes if process.exitcode), 0)


def run_forks(
    script: Path, *arguments: object, environments: Sequence[Environment] = (SAME,), cwd: Path = HERE
) -> CompletedProcess[str]:
    """Run a program to its end, in a process for each of the environments."""
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        places = [{"logs": logs, "environment": environment, "cwd": cwd} for environment in environments]
        status = ended([start(script, *arguments, **place) for place in places])
        return CompletedProcess([script, *arguments], status, *((logs / name).read_text() for name in FILES))
