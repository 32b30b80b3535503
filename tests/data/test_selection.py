"""A part of a store used as a store, and the validation images of a store that has none."""

import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest

from seitpp import StoreWriter, TokenStore
from seitpp.data.selection import SHARED, Selection, set_aside
from seitpp.engine.inputs import open_splits
from seitpp.errors import UserError
from seitpp.store import StoreError

CODEBOOK = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
IMAGES = 50


def write(path: Path, split: str = "train", images: int = IMAGES, labels=None, **settings) -> Path:
    ids = np.random.default_rng(1).integers(64, size=(images, 4, 6))
    with StoreWriter(path, codebook=CODEBOOK, grid=(4, 6), split=split, **settings) as writer:
        writer.add_batch(ids, np.arange(images) % 3 if labels is None else labels)
    return path


def test_every_20th_image_is_held_out_and_both_parts_are_stores(tmp_path: Path) -> None:
    store = TokenStore(write(tmp_path / "store"))
    train, validation = open_splits(tmp_path / "store", verify=True)
    kept = [index for index in range(IMAGES) if index not in (19, 39)]
    for part, indices, split in ((train, kept, "train"), (validation, [19, 39], "validation")):
        assert (part.split, len(part)) == (split, len(indices))
        for own in (part, pickle.loads(pickle.dumps(part))):  # a worker of the loader gets a copy
            assert np.array_equal(own.ids(np.arange(len(own))), store.ids(indices))
            assert np.array_equal(own.labels, store.labels[indices]) and own.num_labeled == len(indices)
            assert np.array_equal(own.multi_hot([1, 0]), store.multi_hot([indices[1], indices[0]]))
        ids, label = part[-1]
        assert np.array_equal(ids, store[indices[-1]][0]) and label == store[indices[-1]][1]
        assert np.array_equal(part.payload_sizes, store.payload_sizes[indices])
        assert part.payload_bytes == store.payload_sizes[indices].sum() and part.grids.shape == (len(part), 2)
        assert part.fingerprint == store.fingerprint and part.lookup == store.lookup
        assert "no split 'validation': every 20th" in part.rule and "2 of 50" in part.rule
        with pytest.raises(IndexError):
            part[len(part)]
        part.require_classes("a test")
        part.verify()


def test_nothing_of_a_store_is_inherited_that_speaks_of_all_images() -> None:
    """Whatever TokenStore offers is shared by all images, or a selection says what it is of its own."""
    of_class = {name for name in vars(TokenStore) if name[0] != "_"}
    inherited = of_class - set(vars(Selection))
    # They follow from what a selection has: its tokenizer, books, number of labels, and columns (none).
    assert inherited == {"lookup", "codebook", "counts", "require_classes", "column"}
    documented = set(inspect.getdoc(TokenStore).replace(";", " ").replace(",", " ").replace(".", " ").split())
    own = {"split", "labels", "grids", "columns", "payload_bytes", "num_labeled"}
    assert set(SHARED) - documented == set() and own <= documented


def test_missing_labels_stay_missing(tmp_path: Path) -> None:
    store = TokenStore(
        write(tmp_path / "some", labels=[index % 3 if index % 2 else None for index in range(IMAGES)])
    )
    train, validation = set_aside(store)
    assert (train.num_labeled, validation.num_labeled) == (23, 2) and train[0][1] is None
    assert np.array_equal(train.labels[:3], [-1, 1, -1])
    with pytest.raises(StoreError, match="a test needs classes: 25 of 48 images"):
        train.require_classes("a test")
    validation.require_classes("a test")
    lists = [(0, 2), (), None, (1,)] * 12 + [(0,), None]
    several = TokenStore(write(tmp_path / "lists", labels=lists, multi_label=True))
    train, validation = set_aside(several)
    assert train.multi_label and (train.num_labeled, validation.num_labeled) == (35, 2)
    assert train[0][1] == (0, 2) and train[2][1] is None
    with pytest.raises(StoreError, match="several classes"):
        _ = train.labels


def test_a_store_without_validation_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    few = write(tmp_path / "few", images=19)
    with pytest.raises(UserError, match=r"few: 19 images and no split 'validation': expected at least 20"):
        open_splits(few, verify=True)
    other = write(tmp_path / "other")
    write(other, split="val", images=4)  # probably meant for validation, so it is not passed over
    with pytest.raises(StoreError, match="no split 'validation', it has train, val"):
        open_splits(other, verify=True)
    named = write(tmp_path / "named")
    write(named, split="validation", images=4)
    assert [len(part) for part in open_splits(named, verify=True)] == [50, 4]
