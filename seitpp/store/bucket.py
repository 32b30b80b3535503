"""Objects in a bucket of S3, Google Cloud Storage or Azure, by obstore.

obstore retries what a server or a network loses for a moment, can write an object only if there is none yet or if
it is still the same one, and needs no other package. pyarrow, which is here anyway, has no conditional writes.
Credentials and endpoints are those that the environment names, as for the tools of each provider
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ..).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from seitpp.files import naming, sha256, sync
from seitpp.store import download, layout
from seitpp.store.layout import StoreError

SCHEMES = ("s3://", "gs://", "az://")
_user: int | None = None  # the process that used obstore first


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
            return _obstore().store.from_url(self.url, retry_config=download.RETRIES)

    def read(self, name: str) -> bytes:
        """Return the content of a small object. Raises StoreError if there is none, or if it is larger."""
        with self._asking(name):
            found = _obstore().get(self._store, name)
            if (size := found.meta["size"]) > layout.MAX_DOCUMENT_BYTES:
                raise StoreError(
                    f"{self.url}/{name}: {size} bytes, expected at most {layout.MAX_DOCUMENT_BYTES}; check the URL"
                )
            return bytes(found.bytes())

    def sizes(self) -> dict[str, int]:
        """Return the number of bytes of each object by its name."""
        with self._asking(""):
            return {one["path"]: one["size"] for batch in _obstore().list(self._store) for one in batch}

    def fetch(self, name: str, path: Path, entry: dict[str, Any]) -> None:
        """Download an object to the file `path`, in one step; what broke off before is continued.

        Raises StoreError unless it has the size and the SHA-256 of `entry`: then nothing is left.
        """
        part = path.with_name(f".{path.name}.part")
        with naming(path):
            self._download(name, part, entry["bytes"])
            got = sha256(part)
            if got != entry["sha256"]:
                part.unlink()
                raise StoreError(
                    f"{self.url}/{name}: SHA-256 {got[:12]}.., expected {entry['sha256'][:12]}..: damaged, or the "
                    "store was changed during the run; remove it there and upload it again, or start again"
                )
            part.replace(path)

    def create(self, name: str, content: bytes | Path) -> None:
        """Upload bytes or a file as a new object. Raises ExistsError if there is one."""
        with self._asking(name):
            # Conditions are for objects that are sent at once.
            _obstore().put(self._store, name, content, mode="create", use_multipart=False)

    def put(self, name: str, content: bytes | Path) -> None:
        """Upload bytes or a file as an object, in place of what there is."""
        with self._asking(name):
            _obstore().put(self._store, name, content)

    def _download(self, name: str, part: Path, size: int) -> None:
        if not _is_forked():
            with self._asking(name):
                download.download(self._store, name, part, size=size)
        else:
            words = [sys.executable, download.__file__, self.url, name, part, str(size)]
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode:
                where, text = f"{self.url}/{name}", done.stderr.strip()[-300:]
                raise StoreError(f"{where}: {text}; check the URL, the endpoint and the network")
        sync(part)

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Say in one line what was refused."""
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise StoreError(
                    f"{where}: no such bucket; check its name, its region and the endpoint"
                ) from error
            raise MissingError(f"{where}: no such object; check the URL, or upload it again") from error
        except _obstore().exceptions.BaseError as error:
            raise _refusal(where, error) from error


class MissingError(StoreError):
    """Raised for an object that is not in a bucket."""


class ExistsError(StoreError):
    """Raised for an object that another process has written."""


def _refusal(where: str, error: Exception) -> StoreError:
    """Return what a provider or a network refused, and what to do."""
    exceptions, text = _obstore().exceptions, " ".join(str(error).partition("Debug source")[0].split())
    if isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError):
        return ExistsError(
            f"{where}: written by another process meanwhile; nothing is overwritten, look what it is"
        )
    if "169.254.169.254" in text or "metadata.google" in text or "credential" in text.lower():
        return StoreError(
            f"{where}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what your provider has "
            "for them), or for a public bucket AWS_SKIP_SIGNATURE=true"
        )
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return StoreError(f"{where}: refused to these credentials; check them, and the permissions of the bucket")
    return StoreError(f"{where}: {text[:300]}; check the URL, the endpoint and the network")


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
