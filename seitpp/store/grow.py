"""Append images to a finished split, merge stores, and take a part of one; labels may be missing or several."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Integer
from tqdm import tqdm

from seitpp.codec import Codec
from seitpp.files import empty_folder, make_folder, naming, new_folder, remove_folder, sync, write_file
from seitpp.store import layout
from seitpp.store.labels import check_labels, read_labels
from seitpp.store.layout import StoreError
from seitpp.store.publish import BUILT, describe, link, replace_derived, withdraw, write_dataset_files
from seitpp.store.reader import TokenStore
from seitpp.store.recode import check_columns, copy_images, renumber, tokens_of
from seitpp.store.shards import column_array, read_shard, write_shard
from seitpp.store.spec import SplitSpec, store_lock
from seitpp.store.spec import describe as describe_codebook
from seitpp.store.writer import StoreWriter

Folder = str | os.PathLike[str]


class Part(NamedTuple):
    """A split that is appended to another, and the new number of each of its classes (None: as before)."""

    store: TokenStore
    classes: dict[int, int] | None


def append(store: Folder, others: Sequence[Folder], *, split: str = "train") -> None:
    """Append the images of a split of `others`, in this order, to the same split of `store`.

    The images that are there stay as they are, byte by byte, and so does the code table; of the others, payloads
    are copied if their table is the same, else encoded anew. Their classes are found by name. A process that is
    killed leaves the old split or the new one, and the same call finishes what it began. Raises StoreError, before
    anything is changed, for stores of another codebook, grid, codec, tokenizer, columns or kind of labels, and for
    classes that `store` lacks.
    """
    target, sources = TokenStore(store, split), [TokenStore(other, split) for other in others]
    _check_alike([target, *sources])
    if _is_multi_label([target, *sources]) != target.multi_label:
        raise StoreError(f"{target.path}: has one class an image, got lists of classes; use `seitpp merge`")
    parts = [Part(source, _new_numbers(source, target.class_names, str(target.path))) for source in sources]
    folder = target.path.parent / f".{target.path.name}-{split}.append"
    receipt = folder.with_suffix(".appended")  # beside the folder, which is removed first
    try:
        with store_lock(target.path):
            try:
                make_folder(folder)
                if not _is_done(receipt, target, sources):
                    empty_folder(folder)  # left by a killed process
                    (folder / BUILT / split).mkdir(parents=True)
                    _build_split(target, parts, folder / BUILT)
                    appended = _receipt(layout.read_document(folder / BUILT)["checksum"], sources)
                    write_file(folder / receipt.name, json.dumps(appended).encode())
                    (folder / receipt.name).replace(receipt)
                    sync(receipt.parent)
                    _replace_split(target, folder / BUILT)
                _remove_old(target.path, split)
            finally:
                remove_folder(folder)
    finally:
        receipt.unlink(missing_ok=True)  # last, so that the same call tidies up whatever was left


def merge(out: Folder, stores: Sequence[Folder]) -> None:
    """Write the new store `out` with the images of all `stores`; splits of the same name are joined in this order.

    Classes are joined by name, in the order in which they first appear, and labels renumbered. The bytes are those
    that one StoreWriter writes for all images. Raises StoreError for stores of another codebook, grid, codec,
    tokenizer, columns or kind of labels, and if only some have class names; UserError if `out` exists.
    """
    opened = [TokenStore(path, split) for path in stores for split in layout.read_document(Path(path))["splits"]]
    opened.sort(key=lambda source: source.split != "train")  # the codes of the first split make the table
    by_split = {source.split: [other for other in opened if other.split == source.split] for source in opened}
    _check_alike(opened)
    names = list(dict.fromkeys(name for source in opened for name in source.class_names or ())) or None
    multi_label = _is_multi_label(opened)
    with new_folder(out) as folder:
        for sources in by_split.values():
            inventory = _joined_inventory(sources)
            with _writer(folder, sources[0], names=names, multi_label=multi_label, inventory=inventory) as writer:
                for source in sources:
                    numbers = _new_numbers(source, names, "the others")
                    copy_images(source, writer, range(len(source)), classes=numbers)


def subset(
    store: Folder,
    out: Folder,
    *,
    positions: Mapping[str, Sequence[int] | Integer[np.ndarray, " images"]] | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write the new store `out` with some of the images of `store`.

    positions: the images of a split, by its name; all of the splits not named. class_names: the classes to keep,
    numbered in the order of the store; images of none of them are left out. The bytes are those that StoreWriter
    writes for these images. Raises StoreError for a class that the store does not have, and if a split would be
    empty; UserError if `out` exists.
    """
    opened = [TokenStore(store, split) for split in layout.read_document(Path(store))["splits"]]
    names = opened[0].class_names if class_names is None else _chosen_names(opened[0], class_names)
    numbers = None
    if class_names is not None:
        numbers = {opened[0].class_names.index(name): number for number, name in enumerate(names)}
    with new_folder(out) as folder:
        for source in opened:
            check_columns(source)
            chosen = (positions or {}).get(source.split, range(len(source)))
            if numbers is not None:
                chosen = _with_class(source, chosen, sorted(numbers))
            if not len(chosen):
                raise StoreError(f"{source.path}: no image of split {source.split!r} is chosen; choose others")
            inventory = None if source.inventory is None else {"subset_of": source.inventory}
            with _writer(
                folder, source, names=names, multi_label=source.multi_label, inventory=inventory
            ) as writer:
                copy_images(source, writer, chosen, classes=numbers)


