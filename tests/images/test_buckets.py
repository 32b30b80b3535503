"""Images in a bucket are those of the same files on a disk, also in forks, whatever the network does."""

import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.buckets import BUCKET, failing, point_to, served, upload
from support.faults import in_child
from support.pictures import PACKINGS, make_tar, photograph_crops, write
from torch.utils.data import DataLoader

from seitpp.images import objects
from seitpp.images.batches import DecodedImages, already_a_batch
from seitpp.images.decode import ImageError
from seitpp.images.inventory import digest
from seitpp.images.labels import LabelRules
from seitpp.images.sources import open_every_split, open_source, split_names
from seitpp.store import StoreError, ranges
from seitpp.store.bucket import Bucket

READ = sorted(PACKINGS.keys() - {"arrow"})


@pytest.fixture(scope="module")
def samples() -> list[tuple[bytes, int]]:
    return photograph_crops(40)


@pytest.fixture(scope="module")
def server(samples, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address, and the folder with the files that the bucket has."""
    folder = tmp_path_factory.mktemp("local")
    for packing in READ:
        (folder / packing).mkdir()
        PACKINGS[packing](folder / packing / "pictures", samples)
    with pytest.MonkeyPatch.context() as patch, served(patch) as address:
        upload(folder, f"s3://{BUCKET}/data")
        yield address, folder


def read_all(source) -> list[tuple[bytes, object, str]]:
    return [tuple(source.read(index)[:3]) for index in range(len(source))]


def both(server: tuple[str, Path], packing: str) -> tuple:
    rules = LabelRules(file=str(server[1] / packing / "labels.csv")) if packing == "flat" else LabelRules()
    data = next((server[1] / packing).glob("pictures*"))
    return tuple(open_source(f"{place}/{packing}/{data.name}", None, rules) for place in (server[1], DATA))


DATA = f"s3://{BUCKET}/data"


@pytest.mark.parametrize("packing", READ)
def test_every_packing_gives_what_its_files_give(packing: str, server, monkeypatch) -> None:
    monkeypatch.setattr(objects, "LEAST", 5000)  # many requests
    monkeypatch.setattr(objects, "MOST", 20000)
    local, remote = both(server, packing)
    assert read_all(remote) == read_all(local) and len(remote) == 40
    assert remote.labels.values == local.labels.values and remote.class_names == local.class_names
    assert list(remote.names) == list(local.names) and str(remote.left_out) == str(local.left_out)
    assert remote.labels.origin == local.labels.origin
    again = pickle.loads(pickle.dumps(remote))
    assert [again.read(index) for index in (39, 0, 17)] == [local.read(index) for index in (39, 0, 17)]
    assert digest(remote, range(3, 9)) == digest(local, range(3, 9))


@pytest.mark.parametrize("packing", READ)
def test_workers_of_a_loader_read_after_their_parent(packing: str, server) -> None:
    """They are forked, and the threads of obstore are not in a fork."""
    local, remote = both(server, packing)
    batches = [list(range(start, start + 8)) for start in range(0, 40, 8)]

    def decoded(source, workers: int) -> list[tuple]:
        images = DecodedImages(source, (16, 16))
        loader = DataLoader(images, batch_sampler=batches, collate_fn=already_a_batch, num_workers=workers)
        return [(batch.pixels.tolist(), batch.kept, batch.errors) for batch in loader]

    assert remote.read(0) == local.read(0)
    assert decoded(remote, 2) == decoded(local, 0)


@pytest.mark.parametrize("fault", [500, "cut", 0.2])
@pytest.mark.parametrize("forked", [False, True])
def test_a_network_that_fails_for_a_moment_changes_nothing(
    server, forked: bool, fault: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    count = 0

    def every_third(method: str, path: str):
        nonlocal count
        count += 1
        return fault if count % 3 == 0 and (fault != "cut" or "pictures" in path) else None

    with failing(server[0], every_third) as (address, _):
        point_to(address, monkeypatch)
        local, remote = both(server, "folder")
        expected = read_all(local)

        def read() -> None:
            assert read_all(remote) == expected

        if forked:
            assert in_child(read, tmp_path / "log") == 0, (tmp_path / "log").read_text()
        else:
            read()


def test_tars_are_read_in_sequence(samples, server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten small files of a tar need no ten requests, and many tars are listed at the same time."""
    monkeypatch.setattr(objects, "LEAST", 30_000)
    members = {
        f"{index:04d}.{kind}": value
        for index, (data, label) in enumerate(samples)
        for kind, value in (("png", data), ("cls", str(label)))
    }
    whole = {f"a/{number:02d}.tar": make_tar(tmp_path / f"{number:02d}.tar", members) for number in range(4)}
    for name, path in whole.items():
        Bucket(f"s3://{BUCKET}/several").put(name, path)
    size = next(iter(whole.values())).stat().st_size
    with failing(server[0], lambda method, path: time.sleep(0.2) if "tar" in path else None) as (address, seen):
        point_to(address, monkeypatch)
        source = open_source(f"s3://{BUCKET}/several/a")
        listing = len(seen)
        assert len(source) == 160 and listing <= 2 + 4 * (2 + size / 30_000)
        read_all(source)
        assert len(seen) - listing <= 4 * (2 + size / 30_000)


def test_splits_are_found_and_read(samples, server, tmp_path: Path) -> None:
    for split, count in (("train", 30), ("val", 10)):
        PACKINGS["folder"](tmp_path / "set" / split, samples[:count])
    upload(tmp_path / "set", f"s3://{BUCKET}/set")
    url = f"s3://{BUCKET}/set"
    assert split_names(url) == ["train", "val"] == split_names(f"{url}/")
    with pytest.raises(ImageError, match="has the splits train, val"):
        open_source(url)
    assert len(open_source(url, "validation")) == 10
    parts = open_every_split(url, LabelRules())
    assert {split: len(source) for split, source in parts.items()} == {"train": 30, "validation": 10}
    assert read_all(parts["train"]) == read_all(open_source(str(tmp_path / "set"), "train"))
    with pytest.raises(ImageError, match="no folder 'test'"):
        open_source(url, "test")


def test_what_lies_beside_images_is_counted(samples, server, tmp_path: Path) -> None:
    folder = PACKINGS["folder"](tmp_path / "mixed", samples[:4])
    for name in ("notes.txt", ".hidden.png", "china/.thumb/x.png", "flower/unnamed"):
        write(folder / name, b"text")
    upload(folder, f"s3://{BUCKET}/mixed")
    Bucket(f"s3://{BUCKET}/mixed").put("empty/", b"")
    source = open_source(f"s3://{BUCKET}/mixed")
    assert len(source) == 4 and source.left_out.counts == {".txt file": 1, "hidden": 2, "no suffix of an image": 1}


def test_what_changes_during_the_run_is_refused(samples, server, tmp_path: Path) -> None:
    """It is no fault of an image, which --skip-errors would skip."""
    folder = PACKINGS["folder"](tmp_path / "changing", samples[:6])
    url = f"s3://{BUCKET}/changing"
    upload(folder, url)
    source = open_source(url)
    Bucket(url).put(source.names[2], b"another one")

    def read() -> None:
        with pytest.raises(StoreError, match=r"changing/china/.*: changed during the run; start again") as error:
            source.read(2)
        assert not isinstance(error.value, ImageError)

    read()
    assert in_child(read, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    damaged = folder / source.names[3]
    damaged.write_bytes(damaged.read_bytes()[:20])
    Bucket(url).put(source.names[3], damaged)
    batch = DecodedImages(open_source(url), (8, 8)).__getitems__([2, 3, 4])
    assert len(batch.kept) == 1 and len(batch.errors) == 2


@pytest.mark.parametrize(
    "data, message",
    [
        ("s3://nowhere/pictures", "no such bucket"),
        (f"s3://{BUCKET}/nothing", "no images below it"),
        (f"s3://{BUCKET}/nothing.tar", r"nothing\.tar: no such object"),
        (f"s3://{BUCKET}/masks", "images with masks are not read from buckets"),
        (f"s3://{BUCKET}/arrow", "the whole local folder"),
        (f"s3://{BUCKET}/damaged.tar", r"s3://bucket/damaged\.tar: cannot be read as an uncompressed tar"),
        (f"s3://{BUCKET}/damaged.parquet", r"s3://bucket/damaged\.parquet: cannot be read as Parquet"),
        ("s3://", "check the URL"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(data: str, message: str, server, monkeypatch) -> None:
    monkeypatch.setattr(ranges, "RETRIES", {"max_retries": 0})
    bucket = Bucket(f"s3://{BUCKET}")
    for name in ("masks/images/a.jpg", "masks/annotations/a.png", "arrow/a.arrow"):
        bucket.put(name, b"x")
    for name in ("damaged.tar", "damaged.parquet"):
        bucket.put(name, b"no such thing" * 100)
    with pytest.raises((ImageError, StoreError), match=message) as error:
        open_source(data)
    assert str(error.value).isprintable()


def test_a_row_with_a_path_is_refused(samples, server, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": samples[0][0], "path": "a.png"}, {"bytes": None, "path": "../../etc/passwd"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "paths.parquet")
    Bucket(f"s3://{BUCKET}").put("paths.parquet", tmp_path / "paths.parquet")
    source = open_source(f"s3://{BUCKET}/paths.parquet", None, None)
    assert source.read(0).data == samples[0][0]
    with pytest.raises(ImageError, match="a bucket has no paths"):
        source.read(1)
