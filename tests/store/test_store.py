"""The store floor: what is written is read, by plain `datasets` too; anything damaged or foreign is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import GOLDEN

from seitpp import StoreWriter, TokenStore
from seitpp.store import StoreError, layout, spec
from seitpp.store.shards import write_shard

CLASSES = ["digit", "letter", "other"]
TOKENIZER = {"fingerprint": "0123abcd", "spec": {"image_size": 32, "scale": 0.5}, "preprocessing": ["resize"]}


def sample(n: int, num_codes: int = 20, grid: tuple[int, int] = (4, 6)) -> tuple[np.ndarray, np.ndarray]:
    """Ids (n, H, W) and labels (n,), by a formula, so that golden files need no second copy of them."""
    position = np.arange(n * grid[0] * grid[1])
    ids = (position * 2654435761 % 2**32 >> 16) % (num_codes - 2)
    return ids.reshape(n, *grid), np.arange(n) % len(CLASSES)


def codebook(num_codes: int = 20, code_dim: int = 3) -> np.ndarray:
    return np.arange(num_codes * code_dim, dtype=np.float32).reshape(num_codes, code_dim) / 8


def write(path: Path, n: int = 50, split: str = "train", **changes) -> Path:
    arguments = {
        "codebook": codebook(),
        "grid": (4, 6),
        "class_names": CLASSES,
        "tokenizer": TOKENIZER,
        **changes,
    }
    with StoreWriter(path, split=split, **arguments) as out:
        out.add_batch(*sample(n))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def store(tmp_path) -> Path:
    """Two splits, the first in three shards."""
    write(tmp_path / "store")
    return write(tmp_path / "store", n=7, split="validation")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(spec, "SHARD_IMAGES", 20)


def edit(path: Path, **changes) -> None:
    """Change tokens.json as a hostile writer can: under a right checksum."""
    document = {**json.loads((path / layout.DOCUMENT).read_bytes()), **changes}
    layout.write_document(path, document)


def relist(path: Path, name: str) -> None:
    """Put a changed file into tokens.json."""
    files = json.loads((path / layout.DOCUMENT).read_bytes())["files"]
    edit(path, files={**files, name: layout.file_entry(path / name)})


# Round trips


def test_what_is_written_is_read(store):
    ids, labels = sample(50)
    s = TokenStore(store)
    assert len(s) == 50
    assert (s.grid, s.num_codes, s.num_classes, s.class_names) == ((4, 6), 20, 3, CLASSES)
    assert s.splits == ["train", "validation"]
    assert s.tokenizer == TOKENIZER
    assert s.codebook.dtype == np.float32 and (s.codebook == codebook()).all()
    assert (s.labels == labels).all() and s.labels.dtype == np.int64
    assert (s.counts == np.bincount(ids.ravel(), minlength=20)).all()
    got, label = s[33]
    assert got.dtype == np.uint16 and (got == ids[33]).all() and label == labels[33] and type(label) is int
    order = np.random.default_rng(0).permutation(50)
    assert s.ids(order).dtype == np.uint16 and (s.ids(order) == ids[order]).all()
    assert (s.ids([-1, 0]) == ids[[-1, 0]]).all()
    assert s.ids([]).shape == (0, 4, 6)
    assert [label for _, label in s] == labels.tolist()
    s.verify()


def test_index_outside_is_an_index_error(store):
    s = TokenStore(store)
    for index in (50, -51):
        with pytest.raises(IndexError):
            s[index]
        with pytest.raises(IndexError):
            s.ids([index])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2**16), st.integers(1, 9), st.integers(1, 9), st.integers(1, 45), st.integers(0, 2**32))
def test_round_trip(tmp_path_factory, num_codes, height, width, n, seed):
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(0, num_codes, (n, height, width)), rng.integers(0, 2**40, n)
    path = tmp_path_factory.mktemp("round") / "store"
    with StoreWriter(path, codebook=np.zeros((num_codes, 1)), grid=(height, width)) as out:
        out.add_batch(ids[: n // 2], labels[: n // 2])
        for image, label in zip(ids[n // 2 :], labels[n // 2 :], strict=True):
            out.add(image, label)
    s = TokenStore(path)
    assert (s.ids(range(n)) == ids).all()
    assert (s.labels == labels).all()
    assert s.num_classes == labels.max() + 1
    assert s.class_names is None and s.tokenizer is None


def test_plain_datasets_reads_it(store):
    ids, labels = sample(50)
    both = datasets.load_from_disk(str(store))
    assert {name: len(split) for name, split in both.items()} == {"train": 50, "validation": 7}
    train = datasets.load_from_disk(str(store / "train"))
    assert train.features["label"].names == CLASSES
    assert train["label"] == labels.tolist()
    codec = TokenStore(store).codec
    assert [codec.decode(payload, 24).tolist() for payload in train["tokens"]] == ids.reshape(50, -1).tolist()
    assert TokenStore(store).payload_bytes == sum(map(len, train["tokens"]))


def test_shards_are_one_batch_each_and_memory_mapped(store):
    shards = sorted((store / "train").glob("*.arrow"))
    assert [len(pa.ipc.open_stream(shard.read_bytes()).read_next_batch()) for shard in shards] == [20, 20, 10]
    before = pa.total_allocated_bytes()
    s = TokenStore(store)
    assert pa.total_allocated_bytes() == before
    assert not s._shard(0).labels.values.flags.owndata


def test_pickle_opens_the_same_store_without_verifying(store, monkeypatch):
    data = pickle.dumps(TokenStore(store, "validation"))
    assert len(data) < 500
    monkeypatch.setattr(layout, "file_entry", None)
    s = pickle.loads(data)
    assert s.split == "validation" and (s.ids(range(7)) == sample(7)[0]).all()


def test_same_data_gives_the_same_bytes(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert contents(first) == contents(second)
    assert TokenStore(first).fingerprint == TokenStore(second).fingerprint
    third = write(tmp_path / "c", n=49)
    assert TokenStore(first).fingerprint != TokenStore(third).fingerprint


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "store")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o750


def test_card_gives_the_figures(store):
    card = (store / "README.md").read_text()
    assert "18 of the 20 codes are used; their perplexity is" in card
    assert json.dumps(TOKENIZER, indent=2) in card
    s = TokenStore(store)
    assert "grid of 4 x 6 ids of a codebook with 20 codes of dimension 3" in card
    assert f"| train | 50 | 3 | {s.payload_bytes:,} | {s.payload_bytes / 50:.1f} |" in card
    share = s.counts[s.counts > 0] / s.counts.sum()
    assert f"{-(share * np.log2(share)).sum():.3f} bits a token" in card


# Golden


def test_golden_store():
    for split, n in (("train", 50), ("validation", 7)):
        s = TokenStore(GOLDEN / "store_v1", split)
        ids, labels = sample(n)
        assert (s.ids(range(n)) == ids).all()
        assert (s.labels == labels).all()
        assert (s.codebook == codebook()).all()
        assert (s.class_names, s.tokenizer) == (CLASSES, TOKENIZER)
    s.verify()


def test_golden_store_is_written_again(store):
    """Payloads to the byte; of the other files the values, since other versions of pyarrow may write them."""
    for split in ("train", "validation"):
        golden = datasets.load_from_disk(str(GOLDEN / "store_v1" / split))["tokens"]
        assert datasets.load_from_disk(str(store / split))["tokens"] == golden[:]
    first, second = (layout.read_document(path) for path in (GOLDEN / "store_v1", store))
    assert list(first["files"]) == list(second["files"])
    for document in (first, second):
        del document["files"], document["checksum"]
    assert first == second


# Writing


def test_a_crash_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError, match="crash"),
        StoreWriter(tmp_path / "deep" / "store", codebook=codebook(), grid=(4, 6)) as out,
    ):
        out.add_batch(*sample(50))
        raise RuntimeError("crash")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_crash_leaves_the_other_splits(store):
    before = contents(store.parent)
    with pytest.raises(RuntimeError), StoreWriter(store, codebook=codebook(), grid=(4, 6), split="test") as out:
        out.add_batch(*sample(50))
        raise RuntimeError("crash")
    assert contents(store.parent) == before


def test_a_store_can_be_read_after_every_rename(store, monkeypatch):
    """Every step of publishing one more split, stopped before it: the old splits are always complete."""
    moves = 0
    for method in ("rename", "replace"):
        real = getattr(Path, method)

        def move(self, target, real=real):
            nonlocal moves
            if not Path(target).is_relative_to(store):
                return real(self, target)
            moves += 1
            copy = shutil.copytree(store, store.parent / f"copy{moves}")
            for split, n in (("train", 50), ("validation", 7)):
                assert (TokenStore(copy, split).ids(range(n)) == sample(n)[0]).all()
            TokenStore(copy).verify()
            return real(self, target)

        monkeypatch.setattr(Path, method, move)
    write(store, n=9, split="test")
    assert moves == 5
    assert TokenStore(store, "test").splits == ["train", "validation", "test"]


def test_a_failing_disk_publishes_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_second_split_uses_the_table_of_the_first(store):
    train, validation = TokenStore(store), TokenStore(store, "validation")
    assert (train.counts == validation.counts).all()
    assert (train.counts == np.bincount(sample(50)[0].ravel(), minlength=20)).all()


def test_a_second_split_takes_names_and_tokenizer_where_none_are_given(store):
    write(store, n=5, split="test", class_names=None, tokenizer=None)
    assert TokenStore(store, "test").class_names == CLASSES
    assert datasets.load_from_disk(str(store / "test")).features["label"].names == CLASSES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (6, 4)}, r"its grid is \[4, 6\], got \[6, 4\]"),
        ({"codebook": codebook() + 1}, r"its codebook is \(20, 3\) \w{12}, got \(20, 3\) \w{12}"),
        ({"codebook": codebook(30, 2)}, r"its codebook is \(20, 3\) \w{12}, got \(30, 2\) \w{12}"),
        ({"class_names": ["a", "b", "c"]}, "its class_names is .*digit.* got .*'a'"),
        ({"tokenizer": {"fingerprint": "other"}}, "its tokenizer is .*0123abcd.* got .*other"),
    ],
)
def test_a_split_that_does_not_agree_is_refused(store, changes, message):
    before = contents(store.parent)
    with pytest.raises(StoreError, match=message):
        write(store, split="test", **changes)
    assert contents(store.parent) == before


def test_nothing_is_overwritten(store, tmp_path):
    with pytest.raises(StoreError, match="has a split 'train' already"):
        write(store)
    (store / "test").mkdir()
    with pytest.raises(StoreError, match="interrupted writer; remove it"):
        write(store, split="test")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(StoreError, match="not empty and no token store"):
        write(tmp_path / "full")
    with pytest.raises(StoreError, match="not empty and no token store"):
        write(tmp_path / "full" / "thesis.tex")
    (tmp_path / "empty").mkdir()
    assert len(TokenStore(write(tmp_path / "empty"))) == 50


def test_a_split_published_meanwhile_is_kept(store):
    with StoreWriter(store, codebook=codebook(), grid=(4, 6), split="one") as out:
        out.add_batch(*sample(3))
        write(store, split="two")
    assert TokenStore(store).splits == ["train", "validation", "two", "one"]
    TokenStore(store).verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook": np.zeros(3)}, "codebook: got shape"),
        ({"codebook": np.full((3, 2), np.nan)}, "all finite"),
        ({"codebook": np.zeros((2, 0))}, "codebook: got shape"),
        ({"codebook": np.zeros((1, 2**16 + 1))}, "vectors of 65537, expected at most 65536"),
        ({"layout": "sequence"}, "layout: got 'sequence' and the grid"),
        ({"grid": (0, 4)}, "grid: got"),
        ({"grid": (4,)}, "grid: got"),
        ({"grid": (2**13, 2**12)}, "grid: got"),
        ({"codec": "zip"}, "codec: got 'zip', expected one of ans"),
        ({"split": "../train"}, "split: got"),
        ({"class_names": ["a", "a"]}, "class_names: got"),
        ({"class_names": []}, "class_names: got"),
        ({"tokenizer": {"scale": float("nan")}}, "JSON"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_arguments_out_of_bounds_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "store", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "label", "message"),
    [
        (np.zeros((6, 4), int), 0, r"got int64 \(6, 4\), expected integers \(4, 6\)"),
        (np.zeros((4, 6)), 0, "got float64"),
        (np.full((4, 6), 20), 0, "image 2: ids 20 .. 20, but the codebook has 20 codes"),
        (np.full((4, 6), -1), 0, "image 2: ids -1 .. -1"),
        (np.zeros((4, 6), int), 3, "image 2: label 3, expected 0 .. 2"),
        (np.zeros((4, 6), int), -2, "image 2: label -2, expected 0 .. 2; give -1 or None"),
        (np.zeros((4, 6), int), 0.5, "got float64"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_images_out_of_bounds_are_refused_and_the_writer_goes_on(tmp_path, ids, label, message):
    with StoreWriter(tmp_path / "s", codebook=codebook(), grid=(4, 6), class_names=CLASSES) as out:
        out.add_batch(*sample(2))
        with pytest.raises(StoreError, match=message):
            out.add(ids, label)
        out.add(sample(3)[0][2], 2)
    assert (TokenStore(tmp_path / "s").ids(range(3)) == sample(3)[0]).all()


def test_an_empty_split_and_a_writer_outside_of_with_are_refused(tmp_path):
    out = StoreWriter(tmp_path / "s", codebook=codebook(), grid=(4, 6))
    with pytest.raises(StoreError, match="with StoreWriter"):
        out.add_batch(*sample(2))
    with pytest.raises(StoreError, match="no images"), out:
        pass
    assert list(tmp_path.iterdir()) == []


# Damage


def test_one_flipped_bit_in_any_file_is_refused(store):
    rng = np.random.default_rng(0)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    for flip in range(300):
        path = files[flip % len(files)]
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(StoreError):
            TokenStore(store).verify()
        path.write_bytes(data)
    TokenStore(store).verify()


def test_every_bit_of_the_checksums_and_layout_of_tokens_json_matters(store):
    path = store / layout.DOCUMENT
    data = path.read_bytes()
    for position in [*range(0, len(data) - 90, 7), *range(len(data) - 90, len(data))]:
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(StoreError):
                layout.read_document(store)


def test_damage_without_verify_is_an_error_or_seen_when_read(store):
    """Bits of payloads and offsets: never other ids in silence, never another exception."""
    shard = store / layout.shard_name("train", 1, 3)
    data, ids = shard.read_bytes(), sample(50)[0]
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        try:
            s = TokenStore(store, verify=False)
            assert (s.ids(range(50)) == ids).all()
        except StoreError:
            refused += 1
    assert refused > 100


def test_a_damaged_image_names_split_image_and_shard(store):
    shard = store / layout.shard_name("train", 1, 3)
    payload = datasets.load_from_disk(str(store / "train"))[27]["tokens"]
    data = shard.read_bytes()
    assert data.count(payload) == 1
    shard.write_bytes(data.replace(payload, payload[:-1] + bytes([payload[-1] ^ 1])))
    s = TokenStore(store, verify=False)
    s.ids([26, 28])
    message = r"split 'train', image 27 \(.*data-00001-of-00003.arrow\): checksum does not match"
    for read in (lambda: s[27], lambda: s.ids([26, 27])):
        with pytest.raises(StoreError, match=message):
            read()
    with pytest.raises(StoreError, match=r"data-00001-of-00003.arrow: SHA-256"):
        TokenStore(store)
    # Listed with its damage, as a bug of a writer would: found by decoding.
    relist(store, layout.shard_name("train", 1, 3))
    with pytest.raises(StoreError, match=message):
        TokenStore(store, "validation").verify()


def test_truncated_missing_and_linked_files_are_refused(store):
    for name in (layout.shard_name("train", 2, 3), layout.CODEBOOK):
        path = store / name
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        with pytest.raises(StoreError, match=f"{path.name}: {len(data) - 1} bytes, expected {len(data)}"):
            TokenStore(store, verify=False)
        path.unlink()
        with pytest.raises(StoreError, match=f"{path.name}: missing"):
            TokenStore(store, verify=False)
        (store.parent / "elsewhere").write_bytes(data)
        path.symlink_to(store.parent / "elsewhere")
        with pytest.raises(StoreError, match=f"{path.name}: a symbolic link"):
            TokenStore(store, verify=False)
        path.unlink()
        path.write_bytes(data)
    (store / layout.DOCUMENT).rename(store.parent / "document")
    (store / layout.DOCUMENT).symlink_to(store.parent / "document")
    with pytest.raises(StoreError, match=r"tokens\.json"):
        TokenStore(store)
    (store / layout.DOCUMENT).unlink()
    (store.parent / "document").rename(store / layout.DOCUMENT)
    (store / "train").rename(store.parent / "moved")
    (store / "train").symlink_to(store.parent / "moved")
    with pytest.raises(StoreError, match="a symbolic link"):
        TokenStore(store)


def test_every_truncation_of_a_listed_shard_is_refused(store):
    """Sizes and checksums agree, so that it is the structure that must be seen."""
    name = layout.shard_name("validation", 0, 1)
    data = (store / name).read_bytes()
    for size in range(0, len(data) - 8, 13):
        (store / name).write_bytes(data[:size])
        relist(store, name)
        with pytest.raises(StoreError, match=r"no shard of a token store|expected"):
            TokenStore(store, "validation", verify=False)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_compressed_shard_is_refused_as_it_is(store, compression: str):
    """A gigabyte of zeros would be a kilobyte of file."""
    name = layout.shard_name("validation", 0, 1)
    with pa.ipc.open_stream((store / name).read_bytes()) as stream:
        (batch,) = stream
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (store / name).open("wb") as file, pa.ipc.new_stream(file, batch.schema, options=options) as stream:
        stream.write_batch(batch)
    relist(store, name)
    with pytest.raises(StoreError, match=rf"{name}: no shard of a token store \(its record batch is compressed\)"):
        TokenStore(store, "validation", verify=False)


def test_foreign_shards_are_refused(store):
    name = layout.shard_name("validation", 0, 1)
    payloads = datasets.load_from_disk(str(store / "validation"))["tokens"][:]
    labels = pa.array(sample(7)[1])
    for columns in (
        {"tokens": pa.array(payloads), "label": pa.array([None, *labels.to_pylist()[1:]], pa.int64())},
        {"tokens": pa.array([None, *payloads[1:]], pa.binary()), "label": labels},
        {"tokens": pa.array(payloads, pa.large_binary()), "label": labels},
        {"tokens": pa.array(payloads), "label": labels.cast(pa.int32())},
        {"tokens": pa.array(payloads)},
        {"tokens": labels, "label": labels},
        {"tokens": pa.array([b""] * 7), "label": labels},
        {"tokens": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
        {"tokens": pa.array(payloads[:6]), "label": labels[:6]},
        {"tokens": pa.array(payloads), "label": pa.array([3] * 7)},
        {"tokens": pa.array(payloads), "label": pa.array([-1] * 7)},
    ):
        with (store / name).open("wb") as file:
            write_shard(file, pa.record_batch(columns))
        relist(store, name)
        with pytest.raises(StoreError):
            TokenStore(store, "validation")


def test_a_codebook_of_another_store_is_refused(store, tmp_path):
    other = write(tmp_path / "other", codebook=codebook() + 1)
    shutil.copy(other / layout.CODEBOOK, store / layout.CODEBOOK)
    with pytest.raises(StoreError, match=r"codebook.safetensors: SHA-256 \w+.., expected \w+..: .*another store"):
        TokenStore(store)


def test_a_shard_of_another_store_is_refused(store, tmp_path):
    other = write(tmp_path / "other", n=50, class_names=["x", "y", "z"])
    (shard, *_), (foreign, *_) = (sorted((path / "train").glob("*.arrow")) for path in (store, other))
    shutil.copy(foreign, shard)
    with pytest.raises(StoreError, match=rf"{shard.name}: .*expected"):
        TokenStore(store)


def test_a_codebook_of_another_shape_or_none_is_refused(store, tmp_path):
    other = write(tmp_path / "other", codebook=codebook(20, 4))
    shutil.copy(other / layout.CODEBOOK, store / layout.CODEBOOK)
    relist(store, layout.CODEBOOK)
    with pytest.raises(StoreError, match=r"float32 \(20, 4\), expected float32 \(20, 3\)"):
        TokenStore(store)
    (store / layout.CODEBOOK).write_bytes(b"\xff" * 100)
    relist(store, layout.CODEBOOK)
    with pytest.raises(StoreError, match="no codebook"):
        TokenStore(store)


def test_shards_of_another_store_are_refused(store, tmp_path):
    with StoreWriter(tmp_path / "other", codebook=codebook(), grid=(4, 6), class_names=CLASSES) as out:
        out.add_batch(19 - sample(7)[0], sample(7)[1])
    name = layout.shard_name("validation", 0, 1)
    shutil.copy(tmp_path / "other" / layout.shard_name("train", 0, 1), store / name)
    with pytest.raises(StoreError):
        TokenStore(store, "validation")
    # Even listed as its own: the payloads' check covers the table.
    relist(store, name)
    splits = json.loads((store / layout.DOCUMENT).read_bytes())["splits"]
    size = TokenStore(tmp_path / "other").payload_bytes
    edit(store, splits={**splits, "validation": {**splits["validation"], "payload_bytes": size}})
    with pytest.raises(StoreError, match="checksum does not match"):
        TokenStore(store, "validation")[0]


def test_labels_have_a_class_name_whatever_the_split_claims(store):
    splits = json.loads((store / layout.DOCUMENT).read_bytes())["splits"]
    edit(store, splits={**splits, "train": {**splits["train"], "num_classes": 9}})
    assert TokenStore(store).num_classes == 3


def test_other_splits_are_not_needed(store):
    shutil.rmtree(store / "train")
    assert len(TokenStore(store, "validation")) == 7
    with pytest.raises(StoreError, match="missing"):
        TokenStore(store, "validation").verify()


def test_paths_that_are_no_store_are_refused(store, tmp_path):
    with pytest.raises(StoreError, match="no such folder"):
        TokenStore(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"no token store, it has no file tokens\.json"):
        TokenStore(store / "train")
    with pytest.raises(StoreError, match="no split 'test', it has train, validation"):
        TokenStore(store, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("\x80", "no JSON"),
        ("[]", "no token store"),
        ('{"format": "other"}', "no token store"),
        ('{"format": "seitpp-token-store", "version": 4}', "version 4, expected 1 .. 3; upgrade"),
        ('{"format": "seitpp-token-store", "version": 1}', "checksum does not match"),
    ],
)
def test_a_tokens_json_that_is_none_is_refused(store, text, message):
    (store / layout.DOCUMENT).write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=message):
        TokenStore(store)


ENTRY = {"bytes": 1, "sha256": "0" * 64}
SPLIT = {"rows": 1, "payload_bytes": 1, "num_classes": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": [2**20, 2**20]}, "grid"),
        ({"grid": [4, True]}, "grid"),
        ({"grid": [4]}, "grid"),
        ({"grid": [2, 6]}, "number of tokens|checksum does not match"),
        ({"num_codes": 2**40}, "num_codes"),
        ({"num_codes": 19}, "expected 19 integers"),
        ({"code_dim": 2**40}, "code_dim"),
        ({"code_dim": 0}, "code_dim"),
        ({"codec": None}, "codec"),
        ({"codec": {"name": ["ans"], "counts": [1] * 20}}, "codec"),
        ({"codec": {"name": "zip", "counts": [1] * 20}}, "'zip', expected one of 'ans'"),
        ({"codec": {"name": "ans", "counts": "many"}}, "expected 20 integers"),
        ({"codec": {"name": "ans", "counts": [[1], [1, 2]]}}, "tokens.json"),
        ({"codec": {"name": "ans", "counts": [10**400] * 20}}, "expected 20 integers"),
        ({"class_names": ["a", "a", "b"]}, "class_names"),
        ({"splits": []}, "splits"),
        ({"splits": {"train": {**SPLIT, "rows": 2**40}}}, "rows"),
        ({"splits": {"train": {**SPLIT, "rows": 2**31}}}, "50 images"),
        ({"splits": {"../train": SPLIT}}, "split"),
        ({"splits": {"train": None}}, "split"),
        ({"splits": {"train": {**SPLIT, "rows": 50}}}, "bytes"),
        ({"files": {}}, "codebook.safetensors"),
        ({"files": {layout.CODEBOOK: ENTRY, "/etc/passwd": ENTRY}}, "'/etc/passwd'"),
        ({"files": {layout.CODEBOOK: ENTRY, "../x": ENTRY}}, "'../x'"),
        ({"files": {layout.CODEBOOK: ENTRY, "train/../../x": ENTRY}}, "inside of the store"),
        ({"files": {layout.CODEBOOK: ENTRY, "train/..": ENTRY}}, "inside of the store"),
        ({"files": {layout.CODEBOOK: {**ENTRY, "bytes": -1}}}, "size in bytes"),
        ({"files": {layout.CODEBOOK: {**ENTRY, "sha256": "0" * 63}}}, "size in bytes"),
        ({"files": {layout.CODEBOOK: ENTRY}}, "gaps"),
        ({"files": {layout.CODEBOOK: ENTRY, "train/data-00001-of-00002.arrow": ENTRY}}, "gaps"),
    ],
)
def test_false_claims_are_refused(store, changes, message):
    edit(store, **changes)
    with pytest.raises(StoreError, match=message):
        TokenStore(store)[0]


def test_an_absurdly_large_tokens_json_is_refused_before_reading(store):
    os.truncate(store / layout.DOCUMENT, layout.MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(StoreError, match="expected at most"):
        TokenStore(store)


def test_the_checksum_is_the_documented_command(store):
    lines = (store / layout.DOCUMENT).read_bytes().splitlines(keepends=True)
    body = b"".join(lines[:-2])
    (store.parent / "body").write_bytes(body)
    checksum = TokenStore(store).checksum
    assert layout.file_entry(store.parent / "body")["sha256"] == checksum
    assert b"".join(lines[-2:]) == b'"checksum": "' + checksum.encode() + b'"\n}\n'
