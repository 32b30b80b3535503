"""What a run writes down about itself: metrics.jsonl, and the figures that its speed is measured against."""

import copy
import json
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from seitpp import files

MATMUL_SIDE = {"cpu": 1536, "cuda": 8192}


class MetricsLog:
    """`metrics.jsonl`: one line for every update, none twice and none missing, also after a kill."""

    def __init__(self, path: Path):
        self.path = path

    def keep_until(self, step: int) -> None:
        """Drop the lines after `step`, and a last line that a kill cut short, before a resumed run goes on."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        files.replace_text(self.path, "".join(whole))

    def write(self, records: list[dict]) -> None:
        """Append records and make them durable."""
        files.append_file(self.path, "".join(json.dumps(record) + "\n" for record in records).encode())

    def read(self) -> list[dict]:
        """All records so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def count_flops(model: nn.Module, *inputs: object) -> int:
    """Floating-point operations of the model on `inputs`, forward and backward from its output or, of several,
    the first; nothing is computed.

    The model is copied to the meta device; the inputs must lie there.
    """
    shadow = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter:
        output = shadow(*inputs)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this machine's own large matrix product, the best of five: what utilisation is a share of."""
    side = MATMUL_SIDE.get(device.type, 4096)
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
