"""Ending every process of a launch within seconds after one of them fails, also those that wait for it.

A process that waits for another in a collective operation is not in Python code, where it could receive a signal:
gloo raises an error of its own once the other is gone, and NCCL waits for minutes. Thus the first process that
fails writes its exit status to the key-value store through which the processes of a launch have found each other,
and a thread in each of the others reads it.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGINT

import torch.distributed as dist

from seitpp.engine.signals import Stopped
from seitpp.errors import UserError

SECONDS = 1.0  # between two looks at the store
OWN = (UserError, OSError, KeyboardInterrupt)  # what is no consequence of another process

_ending = threading.Event()  # set once this process ends by itself
_stores: list[dist.Store] = []  # none in a launch of one process


def watch() -> None:
    """End this process once another process of the launch has failed. Call once the launch has been set up."""
    if not dist.is_initialized() or _stores:
        return
    store = dist.distributed_c10d._get_default_store()  # torch has no public name for it
    if store is None:  # processes that MPI has started
        return
    _ending.clear()
    _stores.append(dist.PrefixStore("seitpp", store.clone()))  # each thread needs a connection of its own
    watched = dist.PrefixStore("seitpp", store.clone())
    thread = threading.Thread(target=_end_after_another, args=(watched,), daemon=True)
    thread.start()
    atexit.register(_leave, thread)


def _leave(thread: threading.Thread) -> None:
    # A thread that is still in torch when the interpreter is taken down aborts the process.
    _ending.set()
    thread.join(10 * SECONDS)


def _end_after_another(store: dist.Store) -> None:
    try:
        while not store.check(["status"]):
            if _ending.wait(SECONDS):
                return
        status = int(store.get("status"))
    except RuntimeError:  # the process that keeps the store has ended as it should
        return
    if not _ending.is_set():
        if os.environ.get("LOCAL_RANK") == "0":  # once on each machine
            print("ended, since another process of the launch has failed", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the main thread may wait for ever


@contextmanager
def ending_together() -> Iterator[None]:
    """End the other processes of the launch where an exception leaves the context.

    The first exception of a launch goes on once the others have ended, so that its message is the last one. Where
    another process has failed before, what a library says about that is left out.
    """
    try:
        yield
    except BaseException as error:
        _ending.set()
        if _stores and not _is_first(_stores[0], error) and not isinstance(error, OWN):
            sys.exit(int(_stores[0].get("status")))
        raise


def _is_first(store: dist.Store, error: BaseException) -> bool:
    """Say how this process ends, unless another has failed before; wait until the others have read it."""
    try:
        if store.add("failed", 1) > 1:
            return False
        store.set("status", str(_status_of(error)))
    except RuntimeError:  # the process that keeps the store is gone, and can end no other one
        return True
    time.sleep(2 * SECONDS)
    return True


def _status_of(error: BaseException) -> int:
    if isinstance(error, Stopped):
        return error.status
    if isinstance(error, KeyboardInterrupt):
        return 128 + SIGINT
    return 2 if isinstance(error, UserError | OSError) else 1
