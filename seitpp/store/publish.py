"""From staged shards to a store: count codes, encode with the exact table, publish by renames."""

import json
from collections.abc import Callable, Iterator
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

from seitpp import codec as codecs
from seitpp.codec import Codec
from seitpp.files import empty_folder, sync, write_file
from seitpp.store import layout
from seitpp.store.card import card
from seitpp.store.layout import StoreError
from seitpp.store.shards import column_array, read_shard, write_shard
from seitpp.store.spec import SplitSpec, fingerprint

# What was built waits in this folder of the staging folder.
MADE = "store"
# Enough for the tables of a codec that learns.
LEARNED_IMAGES = 2**13


class Survey(NamedTuple):
    """What publishing must know of a staged shard before it is encoded."""

    rows: int
    counts: np.ndarray
    largest_label: int


class Encoding(NamedTuple):
    """One shard to be encoded, as it is handed to a process, to which no codec can be sent."""

    staged: Path
    target: Path
    build_codec: Callable[[], Codec]
    new_ids: np.ndarray | None


def build(spec: SplitSpec, folder: Path, staged: list[Path], processes: int = 1) -> dict[str, Any] | None:
    """Encode the `staged` shards into folder/MADE; returns tokens.json of the store that the split is added to.

    Shards without images are left out. The bytes depend neither on `processes`, nor on who staged what.
    Raises StoreError if there are no images, or if something else has taken the place of the split.
    """
    # Read again: another split may have been published since.
    store = spec.existing()
    empty_folder(folder / MADE)
    with _mapping(processes) as each:
        _build(spec, folder / MADE, staged, store, each)
    return store


def place(spec: SplitSpec, folder: Path, store: dict[str, Any] | None) -> None:
    """Put what was built in `folder` in its place: as a new store, or as a split of `store`."""
    made = folder / MADE
    if store is None:
        # Onto nothing or onto an empty folder: fails if somebody filled it meanwhile.
        made.rename(spec.path)
        sync(spec.path.parent)
    else:
        _add(spec, store, made)


@contextmanager
def _mapping(processes: int) -> Iterator[Callable[..., Any]]:
    """map, by this process or by several."""
    if processes == 1:
        yield map
    else:
        # Not forked: this process may hold threads and a device.
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            yield pool.map


def _build(
    spec: SplitSpec, made: Path, staged: list[Path], store: dict[str, Any] | None, each: Callable[..., Any]
) -> None:
    """Put the new files, synced, into the folder `made`, and a tokens.json of the whole store."""
    surveys = list(each(partial(survey, num_codes=len(spec.codebook), new_ids=spec.new_ids), staged))
    filled = [path for path, survey in zip(staged, surveys, strict=True) if survey.rows]
    if not filled:
        raise StoreError(f"{spec.path}: split {spec.split!r} has no images; add at least one")
    rows = sum(survey.rows for survey in surveys)
    document = store or _new_document(spec, sum(survey.counts for survey in surveys))
    table = layout.read_table(spec.path, document) if store else _learned(spec, filled, rows)
    (made / spec.split).mkdir()
    payload_bytes = _encode_all(spec, made, filled, document["codec"], table, each)
    classes = spec.class_names or range(1 + max(survey.largest_label for survey in surveys))
    split = {"rows": rows, "payload_bytes": payload_bytes, "num_classes": len(classes)}
    document = {**document, "splits": {**document["splits"], spec.split: split}}
    if store is None:
        write_file(made / layout.CODEBOOK, safetensors.numpy.save({"codebook": spec.codebook}))
        if table is not None:
            write_file(made / layout.TABLE, table)
    _describe(made, document)
    sync(made / spec.split)
    sync(made)


def _describe(made: Path, document: dict[str, Any]) -> None:
    """Write the derived files, and tokens.json with the checksums of all new ones."""
    splits = json.dumps({"splits": list(document["splits"])})
    write_file(made / layout.DATASET_DICT, splits.encode())
    write_file(made / layout.CARD, card(document).encode())
    files = (path for path in sorted(made.rglob("*")) if path.is_file())
    entries = {path.relative_to(made).as_posix(): layout.file_entry(path) for path in files}
    # By name, since the order must not tell in which steps the store was made.
    layout.write_document(made, {**document, "files": dict(sorted({**document["files"], **entries}.items()))})


