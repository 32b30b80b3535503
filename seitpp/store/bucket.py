"""Objects in a bucket of S3, Google Cloud Storage or Azure, by obstore.

obstore retries what a server or a network loses for a moment, can write an object only if there is none yet or if
it is still the same one, and needs no other package. pyarrow, which is here anyway, has no conditional writes.
Credentials and endpoints are those that the environment names, as for the tools of each provider
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ..).
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from seitpp.files import naming, sha256, sync
from seitpp.store import layout, ranges
from seitpp.store.layout import StoreError

SCHEMES = ("s3://", "gs://", "az://")
PART = 2**23  # bytes of one request
_user: int | None = None  # the process that used obstore first


class Entry(NamedTuple):
    """An object of a bucket: its number of bytes, and what its provider calls this content of it, if anything."""

    size: int
    tag: str | None


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is the URL of a bucket."""
    return str(path).startswith(SCHEMES)


class Bucket:
    """The objects below `url`, as s3://bucket/folder. Raises StoreError in one line for whatever is refused."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self.url,)  # without the connection of this process

    @cached_property
    def _store(self) -> Any:
        with self._asking(""):
            return _obstore().store.from_url(self.url, retry_config=ranges.RETRIES)

    def read(self, name: str) -> bytes:
        """Return the content of a small object. Raises StoreError if there is none, or if it is larger."""
        with self._asking(name):
            found = _obstore().get(self._store, name)
            if (size := found.meta["size"]) > layout.MAX_DOCUMENT_BYTES:
                raise StoreError(
                    f"{self.url}/{name}: {size} bytes, expected at most {layout.MAX_DOCUMENT_BYTES}; check the URL"
                )
            return bytes(found.bytes())

    def read_if_there(self, name: str) -> bytes | None:
        """Return the content of a small object, None if there is none."""
        try:
            return self.read(name)
        except MissingError:
            return None

    def entries(self) -> dict[str, Entry]:
        """Return all objects by their names."""
        with self._asking(""):
            found = (one for batch in _obstore().list(self._store) for one in batch)
            return {one["path"]: Entry(one["size"], one["e_tag"]) for one in found}

    def entry(self, name: str) -> Entry:
        """Return an object. Raises StoreError if there is none."""
        with self._asking(name):
            one = _obstore().head(self._store, name)
            return Entry(one["size"], one["e_tag"])

    def below(self) -> tuple[list[str], list[str]]:
        """Return the names of what is right below, and those of them that are folders."""
        with self._asking(""):
            found = _obstore().list_with_delimiter(self._store)
            files, folders = [one["path"] for one in found["objects"]], list(found["common_prefixes"])
            return sorted({*files, *folders}), sorted(folders)

    def part(self, name: str, places: range, tag: str | None = None) -> bytes:
        """Return the bytes at some places of an object; also in a forked process, by a program of its own.

        Raises StoreError if there is no such object, or if it does not have the `tag` any more.
        """
        if not places:
            return b""
        request = {"name": name, "start": places.start, "end": places.stop, "tag": tag}
        if _is_forked():
            return _reader().ask(self.url, request)
        with self._asking(name):
            try:
                return ranges.read_range(self._store, **request)
            except _obstore().exceptions.PreconditionError as error:
                raise _refusal(f"{self.url}/{name}", CHANGED, "") from error

    def fetch(self, name: str, path: Path, entry: dict[str, Any]) -> None:
        """Copy an object to the file `path`, in one step; what broke off before is continued.

        Raises StoreError unless it has the size and the SHA-256 of `entry`: then nothing is left.
        """
        part = path.with_name(f".{path.name}.part")
        with naming(path):
            self._download(name, part, Entry(entry["bytes"], None))
            got = sha256(part)
            if got != entry["sha256"]:
                part.unlink()
                raise StoreError(
                    f"{self.url}/{name}: SHA-256 {got[:12]}.., expected {entry['sha256'][:12]}..: damaged, or the "
                    "store was changed during the run; remove it there and upload it again, or start again"
                )
            part.replace(path)

    def copy(self, name: str, path: Path, entry: Entry) -> None:
        """Copy an object as it was listed to the new file `path`. Raises StoreError if it is another one now."""
        with naming(path):
            self._download(name, path, entry)

    def write(self, name: str, content: bytes, replacing: str | None = None) -> None:
        """Upload a small object in one step, a new one or instead of the one with the tag `replacing`.

        Raises ExistsError if another process has written another one meanwhile.
        """
        mode = {"e_tag": replacing} if replacing else "create"
        try:
            with self._asking(name):
                # Conditions are for objects that are sent at once.
                _obstore().put(self._store, name, content, mode=mode, use_multipart=False)
        except ExistsError:
            # Perhaps by this process, whose answer was lost on its way.
            if self.read(name) != content:
                raise

    def put(self, name: str, content: bytes | Path) -> None:
        """Upload bytes or a file as an object, in place of what there is."""
        with self._asking(name):
            _obstore().put(self._store, name, content)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, if they are there."""
        if several := sorted(names):
            with self._asking(several[0]), suppress(FileNotFoundError):
                _obstore().delete(self._store, several)

    def _download(self, name: str, part: Path, entry: Entry) -> None:
        """Append to the file `part` what it lacks of an object."""
        with part.open("ab") as file:
            if file.seek(0, 2) > entry.size:
                file.truncate(0)
            while (start := file.seek(0, 2)) < entry.size:
                file.write(self.part(name, range(start, min(start + PART, entry.size)), entry.tag))
                file.flush()
        sync(part)

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Say in one line what was refused."""
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except StoreError:
            raise
        except (FileNotFoundError, _obstore().exceptions.BaseError) as error:
            raise _refusal(where, type(error).__name__, str(error)) from error


class MissingError(StoreError):
    """Raised for an object that is not in a bucket."""


class ExistsError(StoreError):
    """Raised for an object that another process has written."""


CHANGED = "changed"  # the kind of an error that is none of obstore's


def _refusal(where: str, kind: str, text: str) -> StoreError:
    """Return what a provider or a network refused, by the name and the text of obstore's error, and what to do."""
    text = " ".join(text.partition("Debug source")[0].split())
    if "NoSuchBucket" in text:
        return StoreError(f"{where}: no such bucket; check its name, its region and the endpoint")
    if kind in ("FileNotFoundError", "NotFoundError"):
        return MissingError(f"{where}: no such object; check the URL, or upload it again")
    if kind == CHANGED:
        return StoreError(f"{where}: changed during the run; start again")
    if kind in ("AlreadyExistsError", "PreconditionError"):
        return ExistsError(
            f"{where}: written by another process meanwhile; nothing is overwritten, look what it is"
        )
    if "169.254.169.254" in text or "metadata.google" in text or "credential" in text.lower():
        return StoreError(
            f"{where}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what your provider has "
            "for them), or for a public bucket AWS_SKIP_SIGNATURE=true"
        )
    if kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return StoreError(f"{where}: refused to these credentials; check them, and the permissions of the bucket")
    return StoreError(f"{where}: {text[:300]}; check the URL, the endpoint and the network")


