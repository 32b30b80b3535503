"""Build a store from staged shards: count the codes, encode with the exact counts, publish by renames."""

import json
import math
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import safetensors.numpy
from jaxtyping import Int64

from seitpp import codec as codecs
from seitpp.codec import Codec
from seitpp.files import empty_folder, naming, sync, write_file
from seitpp.store import layout
from seitpp.store.card import card
from seitpp.store.fingerprint import split_fingerprint
from seitpp.store.labels import read_labels
from seitpp.store.layout import StoreError
from seitpp.store.shards import column_array, read_shard, write_shard
from seitpp.store.spec import SplitSpec

# The folder inside the staging folder that holds the new files until they are published.
BUILT = "store"
# A codec with a learned table learns from at most so many images, and tokens.
LEARNED_IMAGES, LEARNED_TOKENS = 2**13, 2**26
# So many tokens are counted at once.
COUNTED = 2**20


class Survey(NamedTuple):
    """Statistics of a staged shard that are needed before any shard is encoded."""

    rows: int
    counts: list[Int64[np.ndarray, " values"]]  # of each digit
    largest_label: int  # -1 without labels
    num_labeled: int


class Encoding(NamedTuple):
    """Arguments for the encoding of one shard in another process, which builds the codec itself."""

    staged: Path
    target: Path
    build_codec: Callable[[], Codec]
    spec: SplitSpec


