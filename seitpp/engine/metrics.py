"""What a run writes down about itself: metrics.jsonl, its speed, and what that is measured against."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seitpp import files
from seitpp.engine.precision import check_scale
from seitpp.engine.system import peak_memory

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


class NotFinite(NamedTuple):
    """The first value of a training that is not finite: which one, of what update and on what process."""

    name: str
    value: float
    step: int
    rank: int


def gather_records(accelerator: Accelerator, records: list[dict]) -> tuple[list[dict], NotFinite | None]:
    """Records of updates with their tensors averaged over the processes, in the order of the ranks; and the first
    value that is not finite. Every process must call this. The gradient norm of a skipped update is 0.
    """
    names = [name for name, value in records[0].items() if isinstance(value, Tensor)]
    values = torch.stack([torch.stack([record[name].float() for name in names]) for record in records])
    if "skipped" in names:
        norms, skipped = (values[:, names.index(name)] for name in ("grad_norm", "skipped"))
        norms.masked_fill_(skipped.bool(), 0.0)
    by_rank = accelerator.gather(values.unsqueeze(0)).cpu()
    broken = (~by_rank.isfinite()).nonzero()
    first = None
    if len(broken):
        rank, position, column = min(broken.tolist(), key=lambda at: (at[1], at[2], at[0]))
        value = by_rank[rank, position, column].item()
        first = NotFinite(names[column], value, records[position]["step"], rank)
    means = by_rank.double().mean(dim=0).tolist()
    averaged = [
        {**record, **dict(zip(names, values, strict=True))} for record, values in zip(records, means, strict=True)
    ]
    return averaged, first


class Speed:
    """The speed of training between two lines of the log. What is done between `read` and `start` does not count.

    `batch_size` is global; `flops_per_image` and `matmul_rate` (FLOP/s, of all processes) are for the MFU, which
    is left out without them. `waited` is to be increased by the seconds that each batch was waited for.
    """

    def __init__(
        self, device: torch.device, batch_size: int, flops_per_image: int | None, matmul_rate: float | None
    ):
        self.device, self.batch_size, self.flops_per_image = device, batch_size, flops_per_image
        self.matmul_rate = matmul_rate
        self.images, self.seconds = 0, 0.0  # of the whole training

    def start(self, step: int) -> None:
        """Begin to measure at an update."""
        self._step, self._start, self.waited = step, time.perf_counter(), 0.0

    def read(self, step: int) -> dict[str, float]:
        """What is logged at an update, from where it began; and begin again."""
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
    """How far the training of a run has come, in updates, and at which speed; None before the first step."""

    step: int = 0
    speed: Speed | None = None


class Recorder:
    """What a training writes down: the lines of both logs, trackers, and the progress bar.

    Updates are kept on the device until `flush`, so that no update waits for it. Every process has one.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        log: MetricsLog,
        evaluations: MetricsLog,
        on_main: Callable[[Callable[[], Any]], Any],
    ):
        self._accelerator, self._log, self._evaluations, self._on_main = accelerator, log, evaluations, on_main
        self.pending: list[dict] = []
        self.speed: Speed | None = None

    def drop_lines_after(self, step: int) -> None:
        """Forget what a run that was killed had written past the checkpoint at `step`."""
        self._on_main(lambda: self._log.keep_until(step))
        self._on_main(lambda: self._evaluations.keep_until(step - 1))  # that of this step is made once more

    def start(self, speed: Speed, bar: tqdm, step: int) -> None:
        """Begin to measure and to draw at `step`."""
        self.speed, self.bar = speed, bar
        speed.start(step)

    def add(self, record: dict[str, Any]) -> None:
        """Keep the record of an update."""
        self.pending.append(record)
        self.bar.update()

    def flush(self, step: int) -> NotFinite | None:
        """Fetch what was recorded since the last call and write it down; or write nothing and return the first
        value that is not finite. Raises RunError where the loss scale of fp16 fell below 1.
        """
        records, broken = gather_records(self._accelerator, self.pending)
        if broken:
            return broken
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
        """Print the figures of an evaluation and write them down."""
        self._on_main(lambda: self._evaluations.write([{"step": step, **scores}]))
        self._accelerator.log(scores, step=step)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self._accelerator.print(f"step {step}: {figures}")
        self.speed.start(step)  # time spent on an evaluation is not training time


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


def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of this machine's own large matrix product, the best of five: what utilization is a share of."""
    side = MATMUL_SIDE.get(device.type, 4096)
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        _synchronize(device)
        start = clock()
        a @ a
        _synchronize(device)
        seconds.append(clock() - start)
    return 2 * side**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
