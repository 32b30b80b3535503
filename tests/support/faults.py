"""The disk that fails, or the process that dies, at the n-th operation of seitpp.files."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from seitpp import files

OPERATIONS = {"open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "makedirs", "chmod", "ftruncate"}

# What happens instead of an operation: it is told its name and gets the call that would have been made.
Fault = Callable[[str, Callable, tuple], object]


class FaultyOs:
    """`os`, noting in `names` the operations that change a disk; from number `at` (from 0) on comes the fault."""

    def __init__(self, at: int, fault: Fault):
        self.names, self.at, self.fault = [], at, fault

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in OPERATIONS:
            return real

        def operation(*arguments: object, **named: object) -> object:
            self.names.append(name)
            if len(self.names) > self.at:
                self.at = 10**9 if self.fault is die else self.at
                return self.fault(name, real, arguments)
            return real(*arguments, **named)

        return operation


def die(name: str, real: Callable, arguments: tuple) -> None:
    """A power cut: a write gets half of its data onto the disk, anything else nothing."""
    half(name, real, arguments)
    os.kill(os.getpid(), signal.SIGKILL)


def failing(number: int, but: tuple[str, ...] = ()) -> Fault:
    """From then on every operation fails with this errno, all `but` some."""

    def fault(name: str, real: Callable, arguments: tuple) -> object:
        if name in but:
            return real(*arguments)
        half(name, real, arguments)
        raise OSError(number, os.strerror(number))

    return fault


def half(name: str, real: Callable, arguments: tuple) -> None:
    if name == "write":
        descriptor, data = arguments
        real(descriptor, data[: len(data) // 2])


REMOVALS = ("unlink", "rmdir")
NO_SPACE, BROKEN_DISK = failing(errno.ENOSPC, but=REMOVALS), failing(errno.EIO)


@contextmanager
def faulty(at: int, fault: Fault) -> Iterator[FaultyOs]:
    """Within the block the files of the project are changed through a FaultyOs."""
    files.os = FaultyOs(at, fault)
    try:
        yield files.os
    finally:
        files.os = os


def in_child(function: Callable[[], None], log: Path) -> int:
    """Run in a forked child; its exit status, or minus the signal that killed it. What it prints goes to `log`."""
    child = os.fork()
    if not child:
        status = 1
        try:
            sys.stdout = sys.stderr = log.open("a", buffering=1)
            function()
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