def _new_document(spec: SplitSpec, counts: np.ndarray) -> dict[str, Any]:
    return {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "grid": spec.grid,
        "num_codes": len(spec.codebook),
        "code_dim": spec.codebook.shape[1],
        "codec": {"name": spec.codec, "counts": counts.tolist()},
        "tokenizer": spec.tokenizer,
        "class_names": spec.class_names,
        "splits": {},
        "files": {},
    }


def survey(staged: Path, num_codes: int, new_ids: np.ndarray | None = None) -> Survey:
    """Rows, code counts (num_codes,) int64 and the largest label of a staged shard; `new_ids` as in SplitSpec."""
    batch = read_shard(staged)
    ids = _ids(b"".join(ids.as_buffer() for ids in batch.column("tokens")), new_ids)
    labels = batch.column("label").to_numpy()
    return Survey(len(batch), np.bincount(ids, minlength=num_codes), int(labels.max(initial=-1)))


def _ids(staged: pa.Buffer | bytes, new_ids: np.ndarray | None) -> np.ndarray:
    ids = np.frombuffer(staged, "<u2")
    return ids if new_ids is None else new_ids[ids]


def _learned(spec: SplitSpec, staged: list[Path], rows: int) -> bytes | None:
    """What the codec learns from the images besides the counts: from every n-th one, if they are very many."""
    if spec.codec != codecs.ContextCodec.name:
        return None
    tokens = (ids for path in staged for ids in read_shard(path).column("tokens"))
    chosen = islice(tokens, 0, None, -(-rows // LEARNED_IMAGES))
    grids = [_ids(ids.as_buffer(), spec.new_ids).reshape(spec.grid) for ids in chosen]
    return codecs.ContextCodec.learn(np.stack(grids), spec.codebook).table


def _encode_all(
    spec: SplitSpec,
    made: Path,
    staged: list[Path],
    codec: dict[str, Any],
    table: bytes | None,
    each: Callable[..., Any],
) -> int:
    """Write the shards of the split and what `datasets` wants beside them; the number of payload bytes."""
    build_codec = partial(
        codecs.build, codec["name"], len(spec.codebook), codec["counts"], grid=spec.grid, table=table
    )
    names = (layout.shard_name(spec.split, index, len(staged)) for index in range(len(staged)))
    tasks = [
        Encoding(path, made / name, build_codec, spec.new_ids) for path, name in zip(staged, names, strict=True)
    ]
    size = sum(each(_encode, tasks))
    folder = made / spec.split
    info = {"features": spec.features().to_dict()}
    write_file(folder / layout.DATASET_INFO, json.dumps(info).encode())
    write_file(folder / layout.STATE, json.dumps(_state(spec.split, folder)).encode())
    return size


def _encode(task: Encoding) -> int:
    """Write the shard of a staged one; the number of its payload bytes."""
    batch, codec = read_shard(task.staged), task.build_codec()
    payloads = [codec.encode(_ids(ids.as_buffer(), task.new_ids)) for ids in batch.column("tokens")]
    columns = [column_array(payloads, pa.binary(), "tokens"), *batch.columns[1:]]
    with task.target.open("wb") as file:
        write_shard(file, pa.record_batch(columns, batch.schema))
    return sum(map(len, payloads))


def _state(split: str, folder: Path) -> dict[str, Any]:
    """state.json of `datasets`; its fingerprint is made of the shards, so that caches know them apart."""
    shards = sorted(folder.glob("*.arrow"))
    hashes = "".join(layout.file_entry(shard)["sha256"] for shard in shards)
    return {
        "_data_files": [{"filename": shard.name} for shard in shards],
        "_fingerprint": fingerprint(hashes.encode()),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }


def _add(spec: SplitSpec, store: dict[str, Any], made: Path) -> None:
    """Publish into an existing store such that it can be read after every single rename."""
    kept = {name: entry for name, entry in store["files"].items() if name not in layout.DERIVED}
    withdrawn = made / "withdrawn"
    withdrawn.mkdir()
    layout.write_document(withdrawn, {**store, "files": kept})
    (withdrawn / layout.DOCUMENT).replace(spec.path / layout.DOCUMENT)
    sync(spec.path)
    (made / spec.split).rename(spec.path / spec.split)
    for name in layout.DERIVED:
        (made / name).replace(spec.path / name)
    sync(spec.path)
    (made / layout.DOCUMENT).replace(spec.path / layout.DOCUMENT)
    sync(spec.path)
