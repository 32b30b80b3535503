"""Gradient accumulation: the number of micro-batches, chosen so that one fits into the memory of the GPU."""

from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn

from seitpp.engine.config import TrainConfig
from seitpp.engine.folder import RunError
from seitpp.engine.memory import Trial, footprint, free_memory, state_bytes

USABLE = 0.9  # of the free memory: fragmentation, workspaces and communication buffers take the rest
GIB = 2**30


class Sharing(NamedTuple):
    """The input of `share_out`: `trial` is a training step on zeros, `beside` are the modules it needs besides the
    model, and the size of a micro-batch is a multiple of `multiple`: 4 where the view pairs images, 8 where it
    pairs them within each half of the batch.
    """

    trial: Trial
    beside: tuple[nn.Module, ...] = ()
    multiple: int = 1


class Need(NamedTuple):
    """Bytes that training needs besides what is allocated already: `an_image` for each image of a micro-batch, and
    `fixed`, whatever its size.
    """

    an_image: int
    fixed: int

    def gib(self, images: int) -> float:
        """Return the memory in GiB for micro-batches of `images` images."""
        return (self.fixed + images * self.an_image) / GIB


def share_out(
    accelerator: Accelerator, *, config: TrainConfig, model: nn.Module, batch_size: int, sharing: Sharing | None
) -> int:
    """Return the number of micro-batches per update on each process, and print how it was found.

    It is --accumulation, or the smallest that fits into the GPU with the least free memory; 1 on other devices.
    Every process must call this, when its model is on the device and nothing else of the training is allocated
    yet. Raises RunError as `choose_accumulation` does.
    """
    free, requested = free_memory(accelerator.device), config.accumulation
    if free is None or sharing is None:
        return requested or 1
    free, processes = min(gather_object([free])), accelerator.num_processes
    step = footprint(sharing.trial, config.precision, model, *sharing.beside)
    state = state_bytes(model, processes)
    if accelerator.distributed_type == DistributedType.FSDP:
        state //= processes
    need = Need(step.peak, step.fixed + state)
    advice = "take a smaller model"
    if getattr(config, "grad_checkpointing", None) is False:
        advice = f"pass --grad-checkpointing, or {advice}"
    limits = {"processes": processes, "multiple": sharing.multiple, "need": need, "free": free}
    chosen = choose_accumulation(batch_size, **limits, requested=requested, advice=advice)
    accelerator.print(table(batch_size, **limits, chosen=chosen))
    return chosen


def choose_accumulation(
    batch_size: int, *, processes: int, multiple: int, need: Need, free: int, requested: int | None, advice: str
) -> int:
    """Return the smallest accumulation whose micro-batches fit into `free` bytes, or `requested` if they fit.

    Raises RunError if the requested micro-batches do not fit, with an accumulation that does, or if none does,
    with `advice`.
    """
    fitting = [
        accumulation
        for accumulation in accumulations(batch_size, processes, multiple)
        if need.gib(batch_size // (processes * accumulation)) * GIB <= USABLE * free
    ]
    most = batch_size // processes
    available = f"{free / GIB:.1f} GiB are free on the device, of which {USABLE:.0%} may be used"
    if not fitting:
        least = most // accumulations(batch_size, processes, multiple)[-1]
        raise RunError(f"{least} images at a time need {need.gib(least):.1f} GiB, {available}: {advice}")
    if requested is None:
        return fitting[0]
    images, smaller = most // requested, most // fitting[0]
    if need.gib(images) * GIB > USABLE * free:
        raise RunError(
            f"{images} images at a time need {need.gib(images):.1f} GiB, {available}: pass "
            f"--accumulation {fitting[0]} ({smaller} images at a time, {need.gib(smaller):.1f} GiB), "
            "or leave it out"
        )
    return requested


def accumulations(batch_size: int, processes: int, multiple: int) -> list[int]:
    """List the possible numbers of micro-batches per update on each process, in ascending order."""
    most = batch_size // processes
    return [n for n in range(1, most + 1) if most % n == 0 and (n == 1 or most // n % multiple == 0)]


def table(batch_size: int, *, processes: int, multiple: int, need: Need, free: int, chosen: int) -> str:
    """Format the chosen accumulation, the choices next to it and the memory that each needs."""
    most, choices = batch_size // processes, accumulations(batch_size, processes, multiple)
    position = choices.index(chosen) if chosen in choices else 0
    sizes = f"{need.an_image / GIB:.4f} GiB per image, {need.fixed / GIB:.2f} GiB fixed, {free / GIB:.1f} GiB free"
    lines = [
        f"memory: {sizes}",
        f"{'accumulation':>14}{'images at a time':>18}{'GiB':>8}",
    ]
    for accumulation in choices[max(0, position - 1) : position + 2]:
        images = most // accumulation
        mark = " <- chosen" if accumulation == chosen else ""
        lines.append(f"{accumulation:>14}{images:>18}{need.gib(images):>8.1f}{mark}")
    return "\n".join(lines)
