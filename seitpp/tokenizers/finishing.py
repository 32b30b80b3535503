"""Finish a split of a store that one process or many tasks have tokenized: choose codes, encode, publish."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from seitpp.errors import UserError, refusing
from seitpp.files import make_folder, owned, read_json, replace_json
from seitpp.store import SplitStaging, layout
from seitpp.store.bucket import is_bucket
from seitpp.store.outgoing import TOKENIZER, BucketStaging, Target
from seitpp.store.staging import begun_splits, tidied
from seitpp.tokenizers.base import Tokenizer, by_frequency
from seitpp.tokenizers.loading import load

PLAN = "plan.json"  # in the staging folder, as TOKENIZER


def save_plan(
    staging: SplitStaging, tokenizer: Tokenizer, *, inventory: dict[str, Any], crops: int, compact: bool
) -> None:
    """Write what finishing needs to know besides the shards; all tasks write the same.

    `inventory` is that of the images if all can be read, each of which becomes `crops` of the split. With
    `compact`, the codes that occur are chosen at the end, for which the `tokenizer` is kept.
    """
    if staging.published:
        return
    if compact:
        tokenizer.save(staging.folder / TOKENIZER)
    replace_json(staging.folder / PLAN, {"inventory": inventory, "crops": crops, "compact": compact})
    staging.share()


def finish_split(staging: SplitStaging, processes: int = 1) -> None:
    """Publish a split whose shards are finished, as `save_plan` says; `processes` processes encode what is left.

    With compaction, the tokenizer with the codes that are kept becomes STORE-tokenizer.safetensors. Raises
    StoreError if shards are missing.
    """
    staging.check_finished()
    if staging.published:
        staging.publish()
        return
    path, expected = staging.folder / PLAN, "what a task writes; run one of them again"
    plan = read_json(path, UserError, expected)
    with refusing(UserError, f"{path}: damaged", expected):
        inventory, crops, compact = dict(plan["inventory"]), int(plan["crops"]), bool(plan["compact"])
    inventory["unreadable"] = (staging.num_images - staging.num_written()) // crops
    if compact:
        tokenizer, counts = load(staging.folder / TOKENIZER), torch.from_numpy(staging.counts())
        compacted = tokenizer.compact(counts)
        added = {key: one for key, one in (staging.tokenizer or {}).items() if key not in tokenizer.description()}
        staging.keep(by_frequency(counts).numpy(), {**compacted.description(), **added})
        compacted.save(Path(f"{staging.path}-{TOKENIZER}"))
    staging.publish(processes, inventory=inventory)


def finish(store: str | os.PathLike[str]) -> list[str]:
    """Finish every split of a store that tasks have begun, and return their names; none if nothing is left to do.

    `store` is a folder, or a URL in a bucket. Raises UserError if a task is at work on this machine or another
    process finishes the split, and StoreError if shards are missing: then the split is left as it is.
    """
    if is_bucket(store):
        return _finish_in_bucket(str(store))
    path = Path(store)
    begun = begun_splits(path.resolve())
    if not begun and not (path / layout.DOCUMENT).exists():
        raise _nothing_begun(store)
    for split in begun:
        with sole_writer(path, split):
            if not tidied(path, split):
                finish_split(SplitStaging.begun(path, split), processes=_usable_cores())
    return begun


def _finish_in_bucket(url: str) -> list[str]:
    target = Target(url)
    with target.opened() as begun:
        if not begun and not (target.path / layout.DOCUMENT).exists():
            raise _nothing_begun(url)
        for split in begun:
            finish_split(BucketStaging.of_record(target, split), processes=_usable_cores())
    return begun


def _nothing_begun(store: str | os.PathLike[str]) -> UserError:
    return UserError(f"{store}: no store, and no task has begun one; name the store that tasks write (--out)")


def _usable_cores() -> int:
    """Return how many cores a scheduler gives to this process, where the system tells."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on a Mac or Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def sole_writer(store: Path, split: str, task: int | None = None) -> Iterator[None]:
    """Hold the lock of a split during a block, or only that of one of the tasks that write it together.

    The folder around the store is created, and removed if nothing is in it afterwards. Raises UserError if another
    process writes the split or, for the whole split, one of its tasks.
    """
    folder, name = store.parent, f".{store.name}-{split}"
    created = not folder.exists()
    make_folder(folder)
    try:
        with ExitStack() as held:
            tasks = [] if task is not None else sorted(folder.glob(f"{name}-task-*.writer"))
            for path in (folder / f"{name}{'' if task is None else f'-task-{task}'}.writer", *tasks):
                held.enter_context(owned(path))
            yield
    finally:
        if created:
            with suppress(OSError):  # it holds the store
                folder.rmdir()