def build(
    spec: SplitSpec,
    folder: Path,
    staged: list[Path],
    *,
    processes: int = 1,
    inventory: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Encode the `staged` shards into folder/BUILT; return tokens.json of the existing store, None if it is new.

    Shards without images are left out. The bytes depend neither on `processes` nor on who staged a shard.
    `inventory` is that of SplitStaging.publish, checked. Raises StoreError if there are no images, or if the split
    cannot be added to the store any more.
    """
    # Read again: another split may have been published in the meantime.
    store = spec.existing()
    spec.adopt(store)
    empty_folder(folder / BUILT)
    with _parallel(processes) as parallel_map:
        _build(spec, folder / BUILT, staged, store=store, inventory=inventory, parallel_map=parallel_map)
    return store


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


def _build(
    spec: SplitSpec,
    built: Path,
    staged: list[Path],
    *,
    store: dict[str, Any] | None,
    inventory: dict[str, Any] | None,
    parallel_map: Callable[..., Any],
) -> None:
    """Write the new files and tokens.json of the whole store, synced, into the folder `built`."""
    surveys = list(parallel_map(partial(survey, spec), staged))
    filled = [path for path, survey in zip(staged, surveys, strict=True) if survey.rows]
    if not filled:
        raise StoreError(f"{spec.path}: split {spec.split!r} has no images; add at least one")
    rows = sum(survey.rows for survey in surveys)
    counts = [sum(digit) for digit in zip(*(survey.counts for survey in surveys), strict=True)]
    document = store or _new_document(spec, counts)
    tables = layout.read_tables(spec.path, document) if store else _learned(spec, filled, rows)
    (built / spec.split).mkdir()
    payload_bytes = _encode_all(spec, built, filled, document, tables, parallel_map)
    layout.check_tokens(spec.path, sum(int(digit.sum()) for digit in counts), payload_bytes)
    classes = spec.class_names or range(1 + max(survey.largest_label for survey in surveys))
    split = layout.split_entry(
        rows,
        payload_bytes,
        len(classes),
        num_labeled=sum(survey.num_labeled for survey in surveys),
        multi_label=spec.multi_label,
        inventory=inventory,
    )
    document = {**document, "splits": {**document["splits"], spec.split: split}}
    if store is None:
        names = layout.table_names(len(spec.books.tables))
        codebook = dict(zip(names, spec.books.tables, strict=True))
        write_file(built / layout.CODEBOOK, safetensors.numpy.save(codebook))
        if tables is not None:
            write_file(built / layout.TABLE, layout.joined_tables(tables))
    describe(built, document)
    sync(built / spec.split)
    sync(built)


def describe(built: Path, document: dict[str, Any]) -> None:
    """Write the derived files, and tokens.json with its version and the checksums of all new files."""
    document = {**document, "version": layout.version_of(document)}
    splits = json.dumps({"splits": list(document["splits"])})
    write_file(built / layout.DATASET_DICT, splits.encode())
    write_file(built / layout.CARD, card(document).encode())
    files = (path for path in sorted(built.rglob("*")) if path.is_file())
    entries = {path.relative_to(built).as_posix(): layout.file_entry(path) for path in files}
    # Sorted, so that the bytes do not depend on the order in which files were built.
    layout.write_document(built, {**document, "files": dict(sorted({**document["files"], **entries}.items()))})


def _new_document(spec: SplitSpec, counts: list[np.ndarray]) -> dict[str, Any]:
    added = {"digits": spec.books.describe(), "layout": spec.layout}
    lists = [digit.tolist() for digit in counts]
    return {
        "format": layout.FORMAT,
        "version": layout.VERSIONS[0],
        "grid": spec.grid,
        "num_codes": spec.books.rows,
        "code_dim": spec.books.dim,
        **{key: value for key, value in added.items() if value is not None},
        "codec": {"name": spec.codec, "counts": lists if spec.books.digits > 1 else lists[0]},
        "tokenizer": spec.tokenizer,
        "class_names": spec.class_names,
        "splits": {},
        "files": {},
    }


def survey(spec: SplitSpec, staged: Path) -> Survey:
    """Count the rows of a staged shard and the values of each digit, and find its largest label."""
    batch = read_shard(staged)
    counts = [np.zeros(size, np.int64) for size in spec.books.sizes]
    for planes in _some(spec, batch):
        for digit, plane in zip(counts, planes, strict=True):
            digit += np.bincount(plane, minlength=len(digit))
    labels = read_labels(batch)
    return Survey(len(batch), counts, labels.largest(), int(labels.known.sum()))


def _some(spec: SplitSpec, batch: pa.RecordBatch) -> Iterator[np.ndarray]:
    """Yield the digits of a staged shard in few parts (Q, n): an image at a time, or many tokens of one digit."""
    if _one_digit(spec):
        _, offsets, data = batch.column("tokens").buffers()
        size = int(np.frombuffer(offsets, np.int32)[len(batch)]) if len(batch) else 0
        parts = (data[start : min(start + 2 * COUNTED, size)] for start in range(0, size, 2 * COUNTED))
    else:
        parts = (ids.as_buffer() for ids in batch.column("tokens"))
    return (_planes(spec, part) for part in parts)


def _one_digit(spec: SplitSpec) -> bool:
    staged = spec.renumbering.staged if spec.renumbering else spec.books
    return staged.digits == 1


def code_counts(spec: SplitSpec, staged: Path) -> Int64[np.ndarray, " codes"]:
    """Count how often each code of the one table occurs in a staged shard."""
    counts = np.zeros(spec.books.rows, np.int64)
    for planes in _some(spec, read_shard(staged)):
        counts += np.bincount(spec.books.joined(planes), minlength=len(counts))
    return counts


def _planes(spec: SplitSpec, staged: pa.Buffer | bytes) -> np.ndarray:
    """Return the digits (Q, tokens) of staged tokens, of the codes that are kept."""
    ids, renumbering = np.frombuffer(staged, "<u2"), spec.renumbering
    if renumbering is None:
        return ids.reshape(spec.books.digits, -1)
    return renumbering.planes(ids.reshape(renumbering.staged.digits, -1))


def _learned(spec: SplitSpec, staged: list[Path], rows: int) -> list[bytes] | None:
    """Return the table of each digit that the codec learns from evenly spaced images; None if it has none."""
    if spec.codec != codecs.ContextCodec.name:
        return None
    tokens = (ids for path in staged for ids in read_shard(path).column("tokens"))
    images = min(LEARNED_IMAGES, max(1, LEARNED_TOKENS // math.prod(spec.grid)))
    chosen = islice(tokens, 0, None, -(-rows // images))
    grids = np.stack([_planes(spec, ids.as_buffer()).reshape(-1, *spec.grid) for ids in chosen])
    return [
        codecs.ContextCodec.learn(grids[:, digit], table).table
        for digit, table in enumerate(spec.books.digit_tables())
    ]


def _encode_all(
    spec: SplitSpec,
    built: Path,
    staged: list[Path],
    document: dict[str, Any],
    tables: list[bytes] | None,
    parallel_map: Callable[..., Any],
) -> int:
    """Write the shards of the split and the files `datasets` needs; return the number of payload bytes."""
    counts, grid = layout.counts_of(document), spec.grid
    build_codec = partial(codecs.build_digits, spec.codec, spec.books.sizes, counts, grid=grid, tables=tables)
    names = (layout.shard_name(spec.split, index, len(staged)) for index in range(len(staged)))
    tasks = [Encoding(path, built / name, build_codec, spec) for path, name in zip(staged, names, strict=True)]
    size = sum(parallel_map(_encode, tasks))
    write_dataset_files(spec, built / spec.split)
    return size


def write_dataset_files(spec: SplitSpec, folder: Path) -> None:
    """Write the files that `datasets` needs beside the shards in `folder`."""
    info = {"features": spec.features().to_dict()}
    write_file(folder / layout.DATASET_INFO, json.dumps(info).encode())
    write_file(folder / layout.STATE, json.dumps(_state(spec.split, folder)).encode())


def _encode(task: Encoding) -> int:
    """Encode one staged shard and return the number of its payload bytes."""
    batch, codec = read_shard(task.staged), task.build_codec()
    tokens = batch.column("tokens")
    payloads = [codec.encode(_planes(task.spec, ids.as_buffer()).ravel()) for ids in tokens]
    columns = [column_array(payloads, pa.binary(), "tokens"), *batch.columns[1:]]
    with naming(task.target), task.target.open("wb") as file:
        write_shard(file, pa.record_batch(columns, batch.schema))
    return sum(map(len, payloads))


def _state(split: str, folder: Path) -> dict[str, Any]:
    """Return state.json for `datasets`, with the fingerprint of the split, which identifies it in caches, too."""
    shards = sorted(folder.glob("*.arrow"))
    return {
        "_data_files": [{"filename": shard.name} for shard in shards],
        "_fingerprint": split_fingerprint(shards),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
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
