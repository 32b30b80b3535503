"""The log of a run: metrics.jsonl and evaluations.jsonl, training speed, model FLOPs and their utilization."""

import copy
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seitpp import files
from seitpp.engine.folder import RunError
from seitpp.engine.precision import check_scale
from seitpp.engine.system import peak_memory
from seitpp.errors import refusing

MATMUL_SIDE = {"cpu": 1536, "cuda": 8192}
LONGEST_PRODUCT = 1.0  # seconds


class MetricsLog:
    """A file of JSON lines with a "step" each; no step is lost or written twice, even if the run is killed."""

    def __init__(self, path: Path):
        self.path = path

    def keep_until(self, step: int) -> None:
        """Remove the lines after `step`, and an incomplete last line of a killed run."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        with self._reading():
            kept = [line for line in lines if line.endswith(b"\n") and _record(line)["step"] <= step]
        files.replace_bytes(self.path, b"".join(kept))

    def write(self, records: list[dict]) -> None:
        """Append records and sync the file."""
        files.append_file(self.path, "".join(json.dumps(record) + "\n" for record in records).encode())

    def read(self) -> list[dict]:
        """Return all records."""
        with self._reading():
            return [_record(line) for line in self.path.read_bytes().splitlines()]

    def _reading(self) -> AbstractContextManager[None]:
        return refusing(RunError, f"{self.path} cannot be read", "a record with its step on each line; mend it")


def _record(line: bytes) -> dict:
    record = files.parse_json(line)
    if type(record["step"]) is not int:
        raise TypeError(f"step {record['step']!r}")
    return record


class NotFinite(NamedTuple):
    """The first logged value that is not finite: its name, its update `step` and the `rank` of its process."""

    name: str
    value: float
    step: int
    rank: int


def gather_records(accelerator: Accelerator, records: list[dict]) -> tuple[list[dict], NotFinite | None]:
    """Average the tensors in the records of updates over the processes, as numbers; also return the first value
    that is not finite, or None.

    Every process must call this. The gradient norm of a skipped update counts as 0.
    """
    names = [name for name, value in records[0].items() if isinstance(value, Tensor)]
    values = torch.stack([torch.stack([record[name].float() for name in names]) for record in records])
    if "skipped" in names:
        norms, skipped = (values[:, names.index(name)] for name in ("grad_norm", "skipped"))
        norms.masked_fill_(skipped.bool(), 0.0)
    by_rank = accelerator.gather(values.unsqueeze(0)).cpu()
    not_finite = (~by_rank.isfinite()).nonzero()
    first = None
    if len(not_finite):
        rank, row, column = min(not_finite.tolist(), key=lambda index: (index[1], index[2], index[0]))
        value = by_rank[rank, row, column].item()
        first = NotFinite(name=names[column], value=value, step=records[row]["step"], rank=rank)
    means = by_rank.double().mean(dim=0).tolist()
    averaged = [
        {**record, **dict(zip(names, values, strict=True))} for record, values in zip(records, means, strict=True)
    ]
    return averaged, first


class Speed:
    """The speed of training between two lines of the log.

    `batch_size` is global. The MFU is `flops_per_image` x images per second / `matmul_rate` (FLOP/s of all
    processes), and left out if these are None. The caller adds to `waited` the seconds that it waits for data.
    """

    def __init__(
        self, device: torch.device, *, batch_size: int, flops_per_image: int | None, matmul_rate: float | None
    ):
        self.device, self.batch_size, self.flops_per_image = device, batch_size, flops_per_image
        self.matmul_rate = matmul_rate
        self.images, self.seconds = 0, 0.0  # totals of the training

    def start(self, step: int) -> None:
        """Start a measurement after `step` updates; the time since the last `read` is not counted."""
        self._step, self._start, self.waited = step, time.perf_counter(), 0.0

    def read(self, step: int) -> dict[str, float]:
        """Return the speed since `start`, under the names of the log, and start again."""
        seconds = time.perf_counter() - self._start
        images = (step - self._step) * self.batch_size
        speed = {"images_per_second": images / seconds, "data_wait": self.waited / seconds}
        if self.matmul_rate:
            speed["mfu"] = self.flops_per_image * images / seconds / self.matmul_rate
        speed["memory_gib"] = peak_memory(self.device) / 2**30
        self.images += images
        self.seconds += seconds
        self.start(step)
        return speed


@dataclass
class Progress:
    """The number of updates of a run so far, and its speed, which is None before the first step."""

    step: int = 0
    speed: Speed | None = None


class Recorder:
    """Writes the records of a training to both logs, the trackers and the progress bar.

    Records stay on the device until `flush`, so that updates need not wait for it. Every process has a Recorder.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        log: MetricsLog,
        evaluations: MetricsLog,
        on_main: Callable[[Callable[[], Any]], Any],
    ):
        self._accelerator, self._log, self._evaluations, self._on_main = accelerator, log, evaluations, on_main
        self.pending: list[dict] = []
        self.speed: Speed | None = None

    def drop_lines_after(self, step: int) -> None:
        """Remove the lines that a killed run wrote after the checkpoint at `step`."""
        self._on_main(lambda: self._log.keep_until(step))
        self._on_main(lambda: self._evaluations.keep_until(step - 1))  # that of this step is repeated

    def start(self, speed: Speed, bar: tqdm, step: int) -> None:
        """Start the measurement and the progress bar at `step`."""
        self.speed, self.bar = speed, bar
        speed.start(step)

    def add(self, record: dict[str, Any]) -> None:
        """Keep the record of an update until the next `flush`."""
        self.pending.append(record)
        self.bar.update()

    def flush(self, step: int) -> NotFinite | None:
        """Write the records since the last call and return None.

        If a value is not finite, write nothing and return the first such value. Raises RunError if the loss scale
        of fp16 fell below 1.
        """
        records, not_finite = gather_records(self._accelerator, self.pending)
        if not_finite:
            return not_finite
        check_scale(records)
        self.pending = []
        speed = self.speed.read(step)
        records[-1] |= speed
        self._on_main(lambda: self._log.write(records))
        self._accelerator.log({k: v for k, v in records[-1].items() if k != "step"}, step=step)
        self.bar.set_postfix(
            loss=f"{records[-1]['loss']:.4f}",
            lr=f"{records[-1]['lr']:.2e}",
            images=f"{speed['images_per_second']:.0f}/s",
        )
        return None

    def write_evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Print the scores of an evaluation, and write them to the log and the trackers."""
        self._on_main(lambda: self._evaluations.write([{"step": step, **scores}]))
        self._accelerator.log(scores, step=step)
        text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self._accelerator.print(f"step {step}: {text}")
        self.speed.start(step)  # time spent on an evaluation is not training time


def count_flops(model: nn.Module, *inputs: object) -> int:
    """Count the floating-point operations of a forward and backward pass of the model on `inputs`.

    The backward pass starts at the output, or at the first of several. Nothing is computed: the model is copied to
    the meta device, where the inputs must be already.
    """
    shadow = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter:
        output = shadow(*inputs)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the FLOP/s of a large matrix product on this device, the best of five: the 100% of the MFU."""
    side = MATMUL_SIDE.get(device.type, 4096)
    # On a CPU that lacks the dtype, the large products would take most of a minute.
    if min(_product_seconds(side // 4, device, dtype, clock)) * 4**3 > LONGEST_PRODUCT:
        side //= 4
    return 2 * side**3 / min(_product_seconds(side, device, dtype, clock))


def _product_seconds(
    side: int, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
) -> list[float]:
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        _synchronize(device)
        start = clock()
        a @ a
        _synchronize(device)
        seconds.append(clock() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
