"""How a run is stopped from outside: SIGTERM and SIGINT let it finish its step, a second one does not."""

import os
import signal
import sys
from types import FrameType

import torch
import torch.distributed as dist

from seitpp.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(UserError):
    """A run that was asked to stop, and has. `status` is its exit status, 128 + the number of the signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.status = 128 + number


class StopRequest:
    """Listens from `listen` to `release`. To be made by every process of the launch."""

    def __init__(self, processes: int):
        self._asked = 0
        self._before = {}
        # On the host, so that agreeing does not wait for a device.
        self._group = dist.new_group(backend="gloo") if processes > 1 else None

    def listen(self) -> None:
        """Take over both signals."""
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def release(self) -> None:
        """Give both signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self._asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._asked = number
        name = signal.Signals(number).name
        print(f"\n{name}: stops after this step and saves it; once more stops at once", file=sys.stderr)

    def agreed(self) -> int:
        """The signal that any process got, 0 for none; the same on every process, all of which must ask."""
        if self._group is None:
            return self._asked
        asked = torch.tensor(self._asked)
        dist.all_reduce(asked, dist.ReduceOp.MAX, self._group)
        return int(asked)
