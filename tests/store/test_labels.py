"""Labels: one class, several or none, known or not; what is written is read, and what needs classes says so."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from support.paths import GOLDEN

from seitpp import StoreWriter, TokenStore
from seitpp.data.dataset import TokenDataset, few_labels
from seitpp.store import SplitStaging, StoreError, layout, spec
from seitpp.store.recode import recode
from seitpp.store.release import export_release
from seitpp.store.shards import read_shard, write_shard

CLASSES = ["cat", "dog", "owl"]
CODEBOOK = np.arange(60, dtype=np.float32).reshape(20, 3) / 8
INVENTORY = {"read": {"cat": 4, "dog": 3}, "left out": [{"why": "suffix", "first": "notes.txt", "files": 2}]}
SINGLE = [0, None, 2, 1, None, 0, 0]
SEVERAL = [(0, 2), (), None, (1,), (0, 1, 2), None, (2,)]
KINDS = {
    "complete": ([0, 1, 2, 1, 0, 0, 0], False, 1),
    "some missing": (SINGLE, False, 2),
    "all missing": ([None] * 7, False, 2),
    "several": (SEVERAL, True, 2),
    "several, all known": ([(0, 2), (), (1,), (1,), (0, 1, 2), (), (2,)], True, 2),
    "several, all missing": ([None] * 7, True, 2),
}
GRID = (4, 6)


def images(n: int) -> np.ndarray:
    """Ids (n, 4, 6), by a formula."""
    return ((np.arange(n * 24) * 2654435761 % 2**32 >> 16) % 18).reshape(n, *GRID)


def write(path: Path, labels: list, multi_label: bool = False, split: str = "train", **changes) -> Path:
    arguments = {"codebook": CODEBOOK, "grid": GRID, "class_names": CLASSES, **changes}
    with StoreWriter(path, split=split, multi_label=multi_label, **arguments) as out:
        out.add_batch(images(len(labels)), labels)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def hot(label: tuple | int | None) -> list[int]:
    if label is None:
        return [255] * 3
    return [int(one in (label if isinstance(label, tuple) else (label,))) for one in range(3)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(spec, "SHARD_IMAGES", 3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path, kind):
    labels, multi_label, version = KINDS[kind]
    store = TokenStore(write(tmp_path / "s", labels, multi_label))
    known = [label for label in labels if label is not None]
    assert [label for _, label in store] == labels
    assert layout.read_document(store.path)["version"] == version
    assert (store.multi_label, store.num_labeled, store.num_classes) == (multi_label, len(known), 3)
    order = [6, 2, 2, -7]
    assert store.multi_hot(order).tolist() == [hot(labels[index]) for index in order]
    assert store.multi_hot(order).dtype == np.uint8 and store.multi_hot([]).shape == (0, 3)
    batch = TokenDataset(store).__getitems__(order)
    if multi_label:
        assert batch.labels.dtype == torch.uint8 and batch.labels.tolist() == store.multi_hot(order).tolist()
        with pytest.raises(StoreError, match="several classes each, expected one"):
            _ = store.labels
    else:
        numbers = [-1 if label is None else label for label in labels]
        assert store.labels.tolist() == numbers and store.labels.dtype == np.int64
        assert batch.labels.tolist() == [numbers[index] for index in order]
    read = datasets.load_from_disk(str(store.path / "train"))["label"][:]
    missing = None if multi_label else -1
    assert read == [missing if one is None else list(one) if multi_label else one for one in labels]
    if len(known) == 7:
        store.require_classes("training")
    else:
        message = f"^training needs classes: {7 - len(known)} of 7 images of split 'train' of .* have none; .*"
        with pytest.raises(StoreError, match=message):
            store.require_classes("training")
    store.verify()


@pytest.mark.parametrize("kind", KINDS)
def test_staging_makes_the_same_bytes(tmp_path, kind):
    labels, multi_label, _ = KINDS[kind]
    common = {"codebook": CODEBOOK, "grid": GRID, "class_names": CLASSES, "multi_label": multi_label}
    ranks = [SplitStaging(tmp_path / "staged", num_images=7, **common) for _ in range(2)]
    for shard in (2, 0, 1):
        own = ranks[shard % 2].images(shard)
        ranks[shard % 2].write(shard, images(7)[own.start : own.stop], labels[own.start : own.stop])
    ranks[0].publish(processes=2 if kind == "several" else 1, inventory=INVENTORY)
    assert contents(tmp_path / "staged") == contents(
        write(tmp_path / "written", labels, multi_label, inventory=INVENTORY)
    )


def test_without_class_names_the_largest_label_counts(tmp_path):
    assert TokenStore(write(tmp_path / "none", [None] * 3, class_names=None)).num_classes == 0
    assert TokenStore(write(tmp_path / "some", [None, 4, -1], class_names=None)).num_classes == 5
    lists = TokenStore(write(tmp_path / "lists", [(7, 2, 7), (), None], True, class_names=None))
    assert lists.num_classes == 8 and lists[0][1] == (2, 7)
    empty = TokenStore(write(tmp_path / "empty", [(), ()], True, class_names=None))
    assert empty.multi_hot([0, 1]).shape == (2, 0)
    with pytest.raises(StoreError, match="needs classes: all images of split 'train'"):
        empty.require_classes("training")


def test_an_array_with_minus_one_is_missing_too(tmp_path):
    numbers = np.array([0, -1, 2])
    assert contents(write(tmp_path / "a", numbers)) == contents(write(tmp_path / "b", [0, None, 2]))


@pytest.mark.parametrize(
    ("label", "multi_label", "message"),
    [
        ((0, 1), False, r"image 1: label \(0, 1\), expected one class; write with multi_label=True"),
        (-2, False, "image 1: label -2, expected 0 .. 2; give -1 or None"),
        (3, False, "image 1: label 3, expected 0 .. 2"),
        (2, True, "image 1: label 2, expected a tuple of classes, or None"),
        ("cat", True, "image 1: label 'cat', expected a tuple of classes"),
        ((0, 3), True, r"image 1: labels \(0, 3\), expected 0 .. 2"),
        ((-1,), True, r"image 1: labels \(-1,\), expected 0 .. 2"),
        ((0.5,), True, "image 1: label .*expected a tuple of classes"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_other_labels_are_refused(tmp_path, label, multi_label, message):
    with StoreWriter(
        tmp_path / "s", codebook=CODEBOOK, grid=GRID, class_names=CLASSES, multi_label=multi_label
    ) as out:
        out.add(images(1)[0], None)
        with pytest.raises(StoreError, match=message):
            out.add(images(1)[0], label)
        with pytest.raises(StoreError, match="labels from image 1: got 2, expected 1, one per image"):
            out.add_batch(images(1), [None, None])


def test_splits_agree_on_lists(tmp_path):
    write(tmp_path / "s", SEVERAL, True)
    with pytest.raises(StoreError, match="its multi_label is True, got False"):
        write(tmp_path / "s", SINGLE, split="validation")
    store = TokenStore(write(tmp_path / "s", [None] * 4, True, split="test"), "test")
    assert store.multi_label and store.num_labeled == 0
    begun = SplitStaging(tmp_path / "t", codebook=CODEBOOK, grid=GRID, num_images=7)
    with pytest.raises(StoreError, match="begun with multi_label False, got True"):
        SplitStaging(tmp_path / "t", codebook=CODEBOOK, grid=GRID, num_images=7, multi_label=True)
    record = begun.folder / "staging.json"
    older = {key: value for key, value in json.loads(record.read_bytes()).items() if key != "multi_label"}
    record.write_text(json.dumps(older))
    SplitStaging(tmp_path / "t", codebook=CODEBOOK, grid=GRID, num_images=7)


# Version 2


def test_only_what_needs_version_2_has_it(tmp_path):
    """One split with a missing label, a list or an inventory makes it 2; the other splits stay as they were."""
    path = write(tmp_path / "s", [0, 1, 2])
    before = contents(path / "train")
    assert layout.read_document(path)["version"] == 1
    write(path, [0, None], split="validation")
    document = layout.read_document(path)
    assert document["version"] == 2 and contents(path / "train") == before
    assert document["splits"]["validation"].keys() - document["splits"]["train"].keys() == {"num_labeled"}
    assert TokenStore(path).num_labeled == 3
    assert layout.read_document(write(tmp_path / "t", [0], inventory={}))["version"] == 2


def test_golden_store():
    """Never changes: a store of version 2 that users have."""
    train, validation = (TokenStore(GOLDEN / "store_v2", split) for split in ("train", "validation"))
    assert [label for _, label in train] == SEVERAL
    assert [label for _, label in validation] == [None, (1,), None]
    assert (train.ids(range(7)) == images(7)).all() and (validation.ids(range(3)) == images(3)).all()
    assert (train.inventory, validation.inventory) == (INVENTORY, None)
    assert layout.read_document(train.path)["version"] == 2
    train.verify()


def test_golden_store_is_written_again(tmp_path):
    """Payloads to the byte; of the other files the values, since other versions of pyarrow may write them."""
    write(tmp_path / "s", SEVERAL, True, inventory=INVENTORY)
    write(tmp_path / "s", [None, (1,), None], True, split="validation")
    for split in ("train", "validation"):
        golden, written = (datasets.load_from_disk(str(p / split)) for p in (GOLDEN / "store_v2", tmp_path / "s"))
        assert golden[:] == written[:]
    first, second = (layout.read_document(path) for path in (GOLDEN / "store_v2", tmp_path / "s"))
    assert list(first["files"]) == list(second["files"])
    for document in (first, second):
        del document["files"], document["checksum"]
    assert first == second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labeled": 5}, "5 images have a label, expected"),
        ({"num_labeled": 8}, "split 'train'"),
        ({"num_labeled": -1}, "split 'train'"),
        ({"multi_label": False}, "expected a column 'label' of int64"),
        ({"multi_label": 1}, "split 'train'"),
        ({"inventory": []}, "split 'train'"),
        ({"num_classes": 2}, "labels 0 .. 2, expected 0 .. 1"),
        ({"more": 1}, "split 'train'"),
    ],
)
def test_false_claims_are_refused(tmp_path, changes, message):
    path = write(tmp_path / "s", SEVERAL, True, class_names=None)
    document = json.loads((path / layout.DOCUMENT).read_bytes())
    document["splits"]["train"] |= changes
    layout.write_document(path, document)
    if changes == {"num_labeled": 5}:
        message = "5 images have a label"
        document["splits"]["train"]["num_labeled"] = 6
        layout.write_document(path, document)
    with pytest.raises(StoreError, match=message):
        TokenStore(path)


def test_version_1_has_no_keys_of_version_2(tmp_path):
    path = write(tmp_path / "s", [0, None])
    document = json.loads((path / layout.DOCUMENT).read_bytes())
    layout.write_document(path, {**document, "version": 1})
    with pytest.raises(StoreError, match="split 'train': expected its rows"):
        TokenStore(path)
    document["splits"]["train"].pop("num_labeled")
    layout.write_document(path, {**document, "version": 1})
    with pytest.raises(StoreError, match="1 images have a label, expected 2"):
        TokenStore(path)


def lists(offsets: list[int], values: list[int]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int64()))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lists([0, 1, 2], [0, 3]), "labels 0 .. 3, expected 0 .. 2"),
        (lists([0, 1, 2], [0, -1]), "labels -1 .. 0"),
        (lists([0, 2, 2], [1, 1]), "expected different classes in ascending order"),
        (lists([0, 2, 2], [1, 0]), "expected different classes in ascending order"),
        (pa.array([[None], [1]], pa.list_(pa.int64())), "classes that are not null"),
        (pa.array([[0], [1]], pa.list_(pa.int32())), "expected a column 'label' of lists of int64"),
        (pa.array([0, 1], pa.int64()), "expected a column 'label' of lists of int64"),
        (pa.array([None, [1]], pa.list_(pa.int64())), "1 images have a label, expected 2"),
    ],
)
def test_damaged_lists_are_refused(tmp_path, labels, message):
    path = write(tmp_path / "s", [(0, 1), (2,)], True)
    name = layout.shard_name("train", 0, 1)
    tokens = read_shard(path / name).column("tokens").to_pylist()
    with (path / name).open("wb") as file:
        write_shard(file, pa.record_batch({"tokens": pa.array(tokens, pa.binary()), "label": labels}))
    document = json.loads((path / layout.DOCUMENT).read_bytes())
    layout.write_document(path, {**document, "files": {**document["files"], name: layout.file_entry(path / name)}})
    with pytest.raises(StoreError, match=message):
        TokenStore(path)


def test_damage_without_verify_is_an_error_or_a_set_of_classes(tmp_path):
    """Any bit of a shard with lists: never another exception than StoreError, never a class out of range."""
    path = write(tmp_path / "s", SEVERAL[:3], True)
    shard = path / layout.shard_name("train", 0, 1)
    data, rng, refused = shard.read_bytes(), np.random.default_rng(0), 0
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        try:
            store = TokenStore(path, verify=False)
            read = [label for _, label in store]
            assert all(label is None or set(label) <= {0, 1, 2} for label in read)
            assert store.multi_hot(range(3)).tolist() == [hot(label) for label in read]
        except StoreError:
            refused += 1
    assert refused > 100


# What uses labels


def test_the_inventory_is_kept_and_shown(tmp_path):
    path = write(tmp_path / "s", SINGLE, inventory=INVENTORY)
    assert TokenStore(path).inventory == INVENTORY
    write(path, [1, 0], split="validation")
    assert TokenStore(path, "validation").inventory is None
    card = (path / layout.CARD).read_text()
    assert (
        "What was read for the split train, and what was left out:" in card
        and "| read, cat | 4 |\n| read, dog | 3 |\n| left out, 1, why | suffix |" in card
    )
    assert "split validation, and" not in card
    assert "| train | 7 (2 without a label) | 3 |" in card and "`label` is -1 where it is not known." in card
    many = write(tmp_path / "many", [0], inventory={"files": {str(i): i for i in range(30)}, "names": ["x"] * 40})
    card = (many / layout.CARD).read_text()
    assert "| files, .. | 10 more |" in card and "| names, 21 | .. 20 more |" in card and "files, 29" not in card
    assert len(TokenStore(many).inventory["files"]) == 30
    with pytest.raises(StoreError, match=r"inventory: .* bytes of JSON, expected at most 1048576; give counts"):
        write(tmp_path / "large", [0], inventory={"names": "x" * 2**20})


@pytest.mark.parametrize("kind", KINDS)
def test_recode_keeps_labels_and_inventory(tmp_path, kind):
    labels, multi_label, _ = KINDS[kind]
    path = write(tmp_path / "s", labels, multi_label, inventory=INVENTORY)
    recode(path, tmp_path / "packed", "packed")
    recode(tmp_path / "packed", tmp_path / "back", "ans")
    assert contents(tmp_path / "back") == contents(path)


def test_a_release_holds_one_class_an_image(tmp_path):
    with pytest.raises(StoreError, match="a released file needs classes: 2 of 7 images"):
        export_release(write(tmp_path / "single", SINGLE), tmp_path / "out")
    with pytest.raises(StoreError, match="several classes each"):
        export_release(write(tmp_path / "several", [(0,), ()], True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_without_a_label_are_none_of_the_few():
    labels = np.array([0, -1, 1, 1, -1, 0])
    assert few_labels(labels, 2, seed=0).tolist() == [0, 2, 3, 5]
