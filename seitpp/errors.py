"""Errors that programs print as one line, without a traceback."""

import difflib
import os
import sys
from collections.abc import Iterable
from typing import NoReturn


class UserError(ValueError):
    """An error that the user can fix; its message is one line: where, what was got, what was expected, what to do.

    Programs print it and exit with status 2. Every other exception is a bug and keeps its traceback.
    """


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the choice closest to an unknown word, or "" if none is similar."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def fail(message: str) -> NoReturn:
    """Print one line to standard error, with the rank of a distributed process, and exit with status 2."""
    rank = os.environ.get("RANK")
    print(f"error{f' (rank {rank})' if rank else ''}: {message}", file=sys.stderr)
    sys.exit(2)
