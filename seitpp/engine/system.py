"""What a run needs to know of the machine and of the launch."""

import importlib.util
import os
import resource
import subprocess
from pathlib import Path

import torch

from seitpp.engine.folder import RunError


def launched_processes() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_installed(trackers: tuple[str, ...]) -> None:
    """Raise RunError for a tracker that is not installed, or DeepSpeed if it is launched."""
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if asked and importlib.util.find_spec("deepspeed") is None:
        raise RunError('launched with DeepSpeed, which is not installed: pip install "seitpp[deepspeed]"')
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise RunError(f'tracker {tracker!r} is not installed: pip install "seitpp[trackers]"')


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """For people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def git_commit() -> str | None:
    """The commit of the checkout this runs from; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
