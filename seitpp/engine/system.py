"""Facts about the machine and the launch: processes, installed packages, memory, device, commit."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from seitpp.engine.folder import RunError

MOST_WORKERS = 16  # data loading processes of one process, where none are asked for


def launched_processes() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def loader_workers(workers: int | None) -> int:
    """Return the number of data loading processes of this process: `workers`, or if None by the CPU cores.

    These are the cores that it may use, divided by the processes on this machine: at least 1, at most 16.
    """
    if workers is not None:
        return workers
    return min(MOST_WORKERS, max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def cores() -> int:
    """Return the number of CPU cores that this process may use, by its affinity and its control group's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on a Mac or Windows
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min(allowed, _quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))))


def _quota(membership: Path, root: Path) -> float:
    """Return the cores that the control groups of this process allow (version 2 or 1), infinity without a limit.

    `membership` has a line NUMBER:CONTROLLERS:GROUP for each hierarchy. Each group above it limits it too.
    """
    lines = membership.read_text().splitlines() if membership.exists() else []
    limits = [math.inf]
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers
        inside = base / group.strip("/")
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(base):
                limits += _limits(folder)
    return min(limits)


def _limits(group: Path) -> list[float]:
    """Return the cores that a control group allows: a list of one number, or an empty one without a limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return []
    return [] if quota in ("max", "-1") else [int(quota) / int(period)]


def check_installed(trackers: tuple[str, ...]) -> None:
    """Raise RunError if a tracker, or DeepSpeed where the launcher uses it, is not installed."""
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise RunError('launched with DeepSpeed, which is not installed: pip install "seitpp[deepspeed]"')
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise RunError(f'tracker {tracker!r} is not installed: pip install "seitpp[trackers]"')


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a GPU, or resident in this process on a CPU.

    Of the GPU of a Mac, which counts no peak, it is what the driver has allocated so far.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # a Mac counts bytes, Linux KiB


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of threads on a CPU, for result.json."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def git_commit() -> str | None:
    """Return the commit of the git checkout that this file is in; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
