"""Other columns of a store, a grid for each image, and every codec: written, read back, refused where wrong."""

import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from seitpp import StoreWriter, TokenStore
from seitpp import codec as codecs
from seitpp.store import StoreError, layout, spec
from seitpp.store.shards import read_shard, write_shard

N = 50
CODEBOOK = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32)
COLUMNS = {"file": "string", "map": "binary", "time": "int64"}
VALUES = {
    "file": [f"ö/{i}.png" for i in range(N)],
    "map": [bytes([i, 0, 255]) * (i % 3) for i in range(N)],
    "time": [i - 2**62 for i in range(N)],
}
LABELS = np.arange(N) % 4


def ids_of(*grids: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 20, grid) for grid in grids]


# Grids of 1 to 63 tokens, the last 10 equal.
GRIDS = [(1 + i % 7, 1 + i % 9) for i in range(N - 10)] + [(5, 8)] * 10
IMAGES = ids_of(*GRIDS)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(spec, "SHARD_IMAGES", 20)


@pytest.fixture
def store(tmp_path) -> Path:
    """Every image with its own grid, and with other columns."""
    path = tmp_path / "store"
    with StoreWriter(path, codebook=CODEBOOK, grid=None, columns=COLUMNS) as out:
        out.add_batch(IMAGES[:30], LABELS[:30], {name: values[:30] for name, values in VALUES.items()})
        out.add(IMAGES[30], LABELS[30], {name: values[30] for name, values in VALUES.items()})
        out.add_batch(IMAGES[31:40], LABELS[31:40], {name: values[31:40] for name, values in VALUES.items()})
        rest = {name: values[40:] for name, values in VALUES.items()}
        out.add_batch(np.stack(IMAGES[40:]), LABELS[40:], {**rest, "time": np.array(rest["time"])})
    return path


def replace_columns(path: Path, **changes) -> None:
    """Change columns of the last shard as a hostile writer can: under right checksums."""
    name = layout.shard_name("train", 2, 3)
    table = pa.Table.from_batches([read_shard(path / name)])
    for column, values in changes.items():
        place = table.schema.get_field_index(column)
        table = table.remove_column(place)
        table = table if values is None else table.add_column(place, column, values)
    data = table.combine_chunks().to_batches()[0]
    (path / name).unlink()
    with (path / name).open("wb") as file:
        write_shard(file, data)
    document = json.loads((path / layout.DOCUMENT).read_bytes())
    document["files"][name] = layout.file_entry(path / name)
    layout.write_document(path, document)


# Other columns


def test_columns_are_read_back(store):
    s = TokenStore(store)
    assert s.columns == COLUMNS
    order = np.random.default_rng(0).permutation(N)
    for name, values in VALUES.items():
        column = s.column(name)
        assert column.kind == COLUMNS[name] and len(column) == N
        assert column[33] == values[33] and type(column[33]) is type(values[33])
        assert column[np.int64(-1)] == values[-1]
        assert list(column[order]) == [values[i] for i in order]
        assert list(column) == values
        for index in (N, -N - 1):
            with pytest.raises(IndexError):
                column[index]
    assert s.column("time")[[1, 2]].dtype == np.int64
    assert s.column("file")[[]] == []


def test_columns_stay_on_disk(store):
    before = pa.total_allocated_bytes()
    column = TokenStore(store).column("map")
    assert column[47] == VALUES["map"][47]
    assert pa.total_allocated_bytes() == before


def test_plain_datasets_reads_columns_and_grids(store):
    train = datasets.load_from_disk(str(store / "train"))
    assert train.column_names == ["tokens", "label", "height", "width", *COLUMNS]
    for name, values in VALUES.items():
        assert train[name] == values
    assert list(zip(train["height"], train["width"], strict=True)) == GRIDS


def test_splits_may_have_different_columns(store):
    with StoreWriter(store, codebook=CODEBOOK, grid=None, split="test") as out:
        out.add(IMAGES[0], 0)
    assert TokenStore(store, "test").columns == {}
    with pytest.raises(StoreError, match="split 'test' has no column 'file', it has none"):
        TokenStore(store, "test").column("file")
    with pytest.raises(StoreError, match="no column 'name', it has file, map, time"):
        TokenStore(store).column("name")


