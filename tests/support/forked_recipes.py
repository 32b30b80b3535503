"""Run recipes one after the other, each in a fork of this process, and report how it ended and how long it took.

Reads one JSON object a line from standard input: `recipe` (or seitpp, the command), `arguments`, `limit` (the most
seconds), and if they are not those of this process, `folder`, where it runs, and `stdout`: "closed", "unread" (a
pipe that nobody reads any more) or a file. Writes one JSON object a line: `status` (None: it did not end and was
killed), `seconds`, and what it printed: `out` and `err`.
"""

import importlib
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 (once, before the forks, as those below)
import sklearn.cluster  # noqa: F401
from PIL import Image
from support.paths import RECIPES

from downstream.segmentation.mmseg import load_mmseg
from seitpp import cli


def start(job: dict, out: Path, err: Path) -> int:
    """Fork, and return the number of the process that runs the recipe to the end of the interpreter."""
    if pid := os.fork():
        return pid
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    redirect(job.get("stdout"))
    os.chdir(job.get("folder", "."))
    if job["recipe"] == "seitpp":
        sys.argv = ["seitpp", *job["arguments"]]
        sys.exit(cli.main())
    script = str(RECIPES / f"{job['recipe']}.py")
    sys.argv = [script, *job["arguments"]]
    runpy.run_path(script, run_name="__main__")
    sys.exit(0)


def redirect(stdout: str | None) -> None:
    """Give this process another standard output, buffered as one that is no terminal, see the top."""
    if stdout == "closed":
        os.close(1)
        sys.stdout = None
    elif stdout == "unread":
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
    elif stdout:
        os.dup2(os.open(stdout, os.O_WRONLY), 1)


def ended(pid: int, limit: float) -> int | None:
    """Wait for a process; return its exit status, negative for a signal, or None if it had to be killed."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def report(job: dict, folder: Path) -> dict:
    """Run a job and say how it ended."""
    out, err = folder / "out", folder / "err"
    out.write_text("")
    err.write_text("")
    pid, began = start(job, out, err), time.monotonic()
    status = ended(pid, job["limit"])
    return {"status": status, "seconds": time.monotonic() - began, "out": out.read_text(), "err": err.read_text()}


def main() -> None:
    Image.init()
    folder = Path(tempfile.mkdtemp())  # not a context, which each fork would leave, too
    for line in sys.stdin:
        job = json.loads(line)
        if job["recipe"] != "seitpp":  # before the fork
            importlib.import_module(job["recipe"])
        if "segment" in job["recipe"]:
            load_mmseg()
        print(json.dumps(report(job, folder)), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
