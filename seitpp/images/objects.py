"""Files of images in a bucket, read as those of a folder are: in parts, and nothing is copied to a disk."""

import io
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from seitpp.files import BoundedFile
from seitpp.images.walk import Walked, walk_names
from seitpp.store.bucket import Bucket, Entry

# Bytes of one request: who reads in sequence gets twice as much each time.
LEAST, MOST = 2**20, 2**23


class _Ahead:
    """Reads parts of objects, and keeps the last one with what follows it."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self._held = "", 0, b""

    def __reduce__(self) -> tuple[type["_Ahead"], tuple[Bucket]]:
        return _Ahead, (self.bucket,)

    def read(self, name: str, entry: Entry, places: range) -> bytes:
        """Return the bytes at some places of an object, those that it has."""
        held, first, data = self._held
        start, end = places.start, min(places.stop, entry.size)
        if held != name or not first <= start <= end <= first + len(data):
            sequential = held == name and 0 <= start - first <= len(data) + LEAST
            ahead = start + (min(2 * len(data), MOST) if sequential else LEAST)
            first = start
            data = self.bucket.part(name, range(start, min(max(ahead, end), entry.size)), entry.tag)
            self._held = name, first, data
        return data[start - first : end - first]


class ObjectPath:
    """An object of a bucket, with those methods of a Path that readers of files use.

    They raise StoreError where the bucket refuses it, which is no fault of an image that could be skipped.
    """

    def __init__(self, path: str, entry: Entry, ahead: _Ahead) -> None:
        self._path, self._entry, self._ahead = path, entry, ahead
        self.name, self.suffix = path.rpartition("/")[2], PurePosixPath(path).suffix

    def __str__(self) -> str:
        return f"{self._ahead.bucket.url}/{self._path}"

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self._entry.size

    def read(self, start: int, size: int) -> bytes:
        """Return up to `size` bytes from `start` on."""
        return self._ahead.read(self._path, self._entry, range(start, start + size))

    def read_bytes(self) -> bytes:
        """Return the whole content."""
        return self.read(0, self.size)

    def open(self) -> BinaryIO:
        """Open it for reading; what is read in sequence is asked for in few requests."""
        return ObjectFile(ObjectPath(self._path, self._entry, _Ahead(self._ahead.bucket)))


class ObjectFile(io.RawIOBase):
    """An object that is open for reading, and makes no memory for more bytes than it has."""

    def __init__(self, path: ObjectPath) -> None:
        self._path, self._place = path, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, and return it."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._path.size}[whence]
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes, all that are left if it is negative or None."""
        left = max(self._path.size - self._place, 0)
        data = self._path.read(self._place, left if size is None or size < 0 else min(size, left))
        self._place += len(data)
        return data


class ObjectFolder:
    """The objects below `url`, as s3://bucket/folder, listed once, or only the one called `name`."""

    def __init__(self, url: str, name: str | None = None) -> None:
        self.url = url.rstrip("/")
        bucket = Bucket(self.url)
        self._entries = {name: bucket.entry(name)} if name else bucket.entries()
        self._ahead = _Ahead(bucket)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(name, self._entries[name], self._ahead)

    def walk(self) -> Walked:
        """Sort the objects as `seitpp.images.walk.walk` does files; none is opened to see what it is."""
        # An empty object without a suffix is what some tools write for a folder.
        return walk_names(name for name, entry in self._entries.items() if entry.size or "." in name)


def open_bounded(path: Path | ObjectPath) -> BinaryIO:
    """Open a file that makes no memory for more bytes than it has, whatever a header in it says."""
    return path.open() if isinstance(path, ObjectPath) else BoundedFile(path)


def size_of(path: Path | ObjectPath) -> int:
    """Return the number of bytes of a file."""
    return path.size if isinstance(path, ObjectPath) else path.stat().st_size


def read_part(path: Path | ObjectPath, start: int, size: int) -> bytes:
    """Return up to `size` bytes of a file from `start` on."""
    if isinstance(path, ObjectPath):
        return path.read(start, size)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)
