"""Facts about the machine and the launch: processes, installed packages, memory, device, commit."""

import importlib.util
import os
import resource
import subprocess
from pathlib import Path

import torch

from seitpp.engine.folder import RunError


def launched_processes() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_installed(trackers: tuple[str, ...]) -> None:
    """Raise RunError if a tracker, or DeepSpeed where the launcher uses it, is not installed."""
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise RunError('launched with DeepSpeed, which is not installed: pip install "seitpp[deepspeed]"')
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise RunError(f'tracker {tracker!r} is not installed: pip install "seitpp[trackers]"')


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
