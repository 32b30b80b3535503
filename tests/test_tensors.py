"""Files of tensors: Ctrl-C while one is read."""

import signal
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from seitpp.errors import UserError
from seitpp.tensors import load_tensors


def test_an_interrupt_is_no_error_of_the_file(tmp_path: Path) -> None:
    """About half of them were one: torch says that it does not know the shape of an object."""
    path = tmp_path / "tensors.safetensors"
    save_file({f"tensor_{number}": torch.zeros(100) for number in range(100)}, path, {"key": "{}"})

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    # Where a shell started the tests in the background, nothing listens to SIGINT.
    before = {
        signal.SIGALRM: signal.signal(signal.SIGALRM, interrupt),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    raised = Counter()
    try:
        for number in range(50):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0002 * number)
                while True:
                    load_tensors(path, "key", UserError)
            except (KeyboardInterrupt, UserError) as error:
                raised[type(error)] += 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert raised == {KeyboardInterrupt: 50}
