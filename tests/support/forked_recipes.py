"""Run recipes one after the other, in forks of this process, and report how each ended and how long it took.

Reads one JSON object a line from standard input: `recipe` (or seitpp, the command), `arguments`, `limit` (the
most seconds), `processes` (of one launch, on the CPU); for a run that is signalled `signal` and `after` (seconds
from its start, or a path that is there by then); and if they are not those of this process, `folder`, where it
runs, and `stdout`: "closed", "unread" (a pipe that nobody reads any more) or a file. Writes one JSON object a
line: `statuses` of the processes (None: it did not end and was killed), `seconds` from the start or from the
signal, `signalled`, and what they printed: `out` and `err`.
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
from support.running import places

from downstream.segmentation.mmseg import load_mmseg
from seitpp import cli


def start(job: dict, out: Path, err: Path, launch: dict[str, str]) -> int:
    """Fork, and return the number of the process that runs the recipe to the end of the interpreter."""
    if pid := os.fork():
        return pid
    os.environ.update(launch)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
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


def ended(pid: int, end: float) -> int | None:
    """Wait for a process until `end`; return its exit status, negative for a signal, or None if it was killed."""
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def signalled(pids: list[int], job: dict) -> bool:
    """Send the job's signal when it is time; return whether all processes still ran."""
    if "signal" not in job:
        return False
    began = time.monotonic()
    while _all_run(pids) and not _is_time(job["after"], began):
        time.sleep(0.005)
    running = _all_run(pids)
    for pid in pids:
        os.kill(pid, job["signal"])
    return running


def _all_run(pids: list[int]) -> bool:
    return all(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in pids)


def _is_time(after: float | str, began: float) -> bool:
    if isinstance(after, str):
        return Path(after).exists() and Path(after).stat().st_size > 0
    return time.monotonic() > began + after


def report(job: dict, folder: Path) -> dict:
    """Run a job and say how it ended."""
    out, err = folder / "out", folder / "err"
    out.write_text("")
    err.write_text("")
    began = time.monotonic()
    launches = places(job["processes"]) if job.get("processes", 1) > 1 else [{}]
    pids = [start(job, out, err, launch) for launch in launches]
    sent = signalled(pids, job)
    if sent:
        began = time.monotonic()
    statuses = [ended(pid, began + job["limit"]) for pid in pids]
    seconds = time.monotonic() - began
    printed = {"out": out.read_text(), "err": err.read_text()}
    return {"statuses": statuses, "seconds": seconds, "signalled": sent, **printed}


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
