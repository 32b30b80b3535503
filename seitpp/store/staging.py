"""Write a split with several processes or in several runs: finished shards are staged in a hidden folder."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Integer
from tqdm import tqdm

from seitpp.books import Books
from seitpp.errors import refusing
from seitpp.files import new_file, read_json, remove_folder, replace_bytes, replace_json, sync, write_file
from seitpp.store import layout as layouts
from seitpp.store.encoding import Encoded, Encoding, Table, code_counts, encode
from seitpp.store.labels import Label
from seitpp.store.layout import StoreError
from seitpp.store.publish import BUILT, Content, build, codebook_bytes, first_staged, place
from seitpp.store.samples import Columns, Samples, check_samples, make_batch
from seitpp.store.shards import write_shard
from seitpp.store.spec import SplitSpec, check_inventory

STAGED_NAME = re.compile(r"shard-(\d+)\.arrow")
ENCODED_NAME = re.compile(r"encoded-(\d+)\.json")
RECORD, TABLE = "staging.json", "table.json"


class SplitStaging:
    """A split that is written shard by shard, in any order, by any number of processes, in one or several runs.

    The images of a shard do not depend on the number of processes. Each process creates a SplitStaging with the
    same arguments and writes some shards; when all are finished, one process publishes the split. Finished shards
    survive a killed process: the next run writes only the others. As soon as the code table is known, which is
    made from the first 2^21 images, any process can encode any shards of the store that are finished. The bytes of
    the store are those of one uninterrupted StoreWriter. A run that was killed after publishing can be continued
    as well: all shards count as finished, and `publish` only removes the staging folder.

        staging = SplitStaging("tokens", codebook=codebook, grid=(32, 32), num_images=len(images))
        for shard in range(rank, staging.num_shards, ranks):
            if shard not in staging.finished():
                staging.write(shard, *tokenize(images, staging.images(shard)))
        ...                                  # wait for the other processes
        if rank == 0:
            staging.publish()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codebook: Books | Float[np.ndarray, "codes dim"],
        grid: tuple[int, int] | None,
        layout: str | None = None,
        num_images: int,
        codec: str = "ans",
        split: str = "train",
        class_names: Sequence[str] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
        multi_label: bool = False,
        digest: Callable[[range], str] | None = None,
    ) -> None:
        """The arguments are those of StoreWriter; `num_images` is the number of images of the split, at least 1.

        `digest` says what the images with some indices are: a shard that an earlier run has staged of other images
        is removed, and only with it `num_images` may be another than in that run. Raises StoreError also if the
        staging folder was begun with other arguments.
        """
        self._spec = SplitSpec(
            path,
            codebook=codebook,
            grid=grid,
            layout=layout,
            codec=codec,
            split=split,
            class_names=class_names,
            tokenizer=tokenizer,
            columns=columns,
            multi_label=multi_label,
        )
        if not 1 <= num_images <= layouts.MAX_ROWS:
            raise StoreError(f"num_images: got {num_images}, expected 1 .. {layouts.MAX_ROWS}")
        self.path, self.num_images, self._digest = self._spec.path, num_images, digest
        self.folder = staging_folder(self._spec.path, split)
        # Beside the folder, which is removed first.
        self._receipt = self.folder.with_suffix(".published")
        self.published = self._receipt.exists() and self._in_store()
        if not self.published:
            self._spec.adopt(self._spec.existing(self._was_interrupted()))
            self._begin()
            self._remove_others()

    @classmethod
    def begun(cls, path: str | os.PathLike[str], split: str) -> "SplitStaging":
        """Open a split that other processes have begun, to encode and publish it as they would.

        Raises StoreError if none has.
        """
        return cls(path, split=split, **recorded(staging_folder(Path(path).resolve(), split)))

    @property
    def num_shards(self) -> int:
        """The number of shards of the whole split."""
        return -(-self.num_images // self._spec.shard_images)

    def images(self, shard: int) -> range:
        """Return the indices of the images of a shard. Raises StoreError if there is no such shard."""
        if not 0 <= shard < self.num_shards:
            raise StoreError(f"shard {shard}: expected 0 .. {self.num_shards - 1}; write the shards of this split")
        size = self._spec.shard_images
        return range(shard * size, min((shard + 1) * size, self.num_images))

    @property
    def groups(self) -> list[range]:
        """The shards of which each shard of the store consists, several if there are more than 1,024."""
        return self._spec.groups(self.num_shards)

    def finished(self, among: Collection[int] | None = None) -> set[int]:
        """Return the shards, or those `among` some, that any process of this or an earlier run has written."""
        if self.published:
            found = set(range(self.num_shards))
        else:
            groups = self.groups
            encoded = {shard for group in encoded_groups(self.folder) for shard in groups[group]}
            found = encoded | staged_shards(self.folder).keys()
        return found if among is None else found.intersection(among)

    def write(
        self,
        shard: int,
        ids: Integer[np.ndarray, "images *digits height width"] | Sequence[Integer[np.ndarray, "..."]],
        labels: Integer[np.ndarray, " images"] | Sequence[Label],
        *,
        columns: Columns | None = None,
    ) -> None:
        """Write a whole shard durably and in one step.

        The arguments are those of StoreWriter.add_batch, for the images `images(shard)` in this order; images that
        could not be read are left out. Raises StoreError for invalid values and for too many images.
        """
        indices = self.images(shard)
        samples = check_samples(self._spec, ids, labels, columns=columns, first=indices.start)
        if len(samples.ids) > len(indices):
            raise StoreError(
                f"shard {shard}: got {len(samples.ids)} images, expected at most {len(indices)}; "
                "write the images of this shard only"
            )
        if self._digest:  # first, since a shard without its digest is made again
            with new_file(self.folder / f"shard-{shard:05d}.digest") as file:
                file.write(self._digest(indices).encode())
        write_staged(self._spec, self.folder, shard=shard, samples=samples)

    def encode(self, groups: Iterable[int]) -> list[int]:
        """Encode those of the shards `groups` of the store whose shards here are finished; return which these are.

        Nothing is done as long as the code table is not known. What is encoded replaces what was written, so codes
        can no longer be left out by `keep`. Any processes may do this at the same time for different groups.
        """
        if self.published:
            return []
        every, staged = self.groups, staged_shards(self.folder)
        done = encoded_groups(self.folder).keys()
        ready = [group for group in groups if group not in done and all(shard in staged for shard in every[group])]
        table = self._table() if ready else None
        if table is None:
            return []
        for group in tqdm(ready, desc=f"encoding {self._spec.split}", unit="shard", disable=None):
            paths, target = [staged[shard] for shard in every[group]], self._encoded(group)
            digests = [path.read_text() if path.exists() else None for path in map(_beside, paths)]
            facts = {**encode(Encoding(self._spec, table, paths, target))._asdict(), "digests": digests}
            replace_json(target.with_suffix(".json"), facts)
            for path in paths:
                path.unlink()
                _beside(path).unlink(missing_ok=True)
        return ready

    def share(self) -> None:
        """Let others see what is noted in the staging folder: on a disk, they do."""

    def check_finished(self) -> None:
        """Raise StoreError if shards are missing."""
        missing = sorted(set(range(self.num_shards)) - self.finished())
        if missing:
            raise StoreError(
                f"{self.folder}: {len(missing)} shards are not finished, the first is {missing[0]}; write them"
            )

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        """The description of the tokenizer."""
        return self._spec.tokenizer

    def counts(self) -> Int64[np.ndarray, " codes"]:
        """Count how often each code of the one table occurs in the shards that are finished and not encoded."""
        counts = (code_counts(self._spec, path) for path in staged_shards(self.folder).values())
        return sum(counts, np.zeros(self._spec.books.rows, np.int64))

    def num_written(self) -> int:
        """Count the images of the finished shards."""
        return sum(content.rows for content in self._contents())

    def keep(self, codes: Integer[np.ndarray, " kept"], tokenizer: Mapping[str, Any] | None) -> None:
        """Restrict the codebook to the codes with ids `codes`, which get the ids 0, 1, ... in this order.

        `codes` must include all codes that occur, and the store must not exist yet; `tokenizer` describes the
        tokenizer of the new ids. Call it between the last `write` and `publish`. If the run is killed after
        publishing, continue it with the codebook and the tokenizer of the store.
        """
        if encoded_groups(self.folder):
            raise StoreError(
                f"{self.folder}: encoded with all codes, cannot leave some out; publish it so, or remove the "
                "folder to begin anew"
            )
        (self.folder / TABLE).unlink(missing_ok=True)
        self._spec = self._spec.keep(codes, tokenizer)

    def publish(self, processes: int = 1, inventory: Mapping[str, Any] | None = None) -> None:
        """Encode all shards, create the store or add the split to it, and remove the staging folder.

        `inventory` says what was read and what was left out, as any mapping that JSON can represent: it is stored
        with the split and shown in the store's card. Only one process calls this; it starts `processes` processes
        for the encoding. If these are several, the calling script needs `if __name__ == "__main__"`. Raises
        StoreError if shards are missing. While another process adds to the store, it waits.
        """
        self.check_finished()
        with self._spec.locked():
            if not self.published:
                self._publish(processes, check_inventory(inventory))
            remove_folder(self.folder)
        self._deliver()
        self._receipt.unlink(missing_ok=True)  # last, so that the same call tidies up whatever was left

    def _deliver(self) -> None:
        """Bring the store where it is to be: on a disk, it is there."""

    def _publish(self, processes: int, inventory: dict[str, Any] | None) -> None:
        if self._was_interrupted():
            # Raises if another process has published the split by now: then its folder is not ours to remove.
            self._spec.existing(replace_left=True)
            remove_folder(self._spec.path / self._spec.split)
        table = None if self._spec.renumbering else self._table()
        store = build(
            self._spec, self.folder, self._contents(), table=table, processes=processes, inventory=inventory
        )
        receipt = self.folder / self._receipt.name
        write_file(receipt, self._receipt_of(layouts.read_document(self.folder / BUILT)))
        receipt.replace(self._receipt)
        sync(self.folder.parent)
        place(self._spec, self.folder, store)
        self.published = True

    def _contents(self) -> list[Content]:
        """Return what is finished, by shards of the store."""
        staged, encoded = staged_shards(self.folder), encoded_groups(self.folder)
        contents = []
        for number, group in enumerate(self.groups):
            facts = Encoded.read(encoded[number]) if number in encoded else None
            paths = [staged[shard] for shard in group if shard in staged and not facts]
            contents.append(Content(paths, self._encoded(number) if facts else None, facts))
        return contents

    def _encoded(self, group: int) -> Path:
        return self.folder / f"encoded-{group:05d}.arrow"

    def _table(self) -> Table | None:
        """Return the table of the store or, if it is new, of the first images of this split; None before these.

        Raises StoreError if images were encoded by another table than that of the store.
        """
        path, store = self.folder / TABLE, self._spec.existing(self._was_interrupted())
        if not path.exists() and store is None:
            staged, first = staged_shards(self.folder), first_staged(self._spec, range(self.num_shards))
            if any(shard not in staged for shard in first):
                return None
            made = Table.of_first(self._spec, [staged[shard] for shard in first])
            replace_json(path, {**made.to_json(), "digests": self._first_digests()})
        own = Table.read(path) if path.exists() else None
        if store is None:
            return own
        table = Table.of_store(self._spec.path, store)
        if own and own != table and encoded_groups(self.folder):
            raise StoreError(
                f"{self.folder}: encoded for a new store, but {self._spec.path} was written with another code "
                "table since; move that store away, finish this split, and join both by `seitpp merge`"
            )
        return table

    def _receipt_of(self, document: dict[str, Any]) -> bytes:
        """Return the content of the receipt: the record of the split and the entries of its files."""
        prefix = f"{self._spec.split}/"
        files = {name: entry for name, entry in document["files"].items() if name.startswith(prefix)}
        return json.dumps({**self._record(), "files": files}).encode()

    def _in_store(self) -> bool:
        """Return whether an earlier run published exactly this split and was killed before it cleaned up."""
        if not (self._spec.path / layouts.DOCUMENT).exists():
            return False
        store = layouts.read_document(self._spec.path)
        self._spec.adopt(store)
        return self._receipt.read_bytes() == self._receipt_of(store)

    def _was_interrupted(self) -> bool:
        """Return whether an earlier run was killed between the renames that add a split to a store."""
        built = self.folder / BUILT
        return (built / layouts.DOCUMENT).exists() and not (built / self._spec.split).exists()

    def _record(self) -> dict[str, Any]:
        """Return the properties that identify the split of the staging folder."""
        return {**self._spec.identity(), "num_images": self.num_images, "shard_images": self._spec.shard_images}

    def _shapes(self) -> dict[str, Any]:
        """Return what tokens.json says of the codebook, so that others can read it here."""
        books = self._spec.books
        described = {"digits": books.describe()} if books.describe() else {}
        return {"num_codes": books.rows, "code_dim": books.dim, **described}

    def _begin(self) -> None:
        """Write the record of the staging folder, or raise StoreError if it has a different one."""
        path, record = self.folder / RECORD, self._record()
        if self.folder.is_symlink():
            raise StoreError(f"{self.folder}: a link, expected a folder of an interrupted run; remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            begun = json.loads(path.read_bytes()) if path.exists() else record
            begun = {"multi_label": False, **begun}  # older records do not say it
        except (ValueError, TypeError) as error:
            raise StoreError(f"{path}: damaged ({error}); remove {self.folder} to begin anew") from error
        for key, value in record.items():
            if begun.get(key) != value and not (key == "num_images" and self._digest):
                raise StoreError(
                    f"{self.folder}: begun with {key} {begun.get(key)}, got {value}; "
                    "use the same arguments, or remove the folder to begin anew"
                )
        if not (self.folder / layouts.CODEBOOK).exists():
            replace_bytes(self.folder / layouts.CODEBOOK, codebook_bytes(self._spec.books))
        if begun != {**record, **self._shapes()}:
            replace_json(path, {**record, **self._shapes()})

    def _remove_others(self) -> None:
        """Remove the shards whose images are others now, and all that is encoded if the code table is another."""
        if self._digest is None:
            return
        encoded, damaged = encoded_groups(self.folder), "the facts of a shard; remove its folder to begin anew"
        if (self.folder / TABLE).exists() and self._first_digests() != read_json(
            self.folder / TABLE, StoreError, "a code table; remove its folder to begin anew"
        ).get("digests"):
            for path in (self.folder / TABLE, *encoded.values()):
                path.unlink(missing_ok=True)
            encoded = {}
        for number, path in encoded.items():
            group = self.groups[number] if number < len(self.groups) else ()
            if read_json(path, StoreError, damaged).get("digests") != [self._digest_of(shard) for shard in group]:
                path.unlink(missing_ok=True)
        for shard, path in staged_shards(self.folder).items():
            recorded = _beside(path)
            known = shard < self.num_shards and recorded.exists()
            if not known or recorded.read_text() != self._digest_of(shard):
                path.unlink(missing_ok=True)

    def _digest_of(self, shard: int) -> str | None:
        return self._digest(self.images(shard)) if self._digest else None

    def _first_digests(self) -> list[str | None]:
        """Say what the images are from which the code table is made."""
        return [self._digest_of(shard) for shard in first_staged(self._spec, range(self.num_shards))]


def staging_folder(store: Path, split: str) -> Path:
    """Return the folder in which a split of a store is made."""
    return store.parent / f".{store.name}-{split}.staging"


def recorded(folder: Path) -> dict[str, Any]:
    """Return the arguments with which the split of a staging folder was begun.

    Raises StoreError if none was, or if its record is damaged.
    """
    if not (folder / RECORD).is_file():
        raise StoreError(f"{folder}: no such folder, nobody has begun this split")
    record = read_json(folder / RECORD, StoreError, "the record of a split; remove its folder to begin anew")
    with refusing(StoreError, f"{folder}: damaged", "what a split was begun with; begin it anew"):
        return {
            "codebook": layouts.read_books(folder, record),
            **{name: record.get(name) for name in ("grid", "layout", "class_names", "tokenizer")},
            **{name: record[name] for name in ("num_images", "codec", "columns", "multi_label")},
        }


def begun_splits(store: Path) -> list[str]:
    """Return the splits of a store that are being made, "train" first."""
    match = re.compile(re.escape(f".{store.name}-") + f"({layouts.SPLIT_NAME.pattern})" + r"\.staging").fullmatch
    found = [named[1] for path in store.parent.glob(".*.staging") if (named := match(path.name))]
    return sorted(found, key=lambda split: (split != "train", split))


def tidied(store: Path, split: str) -> bool:
    """Remove what a process left that was killed after it had published a split; return whether there was one."""
    folder = staging_folder(store.resolve(), split)
    receipt = folder.with_suffix(".published")
    if not receipt.exists() or not (store / layouts.DOCUMENT).exists():
        return False
    published = read_json(receipt, StoreError, "what was published; remove it if the split is not in the store")
    prefix, files = f"{split}/", layouts.read_document(store)["files"]
    if published.get("files") != {name: entry for name, entry in files.items() if name.startswith(prefix)}:
        return False
    remove_folder(folder)
    receipt.unlink()
    return True


def staged_shards(folder: Path) -> dict[int, Path]:
    """Return the finished shards of a staging folder that are not encoded, {index: path} in order."""
    return _numbered(folder, STAGED_NAME)


def encoded_groups(folder: Path) -> dict[int, Path]:
    """Return the files with the facts of the shards that are encoded in a staging folder, {index: path}."""
    return _numbered(folder, ENCODED_NAME)


def _numbered(folder: Path, name: re.Pattern) -> dict[int, Path]:
    matches = ((name.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _beside(staged: Path) -> Path:
    """Return the file with the digest of the images of a staged shard."""
    return staged.with_suffix(".digest")


def write_staged(spec: SplitSpec, folder: Path, *, shard: int, samples: Samples) -> None:
    """Write one staged shard durably and in one step."""
    with new_file(folder / f"shard-{shard:05d}.arrow") as file:
        write_shard(file, make_batch(spec, samples))
