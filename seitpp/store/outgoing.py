"""Write a store into a bucket: what is finished is sent there, and nothing else needs to outlive a machine."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer
from tqdm import tqdm

from seitpp.errors import UserError
from seitpp.files import (
    cache_root,
    empty_folder,
    make_folder,
    owned,
    remove_file,
    remove_folder,
    replace_bytes,
    sha256,
)
from seitpp.store import layout
from seitpp.store.bucket import Bucket, ExistsError
from seitpp.store.labels import Label
from seitpp.store.layout import StoreError
from seitpp.store.publish import first_staged
from seitpp.store.samples import Columns
from seitpp.store.staging import (
    TABLE,
    SplitStaging,
    encoded_groups,
    recorded,
    staged_shards,
    staging_folder,
)

# What is finished, in the bucket: KIND-NUMBER-MARK-SHA256.arrow; facts of an encoded one are in a .json beside it.
SENT_NAME = re.compile(r"(shard|encoded)-(\d+)-([0-9a-f]{16})-([0-9a-f]{64})\.arrow")
# What is noted of a split, in its staging folder and in the bucket.
NOTE_NAME = re.compile(r"[a-z]+\.(json|safetensors)")
# Who sends a store says first which one it is, so that two do not mix their shards.
CLAIM = "tokens.json.incoming"
TOKENIZER = "tokenizer.safetensors"  # in the name of the file beside the store


class Sent(NamedTuple):
    """What is finished and in the bucket: a staged shard, or if `encoded` one of the store.

    `mark` is the digest of its images.
    """

    name: str
    encoded: bool
    number: int
    mark: str
    entry: dict[str, Any]


class Target:
    """The store that is written to `url`, by way of the local folder `path`, of which each `task` has its own."""

    def __init__(self, url: str, task: int | None = None) -> None:
        """Raises StoreError for a bucket itself."""
        self.url = url.rstrip("/")
        above, _, name = self.url.rpartition("/")
        if above.endswith(":/") or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise StoreError(f"{url}: expected a folder in a bucket, as s3://bucket/tokens; check its name")
        key = hashlib.sha256(f"{self.url}#{task}".encode()).hexdigest()[:16]
        self.path, self.above = cache_root().resolve() / "outgoing" / key / name, Bucket(above)

    def staging(self, split: str) -> Bucket:
        """Return the place of what is finished of a split."""
        return Bucket(f"{self.above.url}/{staging_folder(self.path, split).name}")

    @contextmanager
    def opened(self) -> Iterator[list[str]]:
        """Hold the folder during a block and remove it then, unless the block fails; its errors name the URL.

        Yields what `receive` returns. Raises UserError if another process of this machine holds it.
        """
        folder = self.path.parent
        make_folder(folder.parent)
        with owned(folder.with_suffix(".writer")):
            try:
                yield self.receive()
            except UserError as error:
                raise type(error)(str(error).replace(str(self.path), self.url)) from error
            remove_folder(folder)

    def receive(self) -> list[str]:
        """Copy what the store says of itself, if there is one, and what was noted of the splits that are begun.

        Returns these splits, "train" first. What is published in the folder by a process that was killed then is
        sent first.
        """
        if any(self.path.parent.glob(f".{self.path.name}-*.published")) and self.path.exists():
            self.deliver()
        empty_folder(self.path.parent)  # all that counts is in the bucket
        raw = Bucket(self.url).read_if_there(layout.DOCUMENT)
        if raw is not None:
            make_folder(self.path)
            replace_bytes(self.path / layout.DOCUMENT, raw)
            for name, entry in layout.read_document(self.path)["files"].items():
                if "/" not in name and name not in layout.DERIVED:
                    Bucket(self.url).fetch(name, self.path / name, entry)
        names, folders = self.above.below()
        if (tokenizer := f"{self.path.name}-{TOKENIZER}") in names:
            self.above.copy(tokenizer, self.path.with_name(tokenizer), self.above.entry(tokenizer))
        begun = self._begun(folders)
        for split in begun:
            folder, staging = staging_folder(self.path, split), self.staging(split)
            make_folder(folder)
            for name, entry in staging.entries().items():
                if NOTE_NAME.fullmatch(name):
                    staging.copy(name, folder / name, entry)
        return begun

    def _begun(self, folders: list[str]) -> list[str]:
        start, end = f".{self.path.name}-", ".staging"
        names = [name for name in folders if name.startswith(start) and name.endswith(end)]
        splits = [name.removeprefix(start).removesuffix(end) for name in names]
        return sorted(filter(layout.SPLIT_NAME.fullmatch, splits), key=lambda split: (split != "train", split))

    def deliver(self) -> None:
        """Send the store in the folder and the files beside it, and remove what was kept of its splits."""
        send(self.path, self.url)
        for path in self.path.parent.glob(f"{self.path.name}-*"):
            self.above.put(path.name, path)
        for split in layout.read_document(self.path)["splits"]:
            staging = self.staging(split)
            staging.remove(staging.entries())


def send(root: Path, url: str) -> None:
    """Upload the folder of a store to the bucket `url`, tokens.json last: until then nobody takes it for a store.

    Every file is verified first. An upload that broke off is continued: shards that are there with the same size
    are not sent again. To a store that is there, splits can be added, whose files alone need to be in the folder.
    Raises StoreError if the store is damaged, if another one is there, or if another one is being sent.
    """
    bucket, document, raw = Bucket(url), layout.read_document(root), (root / layout.DOCUMENT).read_bytes()
    before = bucket.read_if_there(layout.DOCUMENT)
    old = {} if before is None else layout.parse_document(before, bucket.url)["files"]
    kept = {name: entry for name, entry in old.items() if name not in layout.DERIVED}
    if not kept.items() <= document["files"].items():
        raise StoreError(f"{bucket.url}: another store is there and nothing is overwritten; choose another URL")
    new = [name for name in document["files"] if name not in kept]
    layout.check_files(root, document["files"], new, checksums=True)
    try:
        bucket.write(CLAIM, document["checksum"].encode())
    except ExistsError as error:
        raise StoreError(
            f"{bucket.url}: another store is being sent there; wait, or remove {CLAIM} there if nobody does it"
        ) from error
    there = bucket.entries()
    for name in tqdm(new, desc=bucket.url, unit="file", disable=None):
        size = document["files"][name]["bytes"]
        if not name.endswith(".arrow") or name not in there or there[name].size != size:
            bucket.put(name, root / name)
    if raw != before:
        bucket.write(layout.DOCUMENT, raw, replacing=None if before is None else there[layout.DOCUMENT].tag)
    bucket.remove([CLAIM])


class BucketStaging(SplitStaging):
    """A split that is written to a bucket as SplitStaging writes one to a disk.

    Every shard is sent when it is written or encoded, and not kept here. So any number of machines without a
    common disk can write them, one that is lost loses no shard, and one publishes the store in the bucket.
    """

    def __init__(self, target: Target, *, split: str = "train", **arguments: Any) -> None:
        """The arguments are those of SplitStaging; `target` has received what is there."""
        self._target, self._bucket = target, target.staging(split)
        super().__init__(target.path, split=split, **arguments)

    @classmethod
    def of_record(cls, target: Target, split: str) -> "BucketStaging":
        """Open a split that tasks have begun, to publish it. Raises StoreError if none has."""
        return cls(target, split=split, **recorded(staging_folder(target.path, split)))

    def share(self) -> None:
        """Send what is noted of the split, and the files beside the store.

        Raises StoreError if another process has begun the split otherwise.
        """
        if self.published:
            return
        there = self._bucket.entries()
        for path in sorted(self.folder.iterdir()):
            if NOTE_NAME.fullmatch(path.name) is None:
                continue
            if path.stat().st_size > layout.MAX_DOCUMENT_BYTES:  # a tokenizer, of which the record tells as well
                if path.name not in there:
                    self._bucket.put(path.name, path)
                continue
            try:
                self._bucket.write(path.name, path.read_bytes())
            except ExistsError as error:
                raise StoreError(
                    f"{self._bucket.url}/{path.name}: begun otherwise by another process; use the same arguments "
                    "and images, or remove what is there to begin anew"
                ) from error
        for path in self.path.parent.glob(f"{self.path.name}-*"):
            self._target.above.put(path.name, path)

    def finished(self, among: Collection[int] | None = None) -> set[int]:
        """Return the shards that any process of this or an earlier run has written.

        Those `among` some shards whose images are others now are removed.
        """
        if self.published:
            return super().finished(among)
        found, stale = set(), []
        for sent in self._sent():
            shards = self._shards(sent)
            if among is not None and set(shards).isdisjoint(among):
                continue
            if self._digest is None or sent.mark == self._mark(shards):
                found.update(shards)
            elif among is not None:
                stale += _names(sent)
        self._bucket.remove(stale)
        return found

    def write(
        self,
        shard: int,
        ids: Integer[np.ndarray, "images *digits height width"] | Sequence[Integer[np.ndarray, "..."]],
        labels: Integer[np.ndarray, " images"] | Sequence[Label],
        *,
        columns: Columns | None = None,
    ) -> None:
        """Write a whole shard, as SplitStaging does, and send it."""
        super().write(shard, ids, labels, columns=columns)
        self._send(staged_shards(self.folder)[shard], [shard])

    def encode(self, groups: Iterable[int]) -> list[int]:
        """Encode those of the shards `groups` of the store whose shards here are finished; return which these are.

        Of a new store with no more images than make the code table, whoever publishes it encodes them.
        """
        if self.published or not self._has_table():
            return []
        wanted, sent = self._ready(set(groups))
        self._fetch(sent)
        done = super().encode(wanted)
        for group in done:
            path, shards = encoded_groups(self.folder)[group], self.groups[group]
            self._send(path.with_suffix(".arrow"), shards, facts=path)
            self._bucket.remove(one.name for one in sent if one.number in shards)
        return done

    def check_finished(self) -> None:
        """Copy what is finished from the bucket. Raises StoreError if shards are missing."""
        if self.published:
            return
        every, encoded = self._sent(), set()
        chosen: dict[tuple[bool, int], Sent] = {}
        for sent in sorted(every, key=lambda sent: not sent.encoded):
            if sent.encoded:
                encoded.update(self._shards(sent))
            elif sent.number in encoded:
                continue
            one = chosen.setdefault((sent.encoded, sent.number), sent)
            if one.mark != sent.mark:
                raise StoreError(
                    f"{self._bucket.url}: {one.name} and {sent.name} are of other images; remove one of them, or "
                    "run their task again"
                )
        missing = sorted(set(range(self.num_shards)) - encoded - {number for _, number in chosen})
        if missing:
            raise StoreError(
                f"{self._bucket.url}: {len(missing)} shards are not finished, the first is {missing[0]}; write "
                "them"
            )
        self._fetch(chosen.values())

    def _deliver(self) -> None:
        self._target.deliver()

    def _sent(self) -> list[Sent]:
        """List what is finished and in the bucket, also by others; those that do not fit are refused."""
        found = []
        there = self._bucket.entries()
        for name, entry in sorted(there.items()):
            match = SENT_NAME.fullmatch(name)
            if match is None or (match[1] == "encoded" and f"{name[:-6]}.json" not in there):
                continue
            number, encoded = int(match[2]), match[1] == "encoded"
            if number >= len(self.groups if encoded else range(self.num_shards)):
                raise StoreError(f"{self._bucket.url}/{name}: not of this split; remove it")
            found.append(Sent(name, encoded, number, match[3], {"bytes": entry.size, "sha256": match[4]}))
        return found

    def _shards(self, sent: Sent) -> Sequence[int]:
        return self.groups[sent.number] if sent.encoded else (sent.number,)

    def _mark(self, shards: Iterable[int]) -> str:
        """Return the digest of the images of some shards, short enough for a name."""
        return hashlib.sha256("".join(f"{self._digest_of(shard)}" for shard in shards).encode()).hexdigest()[:16]

    def _send(self, path: Path, shards: Sequence[int], facts: Path | None = None) -> None:
        """Send a finished shard of these shards under its name in the bucket, and remove it here."""
        stem = f"{path.stem}-{self._mark(shards)}-{sha256(path)}"
        self._bucket.put(f"{stem}.arrow", path)
        if facts:
            self._bucket.put(f"{stem}.json", facts)
        for one in (path, path.with_suffix(".digest"), path.with_suffix(".json")):
            if one.exists():
                remove_file(one)

    def _fetch(self, several: Iterable[Sent]) -> None:
        """Copy what is finished into the staging folder."""
        for sent in tqdm(list(several), desc=self._bucket.url, unit="file", disable=None):
            kind = "encoded" if sent.encoded else "shard"
            path = self.folder / f"{kind}-{sent.number:05d}.arrow"
            if not path.exists():
                self._bucket.fetch(sent.name, path, sent.entry)
            if sent.encoded:
                replace_bytes(path.with_suffix(".json"), self._bucket.read(f"{sent.name[:-6]}.json"))

    def _ready(self, groups: set[int]) -> tuple[list[int], list[Sent]]:
        """Return those groups that are finished and not encoded, and their shards in the bucket."""
        every = self._sent()
        encoded = {sent.number for sent in every if sent.encoded}
        staged = {sent.number: sent for sent in every if not sent.encoded}
        ready = [
            group for group in sorted(groups - encoded) if all(shard in staged for shard in self.groups[group])
        ]
        return ready, [staged[shard] for group in ready for shard in self.groups[group]]

    def _has_table(self) -> bool:
        """Return whether the code table is known; if all shards that make it are finished, make it."""
        first = first_staged(self._spec, range(self.num_shards))
        if (self.path / layout.DOCUMENT).exists() or (self.folder / TABLE).exists():
            return True
        if len(first) == self.num_shards:
            return False
        staged = {sent.number: sent for sent in self._sent() if not sent.encoded}
        if any(shard not in staged for shard in first):
            return False
        self._fetch(staged[shard] for shard in first)
        self._table()
        self.share()
        for path in staged_shards(self.folder).values():
            remove_file(path)
        return True


def _names(sent: Sent) -> list[str]:
    return [sent.name, f"{sent.name[:-6]}.json"] if sent.encoded else [sent.name]
