"""Stopping a run by SIGTERM or SIGINT: the first one lets it finish and save its step, a second one kills it.

In an evaluation, before which the step is saved, the first one stops it at once.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from seitpp.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(UserError):
    """Raised when a run has stopped after a signal; `status` is the exit status, 128 + the signal's number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.status = 128 + number


class StopRequest:
    """Records a signal to stop, between `listen` and `release`. Every process of the launch must create one."""

    def __init__(self, processes: int):
        self._received = 0
        self._handlers = {}
        self._message: str | None = None  # of a stop at once
        # Communicates on the CPU, so that `agreed` does not wait for the GPU.
        self._group = dist.new_group(backend="gloo") if processes > 1 else None

    def listen(self) -> None:
        """Replace the handlers of both signals."""
        self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def release(self) -> None:
        """Restore the handlers of both signals."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Raise Stopped with this message at a signal, where there is no step to finish."""
        self._message = message
        try:
            if self._received:
                raise Stopped(message, self._received)
            yield
        finally:
            self._message = None

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._received = number
        if self._message is not None:
            raise Stopped(self._message, number)
        name = signal.Signals(number).name
        print(
            f"\n{name}: stopping after this step, which is saved; a second signal stops at once", file=sys.stderr
        )

    def agreed(self) -> int:
        """Return the signal that any process received, 0 for none. Every process must call this."""
        if self._group is None:
            return self._received
        received = torch.tensor(self._received)
        dist.all_reduce(received, dist.ReduceOp.MAX, self._group)
        return int(received)
