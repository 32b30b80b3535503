"""Tokens of several digits and sequences: format version 3, written, read, joined, recoded and refused."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from support.paths import GOLDEN

from seitpp import StoreWriter, TokenStore, codec
from seitpp.books import Books, BooksError, index_sizes
from seitpp.codec import CodecError, build, build_digits
from seitpp.store import SplitStaging, StoreError, grow, layout
from seitpp.store.recode import recode
from seitpp.store.release import ReleaseError, export_release

GRID = (3, 4)
LARGE = 70_000  # codes, more than 16 bits


def tables(sizes: tuple[int, ...], dims: tuple[int, ...]) -> list[np.ndarray]:
    return [
        np.arange(size * dim, dtype=np.float32).reshape(size, dim) / 8 - number
        for number, (size, dim) in enumerate(zip(sizes, dims, strict=True))
    ]


BOOKS = {
    "index": Books.of(np.arange(2 * LARGE, dtype=np.float32).reshape(LARGE, 2)),
    "concat": Books.join(tables((20, 5, 300), (2, 1, 3)), "concat"),
    "sum": Books.join(tables((20, 5), (4, 4)), "sum"),
}


def sample(books: Books, n: int = 50, grid: tuple[int, int] = GRID) -> np.ndarray:
    """Ids (n, Q, H, W), by a formula, so that golden files need no second copy of them."""
    position = np.arange(n * grid[0] * grid[1], dtype=np.uint64)
    ids = (position * 2654435761 % 2**32 >> 8).astype(np.int64)
    if books.combine == "index":
        planes = books.split(ids % LARGE)
    else:
        planes = np.stack([(ids >> 3 * number) % size for number, size in enumerate(books.sizes)])
    return np.moveaxis(planes.reshape(-1, n, *grid), 0, 1)


def write(path: Path, books: Books, *, n: int = 50, split: str = "train", **changes) -> Path:
    arguments = {"grid": GRID, "class_names": ["a", "b"], **changes}
    with StoreWriter(path, codebook=books, split=split, **arguments) as out:
        out.add_batch(sample(books, n, arguments["grid"]), np.arange(n) % 2)
    return path


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seitpp.store.spec.SHARD_IMAGES", 20)


@pytest.mark.parametrize("name", list(codec.CODECS))
@pytest.mark.parametrize("books", BOOKS.values(), ids=BOOKS)
def test_every_cell_is_read_as_it_was_written(tmp_path: Path, books: Books, name: str) -> None:
    store = TokenStore(write(tmp_path / "store", books, codec=name))
    ids = sample(books)
    assert store.ids(range(50)).dtype == np.uint16 and np.array_equal(store.ids(range(50)), ids)
    assert np.array_equal(store[7][0], ids[7]) and store[7][1] == 1
    assert store.books.sizes == books.sizes and store.books.combine == books.combine
    assert all(map(np.array_equal, store.books.tables, books.tables))
    flat = np.moveaxis(ids, 1, 0).reshape(books.digits, -1)
    counted = [np.bincount(digit, minlength=size) for digit, size in zip(flat, books.sizes, strict=True)]
    assert all(map(np.array_equal, store.digit_counts, counted))
    store.verify()
    document = layout.read_document(store.path)
    assert document["version"] == 3 and document["num_codes"] == sum(map(len, books.tables))
    encoded = datasets.load_from_disk(str(store.path / "train"))["tokens"]
    assert list(map(len, encoded)) == store.payload_sizes.tolist()


def test_the_payload_of_the_format_page() -> None:
    page = build_digits("packed", [3, 2], [[1] * 3, [1] * 2])
    assert page.encode(np.array([0, 1, 2, 0, 1, 0, 0, 1])).hex() == "03092f18aad490"


@pytest.mark.parametrize("name", ["packed", "huffman", "ans"])
def test_a_payload_is_those_of_the_planes_and_no_other_bytes_decode(name: str) -> None:
    ids, counts = sample(BOOKS["concat"], 1)[0], [np.arange(1, size + 1) for size in BOOKS["concat"].sizes]
    whole = build_digits(name, BOOKS["concat"].sizes, counts)
    planes = [
        build(name, size, count).encode(plane.ravel())
        for size, count, plane in zip(BOOKS["concat"].sizes, counts, ids, strict=True)
    ]
    payload = whole.encode(ids.ravel())
    assert payload == b"".join([bytes([len(planes[0])]), planes[0], bytes([len(planes[1])]), *planes[1:]])
    for position in range(len(payload)):
        for change in (1, 0x80):
            damaged = bytearray(payload)
            damaged[position] ^= change
            with pytest.raises(CodecError):
                whole.decode(bytes(damaged), ids.size)
        with pytest.raises(CodecError):
            whole.decode(payload[:position], ids.size)
    with pytest.raises(CodecError):
        whole.decode(bytes([len(planes[0]) | 0x80, 0]) + payload[1:], ids.size)
    with pytest.raises(ValueError, match="planes of 3 digits"):
        whole.encode(ids.ravel()[:-1])


def test_sizes_of_the_digits_of_one_table() -> None:
    assert index_sizes(65536) == (65536,) and index_sizes(65537) == (256, 257) and index_sizes(2**18) == (512, 512)
    books = BOOKS["index"]
    ids = np.array([0, 1, LARGE - 1, 264, 265, 266])
    assert np.array_equal(books.joined(books.split(ids)), ids)
    high, low = books.digit_tables()
    assert np.allclose(high[1], books.tables[0][265:530].mean(axis=0)) and low.shape == (265, 2)


@pytest.mark.parametrize("books", BOOKS.values(), ids=BOOKS)
def test_stores_are_joined_recoded_and_taken_apart(tmp_path: Path, books: Books) -> None:
    one, two = write(tmp_path / "one", books), write(tmp_path / "two", books, n=9)
    expected = np.concatenate([sample(books), sample(books, 9)])
    grow.merge(tmp_path / "merged", [one, two])
    recode(tmp_path / "merged", tmp_path / "recoded", "huffman")
    grow.append(one, [two])
    for name in ("merged", "recoded", "one"):
        store = TokenStore(tmp_path / name)
        assert np.array_equal(store.ids(range(59)), expected), name
    grow.subset(two, tmp_path / "some", positions={"train": [3, 8]})
    assert np.array_equal(TokenStore(tmp_path / "some").ids([0, 1]), sample(books, 9)[[3, 8]])
    other = Books.join(tables((20, 5), (4, 4)), "concat")
    with pytest.raises(StoreError, match=r"its codebook is .*, expected"):
        grow.merge(tmp_path / "none", [write(tmp_path / "other", other), write(tmp_path / "sum", BOOKS["sum"])])
    with pytest.raises(ReleaseError, match="several digits"):
        export_release(two, tmp_path / "release")


def test_images_of_their_own_sizes(tmp_path: Path) -> None:
    books, grids = BOOKS["concat"], [(1, 2), (5, 3)]
    images = [sample(books, 1, grid)[0] for grid in grids]
    with StoreWriter(tmp_path / "store", codebook=books, grid=None) as out:
        out.add_batch(images, [0, 1])
    store = TokenStore(tmp_path / "store")
    assert store.grids.tolist() == [[1, 2], [5, 3]]
    assert all(np.array_equal(store[number][0], image) for number, image in enumerate(images))


def test_a_sequence(tmp_path: Path) -> None:
    plain = Books.of(tables((40,), (3,))[0])
    ids = sample(BOOKS["sum"], 5, (1, 32))[:, :1].squeeze(1)
    with StoreWriter(tmp_path / "store", codebook=plain, grid=(1, 32), layout="sequence") as out:
        out.add_batch(ids, range(5))
    store = TokenStore(tmp_path / "store")
    assert store.layout == "sequence" and np.array_equal(store.ids(range(5)), ids)
    document = json.loads((store.path / layout.DOCUMENT).read_bytes())
    assert list(document)[4:7] == ["code_dim", "layout", "codec"] and document["version"] == 3
    with (
        pytest.raises(StoreError, match="its layout is sequence, got None"),
        StoreWriter(store.path, codebook=plain, grid=(1, 32), split="more"),
    ):
        pass
    with pytest.raises(StoreError, match=r"layout: got 'sequence' and the grid \[4, 8\], expected"):
        StoreWriter(tmp_path / "none", codebook=plain, grid=(4, 8), layout="sequence")


def test_codes_of_a_large_codebook_that_are_not_used_are_left_out(tmp_path: Path) -> None:
    books, ids = BOOKS["index"], sample(BOOKS["index"], 30)
    joined = books.joined(np.moveaxis(ids, 1, 0))
    staging = SplitStaging(tmp_path / "store", codebook=books, grid=GRID, num_images=30)
    for shard in range(staging.num_shards):
        chosen = staging.images(shard)
        staging.write(shard, ids[chosen], np.zeros(len(chosen), int))
    counts = staging.counts()
    assert np.array_equal(counts, np.bincount(joined.ravel(), minlength=LARGE))
    used = np.flatnonzero(counts)
    staging.keep(used, None)
    staging.publish()
    store = TokenStore(tmp_path / "store")
    assert store.num_codes == len(used) and layout.read_document(store.path)["version"] == 1
    assert np.array_equal(store.codebook[store.ids(range(30))], books.tables[0][joined])
    two = SplitStaging(tmp_path / "sum", codebook=BOOKS["sum"], grid=GRID, num_images=1)
    with pytest.raises(StoreError, match="codes of 2 tables"):
        two.keep(np.arange(3), None)


def test_what_a_store_of_digits_does_not_have(tmp_path: Path) -> None:
    store = TokenStore(write(tmp_path / "store", BOOKS["sum"]))
    for name in ("codebook", "counts"):
        with pytest.raises(StoreError, match=r"digits|tables"):
            getattr(store, name)
    for books in BOOKS.values():
        with pytest.raises(BooksError, match=r"segmentation takes tokens of one id, got [23] digits"):
            books.only_table("segmentation")


@pytest.mark.parametrize(
    ("books", "ids", "message"),
    [
        ("concat", [[[19]], [[5]], [[0]]], "image 0: digit 1 is 5 .. 5, expected 0 .. 4"),
        ("concat", [[[19]], [[-1]], [[0]]], "image 0: digit 1 is -1 .. -1"),
        ("index", [[[264]], [[264]]], "image 0: digits of id 70224, but the codebook has 70000 codes"),
        ("sum", [[[0]]], r"got int64 \(1, 1, 1\), expected integers \(2, 1, 1\)"),
    ],
)
def test_digits_out_of_range_are_refused(tmp_path: Path, books: str, ids: list, message: str) -> None:
    with (
        pytest.raises(StoreError, match=message),
        StoreWriter(tmp_path / "store", codebook=BOOKS[books], grid=(1, 1)) as out,
    ):
        out.add(np.array(ids), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([np.zeros((3, 2))], "sum"), "got 1 tables"),
        (([np.zeros((3, 2)), np.zeros((3, 1))], "sum"), "expected equal dimensions"),
        (([np.zeros((3, 2)), np.full((3, 2), np.inf)], "concat"), "all finite"),
        (([np.zeros((2**16 + 1, 1)), np.zeros((3, 1))], "concat"), "at most 65536 for a digit"),
        (([np.zeros((3, 2))] * 2, "product"), "concat or sum"),
    ],
)
def test_tables_that_are_no_books_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(BooksError, match=message):
        Books.join(*arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"combine": "mean"},
        {"sizes": [20, 6]},
        {"sizes": [20]},
        {"tables": [[20, 4], [5, 3]]},
        {"tables": [[20, 4], [5, 4], [1, 4]]},
        {"tables": [[20, 4], [5, True]]},
        {"combine": "index"},
    ],
)
def test_claims_about_digits_are_checked(tmp_path: Path, change: dict) -> None:
    store = write(tmp_path / "store", BOOKS["sum"])
    document = layout.read_document(store)
    document["digits"] |= change
    layout.write_document(store, {key: document[key] for key in document if key != "checksum"})
    with pytest.raises(StoreError, match=r"digits .*, expected those of 25 rows and vectors of 4"):
        TokenStore(store)


def test_golden_store(tmp_path: Path) -> None:
    """The store of version 3 that is in the repository is read, and written again with the same payloads."""
    books = BOOKS["concat"]
    store = TokenStore(GOLDEN / "store_v3")
    assert np.array_equal(store.ids(range(10)), sample(books, 10)) and store.layout == "grid"
    assert all(map(np.array_equal, store.books.tables, books.tables))
    again = write(tmp_path / "again", books, n=10)
    golden, written = (datasets.load_from_disk(str(path / "train"))["tokens"] for path in (store.path, again))
    assert golden[:] == written[:]
    assert store.fingerprint == TokenStore(again).fingerprint
