"""SeiT's released files: exact both ways; damage, bombs and payloads are refused in one line, nothing is left."""

import gzip
import io
import pickle
import shutil
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import seitpp.store.release
from seitpp import StoreWriter, TokenStore
from seitpp.errors import UserError
from seitpp.store import StoreError
from seitpp.store.release import ReleaseError, export_release, import_release

K, D = 391, 32
GRID = (32, 32)
IMAGES = {"train": 12, "val": 5}
MIB = 2**20


def escape(ids: np.ndarray) -> bytes:
    """The byte code, written a second time as plainly as it is described."""
    return b"".join(b"\xff" * (i // 255) + bytes([i % 255]) for i in ids.ravel().tolist())


def sample(n: int, num_codes: int = K, grid: tuple[int, int] = GRID, seed: int = 0) -> np.ndarray:
    """(n, H, W) ids, the largest among them."""
    ids = np.random.default_rng(seed).integers(0, num_codes, (n, *grid))
    ids[:, 0, 0] = num_codes - 1
    return ids


def labels_of(n: int) -> np.ndarray:
    return np.arange(n) * 37 % 1000


def codebook(num_codes: int = K) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(num_codes, D)).astype(np.float32)


def save_index(path: Path, array: np.ndarray, **how) -> None:
    stream = io.BytesIO()
    np.save(stream, array, **how)
    path.write_bytes(gzip.compress(stream.getvalue()))


def write_release(folder: Path, num_codes: int = K, grid: tuple[int, int] = GRID) -> Path:
    """Released files, made here without any code of the package."""
    folder.mkdir()
    torch.save(torch.from_numpy(codebook(num_codes)), folder / "codebook.ckpt")
    for seed, (name, n) in enumerate(IMAGES.items()):
        payloads = [escape(image) for image in sample(n, num_codes, grid, seed)]
        (folder / f"{name}-token.data.bin.gz").write_bytes(gzip.compress(b"".join(payloads)))
        save_index(folder / f"{name}-token.index.npy.gz", np.cumsum([0, *map(len, payloads)]))
        (folder / f"{name}-label.txt").write_text("".join(f"{label}\n" for label in labels_of(n)))
    return folder


def unpacked(folder: Path) -> dict[str, object]:
    """What released files say: streams, offsets, label lines, codebook."""
    return {
        path.name: gzip.decompress(path.read_bytes())
        if path.name.endswith(".bin.gz")
        else np.load(io.BytesIO(gzip.decompress(path.read_bytes()))).tolist()
        if path.name.endswith(".npy.gz")
        else path.read_text()
        if path.suffix == ".txt"
        else torch.load(path, weights_only=True).tolist()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "release")


def refused(release: Path, message: str) -> None:
    """The import fails with one line that matches, and leaves nothing."""
    before = sorted(release.parent.iterdir())
    with pytest.raises(ReleaseError, match=message) as caught:
        import_release(release, release.parent / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(release.parent.iterdir()) == before


# Exactness


@pytest.mark.parametrize("num_codes", [1, 255, 256, K, 510, 511, 766, 8192])
def test_import_and_export_are_exact(tmp_path, num_codes):
    """Also beyond the 510 codes that one escape byte reaches."""
    folder = write_release(tmp_path / "release", num_codes, grid=(4, 4))
    store = import_release(folder, tmp_path / "store")
    assert TokenStore(store).splits == ["train", "validation"]
    for seed, (name, split) in enumerate({"train": "train", "val": "validation"}.items()):
        s = TokenStore(store, split)
        assert (s.ids(range(len(s))) == sample(IMAGES[name], num_codes, (4, 4), seed)).all()
        assert (s.labels == labels_of(IMAGES[name])).all()
        assert (s.codebook == codebook(num_codes)).all()
    again = export_release(store, tmp_path / "again")
    assert unpacked(again) == unpacked(folder)


def test_the_grid_of_released_files_is_32_by_32(release, tmp_path):
    assert TokenStore(import_release(release, tmp_path / "store")).grid == (32, 32)


def test_a_store_is_exported_and_imported_exactly(tmp_path):
    """A grid that is no square has to be named, since the files do not hold it."""
    ids = sample(9, grid=(4, 6))
    with StoreWriter(tmp_path / "store", codebook=codebook(), grid=(4, 6), split="part_2") as writer:
        writer.add_batch(ids, labels_of(9))
    folder = export_release(tmp_path / "store", tmp_path / "release")
    assert gzip.decompress((folder / "part_2-token.data.bin.gz").read_bytes()) == escape(ids)
    with pytest.raises(ReleaseError, match=r"image 0: 24 tokens, which is no square; name the grid"):
        import_release(folder, tmp_path / "again")
    s = TokenStore(import_release(folder, tmp_path / "again", grid=(4, 6)), "part_2")
    assert (s.ids(range(9)) == ids).all() and (s.labels == labels_of(9)).all()


def test_an_export_is_the_same_bytes_whenever_it_is_made(release, tmp_path):
    store = import_release(release, tmp_path / "store")
    folders = [export_release(store, tmp_path / name) for name in ("a", "b")]
    first, second = ({path.name: path.read_bytes() for path in folder.glob("*.gz")} for folder in folders)
    assert len(first) == 4 and first == second


def test_one_file_can_be_imported_alone_and_its_name_tells_the_split(release, tmp_path):
    for old in list(release.glob("val-*")):
        old.rename(old.with_name(old.name.replace("val-", "imagenet1k-val-")))
    store = import_release(release / "imagenet1k-val-token.data.bin.gz", tmp_path / "store", codec="escape")
    assert TokenStore(store, "validation").splits == ["validation"]
    assert TokenStore(store, "validation").codec.name == "escape"


def test_index_of_any_integer_type(release, tmp_path):
    path = release / "train-token.index.npy.gz"
    offsets = np.load(io.BytesIO(gzip.decompress(path.read_bytes())))
    for number, dtype in enumerate((np.int32, np.uint64, ">i8")):
        save_index(path, offsets.astype(dtype))
        assert len(TokenStore(import_release(release, tmp_path / str(number)))) == IMAGES["train"]


# What is not there, and what is


def test_missing_files_are_named(release):
    for name in ("train-token.index.npy.gz", "val-label.txt", "codebook.ckpt"):
        data = (release / name).read_bytes()
        (release / name).unlink()
        refused(release, f"{name}: missing")
        (release / name).write_bytes(data)
    for name in ("train-token.data.bin.gz", "val-token.data.bin.gz"):
        (release / name).unlink()
    refused(release, r"no file NAME-token\.data\.bin\.gz there")


def test_two_files_of_one_split_are_refused(release):
    for old in list(release.glob("val-*")):
        (release / old.name.replace("val-", "other_val-")).write_bytes(old.read_bytes())
    refused(release, "both are the split 'validation'")


def test_nothing_is_overwritten(release, tmp_path):
    store = import_release(release, tmp_path / "store")
    for make in (lambda: import_release(release, store), lambda: export_release(store, release)):
        with pytest.raises(UserError, match="exists already and nothing is overwritten"):
            make()


def test_a_damaged_store_is_not_exported(release, tmp_path):
    store = import_release(release, tmp_path / "store")
    (shard,) = (store / "validation").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StoreError, match="SHA-256"):
        export_release(store, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


# Damage


@pytest.mark.parametrize("name", ["train-token.data.bin.gz", "val-token.index.npy.gz"])
def test_every_truncation_and_bit_flip_of_gzip_files_is_refused_or_harmless(release, tmp_path, name):
    """A gzip header says what no reader needs (time, system, name); all else is under its CRC."""
    path = release / name
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for size in rng.integers(0, len(data), 12):
        path.write_bytes(data[:size])
        refused(release, name)
    for position in [*range(10), *rng.integers(10, len(data), 40)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        if position >= 10:
            refused(release, name)
            continue
        try:
            store = import_release(release, tmp_path / "out")
        except ReleaseError:
            continue
        assert (TokenStore(store).ids(range(12)) == sample(12)).all()
        shutil.rmtree(store)


def test_the_image_at_which_a_stream_is_damaged_is_named(release):
    path = release / "val-token.data.bin.gz"
    stream = gzip.decompress(path.read_bytes())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(release, r"val-token.data.bin.gz, image [123]: damaged gzip file \(.*\); download it again")
    path.write_bytes(gzip.compress(stream[:-1]))
    refused(release, r"val-token.data.bin.gz, image 4: the stream ends before it")
    path.write_bytes(gzip.compress(stream + b"\0"))
    refused(release, rf"val-token.data.bin.gz: goes on after byte {len(stream)}")


def test_the_checksum_of_a_stream_is_compared_though_the_last_batch_is_full(release, monkeypatch):
    monkeypatch.setattr(seitpp.store.release, "BATCH_TOKENS", 4 * 1024)
    path = release / "train-token.data.bin.gz"
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    refused(release, r"train-token.data.bin.gz, after the last image: damaged gzip file \(CRC check failed")


def test_ids_that_are_no_codes_are_refused(release):
    """The same stream under a smaller codebook, and one id changed under a right checksum."""
    path = release / "train-token.data.bin.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"\xff\x00", b"\xff\xfe", 1)))
    refused(release, r"train-token.data.bin.gz, image \d+: token \d+: id 509, expected 0 .. 390")


def test_images_of_other_lengths_are_refused_before_they_are_read(release):
    path = release / "train-token.index.npy.gz"
    offsets = np.load(io.BytesIO(gzip.decompress(path.read_bytes())))
    for at, value in ((4, offsets[3] + 1000), (4, offsets[3] + 3000)):
        save_index(path, np.where(np.arange(13) == at, value, offsets))
        refused(release, r"train-token.index.npy.gz, image [34]: \d+ bytes, expected 1024 .. 2048|later end")
    save_index(path, offsets + (np.arange(13) == 4))
    refused(release, "train-token.data.bin.gz, image [34]: ")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lambda o: o[:-1], "11 images, but the labels are 12"),
        (lambda o: np.append(o, o[-1] + 1024), "13 images, but the labels are 12"),
        (lambda o: o + 1, "starts at 1, expected 0"),
        (lambda o: np.where(np.arange(13) == 7, o[6], o), "image 6: bytes .* expected a later end"),
        (lambda o: np.where(np.arange(13) == 7, -1, o), "image 6: bytes .* expected a later end"),
        (lambda o: o.astype(np.float64), "float64 .* expected a 1-D array of integers"),
        (lambda o: o.reshape(1, 13), r"int64 \(1, 13\), expected a 1-D array of integers"),
        (lambda o: o[:, None].astype("i4").view([("a", "i4")])[:, 0], "expected a 1-D array of integers"),
        (lambda o: np.where(np.arange(13) == 12, 2**62, o), "image 11: .* bytes, expected 1024 .. 2048"),
        (lambda o: o * 2**40, "image 0: .* bytes by its index, expected at most"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(release, index, message):
    path = release / "train-token.index.npy.gz"
    save_index(path, index(np.load(io.BytesIO(gzip.decompress(path.read_bytes())))))
    refused(release, f"train-token[^ ]*, {message}" if message.startswith("image") else message)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x07\x00\x10\x00" + b" " * 16,
        b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i8', ",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        b"\x93NUMPY\x01\x00\x08\x00" + b"(" * 8,
        b"\x93NUMPY\x01\x00\x40\x00"
        + b"{'descr': '<i8', 'fortran_order': False, 'shape': (13,), 1: 2}\n".ljust(64),
        b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}\n".ljust(64),
        b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (13,)}\n".ljust(64),
    ],
)
def test_an_index_that_is_no_array_is_refused(release, raw):
    (release / "train-token.index.npy.gz").write_bytes(gzip.compress(raw))
    refused(release, "train-token.index.npy.gz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("1\n" * 11, "12 images, but the labels are 11"),
        ("1\n" * 13, "12 images, but the labels are 13"),
        ("1\n" * 5 + "cat\n" + "1\n" * 6, r"line 6: got b'cat\\n', expected a class id"),
        ("1\n" * 5 + "-1\n" + "1\n" * 6, "line 6"),
        ("1\n" * 5 + "1.0\n" + "1\n" * 6, "line 6"),
        ("1\n" * 5 + "\n" + "1\n" * 6, "line 6"),
        ("1\n" * 5 + "\u0661\n" + "1\n" * 6, "line 6"),
        ("1\n" * 5 + "9" * 5000 + "\n" + "1\n" * 6, "line 6"),
        ("1\n" * 5 + "1" + " " * 5000 + "\n" + "1\n" * 6, "line 7"),
    ],
)
def test_labels_that_do_not_fit_are_refused(release, text, message):
    (release / "train-label.txt").write_text(text)
    refused(release, message)