def reshuffle(store: Folder, out: Folder, positions: Mapping[str, Sequence[int]]) -> None:
    """Write the new store `out` with all images of `store`, those of the splits `positions` in another order.

    `positions` are permutations, of which parts are read. The table is that of the images that come first. Raises
    UserError if `out` exists.
    """
    opened = [TokenStore(store, split) for split in layout.read_document(Path(store))["splits"]]
    with new_folder(out) as folder:
        for source in opened:
            check_columns(source)
            described = {"names": source.class_names, "inventory": source.inventory}
            with _writer(folder, source, multi_label=source.multi_label, **described) as writer:
                copy_images(source, writer, positions.get(source.split, range(len(source))))


# Checks


def _check_alike(sources: Sequence[TokenStore]) -> None:
    """Raise StoreError for the first split that cannot be joined with the first one, or that is named twice."""
    by_split: dict[str, TokenStore] = {}
    seen = set()
    for source in sources:
        if (source.path, source.split) in seen:
            raise StoreError(f"{source.path}: named twice, expected different stores; name it once")
        seen.add((source.path, source.split))
        check_columns(source)
        _check_properties(source, sources[0], ("codebook", "grid", "layout", "codec", "tokenizer"))
        _check_properties(source, by_split.setdefault(source.split, source), ("columns",))


def _check_properties(source: TokenStore, first: TokenStore, names: Sequence[str]) -> None:
    for name in names:
        got, expected = _property(source, name), _property(first, name)
        if got != expected:
            advice = "use `seitpp recode` first" if name == "codec" else "tokenize both alike"
            raise StoreError(
                f"{source.path}: its {name} is {_difference(got, expected)}, expected "
                f"{_difference(expected, got)} as in {first.path}; {advice}"
            )


def _property(store: TokenStore, name: str) -> Any:
    if name == "codebook":
        return describe_codebook(store.books)
    return store.codec.name if name == "codec" else getattr(store, name)


