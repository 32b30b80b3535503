"""Stores grow, join and shrink: the same bytes as if written at once, or old bytes untouched; never half of it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from seitpp import StoreWriter, TokenStore
from seitpp.data.dataset import fraction_of
from seitpp.data.order import Permutation
from seitpp.errors import UserError
from seitpp.store import StoreError, layout, spec
from seitpp.store.grow import append, merge, reshuffle, subset
from seitpp.store.labels import Label
from seitpp.store.recode import recode

CLASSES = ["cat", "dog", "owl"]
CODEBOOK = np.arange(60, dtype=np.float32).reshape(20, 3) / 8
GRID = (4, 6)
COLUMNS = {"name": "string", "size": "int64"}
LABELS = [0, 1, 2, None, 1, 0, 2]
SEVERAL = [(0, 2), (), None, (1,), (0, 1, 2)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(spec, "SHARD_IMAGES", 3)


def images(numbers: range) -> np.ndarray:
    """Ids (n, 4, 6) of some images, by their numbers."""
    return np.stack([(np.arange(24) * (number + 3) + number**2) % 18 for number in numbers]).reshape(-1, *GRID)


def write(path: Path, labels: list[Label], start: int = 0, split: str = "train", **changes) -> Path:
    """A split of images `start`, `start` + 1, .."""
    numbers = range(start, start + len(labels))
    arguments = {"codebook": CODEBOOK, "grid": GRID, "class_names": CLASSES, "columns": COLUMNS, **changes}
    columns = {"name": [f"{number}.png" for number in numbers], "size": list(numbers)}
    with StoreWriter(path, split=split, **arguments) as out:
        out.add_batch(images(numbers), labels, {name: columns[name] for name in arguments["columns"]})
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def holds(path: Path, numbers: list[int], labels: list[Label], split: str = "train") -> TokenStore:
    """Check every image, also as plain `datasets` reads it."""
    store = TokenStore(path, split)
    store.verify()
    assert (store.ids(range(len(store))) == np.stack([images(range(i, i + 1))[0] for i in numbers])).all()
    assert [label for _, label in store] == labels
    assert store.column("name")[range(len(store))] == [f"{number}.png" for number in numbers]
    plain = datasets.load_from_disk(str(path))[split]
    assert plain["size"][:] == numbers
    assert {shard.name for shard in (path / split).glob("data-*")} == {
        Path(name).name for name in layout.shard_names(store._document, split)
    }
    return store


# Append


@pytest.mark.parametrize("codec", ["ans", "huffman", "packed"])
def test_append_keeps_what_is_there_and_the_table(tmp_path, codec):
    path = write(write(tmp_path / "s", LABELS, codec=codec), [1, 1], split="validation", codec=codec)
    before, counts, validation = TokenStore(path), TokenStore(path).counts, contents(path / "validation")
    payloads = [before._decode(i).tobytes() for i in range(7)]
    first = (path / layout.shard_name("train", 0, 3)).read_bytes()
    document = layout.read_document(path)
    more, most = (
        write(tmp_path / "more", [2, None], 7, codec=codec),
        write(tmp_path / "most", [0] * 4, 9, codec=codec),
    )
    append(path, [more, most])
    after = holds(path, list(range(13)), [*LABELS, 2, None, 0, 0, 0, 0])
    assert (after.counts == counts).all() and [after._decode(i).tobytes() for i in range(7)] == payloads
    assert (path / layout.shard_name("train", 0, 6)).read_bytes() == first
    assert contents(path / "validation") == validation
    written = layout.read_document(path)
    for key in ("codec", "grid", "class_names", "tokenizer", "num_codes"):
        assert written[key] == document[key]
    assert after.num_labeled == 11 and after.fingerprint != before.fingerprint
    assert f"| train | 13 (2 without a label) | 3 | {after.payload_bytes:,} |" in (path / "README.md").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["more", "most", "s"]


@pytest.mark.parametrize("codec", ["ans", "context"])
def test_payloads_of_the_same_table_are_copied(tmp_path, monkeypatch, codec):
    write(tmp_path / "s", [0, 1], codec=codec)
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    monkeypatch.setattr(TokenStore, "__getitem__", None)  # no image is decoded
    append(tmp_path / "s", [tmp_path / "t"])
    monkeypatch.undo()
    holds(tmp_path / "s", [0, 1, 0, 1], [0, 1, 0, 1])


def test_append_finds_classes_by_name(tmp_path):
    path = write(tmp_path / "s", [0, 1, 2])
    other = write(tmp_path / "o", [0, 1, None], 3, class_names=["owl", "cat"])
    append(path, [other])
    holds(path, list(range(6)), [0, 1, 2, 2, 0, None])
    before = contents(tmp_path)
    new = write(tmp_path / "n", [0], class_names=["ant"])
    with pytest.raises(StoreError, match=r"n: has 1 classes that .*s lacks, as 'ant'; use `seitpp merge`"):
        append(path, [new])
    assert contents(tmp_path) == before | {f"n/{name}": data for name, data in contents(new).items()}


def test_append_without_names_and_without_labels(tmp_path):
    path = write(tmp_path / "s", [0, 4], class_names=None)
    append(path, [write(tmp_path / "o", [6, None], 2, class_names=None)])
    assert holds(path, [0, 1, 2, 3], [0, 4, 6, None]).num_classes == 7
    unknown = write(tmp_path / "u", [None, None], 4, class_names=None)
    append(write(tmp_path / "named", [1]), [unknown])
    holds(tmp_path / "named", [0, 4, 5], [1, None, None])
    with pytest.raises(StoreError, match=r"got class names in .*named and none in .*o, expected them in both"):
        append(tmp_path / "named", [tmp_path / "o"])


def test_append_of_lists(tmp_path):
    path = write(tmp_path / "s", SEVERAL, multi_label=True)
    append(path, [write(tmp_path / "o", [(1, 0), (), None], 5, multi_label=True, class_names=["dog", "owl"])])
    store = holds(path, list(range(8)), [*SEVERAL, (1, 2), (), None])
    assert store.multi_label and store.num_labeled == 6
    append(path, [write(tmp_path / "u", [None], 8)])
    holds(path, list(range(9)), [*SEVERAL, (1, 2), (), None, None])
    single = write(tmp_path / "single", [0])
    with pytest.raises(StoreError, match=r"s: its images have several classes each, but those of .*single"):
        append(path, [single])
    with pytest.raises(StoreError, match="u: has one class an image, got lists of classes; use `seitpp merge`"):
        append(tmp_path / "u", [path])


def test_append_of_images_with_their_own_grids(tmp_path):
    sides = [(2, 3), (4, 1), (1, 1), (5, 2)]
    for name, part in (("s", sides[:2]), ("o", sides[2:])):
        with StoreWriter(tmp_path / name, codebook=CODEBOOK, grid=None, columns={"n": "int64"}) as out:
            for height, width in part:
                out.add(np.full((height, width), height + width), width, {"n": height})
    append(tmp_path / "s", [tmp_path / "o"])
    store = TokenStore(tmp_path / "s")
    assert store.grids.tolist() == [list(pair) for pair in sides]
    for (height, width), (ids, label) in zip(sides, store, strict=True):
        assert ids.shape == (height, width) and (ids == height + width).all() and label == width
    assert store.column("n")[range(4)].tolist() == [2, 4, 1, 5]


def inventories(path: Path, *others: Path, split: str = "train") -> dict | None:
    append(path, others, split=split)
    return TokenStore(path, split).inventory


def test_inventories_are_kept_part_by_part(tmp_path):
    path = write(tmp_path / "s", [0, 1])
    assert inventories(path, write(tmp_path / "a", [0], 2)) is None
    assert layout.read_document(path)["version"] == 1
    told = write(tmp_path / "b", [0], 3, inventory={"read": 1})
    parts = [{"images": 3, "inventory": None}, {"images": 1, "inventory": {"read": 1}}]
    assert inventories(path, told) == {"parts": parts}
    last = {"images": 2, "inventory": None}
    assert inventories(path, write(tmp_path / "c", [0, 0], 4)) == {"parts": [*parts, last]}
    merge(tmp_path / "m", [path, write(tmp_path / "d", [1, 1], 6)])
    assert TokenStore(tmp_path / "m").inventory == {"parts": [*parts, last, last]}
    subset(path, tmp_path / "half", positions={"train": [0, 5]})
    assert TokenStore(tmp_path / "half").inventory == {"subset_of": {"parts": [*parts, last]}}


@pytest.mark.parametrize("join", [lambda path, other: append(path, [other]), None])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook": CODEBOOK + 1}, r"o: its codebook is \(20, 3\) \w{12}, expected \(20, 3\) \w{12} as in .*s;"),
        ({"grid": None}, r"its grid is None, expected \(4, 6\)"),
        ({"codec": "packed"}, "its codec is packed, expected ans as in .*s; use `seitpp recode` first"),
        (
            {"tokenizer": {"fingerprint": "a", "spec": {"size": 8, "resize": "pad"}}},
            r"its tokenizer is \{'spec': \{'resize': 'pad'\}\}, expected \{'spec': \{'resize': 'squash'\}\}",
        ),
        ({"columns": {"name": "string"}}, r"its columns is \{\}, expected \{'size': 'int64'\}"),
    ],
)
def test_stores_that_do_not_go_together_are_refused(tmp_path, join, changes, message):
    tokenizer = {"fingerprint": "a", "spec": {"size": 8, "resize": "squash"}}
    path = write(tmp_path / "s", [0, 1], tokenizer=tokenizer)
    other = write(tmp_path / "o", [0], 2, **{"tokenizer": tokenizer, **changes})
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=message) as caught:
        append(path, [other]) if join else merge(tmp_path / "m", [path, other])
    assert len(str(caught.value).splitlines()) == 1
    assert contents(tmp_path) == before and {entry.name for entry in tmp_path.iterdir()} == {"o", "s"}


def test_no_image_is_there_twice(tmp_path):
    path, other = write(tmp_path / "s", [0]), write(tmp_path / "o", [0], 1)
    for others in ([path], [other, tmp_path / ".." / tmp_path.name / "o"]):
        with pytest.raises(StoreError, match="named twice, expected different stores"):
            append(path, others)
    with pytest.raises(StoreError, match="named twice"):
        merge(tmp_path / "m", [other, other])
    with pytest.raises(StoreError, match="no split 'test', it has train"):
        append(path, [other], split="test")


# Killed


def states(append_now: Callable[[], None], folder: Path, copies: Path) -> list[Path]:
    """What lies in `folder` before every single file operation of an append: there it can be killed."""
    found: dict[tuple, Path] = {}

    def copied(real):
        def operation(*args, **kwargs):
            state = contents(folder)
            key = tuple((name, data) for name, data in state.items() if not name.startswith(".s-train.append/"))
            if key not in found:
                found[key] = shutil.copytree(folder, copies / str(len(found)))
            return real(*args, **kwargs)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            *((os, name) for name in ("fsync", "unlink", "rmdir", "replace")),
            *((Path, name) for name in ("rename", "replace", "unlink")),
        ):
            patch.setattr(module, name, copied(getattr(module, name)))
        append_now()
    return list(found.values())


def test_killed_at_any_file_operation_it_is_the_old_or_the_new_store(tmp_path):
    path, other = write(tmp_path / "here" / "s", [0, None]), write(tmp_path / "o", [1], 2)
    left = states(lambda: append(path, [other]), path.parent, tmp_path / "copies")
    wanted, seen = contents(path.parent), []
    for folder in left:
        store = TokenStore(folder / "s")
        store.verify()
        seen.append(len(store))
        assert [label for _, label in store] == [0, None, 1][: len(store)]
        assert datasets.load_from_disk(str(folder / "s" / "train")).num_rows in (2, 3)
        append(folder / "s", [other])  # finishes it, and does not append twice
        assert contents(folder) == wanted
    assert len(left) >= 10 and set(seen) == {2, 3} and seen == sorted(seen)


def test_a_store_that_changes_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    path, other = write(tmp_path / "s", [0]), write(tmp_path / "o", [1], 1)
    from seitpp.store import grow

    real = grow._build_split

    def build_slowly(*arguments):
        real(*arguments)
        write(path, [0], split="validation")

    monkeypatch.setattr(grow, "_build_split", build_slowly)
    with pytest.raises(StoreError, match="another process has changed it in the meantime; repeat the command"):
        append(path, [other])
    monkeypatch.undo()
    holds(path, [0], [0])
    append(path, [other])
    holds(path, [0, 1], [0, 1])
    holds(path, [0], [0], "validation")


# Merge


def test_merge_is_what_one_writer_writes(tmp_path):
    a = write(write(tmp_path / "a", [0, 1, None]), [1], 20, split="validation")
    b = write(tmp_path / "b", [0, 1, 2, 0], 3, class_names=["owl", "ant", "cat"])
    c = write(tmp_path / "c", [1, 0], 21, split="validation", class_names=["ant", "fox"])
    merge(tmp_path / "m", [c, a, b])
    names = ["cat", "dog", "owl", "ant", "fox"]
    expected = write(tmp_path / "e", [0, 1, None, 2, 3, 0, 2], class_names=names)
    with StoreWriter(
        expected, codebook=CODEBOOK, grid=GRID, split="validation", class_names=names, columns=COLUMNS
    ) as out:
        for start, labels in ((21, [4, 3]), (20, [1])):
            numbers = range(start, start + len(labels))
            out.add_batch(images(numbers), labels, {"name": [f"{n}.png" for n in numbers], "size": list(numbers)})
    assert contents(tmp_path / "m") == contents(expected)
    holds(tmp_path / "m", list(range(7)), [0, 1, None, 2, 3, 0, 2])


def test_merge_of_lists_and_of_images_without_labels(tmp_path):
    several = write(tmp_path / "a", SEVERAL, multi_label=True)
    unknown = write(tmp_path / "b", [None, None], 5, class_names=None)
    for number, stores in enumerate(([several, unknown], [unknown, several])):
        merge(tmp_path / str(number), stores)
    holds(tmp_path / "0", list(range(7)), [*SEVERAL, None, None])
    holds(tmp_path / "1", [5, 6, 0, 1, 2, 3, 4], [None, None, *SEVERAL])
    single = write(tmp_path / "c", [1], 9)
    with pytest.raises(StoreError, match=r"a: its images have several classes each, but those of .*c have one"):
        merge(tmp_path / "m", [single, several])
    with pytest.raises(StoreError, match=r"got class names in the others and none in .*d, expected them in both"):
        merge(tmp_path / "m", [single, write(tmp_path / "d", [1], class_names=None)])
    assert not (tmp_path / "m").exists()
    merge(tmp_path / "m", [unknown, write(tmp_path / "e", [4], 7, class_names=None)])
    assert holds(tmp_path / "m", [5, 6, 7], [None, None, 4]).num_classes == 5
    with pytest.raises(ValueError, match="exists already and nothing is overwritten"):
        merge(tmp_path / "m", [single])


# Subset


def test_subset_is_the_fraction_of_training(tmp_path):
    path = write(write(tmp_path / "s", LABELS), [2, 2], 9, split="validation")
    chosen = fraction_of(7, 0.5, seed=3)
    subset(path, tmp_path / "half", positions={"train": chosen})
    expected = tmp_path / "e"
    with StoreWriter(expected, codebook=CODEBOOK, grid=GRID, class_names=CLASSES, columns=COLUMNS) as out:
        for number in chosen.tolist():
            out.add(
                images(range(number, number + 1))[0], LABELS[number], {"name": f"{number}.png", "size": number}
            )
    write(expected, [2, 2], 9, split="validation")
    assert contents(tmp_path / "half") == contents(expected)
    holds(tmp_path / "half", chosen.tolist(), [LABELS[number] for number in chosen])
    with pytest.raises(StoreError, match="no image of split 'train' is chosen"):
        subset(path, tmp_path / "none", positions={"train": []})
    assert not (tmp_path / "none").exists()


def test_subset_of_classes(tmp_path):
    path = write(write(tmp_path / "s", LABELS), [2, 1, 0], 9, split="validation")
    subset(path, tmp_path / "two", class_names=["owl", "cat"])
    assert holds(tmp_path / "two", [0, 2, 5, 6], [0, 1, 0, 1]).class_names == ["cat", "owl"]
    holds(tmp_path / "two", [9, 11], [1, 0], "validation")
    several = write(tmp_path / "several", SEVERAL, multi_label=True)
    subset(several, tmp_path / "lists", class_names=["owl"])
    holds(tmp_path / "lists", [0, 4], [(0,), (0,)])
    for store, name, message in (
        (path, "ant", "no class 'ant', it has cat, dog, owl"),
        (write(tmp_path / "nameless", [1], class_names=None), "cat", "no class 'cat', it has no class names"),
        (write(tmp_path / "cats", [0]), "dog", "no image of split 'train' is chosen"),
    ):
        with pytest.raises(StoreError, match=message):
            subset(store, tmp_path / "other", class_names=[name])


def test_what_grew_is_recoded_as_if_written_at_once(tmp_path):
    """Recoding makes the table of all images, so that nothing is left of how the store came about."""
    path = write(tmp_path / "s", LABELS)
    append(path, [write(tmp_path / "o", [1, 1], 7)])
    recode(path, tmp_path / "r", "ans")
    assert contents(tmp_path / "r") == contents(write(tmp_path / "e", [*LABELS, 1, 1]))
    assert json.loads((path / layout.DATASET_DICT).read_text()) == {"splits": ["train"]}


def test_reshuffled_images_are_the_same_in_another_order(tmp_path):
    path = write(write(tmp_path / "s", LABELS, inventory={"found": 7}), [1, 1], split="validation")
    order = Permutation(7, 1)
    reshuffle(path, tmp_path / "mixed", {"train": order})
    numbers = order[:].tolist()
    assert sorted(numbers) == list(range(7)) != numbers
    mixed = holds(tmp_path / "mixed", numbers, [LABELS[number] for number in numbers])
    assert mixed.inventory == {"found": 7} and mixed.class_names == CLASSES
    holds(tmp_path / "mixed", [0, 1], [1, 1], "validation")
    with pytest.raises(UserError, match="exists already"):
        reshuffle(path, tmp_path / "mixed", {"train": order})