def test_labels_may_end_without_a_newline(release, tmp_path):
    path = release / "train-label.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").rstrip())
    assert (TokenStore(import_release(release, tmp_path / "store")).labels == labels_of(12)).all()


# Hostile files


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_payload_runs(release, tmp_path):
    trace = tmp_path / "release" / "ran"
    index, ckpt = release / "train-token.index.npy.gz", release / "codebook.ckpt"
    offsets, good = index.read_bytes(), ckpt.read_bytes()
    save_index(index, np.array([Payload(trace)] * 13, dtype=object), allow_pickle=True)
    refused(release, r"train-token.index.npy.gz: got object \(13,\), expected a 1-D array of integers")
    index.write_bytes(offsets)
    for write in (
        lambda: torch.save(Payload(trace), ckpt),
        lambda: torch.save(Payload(trace), ckpt, _use_new_zipfile_serialization=False),
        lambda: ckpt.write_bytes(pickle.dumps(Payload(trace))),
        lambda: torch.save({"codebook": Payload(trace)}, ckpt),
    ):
        write()
        refused(
            release,
            r"codebook.ckpt cannot be read as plain tensors, and is not unpickled since that could run code",
        )
    ckpt.write_bytes(good)
    # The payload works where somebody unpickles it.
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"codebook": torch.zeros(K, D)}, "holds a dict, expected a tensor"),
        ([torch.zeros(K, D)], "holds a list"),
        (torch.zeros(K), r"float32 \(391,\), expected a plain float32 tensor"),
        (torch.zeros(1, K, D), r"float32 \(1, 391, 32\)"),
        (torch.zeros(K, D, dtype=torch.int64), "int64"),
        (torch.zeros(K, D, dtype=torch.float64), "float64"),
        (torch.zeros(K, D).to_sparse(), "not stored as such"),
        (torch.zeros(K, D, device="meta"), "float32"),
        (torch.zeros(1, 1).expand(2**16, 2**16), r"\(65536, 65536\)"),
        (nn.Linear(2, 2), "cannot be read as plain tensors"),
    ],
)
def test_a_codebook_that_is_no_bare_tensor_is_refused(release, content, message):
    torch.save(content, release / "codebook.ckpt")
    refused(release, f"codebook.ckpt.*{message}")


