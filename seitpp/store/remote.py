"""A store in a bucket: its small files are copied when it is opened, its shards when they are read."""

import hashlib
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from seitpp.files import cache_root, locked, make_folder, owned, remove_folder, sync, write_file
from seitpp.store import layout
from seitpp.store.bucket import Bucket
from seitpp.store.layout import StoreError

SHARE = 3, 4  # of the space that is free or used by the cache, what it may use
KEPT_OPEN = 128  # shards that a process keeps open: those of two windows
# Of the threads of this process; the locks of files are those of processes.
_fetching: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
if hasattr(os, "register_at_fork"):  # a thread that holds one is not in the fork
    os.register_at_fork(after_in_child=_fetching.clear)


class Remote(NamedTuple):
    """The copy of one state of a store in a bucket, in the folder `folder` of a cache that several runs share."""

    bucket: Bucket
    folder: Path
    cache: Path

    @classmethod
    def open(cls, url: str, cache: str | os.PathLike[str] | None) -> "Remote":
        """Read tokens.json of the store at `url`. Raises StoreError if there is none, or if it is damaged.

        Another state of the store, after images were appended, has another folder.
        """
        bucket, root = Bucket(url), Path(cache) if cache else cache_root() / "buckets"
        own = root.resolve() / hashlib.sha256(bucket.url.encode()).hexdigest()[:16]
        raw = bucket.read(layout.DOCUMENT)
        incoming = own / f".{os.getpid()}-{threading.get_ident()}"
        make_folder(incoming)
        try:
            write_file(incoming / layout.DOCUMENT, raw)
            try:
                document = layout.read_document(incoming)
            except StoreError as error:
                raise StoreError(f"{bucket.url}: {error}") from error
            folder = own / document["checksum"][:16]
            make_folder(folder)
            (incoming / layout.DOCUMENT).replace(folder / layout.DOCUMENT)
        finally:
            remove_folder(incoming)
        return cls(bucket, folder, root)

    def fetch(self, document: dict[str, Any], names: Iterable[str]) -> None:
        """Copy the files `names` of the store that are not there yet, and check all that it copies.

        Raises StoreError if one is missing or different in the bucket.
        """
        for name in names:
            path, entry = self.folder / name, document["files"][name]
            with _fetching[path]:
                if _is_there(path, entry):
                    os.utime(path)  # it was used now
                    continue
                make_folder(path.parent)
                with locked(path.with_name(f".{path.name}.lock"), quiet=True):
                    if not _is_there(path, entry):
                        self._make_room(entry["bytes"])
                        self.bucket.fetch(name, path, entry)

    def prefetch(self, document: dict[str, Any], names: Iterable[str]) -> None:
        """Copy shards in the background; what fails is tried again when it is read."""

        def fetch() -> None:
            try:
                self.fetch(document, names)
            except (StoreError, OSError):
                return

        threading.Thread(target=fetch, daemon=True).start()

    def _make_room(self, coming: int) -> None:
        """Remove the shards that were not used for the longest time, so that the cache leaves space on its disk.

        A process that has one open reads on.
        """
        paths = [path for path in self.cache.resolve().rglob("*.arrow") if path.is_file()]
        times = {path: path.stat() for path in paths}
        used = sum(one.st_size for one in times.values())
        limit = (shutil.disk_usage(self.cache).free + used) * SHARE[0] // SHARE[1]
        for path in sorted(times, key=lambda path: times[path].st_mtime):
            if used + coming <= limit:
                break
            path.unlink(missing_ok=True)
            used -= times[path].st_size


def pull(url: str, folder: str | os.PathLike[str]) -> Path:
    """Copy a whole store from a bucket into the new `folder`, verify every file, and return its path.

    What broke off is continued. Raises StoreError if there is no store, if it is damaged, or if `folder` exists;
    UserError if another process does the same.
    """
    target = Path(folder).resolve()
    if target.exists():
        raise StoreError(f"{target}: exists already and nothing is overwritten; choose another folder")
    incoming = target.parent / f".{target.name}.download"
    make_folder(target.parent)
    with owned(incoming.with_suffix(".lock")):
        remote = Remote.open(url, incoming)
        files = layout.read_document(remote.folder)["files"]
        for name in tqdm(files, desc=url, unit="file", disable=None):
            path = remote.folder / name
            make_folder(path.parent)
            if not _is_there(path, files[name]):
                remote.bucket.fetch(name, path, files[name])
        layout.check_files(remote.folder, files, files, checksums=True)
        remote.folder.rename(target)
        sync(target.parent)
        remove_folder(incoming)
    return target


def _is_there(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"]
