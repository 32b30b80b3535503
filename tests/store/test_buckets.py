"""Stores in buckets: what is read is what was written, whatever the network does, and little of it is copied."""

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import obstore.store
import pytest
from support.buckets import BUCKET, failing, point_to, served, upload
from support.faults import in_child

from seitpp import StoreWriter, TokenStore
from seitpp.store import StoreError, bucket, layout, outgoing, ranges, remote, spec
from seitpp.store.bucket import Bucket, ExistsError

N, SHARD = 95, 10
CODEBOOK = np.arange(60, dtype=np.float32).reshape(20, 3)
IDS = np.random.default_rng(0).integers(20, size=(N, 16, 16))
URL = f"s3://{BUCKET}/sets/tokens"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("local") / "tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "SHARD_IMAGES", SHARD)
        for split in ("train", "validation"):
            with StoreWriter(path, codebook=CODEBOOK, grid=(16, 16), split=split) as writer:
                writer.add_batch(IDS, np.arange(N) % 7)
    return path


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, served(patch) as address:
        upload(store, URL)
        yield address


def shards_in(cache: Path) -> list[str]:
    return sorted(path.name[5:10] for path in cache.rglob("*.arrow"))


def test_a_store_reads_as_the_local_one_and_copies_what_is_read(store: Path, server: str, tmp_path: Path) -> None:
    local, found = TokenStore(store), TokenStore(URL, cache=tmp_path)
    assert len(found) == N and found.fingerprint == local.fingerprint and found.is_remote and not local.is_remote
    assert shards_in(tmp_path) == ["00000"]
    assert np.array_equal(found.ids([31, 38]), IDS[[31, 38]]) and found[94][1] == 94 % 7
    assert shards_in(tmp_path) == ["00000", "00003", "00009"]
    worker = pickle.loads(pickle.dumps(found))
    assert np.array_equal(worker.ids([50]), IDS[[50]]) and worker.checksum == found.checksum
    assert np.array_equal(found.ids(range(N)), IDS) and np.array_equal(found.labels, local.labels)
    found.verify()
    assert len(shards_in(tmp_path)) == 20
    damaged = next(tmp_path.rglob("data-00007*.arrow"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"data-00007.*SHA-256"):
        found.verify()


def test_what_was_copied_is_not_copied_again(store: Path, server: str, tmp_path: Path, monkeypatch) -> None:
    with failing(server, lambda method, path: None) as (address, seen):
        point_to(address, monkeypatch)
        TokenStore(URL, cache=tmp_path).ids(range(N))
        first = len(seen)
        again = TokenStore(URL, cache=tmp_path)
        again.ids(range(N))
        pickle.loads(pickle.dumps(again)).ids(range(N))
        assert len(seen) == first + 1 and seen[-1].endswith("tokens.json")


@pytest.mark.parametrize("fault", [500, "cut", 0.5])
def test_a_network_that_fails_for_a_moment_changes_nothing(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault
) -> None:
    monkeypatch.setattr(bucket, "PART", 1000)  # many requests for each shard
    count = 0

    def every_third(method: str, path: str):
        nonlocal count
        count += 1
        return fault if count % 3 == 0 and (fault != "cut" or "arrow" in path) else None

    with failing(server, every_third) as (address, _):
        point_to(address, monkeypatch)
        assert np.array_equal(TokenStore(URL, cache=tmp_path).ids(range(40)), IDS[:40])


def test_a_copy_that_broke_off_is_continued(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "PART", 500)
    monkeypatch.setattr(ranges, "TRIES", 1)
    monkeypatch.setattr(ranges, "RETRIES", {"max_retries": 0})
    found = TokenStore(URL, cache=tmp_path)
    with failing(server, lambda method, path: 500 if len(seen) > 3 else None) as (address, seen):
        point_to(address, monkeypatch)
        broken = TokenStore._opened_again(found._remote._replace(bucket=Bucket(URL)), "train")
        with pytest.raises(StoreError, match="500"):
            broken.ids([12])
    (part,) = tmp_path.rglob(".*.part")
    assert part.stat().st_size == 3 * 500
    with failing(server, lambda method, path: None) as (address, seen):
        point_to(address, monkeypatch)
        again = TokenStore._opened_again(found._remote._replace(bucket=Bucket(URL)), "train")
        assert np.array_equal(again.ids([12]), IDS[[12]])
        size = next(tmp_path.rglob("data-00001*.arrow")).stat().st_size
        assert len(seen) == -(-size // 500) - 3


def test_the_cache_leaves_space_on_its_disk(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = TokenStore(URL, cache=tmp_path)
    size = max(path.stat().st_size for path in tmp_path.rglob("*.arrow"))

    def disk(_: Path) -> object:
        used = sum(path.stat().st_size for path in tmp_path.rglob("*.arrow"))
        return type("Usage", (), {"free": 5 * size - used})

    monkeypatch.setattr(remote.shutil, "disk_usage", disk)
    assert np.array_equal(found.ids(range(N)), IDS), "what is open can be read on"
    assert shards_in(tmp_path)[-1] == "00009"
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.arrow")) <= 5 * size * 3 / 4
    monkeypatch.setattr("seitpp.store.reader.KEPT_OPEN", 2)
    assert np.array_equal(TokenStore(URL, cache=tmp_path).ids(range(N)), IDS)


def test_a_forked_process_reads_as_its_parent(server: str, tmp_path: Path) -> None:
    """Workers of a data loader are forked, and the threads of obstore are not in a fork."""
    found = TokenStore(URL, cache=tmp_path / "cache")

    def read() -> None:
        worker = pickle.loads(pickle.dumps(found))
        assert np.array_equal(worker.ids([71, 33]), IDS[[71, 33]])
        elsewhere = worker._remote._replace(bucket=Bucket("s3://nowhere/tokens"))
        with pytest.raises(StoreError, match=r"s3://nowhere/tokens/train/data-00005.*no such bucket"):
            elsewhere.fetch(worker._document, [worker._names[5]])
        with pytest.raises(StoreError, match="forked from one that used obstore"):
            TokenStore(URL, cache=tmp_path / "cache")

    assert in_child(read, tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_shards_are_copied_ahead(server: str, tmp_path: Path) -> None:
    found = TokenStore(URL, cache=tmp_path)
    found.prefetch([4, 5])
    for thread in remote.threading.enumerate():
        if thread is not remote.threading.current_thread() and thread.daemon and "fetch" in thread.name:
            thread.join(20)
    assert shards_in(tmp_path) == ["00000", "00004", "00005"]


def test_a_store_that_changes_is_never_mixed(store: Path, server: str, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/changing"
    upload(store, url)
    found = TokenStore(url, cache=tmp_path)
    found.ids([0])
    with StoreWriter(tmp_path / "other", codebook=CODEBOOK, grid=(16, 16)) as writer:
        writer.add_batch(IDS[:15], [0] * 15)
    shard = next((tmp_path / "other/train").glob("*.arrow"))
    Bucket(url).put(layout.shard_name("train", 5, 10), shard)
    with pytest.raises(StoreError, match="changed during the run"):
        found.ids([55])
    upload(tmp_path / "other", url)
    assert len(TokenStore(url, cache=tmp_path)) == 15
    obstore.delete(obstore.store.from_url(url), f"train/{shard.name}")
    shutil.rmtree(next(path for path in tmp_path.glob("*/*") if (path / "train" / shard.name).is_file()))
    with pytest.raises(StoreError, match="no such object"):
        TokenStore(url, cache=tmp_path)


def test_what_cannot_be_read_is_said_in_one_line(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "RETRIES", {"max_retries": 0})
    for url, message in (
        ("s3://nowhere/tokens", "no such bucket"),
        (f"s3://{BUCKET}/nothing", "no such object"),
        ("s3://", "check the URL"),
    ):
        with pytest.raises(StoreError, match=message) as error:
            TokenStore(url, cache=tmp_path)
        assert str(error.value).isprintable()
    Bucket(f"s3://{BUCKET}/bad").put(layout.DOCUMENT, b"{}")
    with pytest.raises(StoreError, match=r"s3://bucket/bad: .*no token store"):
        TokenStore(f"s3://{BUCKET}/bad", cache=tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="check the URL, the endpoint and the network"):
        TokenStore(URL, cache=tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match="no credentials"):
        TokenStore(URL, cache=tmp_path)


def test_a_store_goes_up_and_comes_down(store: Path, server: str, tmp_path: Path, monkeypatch) -> None:
    url = f"s3://{BUCKET}/pushed"
    with failing(server, lambda method, path: 500 if len(seen) > 8 else None) as (address, seen):
        point_to(address, monkeypatch)
        monkeypatch.setattr(ranges, "RETRIES", {"max_retries": 0})
        with pytest.raises(StoreError, match="500"):
            outgoing.send(store, url)
    point_to(server, monkeypatch)
    with pytest.raises(StoreError, match=r"tokens\.json: no such object"):
        TokenStore(url, cache=tmp_path)
    before = len(Bucket(url).entries())
    assert 0 < before < 20
    with failing(server, lambda method, path: None) as (address, seen):
        point_to(address, monkeypatch)
        outgoing.send(store, url)
        shards = [line for line in seen if line.startswith("PUT") and ".arrow" in line]
        assert 10 < len(shards) < 20, "those of before are not sent again"
    point_to(server, monkeypatch)
    outgoing.send(store, url)  # nothing is left to do
    full = type("Usage", (), {"free": 0})
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: full)  # what is pulled is no cache
    down = remote.pull(url, tmp_path / "down")
    files = {path.relative_to(store) for path in store.rglob("*") if path.is_file()}
    assert {path.relative_to(down) for path in down.rglob("*") if path.is_file()} == files
    assert all((down / name).read_bytes() == (store / name).read_bytes() for name in files)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".down")]
    with pytest.raises(StoreError, match="exists already"):
        remote.pull(url, down)
    with StoreWriter(tmp_path / "other", codebook=CODEBOOK, grid=(16, 16)) as writer:
        writer.add_batch(IDS[:5], [0] * 5)
    with pytest.raises(StoreError, match="another store is there"):
        outgoing.send(tmp_path / "other", url)
    with pytest.raises(ExistsError, match="nothing is overwritten"):  # of two at the same time
        Bucket(url).write(layout.DOCUMENT, b"{}")
