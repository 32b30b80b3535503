"""Tokenize images on many machines: steps of datatrove, whose executors start the tasks and note which have ended.

    from datatrove.executor import LocalPipelineExecutor
    from seitpp.distributed import FinishStore, TokenizeImages

    words = ["published", "--data", "photos", "--tokenizer", "vitvqgan.ckpt", "--out", "tokens"]
    step = TokenizeImages(words, recipe="recipes/tokenize_images.py")
    tasks = LocalPipelineExecutor([step], tasks=100, workers=4, logging_dir="logs/tasks")
    LocalPipelineExecutor([FinishStore("tokens")], depends=tasks, logging_dir="logs/finish").run()

Executors pickle the steps for other machines, so these hold nothing but text. Relative paths are those of the
folder in which a step was made.
"""

import io
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from seitpp.errors import UserError
from seitpp.store.bucket import is_bucket

try:
    from datatrove.data import DocumentsPipeline
    from datatrove.pipeline.base import PipelineStep
    from datatrove.utils.logging import logger
except ImportError as error:
    raise UserError(f'seitpp.distributed needs datatrove ({error}): pip install "seitpp[distributed]"') from error

BAR_SECONDS = 60  # between two states of a progress bar in the log


class TaskError(UserError):
    """Raised for a task that cannot be started as it is described, and for one whose recipe has failed."""


class TokenizeImages(PipelineStep):
    """Run tokenize_images as task `rank` of `world_size`, in a process of its own.

    Its output goes to the log of the task. If it fails, the task fails with its last line, and can be repeated.
    """

    name = "tokenize_images"
    type = "seitpp"

    def __init__(self, words: Sequence[str | os.PathLike[str]], *, recipe: str | os.PathLike[str]) -> None:
        """The words are those of the command line but --task and --tasks; `recipe` is recipes/tokenize_images.py.

        Raises TaskError if the recipe is not there, or for words that cannot be those of a task.
        """
        super().__init__()
        self.words, self.recipe, self.folder = list(map(str, words)), str(Path(recipe).absolute()), str(Path.cwd())
        flags = {word.partition("=")[0] for word in self.words}
        if both := sorted(flags & {"--task", "--tasks"}):
            raise TaskError(f"{' and '.join(both)}: got among the words; omit it, the executor numbers the tasks")
        if "--out" not in flags:
            raise TaskError(f"got the words {self.words}, expected --out among them: name the store of all tasks")
        if not Path(self.recipe).is_file():
            raise TaskError(f"{self.recipe}: no such file, expected recipes/tokenize_images.py of a checkout")

    def run(
        self, data: DocumentsPipeline | None = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline | None:
        """Run the task, and return `data` as it is. Raises TaskError if the recipe fails."""
        for path in (self.recipe, self.folder):
            if not Path(path).exists():
                raise TaskError(f"{path}: not on the machine of this task; use a path that all machines have")
        task = ["--task", str(rank), "--tasks", str(world_size)]
        with self.track_time("task"):
            status, last = self._logged([sys.executable, self.recipe, *self.words, *task])
        if status:
            raise TaskError(f"task {rank} of {world_size} ended with exit status {status}: {last}")
        return data

    def _logged(self, line: list[str]) -> tuple[int, str]:
        """Run a command and log what it prints; return its exit status, and the line that says why."""
        # Through a pipe: if this process is killed, the command ends too, as soon as it has something to print.
        through = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # the log has every line at its time
        with subprocess.Popen(line, cwd=self.folder, env=environment, **through) as process:
            try:
                last = _log(process.stdout)
            except BaseException:  # Ctrl-C, or a signal of the scheduler
                process.terminate()
                raise
        return process.returncode, last


class FinishStore(PipelineStep):
    """Publish the store when all tasks have ended, as `seitpp finish` does: of an executor with one task."""

    name = "finish"
    type = "seitpp"

    def __init__(self, store: str | os.PathLike[str]) -> None:
        """`store` is what --out of the tasks names."""
        super().__init__()
        self.store = str(store) if is_bucket(store) else str(Path(store).absolute())

    def run(
        self, data: DocumentsPipeline | None = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline | None:
        """Finish the store, and return `data` as it is. Raises UserError or StoreError if tasks have not ended."""
        from seitpp.tokenizers import finishing  # takes seconds, which the other tasks need not wait

        if world_size != 1:
            raise TaskError(f"FinishStore: got {world_size} tasks, expected 1: give it an executor with tasks=1")
        with self.track_time("store"):
            finishing.finish(self.store)
        return data


def _log(output: IO[bytes]) -> str:
    """Log what a recipe prints; return the last line that is an error or, if there is none, the last one."""
    last = deque([""], maxlen=20)
    for text in _lines(output):
        logger.info(text)
        last.append(text)
    return next((text for text in reversed(last) if text.startswith("error")), last[-1])


def _lines(output: IO[bytes]) -> Iterator[str]:
    """Return the lines that are not empty; of a progress bar, which is drawn anew each second, one a minute."""
    drawn = -float("inf")
    for text in io.TextIOWrapper(output, "utf-8", errors="backslashreplace", newline=""):
        if text.endswith("\r") and time.monotonic() - drawn < BAR_SECONDS:
            continue
        if text.endswith("\r") and text.strip():
            drawn = time.monotonic()
        if text.strip():
            yield text.rstrip()
