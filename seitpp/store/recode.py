"""Convert a store to another codec; images and their order stay the same."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from tqdm import tqdm

from seitpp.files import new_folder
from seitpp.store import layout
from seitpp.store.labels import Label
from seitpp.store.layout import StoreError
from seitpp.store.reader import TokenStore
from seitpp.store.shards import ARROW_TYPES
from seitpp.store.spec import OWN_COLUMNS
from seitpp.store.writer import StoreWriter

# Images are copied in batches of so many, and of so many tokens where they are large.
BATCH, BATCH_TOKENS = 1024, 2**22


def recode(store: str | os.PathLike[str], out: str | os.PathLike[str], codec: str) -> None:
    """Write all splits of `store` into the new store `out` with the codec named `codec`.

    Ids, labels, class names, tokenizer, inventories and additional columns stay exactly the same. Raises
    StoreError for a damaged store and for columns that would be lost, UserError if `out` exists.
    """
    root = Path(store)
    splits = [TokenStore(root, split) for split in layout.read_document(root)["splits"]]
    with new_folder(out) as folder:
        for source in splits:
            _recode_split(source, folder, codec)


def tokens_of(store: TokenStore) -> dict[str, Any]:
    """Return what the tokens of a store are, as arguments of StoreWriter."""
    sequence = layout.SEQUENCE if store.layout == layout.SEQUENCE else None
    return {"codebook": store.books, "grid": store.grid, "layout": sequence}


def check_columns(source: TokenStore) -> None:
    """Raise StoreError for a column of a kind that StoreWriter does not write: another program has added it."""
    foreign = sorted(set(source.column_names) - {*OWN_COLUMNS, *source.columns})
    if foreign:
        raise StoreError(
            f"{source.path}: split {source.split!r} has columns that would be lost: {', '.join(foreign)}; "
            f"expected the kinds {', '.join(ARROW_TYPES)}; remove them with `datasets` first"
        )


def copy_images(
    source: TokenStore,
    writer: StoreWriter,
    positions: Sequence[int] | Integer[np.ndarray, " images"],
    *,
    classes: Mapping[int, int] | None = None,
) -> None:
    """Add the images of `source` at `positions`, with all columns, to an open writer, with a progress bar.

    `classes` gives the new number of each class; classes that it does not have are left out of lists.
    """
    columns = {name: source.column(name) for name in source.columns}
    with tqdm(total=len(positions), desc=source.split, unit=" images", disable=None) as bar:
        for part in _batches(source, positions):
            ids, labels = zip(*(source[position] for position in part), strict=True)
            others = {name: column[part] for name, column in columns.items()}
            renumbered = [renumber(label, classes) for label in labels]
            writer.add_batch(np.stack(ids) if source.grid else ids, renumbered, others)
            bar.update(len(part))


def _batches(
    source: TokenStore, positions: Sequence[int] | Integer[np.ndarray, " images"]
) -> Iterator[Sequence[int] | np.ndarray]:
    """Split `positions` into parts of at most BATCH images and BATCH_TOKENS tokens, but at least one image."""
    if source.grid:
        size = max(1, min(BATCH, BATCH_TOKENS // math.prod(source.grid)))
        yield from (positions[start : start + size] for start in range(0, len(positions), size))
        return
    start = tokens = 0
    for end, position in enumerate(positions):
        size = math.prod(source.grids[position].tolist())
        if end > start and (end - start == BATCH or tokens + size > BATCH_TOKENS):
            yield positions[start:end]
            start, tokens = end, 0
        tokens += size
    if start < len(positions):
        yield positions[start:]


def renumber(label: Label, classes: Mapping[int, int] | None) -> Label:
    """Return a label with the new numbers of its classes; of several, those without a number are left out."""
    if label is None or classes is None:
        return label
    if isinstance(label, tuple):
        return tuple(classes[one] for one in label if one in classes)
    return classes[label]


def _recode_split(source: TokenStore, out: Path, codec: str) -> None:
    check_columns(source)
    writer = StoreWriter(
        out,
        **tokens_of(source),
        codec=codec,
        split=source.split,
        class_names=source.class_names,
        tokenizer=source.tokenizer,
        columns=source.columns,
        multi_label=source.multi_label,
        inventory=source.inventory,
    )
    with writer:
        copy_images(source, writer, range(len(source)))