@pytest.mark.parametrize(
    "columns",
    [{"tokens": "binary"}, {"height": "int64"}, {"a b": "string"}, {"file": "float"}, {"": "string"}],
)
def test_columns_that_cannot_be_are_refused(tmp_path, columns):
    with pytest.raises(StoreError, match="columns: got"):
        StoreWriter(tmp_path / "s", codebook=CODEBOOK, grid=None, columns=columns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": None}, r"columns from image 1: got \['map', 'time'\], expected \['file', 'map', 'time'\]"),
        ({"other": [1]}, "columns from image 1"),
        ({"file": ["a", "b"]}, "column 'file' from image 1: got 2 values, expected 1"),
        ({"file": [3]}, "column 'file' from image 1: expected string"),
        ({"file": ["\udcff"]}, "column 'file' from image 1: expected string"),
        ({"file": [None]}, "column 'file' from image 1: got None"),
        ({"map": [3]}, "column 'map' from image 1: expected binary"),
        ({"time": ["3"]}, "column 'time' from image 1: expected int64"),
        ({"time": [2**63]}, "column 'time' from image 1: expected int64"),
    ],
)
def test_wrong_values_are_refused_and_the_writer_goes_on(tmp_path, changes, message):
    right = {"file": ["a"], "map": [b"b"], "time": [3]}
    wrong = {name: values for name, values in {**right, **changes}.items() if values is not None}
    with StoreWriter(tmp_path / "s", codebook=CODEBOOK, grid=None, columns=COLUMNS) as out:
        out.add_batch(IMAGES[:1], [0], right)
        with pytest.raises(StoreError, match=message):
            out.add_batch(IMAGES[:1], [0], wrong)
        out.add_batch(IMAGES[1:2], [0], right)
    s = TokenStore(tmp_path / "s")
    assert (s[1][0] == IMAGES[1]).all() and list(s.column("file")) == ["a", "a"]


@pytest.mark.parametrize(
    "values",
    [
        None,
        pa.array(range(10)),
        pa.array([None] + ["x"] * 9),
        pa.array([b"x"] * 10),
    ],
)
def test_a_column_that_differs_between_shards_is_refused(store, values):
    replace_columns(store, file=values)
    with pytest.raises(StoreError, match="column 'file' of shard 2: expected string"):
        TokenStore(store).column("file")


def test_a_string_that_is_none_is_refused(store):
    latin = pa.array([b"\xf6"] * 10).view(pa.string())
    replace_columns(store, file=latin)
    column = TokenStore(store).column("file")
    assert column[39] == VALUES["file"][39]
    with pytest.raises(StoreError, match="column 'file', image 40: 'utf-8' codec"):
        column[40]


def test_damaged_columns_without_verify_never_crash(store):
    """Offsets too: Arrow would follow them out of the file."""
    path = store / layout.shard_name("train", 1, 3)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            s = TokenStore(store, verify=False)
            for name in s.columns:
                s.column(name)[range(20, 40)]
        except StoreError:
            pass


# A grid for each image


def test_every_image_has_its_grid(store):
    s = TokenStore(store)
    assert s.grid is None and len(s) == N
    assert s.grids.tolist() == [list(grid) for grid in GRIDS]
    for i, (ids, label) in enumerate(s):
        assert ids.dtype == np.uint16 and (ids == IMAGES[i]).all() and ids.shape == GRIDS[i]
        assert label == LABELS[i]
    assert (s.ids([45, 40]) == np.stack([IMAGES[45], IMAGES[40]])).all()
    assert s.ids([3]).shape == (1, *GRIDS[3])
    with pytest.raises(StoreError, match=r"ids of 3 images: got the grids \(1, 1\), \(2, 2\), \(3, 3\), expected"):
        s.ids([2, 0, 1])
    with pytest.raises(IndexError):
        s.ids([N])
    assert s.ids([]).size == 0
    assert (pickle.loads(pickle.dumps(s)).ids([7]) == IMAGES[7]).all()
    s.verify()


def test_one_grid_is_the_grid_of_every_image(tmp_path):
    with StoreWriter(tmp_path / "s", codebook=CODEBOOK, grid=(5, 8)) as out:
        out.add_batch(IMAGES[40:], LABELS[40:])
    assert TokenStore(tmp_path / "s").grids.tolist() == [[5, 8]] * 10
    assert (TokenStore(tmp_path / "s").ids([3]) == IMAGES[43]).all()


@pytest.mark.parametrize(
    "ids", [np.zeros((2, 0), int), np.zeros(3, int), np.zeros((2, 2)), np.full((1, 2), 20), np.array([["a"]])]
)
@pytest.mark.usefixtures("unchecked")
def test_images_that_are_no_grids_are_refused(tmp_path, ids):
    with StoreWriter(tmp_path / "s", codebook=CODEBOOK, grid=None) as out:
        out.add(IMAGES[0], 0)
        with pytest.raises(StoreError, match="image 1"):
            out.add(ids, 0)
    assert len(TokenStore(tmp_path / "s")) == 1


