"""Errors that are shown as one line, and how a program says them."""

import difflib
import os
import sys
from collections.abc import Iterable
from typing import NoReturn


class UserError(ValueError):
    """Something that the person who runs the program can mend: one line with got, expected, where, what to do.

    Programs print it and exit with status 2. Every other exception is a defect and keeps its traceback.
    """


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: "; did you mean ...?", or nothing if none of `known` is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def fail(message: str) -> NoReturn:
    """Print one line to standard error, with this process's rank where several were launched, and exit with 2."""
    rank = os.environ.get("RANK")
    print(f"error{f' (rank {rank})' if rank else ''}: {message}", file=sys.stderr)
    sys.exit(2)
