"""Write a split from several processes or over several runs: finished shards wait in a folder beside it."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from seitpp.files import lock, new_file, remove_folder, sync, unlock, write_file
from seitpp.store import layout
from seitpp.store.layout import StoreError
from seitpp.store.publish import MADE, build, place, survey
from seitpp.store.samples import Columns, Samples, check_samples, make_batch
from seitpp.store.shards import write_shard
from seitpp.store.spec import SplitSpec

STAGED_NAME = re.compile(r"shard-(\d+)\.arrow")
RECORD, LOCK = "staging.json", "publishing.lock"


class SplitStaging:
    """A split that is made shard by shard, in any order, by any number of processes, in one run or in several.

    Which images are in which shard does not depend on the processes. Each makes its own SplitStaging with the same
    arguments and writes some shards; when all are there, one process publishes. What was written stays when a
    process is killed: the next run asks for the finished shards and writes the others. The store has the bytes
    that one uninterrupted StoreWriter would give it. A run that was killed when its split was in the store already
    is continued too: all shards are finished then, and `publish` only removes what was left.

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
        codebook: np.ndarray,
        grid: tuple[int, int] | None,
        num_images: int,
        codec: str = "ans",
        split: str = "train",
        class_names: Sequence[str] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """As StoreWriter; num_images: images of the split, at least 1.

        Raises StoreError also if the staging folder belongs to a split that was begun with something else.
        """
        self._spec = SplitSpec(
            path,
            codebook=codebook,
            grid=grid,
            codec=codec,
            split=split,
            class_names=class_names,
            tokenizer=tokenizer,
            columns=columns,
        )
        if not 1 <= num_images <= layout.MAX_ROWS:
            raise StoreError(f"num_images: got {num_images}, expected 1 .. {layout.MAX_ROWS}")
        self.num_images = num_images
        self.folder = self._spec.path.parent / f".{self._spec.path.name}-{split}.staging"
        # Beside the folder, since it must outlive every file of it.
        self._receipt = self.folder.with_suffix(".published")
        self.published = self._receipt.exists() and self._in_store()
        if not self.published:
            self._spec.adopt(self._spec.existing(self._left_by_us()))
            self._begin()

    @property
    def num_shards(self) -> int:
        """Shards of the whole split."""
        return -(-self.num_images // self._spec.shard_images)

    def images(self, shard: int) -> range:
        """Numbers of the images of a shard. Raises StoreError if there is no such shard."""
        if not 0 <= shard < self.num_shards:
            raise StoreError(f"shard {shard}: expected 0 .. {self.num_shards - 1}")
        size = self._spec.shard_images
        return range(shard * size, min((shard + 1) * size, self.num_images))

    def finished(self) -> set[int]:
        """The shards that some process, of this run or of an earlier one, has written."""
        return set(range(self.num_shards) if self.published else staged_shards(self.folder))

    def write(
        self,
        shard: int,
        ids: np.ndarray | Sequence[np.ndarray],
        labels: np.ndarray | Sequence[int],
        columns: Columns | None = None,
    ) -> None:
        """Write a whole shard, durably: afterwards it is finished, before that it is not there.

        ids, labels, columns: as StoreWriter.add_batch, of the images `images(shard)` in their order; those that
        could not be read are left out. Raises StoreError for anything else, also for too many images.
        """
        numbers = self.images(shard)
        images = check_samples(self._spec, ids, labels, columns, first=numbers.start)
        if len(images.ids) > len(numbers):
            raise StoreError(f"shard {shard}: got {len(images.ids)} images, expected at most {len(numbers)}")
        write_staged(self._spec, self.folder, shard, images)

    def counts(self) -> np.ndarray:
        """How often each code is in the finished shards, (K,) int64."""
        num_codes = len(self._spec.codebook)
        staged = staged_shards(self.folder).values()
        return sum((survey(path, num_codes).counts for path in staged), np.zeros(num_codes, np.int64))

    def keep(self, codes: np.ndarray, tokenizer: Mapping[str, Any] | None) -> None:
        """Publish the split with `codes` (K',) of the codebook only, re-numbered in this order: those it uses.

        For a store that is not there yet; `tokenizer` is what makes these ids.

        To be called between the last `write` and `publish`. Killed after it has published, such a split is
        continued with the codebook and the tokenizer of its store.
        """
        self._spec = self._spec.keep(codes, tokenizer)

    def publish(self, processes: int = 1) -> None:
        """Encode all shards, make the store or add the split to it, and remove the staging folder.

        To be called by one process, which starts as many for the encoding. With several, the calling script needs
        `if __name__ == "__main__"`.
        Raises StoreError if shards are missing, or if another process publishes already.
        """
        missing = sorted(set(range(self.num_shards)) - self.finished())
        if missing:
            raise StoreError(f"{self.folder}: {len(missing)} shards are not finished, the first is {missing[0]}")
        if not self.published:
            with _only_one(self.folder / LOCK):
                self._publish(processes)
        remove_folder(self.folder)
        self._receipt.unlink(missing_ok=True)

    def _publish(self, processes: int) -> None:
        if self._left_by_us():
            # Raises if somebody else has published the split by now: then the folder is theirs.
            self._spec.existing(replace_left=True)
            remove_folder(self._spec.path / self._spec.split)
        store = build(self._spec, self.folder, list(staged_shards(self.folder).values()), processes)
        receipt = self.folder / self._receipt.name
        write_file(receipt, self._receipt_of(layout.read_document(self.folder / MADE)))
        receipt.replace(self._receipt)
        sync(self.folder.parent)
        place(self._spec, self.folder, store)
        self.published = True

    def _receipt_of(self, document: dict[str, Any]) -> bytes:
        """What was begun, and the files of the split in a store."""
        prefix = f"{self._spec.split}/"
        files = {name: entry for name, entry in document["files"].items() if name.startswith(prefix)}
        return json.dumps({**self._record(), "files": files}).encode()

    def _in_store(self) -> bool:
        """Whether an earlier run has published exactly this split, and was killed before it had tidied up."""
        if not (self._spec.path / layout.DOCUMENT).exists():
            return False
        store = layout.read_document(self._spec.path)
        self._spec.adopt(store)
        return self._receipt.read_bytes() == self._receipt_of(store)

    def _left_by_us(self) -> bool:
        """Whether an earlier run was killed between the renames that add a split to a store."""
        made = self.folder / MADE
        return (made / layout.DOCUMENT).exists() and not (made / self._spec.split).exists()

    def _record(self) -> dict[str, Any]:
        """What the folder belongs to."""
        return {**self._spec.identity(), "num_images": self.num_images, "shard_images": self._spec.shard_images}

    def _begin(self) -> None:
        """Record what the folder belongs to, or refuse to continue with something else."""
        path, record = self.folder / RECORD, self._record()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with new_file(path) as file:
                file.write(json.dumps(record).encode())
        try:
            begun = json.loads(path.read_bytes())
        except ValueError as error:
            raise StoreError(f"{path}: damaged ({error}); remove {self.folder} to begin anew") from error
        for key, value in record.items():
            if begun.get(key) != value:
                raise StoreError(
                    f"{self.folder}: begun with {key} {begun.get(key)}, got {value}; "
                    "go on as it was begun, or remove the folder to begin anew"
                )


def staged_shards(folder: Path) -> dict[int, Path]:
    """The finished shards in a staging folder, in order."""
    found = ((STAGED_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def write_staged(spec: SplitSpec, folder: Path, shard: int, images: Samples) -> None:
    """Write one staged shard, durably and in one step."""
    with new_file(folder / f"shard-{shard:05d}.arrow") as file:
        write_shard(file, make_batch(spec, images))


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Raises StoreError if another process is in such a block for the same file."""
    descriptor = lock(path)
    if descriptor is None:
        raise StoreError(f"{path.parent}: another process publishes it; wait for it")
    try:
        yield
    finally:
        unlock(descriptor)
