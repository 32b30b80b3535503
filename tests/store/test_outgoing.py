"""Stores written into buckets: whatever request fails, and whoever else writes, the bytes are those of a disk."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.buckets import BUCKET, failing, point_to, served

from seitpp import StoreWriter
from seitpp.store import StoreError, layout, outgoing, publish, ranges, spec
from seitpp.store.bucket import Bucket, ExistsError
from seitpp.store.outgoing import BucketStaging, Target
from seitpp.store.remote import pull

N, SHARD, GRID = 60, 8, (4, 6)  # 8 staged shards of 8 images, 2 in each shard of the store
CODEBOOK = np.arange(60, dtype=np.float32).reshape(20, 3) / 8
COMMON = {"codebook": CODEBOOK, "grid": GRID, "class_names": ["a", "b"]}
IDS = np.random.default_rng(0).integers(18, size=(N, *GRID))
LABELS = np.arange(N) % 2
ABOVE = f"s3://{BUCKET}/sets"
URL = f"{ABOVE}/tokens"


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "SHARD_IMAGES", SHARD)
        patch.setattr(spec, "FEW_SHARDS", 4)
        patch.setattr(spec, "GROUP", 2)
        patch.setattr(publish, "TABLE_IMAGES", 3 * SHARD)
        patch.setattr(ranges, "RETRIES", {"max_retries": 0})
        patch.setattr(ranges, "TRIES", 1)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "tokens"
    for split in ("train", "validation"):
        with StoreWriter(path, **COMMON, split=split) as writer:
            writer.add_batch(IDS, LABELS)
    return path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with served(monkeypatch) as address:
        yield address


def digest(images: range) -> str:
    return f"images {images}"


def begin(task: int | None = None, **changes) -> BucketStaging:
    target = Target(URL, task)
    target.receive()
    staging = BucketStaging(target, **{**COMMON, "num_images": N, "digest": digest, **changes})
    staging.share()
    return staging


def run_task(task: int, tasks: int = 2, *, ids: np.ndarray = IDS, **changes) -> None:
    staging = begin(task, **changes)
    groups = range(len(staging.groups))[task::tasks]
    shards = {shard for group in groups for shard in staging.groups[group]}
    for shard in sorted(shards - staging.finished(shards)):
        chosen = staging.images(shard)
        staging.write(shard, ids[chosen.start : chosen.stop], LABELS[chosen.start : chosen.stop])
    staging.encode(groups)


def finish(split: str = "train") -> None:
    target = Target(URL)
    if split in target.receive():
        BucketStaging.of_record(target, split).publish()


def everything() -> None:
    for split in ("train", "validation"):
        document = Bucket(URL).read_if_there(layout.DOCUMENT)
        if document is None or split not in layout.parse_document(document, URL)["splits"]:
            for task in (0, 1, 0):
                run_task(task, split=split)
        finish(split)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lost", [False, True])
def test_a_process_may_end_at_any_request(
    whole: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Either the request does not arrive, or its answer is lost; the next process goes on at once."""
    limit, count = 0, 0

    def break_off(method: str, path: str) -> int | str | None:
        nonlocal count
        count += 1
        return None if count <= limit else "cut" if lost and method == "PUT" else 500

    while True:
        count = 0
        with failing(server, break_off) as (address, _):
            point_to(address, monkeypatch)
            try:
                everything()
                break
            except StoreError:
                limit += 7
    point_to(server, monkeypatch)
    assert limit > 40, "requests of the last one"
    assert contents(pull(URL, tmp_path / "pulled")) == contents(whole)
    assert {name.partition("/")[0] for name in Bucket(ABOVE).entries()} == {"tokens"}
    assert outgoing.CLAIM not in Bucket(URL).entries()


