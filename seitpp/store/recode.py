"""Convert a store to another codec; images and their order stay the same."""

import os
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm

from seitpp.files import new_folder
from seitpp.store import layout
from seitpp.store.layout import StoreError
from seitpp.store.reader import TokenStore
from seitpp.store.shards import ARROW_TYPES
from seitpp.store.spec import OWN_COLUMNS
from seitpp.store.writer import StoreWriter

BATCH = 1024


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


def _check_columns(source: TokenStore) -> None:
    """Raise StoreError for a column of a kind that StoreWriter does not write: another program has added it."""
    present = datasets.load_from_disk(str(source.path / source.split)).column_names
    foreign = sorted(set(present) - {*OWN_COLUMNS, *source.columns})
    if foreign:
        raise StoreError(
            f"{source.path}: split {source.split!r} has columns that would be lost: {', '.join(foreign)}; "
            f"expected the kinds {', '.join(ARROW_TYPES)}; remove them with `datasets` first"
        )


def _recode_split(source: TokenStore, out: Path, codec: str) -> None:
    _check_columns(source)
    columns = {name: source.column(name) for name in source.columns}
    writer = StoreWriter(
        out,
        codebook=source.codebook,
        grid=source.grid,
        codec=codec,
        split=source.split,
        class_names=source.class_names,
        tokenizer=source.tokenizer,
        columns=source.columns,
        multi_label=source.multi_label,
        inventory=source.inventory,
    )
    with writer, tqdm(total=len(source), desc=source.split, unit=" images", disable=None) as bar:
        for start in range(0, len(source), BATCH):
            part = range(start, min(start + BATCH, len(source)))
            ids, labels = zip(*(source[position] for position in part), strict=True)
            others = {name: column[part] for name, column in columns.items()}
            writer.add_batch(np.stack(ids) if source.grid else ids, labels, others)
            bar.update(len(part))
