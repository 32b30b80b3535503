"""Atomic writes of files and folders; everything that a run writes goes through this module.

A file is written to a temporary file beside its target, synced, and renamed over it; a folder is filled beside its
target, synced file by file, and renamed. A temporary file is new and has a random name, and nothing is written or
removed through a link that somebody has put in its place. Each change on disk is one call of `os` in this module,
so that tests can make each of them fail, or kill the process at it. Nothing here imports torch.
"""

# ruff: noqa: PTH101, PTH103, PTH104, PTH105, PTH106, PTH108, PTH116
import csv
import errno
import hashlib
import io
import json
import os
import secrets
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from seitpp.errors import UserError, refusing

CHUNK = 1 << 20
WINDOWS = sys.platform == "win32"
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # else Windows writes two bytes for a newline
TEMPORARY = ".tmp"  # the end of the names of temporary files
# What file systems answer that cannot sync folders (CIFS, FUSE), and what a lock of another process answers.
NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.EACCES}
HELD = {errno.EACCES, errno.EAGAIN}

Lock = int | filelock.BaseFileLock


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class BoundedFile(io.BufferedReader):
    """A file open for reading that makes no memory for more bytes than it has, whatever a header in it says."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.size = path.stat().st_size

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes, all that are left if it is negative or None."""
        left = max(self.size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises ValueError for any other text, and for one that is nested too deep or has half a character (surrogate).
    """
    try:
        value = json.loads(text)
        if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json(path: Path, error: type[UserError], expected: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `error`, which names the file and what was `expected`."""
    with refusing(error, f"{path} cannot be read", expected):
        value = parse_json(path.read_bytes())
    if not isinstance(value, dict):
        raise error(f"{path}: got a {type(value).__name__}, expected a JSON object: {expected}")
    return value


def sync(path: Path) -> None:
    """Flush the content of a file or folder to disk (fsync); Windows and some file systems do it to files only."""
    folder = path.is_dir()
    if WINDOWS and folder:
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows flushes what is open for writing
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError of the block that names no file, as the system's about an open one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write and sync a file, not atomically: for folders that are published later."""
    _write(path, data, os.O_TRUNC)


def append_file(path: Path, data: bytes) -> None:
    """Append to a file, or create it, and sync it. Not atomic: interrupted, it may write a part of `data`."""
    _write(path, data, os.O_APPEND)


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | mode | NO_LINK, 0o666)
    try:
        with naming(path):
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest[:CHUNK]) :]
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the with-block ends. Several processes may do so at the same time."""
    with _replacement(path) as temporary, temporary.open("wb") as file:
        yield file


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then replace `path` by that file atomically."""
    with _replacement(path) as temporary:
        write(temporary)


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`, which replaces it when the with-block ends, or is removed if it fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666))
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        if temporary.exists():
            os.unlink(temporary)


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder."""
    for path in folder.glob(f".*{TEMPORARY}"):
        if path.is_file() or path.is_symlink():
            os.unlink(path)


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    replace_file(path, lambda temporary: write_file(temporary, data))


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; bytes of a file name that are no text become escapes."""
    replace_bytes(path, text.encode(errors="backslashreplace"))


def replace_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, indented, with a newline at its end."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def replace_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    replace_text(path, text.getvalue())


def publish_folder(staging: Path, target: Path) -> None:
    """Sync every file and folder under `staging`, then rename it to `target`, which must not exist."""
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            os.chmod(path, 0o666 & ~_umask())
        sync(path)
    sync(staging)
    os.rename(staging, target)
    sync(target.parent)


@contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `out` to create a folder at; it is renamed to `out` when the with-block ends.

    It is removed if the block fails. Raises UserError if `out` exists.
    """
    target = Path(out).resolve()
    if target.exists():
        raise UserError(f"{target}: exists already and nothing is overwritten; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with naming(target):
            yield staging / "made"
            publish_folder(staging / "made", target)
    finally:
        remove_folder(staging)


def make_folder(path: Path) -> None:
    """Create a folder and its parents; an existing folder stays as it is."""
    os.makedirs(path, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and its content, if it exists; of a link, the link alone."""
    if path.is_symlink():
        os.unlink(path)
    elif path.exists():
        empty_folder(path)
        os.rmdir(path)


def remove_file(path: Path) -> None:
    """Remove a file."""
    os.unlink(path)


def empty_folder(path: Path, but: Collection[str] = ()) -> None:
    """Create a folder, or remove its content except the files named in `but`."""
    make_folder(path)
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            remove_folder(child)
        elif child.name not in but:
            os.unlink(child)


def cache_root() -> Path:
    """Return the folder of this project in the user's cache; it may not exist yet."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "seitpp"
    try:
        return Path.home() / ".cache/seitpp"
    except RuntimeError as error:
        raise UserError("no home folder for a cache: set HOME or XDG_CACHE_HOME to a folder") from error


def make_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the user's cache; `make` fills it on first use. Safe with several processes."""
    root = cache_root()
    folder = root / name
    if folder.exists():
        return folder
    make_folder(root)
    staging = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}-"))
    try:
        with naming(folder):
            make(staging)
        os.chmod(staging, 0o777 & ~_umask())  # mkdtemp allows only the owner
        os.rename(staging, folder)
    except OSError:
        if not folder.exists():  # else another process was faster, and its folder has the same content
            raise
    finally:
        remove_folder(staging)
    return folder


def lock(path: Path) -> Lock | None:
    """Lock the file `path` for this process; return None if another process has locked it (see `owner`).

    The lock ends at `unlock` or with the process, even if it is killed. Forked children do not hold it.
    """
    if WINDOWS:
        held = filelock.FileLock(path)
        try:
            held.acquire(timeout=0)
        except filelock.Timeout:
            return None
        return held
    return _lock_record(path)


def _lock_record(path: Path) -> int | None:
    """Lock by a POSIX record lock, which also works on network file systems, and write the owner into the file.

    The locks of filelock are `flock`, which forked children hold too: the workers of a killed run would keep its
    folder.
    """
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            os.close(descriptor)
            return None
        warnings.warn(f"{path}: no locks here ({error.strerror}): start nothing else on this folder", stacklevel=3)
    if not _is_open_at(path, descriptor):  # its owner has removed it meanwhile, as `locked` does
        os.close(descriptor)
        return _lock_record(path)
    with suppress(OSError):  # of a full disk, which hinders no lock
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _is_open_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Hold the lock file `path` during the block, then remove it. Raises UserError if another process holds it."""
    held = lock(path)
    if held is None:
        raise UserError(f"{path}: held by {owner(path)}, which writes the same: wait until it ends, or stop it")
    try:
        yield
    finally:
        _remove_lock(path, held)


@contextmanager
def locked(path: Path, *, quiet: bool = False) -> Iterator[None]:
    """Hold the lock file `path` during the block, then remove it; wait, and say so, while another holds it."""
    told = quiet
    while (held := lock(path)) is None:
        if not told:
            print(f"waiting for {owner(path)}, which holds {path}", file=sys.stderr)
            told = True
        time.sleep(0.1)
    try:
        yield
    finally:
        _remove_lock(path, held)


def _remove_lock(path: Path, held: Lock) -> None:
    with suppress(OSError):  # Windows removes no file that is open
        os.unlink(path)
    unlock(held)


def owner(path: Path) -> str:
    """Say which process has locked a file, and on which host; Windows lets nobody read a locked file."""
    try:
        return path.read_text() or "another process"
    except PermissionError:
        return "another process"


def unlock(held: Lock) -> None:
    """Release a lock that `lock` returned."""
    if isinstance(held, int):
        os.close(held)
    else:
        held.release()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