def test_a_codebook_that_is_not_finite_is_refused(release, tmp_path):
    torch.save(torch.full((K, D), torch.nan), release / "codebook.ckpt")
    with pytest.raises(StoreError, match="all finite"):
        import_release(release, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_codebook_is_refused(release):
    path = release / "codebook.ckpt"
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for size in rng.integers(0, len(data) - 1, 8):
        path.write_bytes(data[:size])
        refused(release, "codebook.ckpt")


def test_bombs_are_refused_in_bounded_memory(release):
    """Files of kilobytes that unpack to gigabytes: a stream, an index, a codebook, and a first image."""
    data, index = (release / f"train-token.{kind}.gz" for kind in ("data.bin", "index.npy"))
    ckpt = release / "codebook.ckpt"
    good = {path: path.read_bytes() for path in (data, index, ckpt)}
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = b"".join(pack.compress(bytes(MIB)) for _ in range(512)) + pack.flush()
    tracemalloc.start()
    data.write_bytes(zeros)
    refused(release, "train-token.data.bin.gz")
    data.write_bytes(good[data] + zeros)
    refused(release, "train-token.data.bin.gz: goes on after byte")
    data.write_bytes(good[data])
    index.write_bytes(zeros)
    refused(release, "train-token.index.npy.gz: holds no .npy array")
    header = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (13,), }".ljust(
        117
    )
    index.write_bytes(gzip.compress(header + b"\n" + bytes(13 * 8)) + zeros)
    refused(release, "train-token.index.npy.gz: shorter or longer than its 13 offsets")
    index.write_bytes(good[index])
    deflate(ckpt, good[ckpt])
    refused(release, r"codebook.ckpt cannot be read as plain tensors.*compressed entries")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MIB


def deflate(path: Path, archive: bytes) -> None:
    """Write a zip archive again, compressed."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
