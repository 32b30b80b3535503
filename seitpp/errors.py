"""Errors that programs print as one line, without a traceback."""

import _thread
import difflib
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

LONGEST = 4000  # characters of a message, of which the middle is left out if there are more
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in the text of a Python object


class UserError(ValueError):
    """An error that the user can fix; its message is one line: where, what was got, what was expected, what to do.

    Programs print it and exit with status 2. Every other exception is a bug and keeps its traceback. What does not
    print is escaped, since a stranger's file may name anything, and a terminal obeys some of it; `args` has it as
    it was given.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} .. {text[-LONGEST // 2 :]}"
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(problem: BaseException) -> str:
    """Return what a library says about a file: one line of at most 300 characters."""
    text = getattr(problem, "strerror", None) or str(problem)
    if isinstance(problem, KeyError) and problem.args:
        text = f"no {problem.args[0]!r}"
    return ADDRESS.sub("", " ".join(text.split()))[:300] or type(problem).__name__


@contextmanager
def refusing(kind: type[UserError], complaint: str, expected: str) -> Iterator[None]:
    """Raise whatever the block raises about a stranger's file as one line of `kind` that begins with `complaint`.

    Libraries raise any exception for a damaged file. Our own errors pass as they are, and so does MemoryError:
    sizes are checked before there is memory for them.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as problem:
        raise kind(f"{complaint} ({reason(problem)}); expected {expected}") from problem


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the choice closest to an unknown word, or "" if none is similar."""
    close = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_version(found: object, newest: int, *, path: object, error: type[UserError]) -> None:
    """Raise `error` unless the version `found` in a file is one of 1 .. `newest`."""
    if type(found) is not int or not 1 <= found <= newest:
        expected = "1" if newest == 1 else f"1 to {newest}"
        raise error(f"{path}: written in version {found!r} of its format, expected {expected}: upgrade seitpp")


OUTPUT = "standard output"
AGAIN = 1.0  # seconds until an interrupt that was lost is raised again

# What the user can do about what an operating system refuses.
REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room: your quota is used up",
    errno.EFBIG: "allow larger files (ulimit -f), or choose another disk",
    errno.EPIPE: "start again with a reader that stays, or with a file",
    errno.EIO: "repair the disk, or choose another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "correct its permissions, or choose another",
    errno.EPERM: "correct its permissions, or choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path, of which a part is a file",
    errno.EEXIST: "check the path, of which a part is a file",
    errno.EISDIR: "name a file",
    errno.ELOOP: "check the path, of which a part is a link",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ESTALE: "check the network file system, and start again",
}


def os_message(error: OSError) -> str | None:
    """Return one line about what the system refused: where, what, and what to do; None for other errors."""
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    where = error.filename if error.filename2 is None else error.filename2
    what = f"{error.strerror}; {remedy}"
    return f"{os.fsdecode(where)}: {what}" if where else what


def fail_by_system(error: OSError) -> NoReturn:
    """End as `fail` with the line of `os_message`; raise the error itself where there is none."""
    try:
        flush_output()
    except OSError as unprinted:
        error = unprinted if error.filename is None else error
    message = os_message(error)
    if message is None:
        raise error
    fail(message)


def fail(message: str) -> NoReturn:
    """Print one line to standard error, with the rank of a distributed process, and exit with status 2."""
    rank, line = os.environ.get("RANK"), escaped(message)
    with suppress(OSError):
        flush_output()
    with suppress(OSError):  # on a full disk, too
        print(f"error{f' (rank {rank})' if rank else ''}: {line}", file=sys.stderr)
    sys.exit(2)


def escaped(text: str) -> str:
    """Return one line of text; bytes of a file name that are no UTF-8, and a newline in one, become escapes."""
    return text.encode(errors="backslashreplace").decode().replace("\n", "\\n")


@contextmanager
def keeping_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the block wherever it comes.

    A finalizer cannot raise, and some libraries have an `except` for everything: there KeyboardInterrupt is lost,
    and the program goes on. So it is raised again, each second, until it has left the block; but not where it is
    being handled, so that what tidies up is not interrupted itself.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # Ctrl-C is ignored here, or somebody else's
        return
    again: list[threading.Timer] = []

    def interrupt(*_: object) -> None:
        again[:] = [threading.Timer(AGAIN, _interrupt_main)]
        again[0].daemon = True
        again[0].start()
        handled = sys.exc_info()[1]
        while handled is not None and not isinstance(handled, KeyboardInterrupt):
            handled = handled.__context__
        if handled is None:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt_main() -> None:
    """Send the signal of Ctrl-C to the main thread, which wakes it where the system can."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        _thread.interrupt_main()


def prepare_text() -> None:
    """Let both outputs print characters that their encoding lacks, as escapes; one that is closed goes nowhere.

    Raises UserError where Python takes the names of files for another encoding than UTF-8: those of classes and
    pictures would be stored as others than elsewhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # no file that is written may get its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.getfilesystemencoding() != "utf-8":
        raise UserError(f"names of files are read as {sys.getfilesystemencoding()} here: set PYTHONUTF8=1")


def flush_output() -> None:
    """Flush standard output. Raises OSError that names it; the interpreter does not try it again at its end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = OUTPUT
        raise
