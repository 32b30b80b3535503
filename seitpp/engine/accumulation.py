"""How many images at a time: as many as fit into the device's memory, in equal shares of the batch."""

from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn

from seitpp.engine.config import TrainConfig
from seitpp.engine.folder import RunError
from seitpp.engine.memory import Trial, footprint, free_memory, state_bytes

USABLE = 0.9  # of the free memory: what is cut up, workspaces and the buffers of sums take the rest
GIB = 2**30


class Sharing(NamedTuple):
    """What decides how a batch can be shared out: a step on zeros, the modules `beside` the model in it, and the
    number of which the images at a time are a multiple: 4 where they are paired, 8 where halves of them are.
    """

    trial: Trial
    beside: tuple[nn.Module, ...] = ()
    multiple: int = 1


class Need(NamedTuple):
    """Bytes that training takes beside what lies on the device already: for each of the images at a time, and
    `fixed` at any number of them.
    """

    an_image: int
    fixed: int

    def gib(self, images: int) -> float:
        """What so many images at a time take."""
        return (self.fixed + images * self.an_image) / GIB


def share_out(
    accelerator: Accelerator, config: TrainConfig, model: nn.Module, batch_size: int, sharing: Sharing | None
) -> int:
    """Into how many micro-batches each process divides its share of a batch: --accumulation, or as few as the GPU
    with the least free memory asks for; 1 on another device. Prints why. Every process must call this, with its
    model on its device and before any other state of the training is there. Raises RunError as
    `choose_accumulation`.
    """
    free, asked = free_memory(accelerator.device), config.accumulation
    if free is None or sharing is None:
        return asked or 1
    free, processes = min(gather_object([free])), accelerator.num_processes
    found = footprint(sharing.trial, config.precision, model, *sharing.beside)
    state = state_bytes(model, processes)
    if accelerator.distributed_type == DistributedType.FSDP:
        state //= processes
    need = Need(found.peak, found.fixed + state)
    advice = "take a smaller model"
    if getattr(config, "grad_checkpointing", None) is False:
        advice = f"pass --grad-checkpointing, or {advice}"
    shape = batch_size, processes, sharing.multiple, need, free
    chosen = choose_accumulation(*shape, asked, advice)
    accelerator.print(table(*shape, chosen))
    return chosen


def choose_accumulation(
    batch_size: int, processes: int, multiple: int, need: Need, free: int, asked: int | None, advice: str
) -> int:
    """The smallest accumulation whose share of the global batch fits into `free` bytes, or `asked` if it does.

    Raises RunError if it does not, or if nothing does: in one line that says what would, or `advice`.
    """
    fitting = [
        accumulation
        for accumulation in accumulations(batch_size, processes, multiple)
        if need.gib(batch_size // (processes * accumulation)) * GIB <= USABLE * free
    ]
    most = batch_size // processes
    room = f"{free / GIB:.1f} GiB are free on the device, of which {USABLE:.0%} are taken"
    if not fitting:
        least = most // accumulations(batch_size, processes, multiple)[-1]
        raise RunError(f"{least} images at a time need {need.gib(least):.1f} GiB, {room}: {advice}")
    if asked is None:
        return fitting[0]
    images, smaller = most // asked, most // fitting[0]
    if need.gib(images) * GIB > USABLE * free:
        raise RunError(
            f"{images} images at a time need {need.gib(images):.1f} GiB, {room}: pass --accumulation {fitting[0]} "
            f"({smaller} images at a time, {need.gib(smaller):.1f} GiB), or leave it out"
        )
    return asked


def accumulations(batch_size: int, processes: int, multiple: int) -> list[int]:
    """Into how many micro-batches a process can divide its share of a batch, from 1 on."""
    most = batch_size // processes
    return [n for n in range(1, most + 1) if most % n == 0 and (n == 1 or most // n % multiple == 0)]


def table(batch_size: int, processes: int, multiple: int, need: Need, free: int, chosen: int) -> str:
    """What was chosen and why, for people: the choices around it."""
    most, choices = batch_size // processes, accumulations(batch_size, processes, multiple)
    at = choices.index(chosen) if chosen in choices else 0
    found = f"{need.an_image / GIB:.4f} GiB an image, {need.fixed / GIB:.2f} GiB fixed, {free / GIB:.1f} GiB free"
    lines = [
        f"memory: {found}",
        f"{'accumulation':>14}{'images at a time':>18}{'GiB':>8}",
    ]
    for accumulation in choices[max(0, at - 1) : at + 2]:
        images = most // accumulation
        mark = " <- chosen" if accumulation == chosen else ""
        lines.append(f"{accumulation:>14}{images:>18}{need.gib(images):>8.1f}{mark}")
    return "\n".join(lines)
