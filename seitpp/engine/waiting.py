"""The progress bar of work that may take a while, beside that of the training."""

from collections.abc import Iterable
from typing import Any

from accelerate.utils import tqdm

SHORT = 2.0  # seconds after which a bar appears, so that short work leaves nothing behind


def progress(items: Iterable, what: str, unit: str = "batch") -> Any:
    """Iterate over sized `items` with a bar that says `what` is done and how long it will take.

    It is shown in a terminal by one process of each machine, after two seconds, and removed at the end.
    """
    return tqdm(items, desc=what, unit=unit, delay=SHORT, leave=False, disable=None)