def test_a_listing_that_is_late_is_refused_and_nothing_is_lost(
    whole: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in (0, 1, 0):
        run_task(task)

    def late(content: bytes) -> bytes:
        return re.sub(
            rb"<Contents>(?:(?!</Contents>).)*shard-00005.*?</Contents>|"
            rb"<Contents>(?:(?!</Contents>).)*encoded-00002.*?</Contents>",
            b"",
            content,
            flags=re.S,
        )

    with failing(server, lambda method, path: late if "list-type=2" in path else None) as (address, _):
        point_to(address, monkeypatch)
        with pytest.raises(StoreError, match=r"2 shards are not finished, the first is 4|the first is 5"):
            finish()
    point_to(server, monkeypatch)
    finish()
    run_task(0, split="validation")
    run_task(1, split="validation")
    finish("validation")
    assert contents(pull(URL, tmp_path / "pulled")) == contents(whole)


def test_what_others_do_otherwise_is_refused(whole: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_task(0)
    for changes, words in (
        ({"codebook": CODEBOOK + 1}, "begun with codebook"),
        ({"tokenizer": {"kind": "another"}}, "begun with tokenizer"),
        ({"num_images": 50}, r"staging\.json: begun otherwise by another process"),
    ):
        with pytest.raises(StoreError, match=words):
            begin(1, **changes)
    with pytest.raises(StoreError, match="expected a folder in a bucket"):
        Target(f"s3://{BUCKET}")
    with pytest.raises(StoreError, match="nobody has begun this split"):
        BucketStaging.of_record(Target(URL), "other")


def test_images_that_change_are_tokenized_again(
    whole: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = np.where(np.arange(N)[:, None, None] < 56, IDS, 1)  # the last shard
    run_task(1)

    def other(images: range) -> str:
        return digest(images) + ("." if images.stop > 56 else "")

    run_task(1, ids=changed, digest=other)
    run_task(0)
    finish()
    with StoreWriter(tmp_path / "tokens", **COMMON) as writer:
        writer.add_batch(changed, LABELS)
    assert contents(pull(URL, tmp_path / "pulled")) == contents(tmp_path / "tokens")


def test_what_is_damaged_or_of_other_images_is_refused(whole: Path, server: str, tmp_path: Path) -> None:
    run_task(0)
    run_task(1)
    bucket = Target(URL).staging("train")
    name = next(name for name in bucket.entries() if name.startswith("shard-00004"))
    whole_shard = bucket.read(name)
    bucket.put(name, whole_shard[:-1] + b"?")
    with pytest.raises(StoreError, match=r"shard-00004.*SHA-256"):
        finish()
    bucket.put(name, whole_shard)
    other = re.sub(r"-[0-9a-f]{16}-", "-" + "0" * 16 + "-", name)
    bucket.put(other, whole_shard)
    with pytest.raises(StoreError, match=r"are of other images"):
        finish()
    bucket.remove([other])
    bucket.put(name.replace("00004", "00099"), whole_shard)
    with pytest.raises(StoreError, match=r"shard-00099.*not of this split"):
        finish()
    bucket.remove([name.replace("00004", "00099")])
    finish()
    assert layout.shard_names(layout.read_document(pull(URL, tmp_path / "pulled")), "train")


def interrupted(monkeypatch: pytest.MonkeyPatch, name: str, then: Callable[[], None]) -> None:
    """Let another process do something right before this one writes the object `name`."""
    write, todo = Bucket.write, [then]

    def first(self: Bucket, what: str, *rest: object, **more: object) -> None:
        if what == name and todo:
            todo.pop()()
        write(self, what, *rest, **more)

    monkeypatch.setattr(Bucket, "write", first)


def test_of_two_that_finish_one_publishes(whole: Path, server: str, tmp_path: Path, monkeypatch) -> None:
    run_task(0)
    run_task(1)

    def other() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        finish()

    interrupted(monkeypatch, layout.DOCUMENT, other)
    finish()  # what is there is what it would have written
    run_task(0, split="validation")
    run_task(1, split="validation")
    finish("validation")
    assert contents(pull(URL, tmp_path / "pulled")) == contents(whole)


def test_two_different_stores_do_not_mix(whole: Path, server: str, tmp_path: Path, monkeypatch) -> None:
    with StoreWriter(tmp_path / "other", **COMMON) as writer:
        writer.add_batch(IDS[:9], LABELS[:9])
    with pytest.raises(
        StoreError, match=r"another store is being sent there; wait, or remove tokens\.json\.incoming"
    ):
        interrupted(monkeypatch, outgoing.CLAIM, lambda: Bucket(URL).put(outgoing.CLAIM, b"of another"))
        outgoing.send(whole, URL)
    assert not [name for name in Bucket(URL).entries() if name.endswith(".arrow")]
    Bucket(URL).remove([outgoing.CLAIM])
    outgoing.send(whole, URL)
    with pytest.raises(StoreError, match="another store is there"):
        outgoing.send(tmp_path / "other", URL)
    assert contents(pull(URL, tmp_path / "pulled")) == contents(whole)


def test_a_store_that_changes_while_a_split_is_added_stays(
    whole: Path, server: str, tmp_path: Path, monkeypatch
) -> None:
    run_task(0)
    run_task(1)
    finish()
    for task in (0, 1):
        run_task(task, split="validation")
        run_task(task, split="test")

    def other() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        Bucket(URL).remove([outgoing.CLAIM])  # by somebody who does not wait
        finish("test")

    cache = tmp_path / "cache"
    interrupted(monkeypatch, layout.DOCUMENT, other)
    with pytest.raises(ExistsError, match=r"tokens\.json: written by another process meanwhile"):
        finish("validation")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with pytest.raises(StoreError, match="another store is there"):
        finish("validation")
    assert list(layout.read_document(pull(URL, tmp_path / "pulled"))["splits"]) == ["train", "test"]
