"""Build a store from staged shards: encode what is not encoded yet, write tokens.json, publish by renames."""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors.numpy
from tqdm import tqdm

from seitpp.books import Books
from seitpp.files import empty_folder, naming, sync, write_file
from seitpp.store import layout
from seitpp.store.card import card
from seitpp.store.encoding import TABLE_IMAGES, Encoded, Encoding, Table, encode
from seitpp.store.fingerprint import LARGE, joined_fingerprint, split_fingerprint
from seitpp.store.layout import StoreError
from seitpp.store.shards import read_shard
from seitpp.store.spec import SplitSpec

# The folder inside the staging folder that holds the new files until they are published.
BUILT = "store"

Staged = TypeVar("Staged")


class Content(NamedTuple):
    """The images of a shard of the store: files of staged shards, or the file `path`, encoded before."""

    staged: list[Path]
    path: Path | None = None
    encoded: Encoded | None = None

    @property
    def rows(self) -> int:
        """The number of images."""
        return self.encoded.rows if self.encoded else sum(len(read_shard(path)) for path in self.staged)


def build(
    spec: SplitSpec,
    folder: Path,
    contents: Sequence[Content],
    *,
    table: Table | None = None,
    processes: int = 1,
    inventory: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Write all files of a split into folder/BUILT; return tokens.json of the existing store, None if it is new.

    Shards without images are left out. The bytes depend neither on `processes` nor on who staged or encoded what.
    `table` is that of a new store, if it is made already; `inventory` that of SplitStaging.publish, checked.
    Raises StoreError if there are no images, or if the split cannot be added to the store any more.
    """
    # Read again: another split may have been published in the meantime.
    store = spec.existing()
    spec.adopt(store)
    built = folder / BUILT
    empty_folder(built)
    filled = [content for content in contents if content.rows]
    if not filled:
        raise StoreError(f"{spec.path}: split {spec.split!r} has no images; add at least one")
    if store:
        table = Table.of_store(spec.path, store)
    table = table or Table.of_first(spec, first_staged(spec, [path for one in contents for path in one.staged]))
    (built / spec.split).mkdir()
    encoded = _encode_all(spec, built, filled, table, processes)
    total = sum(shard.tokens for shard in encoded), sum(shard.payload_bytes for shard in encoded)
    layout.check_tokens(spec.path, *total)
    write_dataset_files(spec, built / spec.split, encoded)
    document = store or _new_document(spec, table)
    classes = spec.class_names or range(1 + max(shard.largest_label for shard in encoded))
    split = layout.split_entry(
        sum(shard.rows for shard in encoded),
        total[1],
        len(classes),
        num_labeled=sum(shard.num_labeled for shard in encoded),
        multi_label=spec.multi_label,
        inventory=inventory,
    )
    document = {**document, "splits": {**document["splits"], spec.split: split}}
    if store is None:
        write_file(built / layout.CODEBOOK, codebook_bytes(spec.books))
        if table.learned is not None:
            write_file(built / layout.TABLE, layout.joined_tables(table.learned))
    names = (layout.shard_name(spec.split, index, len(encoded)) for index in range(len(encoded)))
    describe(built, document, known={name: shard.entry for name, shard in zip(names, encoded, strict=True)})
    sync(built / spec.split)
    sync(built)
    return store


def first_staged(spec: SplitSpec, staged: Sequence[Staged]) -> Sequence[Staged]:
    """Return those of all staged shards of a split, in order, from which the code table is made."""
    return staged[: max(1, TABLE_IMAGES // spec.shard_images)]


def place(spec: SplitSpec, folder: Path, store: dict[str, Any] | None) -> None:
    """Publish the files in folder/BUILT as a new store, or as a split of the one with the tokens.json `store`."""
    built = folder / BUILT
    if store is None:
        # This fails unless the target is missing or an empty folder.
        built.rename(spec.path)
        sync(spec.path.parent)
    else:
        _add(spec, store, built)


@contextmanager
def _parallel(processes: int) -> Iterator[Callable[..., Any]]:
    """Yield a `map` function that runs in this process or in several processes."""
    if processes == 1:
        yield map
    else:
        # Spawned, since threads and CUDA contexts of this process do not survive a fork.
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            yield pool.map


def codebook_bytes(books: Books) -> bytes:
    """Return the file of a codebook."""
    names = layout.table_names(len(books.tables))
    return safetensors.numpy.save(dict(zip(names, books.tables, strict=True)))


def describe(built: Path, document: dict[str, Any], *, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Write the derived files, and tokens.json with its version and the checksums of all new files.

    `known` are the entries of files that need not be read again.
    """
    document = {**document, "version": layout.version_of(document)}
    splits = json.dumps({"splits": list(document["splits"])})
    write_file(built / layout.DATASET_DICT, splits.encode())
    write_file(built / layout.CARD, card(document).encode())
    names = {path.relative_to(built).as_posix(): path for path in sorted(built.rglob("*")) if path.is_file()}
    known = known or {}
    entries = {name: known.get(name) or layout.file_entry(path) for name, path in names.items()}
    # Sorted, so that the bytes do not depend on the order in which files were built.
    layout.write_document(built, {**document, "files": dict(sorted({**document["files"], **entries}.items()))})


def _new_document(spec: SplitSpec, table: Table) -> dict[str, Any]:
    added, counts = {"digits": spec.books.describe(), "layout": spec.layout}, table.counts
    return {
        "format": layout.FORMAT,
        "version": layout.VERSIONS[0],
        "grid": spec.grid,
        "num_codes": spec.books.rows,
        "code_dim": spec.books.dim,
        **{key: value for key, value in added.items() if value is not None},
        "codec": {"name": spec.codec, "counts": counts if spec.books.digits > 1 else counts[0]},
        "tokenizer": spec.tokenizer,
        "class_names": spec.class_names,
        "splits": {},
        "files": {},
    }


def _encode_all(
    spec: SplitSpec, built: Path, contents: Sequence[Content], table: Table, processes: int
) -> list[Encoded]:
    """Write the shards of the split, those that are encoded already by links; return what is in each."""
    paths = [built / layout.shard_name(spec.split, index, len(contents)) for index in range(len(contents))]
    places = zip(contents, paths, strict=True)
    waiting = [Encoding(spec, table, one.staged, path) for one, path in places if not one.encoded]
    with _parallel(min(processes, max(1, len(waiting)))) as parallel_map:
        done = parallel_map(encode, waiting)
        encoded = []
        bar = tqdm(contents, desc=f"writing {spec.split}", unit="shard", disable=None)
        for content, path in zip(bar, paths, strict=True):
            if content.encoded:
                link(content.path, path)
            encoded.append(content.encoded or next(done))
    return encoded


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        target.hardlink_to(source)
    except OSError:
        with naming(target):
            shutil.copyfile(source, target)
        sync(target)


def write_dataset_files(spec: SplitSpec, folder: Path, encoded: Sequence[Encoded] | None = None) -> None:
    """Write the files that `datasets` needs beside the shards in `folder`, of which `encoded` is known."""
    info = {"features": spec.features().to_dict()}
    write_file(folder / layout.DATASET_INFO, json.dumps(info).encode())
    write_file(folder / layout.STATE, json.dumps(_state(spec.split, folder, encoded)).encode())


def _state(split: str, folder: Path, encoded: Sequence[Encoded] | None) -> dict[str, Any]:
    """Return state.json for `datasets`, with the fingerprint of the split, which identifies it in caches, too.

    Of several shards it has the numbers of images, so that a reader opens a shard when it needs it.
    """
    shards = sorted(folder.glob("*.arrow"))
    rows = [one.rows for one in encoded] if encoded else [len(read_shard(path)) for path in shards]
    if encoded and sum(rows) > LARGE:
        fingerprint = joined_fingerprint(one.fingerprint for one in encoded)
    else:
        fingerprint = split_fingerprint(shards)
    return {
        "_data_files": [{"filename": shard.name} for shard in shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
        **({layout.SHARD_ROWS: rows} if len(rows) > 1 else {}),
    }


def _add(spec: SplitSpec, store: dict[str, Any], built: Path) -> None:
    """Add the split to an existing store, which can be read after every single rename."""
    withdraw(spec.path, store, built, names=layout.DERIVED)
    (built / spec.split).rename(spec.path / spec.split)
    replace_derived(spec.path, built)


def withdraw(root: Path, store: dict[str, Any], built: Path, *, names: Collection[str]) -> None:
    """Replace tokens.json of a store by one without the files `names`, which may then change."""
    kept = {name: entry for name, entry in store["files"].items() if name not in names}
    withdrawn = built / "withdrawn"
    withdrawn.mkdir()
    layout.write_document(withdrawn, {**store, "files": kept})
    (withdrawn / layout.DOCUMENT).replace(root / layout.DOCUMENT)
    sync(root)


def replace_derived(root: Path, built: Path) -> None:
    """Replace the derived files of a store by those in the folder `built`, and then its tokens.json."""
    for name in layout.DERIVED:
        (built / name).replace(root / name)
    sync(root)
    (built / layout.DOCUMENT).replace(root / layout.DOCUMENT)
    sync(root)
