"""Write a split with several processes or in several runs: finished shards are staged in a hidden folder."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Integer

from seitpp.books import Books
from seitpp.files import new_file, remove_folder, sync, write_file
from seitpp.store import layout as layouts
from seitpp.store.labels import Label
from seitpp.store.layout import StoreError
from seitpp.store.publish import BUILT, build, code_counts, place
from seitpp.store.samples import Columns, Samples, check_samples, make_batch
from seitpp.store.shards import read_shard, write_shard
from seitpp.store.spec import SplitSpec, check_inventory

STAGED_NAME = re.compile(r"shard-(\d+)\.arrow")
RECORD = "staging.json"


class SplitStaging:
    """A split that is written shard by shard, in any order, by any number of processes, in one or several runs.

    The images of a shard do not depend on the number of processes. Each process creates a SplitStaging with the
    same arguments and writes some shards; when all are finished, one process publishes the split. Finished shards
    survive a killed process: the next run writes only the others. The bytes of the store are those of one
    uninterrupted StoreWriter. A run that was killed after publishing can be continued as well: all shards count as
    finished, and `publish` only removes the staging folder.

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
        self.num_images, self._digest = num_images, digest
        self.folder = self._spec.path.parent / f".{self._spec.path.name}-{split}.staging"
        # Beside the folder, which is removed first.
        self._receipt = self.folder.with_suffix(".published")
        self.published = self._receipt.exists() and self._in_store()
        if not self.published:
            self._spec.adopt(self._spec.existing(self._was_interrupted()))
            self._begin()
            self._remove_others()

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

    def finished(self) -> set[int]:
        """Return the shards that any process of this or an earlier run has written."""
        return set(range(self.num_shards) if self.published else staged_shards(self.folder))

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

    def counts(self) -> Int64[np.ndarray, " codes"]:
        """Count how often each code of the one table occurs in the finished shards."""
        counts = (code_counts(self._spec, path) for path in staged_shards(self.folder).values())
        return sum(counts, np.zeros(self._spec.books.rows, np.int64))

    def num_written(self) -> int:
        """Count the images of the finished shards."""
        return sum(len(read_shard(path)) for path in staged_shards(self.folder).values())

    def keep(self, codes: Integer[np.ndarray, " kept"], tokenizer: Mapping[str, Any] | None) -> None:
        """Restrict the codebook to the codes with ids `codes`, which get the ids 0, 1, ... in this order.

        `codes` must include all codes that occur, and the store must not exist yet; `tokenizer` describes the
        tokenizer of the new ids. Call it between the last `write` and `publish`. If the run is killed after
        publishing, continue it with the codebook and the tokenizer of the store.
        """
        self._spec = self._spec.keep(codes, tokenizer)

    def publish(self, processes: int = 1, inventory: Mapping[str, Any] | None = None) -> None:
        """Encode all shards, create the store or add the split to it, and remove the staging folder.

        `inventory` says what was read and what was left out, as any mapping that JSON can represent: it is stored
        with the split and shown in the store's card. Only one process calls this; it starts `processes` processes
        for the encoding. If these are several, the calling script needs `if __name__ == "__main__"`. Raises
        StoreError if shards are missing. While another process adds to the store, it waits.
        """
        missing = sorted(set(range(self.num_shards)) - self.finished())
        if missing:
            raise StoreError(
                f"{self.folder}: {len(missing)} shards are not finished, the first is {missing[0]}; write them"
            )
        with self._spec.locked():
            if not self.published:
                self._publish(processes, check_inventory(inventory))
            remove_folder(self.folder)
        self._receipt.unlink(missing_ok=True)  # last, so that the same call tidies up whatever was left

    def _publish(self, processes: int, inventory: dict[str, Any] | None) -> None:
        if self._was_interrupted():
            # Raises if another process has published the split by now: then its folder is not ours to remove.
            self._spec.existing(replace_left=True)
            remove_folder(self._spec.path / self._spec.split)
        staged = list(staged_shards(self.folder).values())
        store = build(self._spec, self.folder, staged, processes=processes, inventory=inventory)
        receipt = self.folder / self._receipt.name
        write_file(receipt, self._receipt_of(layouts.read_document(self.folder / BUILT)))
        receipt.replace(self._receipt)
        sync(self.folder.parent)
        place(self._spec, self.folder, store)
        self.published = True

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

    def _begin(self) -> None:
        """Write the record of the staging folder, or raise StoreError if it has a different one."""
        path, record = self.folder / RECORD, self._record()
        if self.folder.is_symlink():
            raise StoreError(f"{self.folder}: a link, expected a folder of an interrupted run; remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with new_file(path) as file:
                file.write(json.dumps(record).encode())
        try:
            begun = {"multi_label": False, **json.loads(path.read_bytes())}  # older records do not say it
        except (ValueError, TypeError) as error:
            raise StoreError(f"{path}: damaged ({error}); remove {self.folder} to begin anew") from error
        for key, value in record.items():
            if begun.get(key) != value and not (key == "num_images" and self._digest):
                raise StoreError(
                    f"{self.folder}: begun with {key} {begun.get(key)}, got {value}; "
                    "use the same arguments, or remove the folder to begin anew"
                )

    def _remove_others(self) -> None:
        """Remove the staged shards whose images are others now."""
        if self._digest is None:
            return
        for shard, path in staged_shards(self.folder).items():
            recorded = path.with_suffix(".digest")
            known = shard < self.num_shards and recorded.exists()
            if not known or recorded.read_text() != self._digest(self.images(shard)):
                path.unlink(missing_ok=True)


def staged_shards(folder: Path) -> dict[int, Path]:
    """Return the finished shards of a staging folder, {index: path} in order."""
    matches = ((STAGED_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def write_staged(spec: SplitSpec, folder: Path, *, shard: int, samples: Samples) -> None:
    """Write one staged shard durably and in one step."""
    with new_file(folder / f"shard-{shard:05d}.arrow") as file:
        write_shard(file, make_batch(spec, samples))