@pytest.mark.parametrize(
    ("height", "width"), [(2**30, 2**30), (-1, 8), (0, 8), (2**13, 2**12), (-(2**16), -(2**16))]
)
def test_grids_that_cannot_be_are_refused_before_anything_is_allocated(store, height, width):
    sides = [[5] * 9 + [height], [8] * 9 + [width]]
    heights, widths = (pa.array(values, "int32") for values in sides)
    replace_columns(store, height=heights, width=widths)
    with pytest.raises(StoreError, match=r"a grid outside 1 .. 16777216 tokens"):
        TokenStore(store)


def test_grids_that_are_missing_or_not_those_of_the_payload_are_refused(store):
    replace_columns(store, height=pa.array([5] * 9 + [4], "int32"))
    s = TokenStore(store)
    assert (s[48][0] == IMAGES[48]).all()
    with pytest.raises(StoreError, match=r"image 49 .*checksum does not match"):
        s[49]
    replace_columns(store, height=pa.array([5] * 10, "int64"))
    with pytest.raises(StoreError, match="expected a column 'height' of int32"):
        TokenStore(store)
    replace_columns(store, height=None)
    with pytest.raises(StoreError, match="expected a column 'height'"):
        TokenStore(store)


def test_a_store_has_one_grid_or_none(store):
    with pytest.raises(StoreError, match=r"its grid is None, got \[4, 6\]"):
        StoreWriter(store, codebook=CODEBOOK, grid=(4, 6), split="test")


# Codecs


def smooth(n: int, seed: int) -> np.ndarray:
    """(n, 8, 8) ids of which neighbors are alike, for codecs that look at them."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 17, (n, 1, 1)) + rng.integers(0, 3, (n, 8, 8))).astype(np.int64)


@pytest.mark.parametrize("name", codecs.CODECS)
def test_every_codec_makes_a_store_that_is_read_back(tmp_path, name):
    path, splits = tmp_path / "s", {"train": smooth(50, 0), "test": smooth(30, 1)}
    for split, ids in splits.items():
        with StoreWriter(path, codebook=CODEBOOK, grid=(8, 8), codec=name, split=split) as out:
            out.add_batch(ids, np.zeros(len(ids), int))
    for split, ids in splits.items():
        s = TokenStore(path, split)
        assert s.codec.name == name and (s.ids(range(len(ids))) == ids).all()
        assert (s.counts == np.bincount(splits["train"].ravel(), minlength=20)).all()
    s.verify()
    assert (path / layout.TABLE).exists() == (name == "context")


def test_the_learned_table_is_checked(tmp_path):
    path = tmp_path / "s"
    with StoreWriter(path, codebook=CODEBOOK, grid=(8, 8), codec="context") as out:
        out.add_batch(smooth(50, 0), np.zeros(50, int))
    table = path / layout.TABLE
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)
    with pytest.raises(StoreError, match=r"codec.table: SHA-256"):
        TokenStore(path)
    with pytest.raises(StoreError, match="checksum does not match"):
        TokenStore(path, verify=False)[0]
    table.unlink()
    with pytest.raises(StoreError, match=r"codec.table: missing"):
        TokenStore(path, verify=False)
    document = json.loads((path / layout.DOCUMENT).read_bytes())
    del document["files"][layout.TABLE]
    layout.write_document(path, document)
    with pytest.raises(StoreError, match="learned table"):
        TokenStore(path)
    document["files"][layout.TABLE] = {"bytes": 2**40, "sha256": "0" * 64}
    layout.write_document(path, document)
    with pytest.raises(StoreError, match="expected at most 268435456"):
        TokenStore(path)


def test_a_codec_that_needs_a_grid_is_refused_without_one(tmp_path):
    with pytest.raises(StoreError, match="codec 'context': got no grid"):
        StoreWriter(tmp_path / "s", codebook=CODEBOOK, grid=None, codec="context")


@pytest.mark.parametrize("name", ["escape", "packed"])
def test_counts_are_checked_also_where_the_codec_needs_none(tmp_path, name):
    path = tmp_path / "s"
    with StoreWriter(path, codebook=CODEBOOK, grid=(8, 8), codec=name) as out:
        out.add_batch(smooth(5, 0), np.zeros(5, int))
    document = json.loads((path / layout.DOCUMENT).read_bytes())
    for counts in ([1] * 19, [-1] * 20, "many", [10**400] * 20):
        layout.write_document(path, {**document, "codec": {"name": name, "counts": counts}})
        with pytest.raises(StoreError, match="counts"):
            TokenStore(path)