class _Reader:
    """The program that reads for a forked process."""

    def __init__(self) -> None:
        self.process_id, self._lock = os.getpid(), threading.Lock()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # In a session of its own, since Ctrl-C is for this process, with which it ends.
        self._program = subprocess.Popen([sys.executable, ranges.__file__], start_new_session=True, **pipes)

    def ask(self, url: str, request: dict[str, Any]) -> bytes:
        """Return a part of an object as `Bucket.part` does."""
        where, sent, answers = f"{url}/{request['name']}", self._program.stdin, self._program.stdout
        with self._lock:
            try:
                sent.write(json.dumps([url, request]).encode() + b"\n")
                sent.flush()
                answer = json.loads(answers.readline())
                data = answers.read(answer[0]) if len(answer) == 1 else b""
            except (OSError, ValueError) as error:
                raise StoreError(f"{where}: the program that reads buckets has ended; start again") from error
        if len(answer) == 1:
            return data
        kind, text = answer
        raise _refusal(where, CHANGED if kind == "PreconditionError" else kind, text)


_readers: list[_Reader] = []  # that of this process, or of the one that it was forked from


def _reader() -> _Reader:
    """Return the program that reads for this process, and start it first."""
    if not _readers or _readers[0].process_id != os.getpid():
        _readers[:] = [_Reader()]
    return _readers[0]


def _is_forked() -> bool:
    """Return whether this process was forked from one that used obstore."""
    return _user not in (None, os.getpid())


def _obstore() -> Any:
    """Return the library. Raises StoreError where it is not installed, and in a fork, where it would hang."""
    global _user
    if _is_forked():
        raise StoreError(
            "a bucket: this process was forked from one that used obstore, whose threads it does not have; open "
            "the store before the fork, or spawn the process"
        )
    _user = os.getpid()
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise StoreError('buckets need obstore: pip install "seitpp[buckets]"') from error
    return obstore