def _difference(value: Any, other: Any) -> Any:
    """Return what of `value` is not in `other`: descriptions of tokenizers are long."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return value
    return {key: _difference(one, other.get(key)) for key, one in value.items() if one != other.get(key)}


def _is_multi_label(sources: Sequence[TokenStore]) -> bool:
    """Return whether images have several classes. Raises StoreError if they have in some of the stores only.

    A store without any label goes with both.
    """
    labeled = [source for source in sources if source.num_labeled] or sources
    for source in labeled:
        if source.multi_label != labeled[0].multi_label:
            one, several = sorted((source, labeled[0]), key=lambda store: store.multi_label)
            raise StoreError(
                f"{several.path}: its images have several classes each, but those of {one.path} have one; "
                "keep them apart"
            )
    return labeled[0].multi_label


def _new_numbers(source: TokenStore, names: list[str] | None, where: str) -> dict[int, int] | None:
    """Return the number in `names` of each class of `source`. Raises StoreError for classes that are not there."""
    if source.class_names is None and names is None:
        return None
    if not source.num_labeled:
        return {}
    if source.class_names is None or names is None:
        has, lacks = (where, source.path) if names else (source.path, where)
        raise StoreError(f"{source.path}: got class names in {has} and none in {lacks}, expected them in both")
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [name for name in source.class_names if name not in numbers]
    if unknown:
        raise StoreError(
            f"{source.path}: has {len(unknown)} classes that {where} lacks, as {unknown[0]!r}; use `seitpp merge`"
        )
    return {old: numbers[name] for old, name in enumerate(source.class_names)}


def _chosen_names(store: TokenStore, chosen: Sequence[str]) -> list[str]:
    names = store.class_names or []
    for name in chosen:
        if name not in names:
            known = ", ".join(names[:10]) + (", .." if len(names) > 10 else "") if names else "no class names"
            raise StoreError(f"{store.path}: no class {name!r}, it has {known}")
    return [name for name in names if name in set(chosen)]


def _with_class(source: TokenStore, positions: Sequence[int] | np.ndarray, classes: list[int]) -> list[int]:
    """Return those of `positions` whose images have one of `classes`."""
    chosen: list[int] = []
    rows = max(1, 2**24 // source.num_classes)
    for start in range(0, len(positions), rows):
        part = positions[start : start + rows]
        wanted = (source.multi_hot(part)[:, classes] == 1).any(axis=1)
        chosen.extend(int(position) for position, one in zip(part, wanted, strict=True) if one)
    return chosen


# Inventories


def _joined_inventory(sources: Sequence[TokenStore]) -> dict[str, Any] | None:
    if all(source.inventory is None for source in sources):
        return None
    return {"parts": [part for source in sources for part in _inventories(source)]}


def _inventories(source: TokenStore) -> list[dict[str, Any]]:
    inventory = source.inventory
    if inventory is not None and set(inventory) == {"parts"}:  # it was joined itself
        return inventory["parts"]
    return [{"images": len(source), "inventory": inventory}]


# Writing


def _writer(
    path: Path,
    source: TokenStore,
    *,
    names: list[str] | None,
    multi_label: bool,
    inventory: dict[str, Any] | None,
) -> StoreWriter:
    """Return a writer for a split of the new store `path` that is like that of `source`."""
    return StoreWriter(
        path,
        **tokens_of(source),
        codec=source.codec.name,
        split=source.split,
        class_names=names,
        tokenizer=source.tokenizer,
        columns=source.columns,
        multi_label=multi_label,
        inventory=inventory,
    )


def _build_split(target: TokenStore, parts: Sequence[Part], built: Path) -> None:
    """Fill the folder `built` with the longer split, whose old shards are links, and the files that change."""
    from pyarrow import compute

    spec = SplitSpec(
        target.path,
        **tokens_of(target),
        codec=target.codec.name,
        split=target.split,
        class_names=target.class_names,
        tokenizer=target.tokenizer,
        columns=target.columns,
        multi_label=target.multi_label,
    )
    document = layout.read_document(target.path)
    old = layout.shard_names(document, target.split)
    new = [(part, path) for part in parts for path in _shard_paths(part.store)]
    total = len(old) + len(new)
    for number, name in enumerate(old):
        link(target.path / name, built / layout.shard_name(target.split, number, total))
    size = target.payload_bytes
    for number, batch in enumerate(_converted(target, spec, parts), len(old)):
        path = built / layout.shard_name(target.split, number, total)
        with naming(path), path.open("wb") as file:
            write_shard(file, batch)
        size += compute.sum(compute.binary_length(batch.column("tokens"))).as_py()
    write_dataset_files(spec, built / target.split)
    stores = [target, *(part.store for part in parts)]
    entries = [layout.read_document(store.path)["splits"][target.split] for store in stores]
    entry = layout.split_entry(
        sum(map(len, stores)),
        size,
        len(spec.class_names or range(max(entry["num_classes"] for entry in entries))),
        num_labeled=sum(store.num_labeled for store in stores),
        multi_label=target.multi_label,
        inventory=_joined_inventory(stores),
    )
    kept = {name: one for name, one in document["files"].items() if not name.startswith(f"{target.split}/")}
    describe(built, {**document, "splits": {**document["splits"], target.split: entry}, "files": kept})
    sync(built / target.split)
    sync(built)


def _shard_paths(store: TokenStore) -> list[Path]:
    names = layout.shard_names(layout.read_document(store.path), store.split)
    return [store.path / name for name in names]


def _converted(target: TokenStore, spec: SplitSpec, parts: Sequence[Part]) -> Iterator[pa.RecordBatch]:
    """Yield the shards of `parts` with the codec, the classes and the order of columns of `target`."""
    for store, classes in parts:
        codec = None if _same_table(store, target) else target.codec
        position = 0
        with tqdm(total=len(store), desc=str(store.path), unit=" images", disable=None) as bar:
            for path in _shard_paths(store):
                batch = read_shard(path)
                rows = range(position, position + len(batch))
                yield _convert(store, batch, rows, spec=spec, classes=classes, codec=codec)
                position = rows.stop
                bar.update(len(batch))


def _convert(
    store: TokenStore,
    batch: pa.RecordBatch,
    positions: range,
    *,
    spec: SplitSpec,
    classes: dict[int, int] | None,
    codec: Codec | None,
) -> pa.RecordBatch:
    """Return a shard of `store`, its images at `positions`, as one of the split `spec`; None copies payloads."""
    labels = read_labels(batch)
    renumbered = [renumber(labels.label(row), classes) for row in range(len(batch))]
    values = check_labels(renumbered, len(batch), None, multi_label=spec.multi_label, first=positions.start)
    schema = spec.features().arrow_schema
    columns = {field.name: batch.column(field.name) for field in schema if field.name != "label"}
    columns["label"] = column_array(values, schema.field("label").type, "label")
    if codec is not None:
        payloads = [codec.encode(store[position][0].ravel()) for position in positions]
        columns["tokens"] = column_array(payloads, pa.binary(), "tokens")
    return pa.record_batch([columns[field.name] for field in schema], schema)


def _same_table(store: TokenStore, other: TokenStore) -> bool:
    """Return whether payloads of both stores are the same bytes for the same ids."""
    tables = [layout.read_tables(one.path, layout.read_document(one.path)) for one in (store, other)]
    equal = all(map(np.array_equal, store.digit_counts, other.digit_counts))
    return equal and tables[0] == tables[1]


def _replace_split(target: TokenStore, built: Path) -> None:
    """Replace a split by the longer one in `built`; the store can be read after every single rename."""
    root, folder = target.path, target.path / target.split
    document = layout.read_document(root)
    if document["checksum"] != target.checksum:
        raise StoreError(f"{root}: another process has changed it in the meantime; repeat the command")
    described = [f"{target.split}/{name}" for name in (layout.DATASET_INFO, layout.STATE)]
    withdraw(root, document, built, names=(*layout.DERIVED, *described))
    for path in sorted((built / target.split).iterdir()):  # shards before the file that lists them
        path.replace(folder / path.name)
    sync(folder)
    replace_derived(root, built)


def _remove_old(root: Path, split: str) -> None:
    """Remove the shards under their old names, also those that a killed process has left."""
    listed = layout.read_document(root)["files"]
    for path in (root / split).glob("data-*.arrow"):
        if f"{split}/{path.name}" not in listed:
            path.unlink()
    sync(root / split)


def _receipt(checksum: str, sources: Sequence[TokenStore]) -> dict[str, Any]:
    """Return what is written before a split is replaced: the store that comes, and what is appended."""
    return {"store": checksum, "appended": [source.checksum for source in sources]}


def _is_done(receipt: Path, target: TokenStore, sources: Sequence[TokenStore]) -> bool:
    """Return whether a killed process has appended just this, and only could not tidy up."""
    return receipt.exists() and json.loads(receipt.read_bytes()) == _receipt(target.checksum, sources)
