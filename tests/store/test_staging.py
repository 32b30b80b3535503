"""A split made shard by shard: by several processes, killed anywhere and continued, it has the same bytes."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from seitpp import StoreWriter, TokenStore
from seitpp.store import SplitStaging, StoreError, layout, spec

N, SHARD, GRID = 50, 20, (4, 6)
CODEBOOK = np.arange(60, dtype=np.float32).reshape(20, 3) / 8
COLUMNS = {"file": "string", "map": "binary", "time": "int64"}
COMMON = {"codebook": CODEBOOK, "grid": GRID, "class_names": ["a", "b"], "columns": COLUMNS}


def images(numbers: range) -> tuple[np.ndarray, list[int], dict]:
    """Ids, labels and other columns of some images, by their numbers."""
    ids = (np.arange(N * 24) * 2654435761 % 2**32 >> 16) % 18
    columns = {
        "file": [f"täglich/{i}.png" for i in numbers],
        "map": [bytes([i, 0, 255]) * (i % 3) for i in numbers],
        "time": np.array(numbers) * -(2**40),
    }
    return ids.reshape(N, *GRID)[numbers.start : numbers.stop], [i % 2 for i in numbers], columns


def begin(path: Path, split: str = "train", **changes) -> SplitStaging:
    return SplitStaging(path, split=split, **{**COMMON, "num_images": N, **changes})


def write_images(staging: SplitStaging, shard: int, numbers: range) -> None:
    ids, labels, columns = images(numbers)
    staging.write(shard, ids, labels, columns=columns)


def make(path: Path, split: str = "train", rank: int = 0, ranks: int = 1, **changes) -> SplitStaging:
    """A rank's share of the shards that are not finished."""
    staging = begin(path, split, **changes)
    for shard in set(range(rank, staging.num_shards, ranks)) - staging.finished():
        write_images(staging, shard, staging.images(shard))
    return staging


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(spec, "SHARD_IMAGES", SHARD)


def write(path: Path, split: str = "train", step: int = N) -> Path:
    with StoreWriter(path, split=split, **COMMON) as out:
        for start in range(0, N, step):
            out.add_batch(*images(range(start, min(start + step, N))))
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """What one uninterrupted StoreWriter makes, split by split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "SHARD_IMAGES", SHARD)
        folder = tmp_path_factory.mktemp("expected")
        write(folder / "one")
        write(write(folder / "two"), "validation")
    return {name: contents(folder / name) for name in ("one", "two")}


@pytest.mark.parametrize("step", [1, 7, 20, 33])
def test_batches_do_not_show_in_the_bytes(tmp_path, expected, step):
    assert contents(write(tmp_path / "s", step=step)) == expected["one"]


def test_shards_in_any_order_make_the_same_store(tmp_path, expected):
    staging = begin(tmp_path / "s")
    assert staging.num_shards == 3 and staging.images(2) == range(40, 50)
    for shard in (2, 0, 1):
        assert shard not in staging.finished()
        write_images(staging, shard, staging.images(shard))
    assert staging.finished() == {0, 1, 2}
    staging.publish()
    assert contents(tmp_path / "s") == expected["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_several_processes_encode_the_same_bytes(tmp_path, expected):
    make(tmp_path / "s").publish(processes=2)
    assert contents(tmp_path / "s") == expected["one"]


def test_a_shard_written_twice_counts_once(tmp_path, expected):
    staging = make(tmp_path / "s")
    write_images(staging, 1, staging.images(1))
    staging.publish()
    assert contents(tmp_path / "s") == expected["one"]


def test_images_that_could_not_be_read_are_left_out(tmp_path):
    staging = begin(tmp_path / "s")
    write_images(staging, 0, range(3, 20))
    write_images(staging, 1, range(20, 20))
    write_images(staging, 2, range(40, 49))
    staging.publish()
    store = TokenStore(tmp_path / "s")
    kept = [*range(3, 20), *range(40, 49)]
    assert store.column("time")[range(len(store))].tolist() == [-i * 2**40 for i in kept]
    assert (store.ids(range(len(store))) == images(range(N))[0][kept]).all()
    assert len(layout.shard_names(store._document, "train")) == 2
    store.verify()


# Killed and continued


def run_killed(target, *arguments, at: int) -> bool:
    """Run in a process that gets SIGKILL before its `at`-th file operation; whether it came to that."""

    def body():
        done = 0

        def counted(real):
            def operation(*args, **kwargs):
                nonlocal done
                done += 1
                if done == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return operation

        os.fsync, os.unlink, os.rmdir = map(counted, (os.fsync, os.unlink, os.rmdir))
        Path.rename, Path.replace = map(counted, (Path.rename, Path.replace))
        target(*arguments)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def make_and_publish(path: Path, split: str) -> None:
    make(path, split).publish()


@pytest.mark.parametrize("splits", [["train"], ["train", "validation"]])
def test_killed_at_every_file_operation_it_goes_on_to_the_same_bytes(tmp_path, expected, splits):
    *before, split = splits
    wanted, at = expected["two" if before else "one"], 1
    while True:
        path = tmp_path / str(at) / "s"
        for other in before:
            write(path, other)
        if not run_killed(make_and_publish, path, split, at=at):
            break
        for other in before:
            TokenStore(path, other).verify()
        make_and_publish(path, split)
        assert contents(path) == wanted
        assert [entry.name for entry in path.parent.iterdir()] == ["s"]
        at += 1
    assert at > 30
    assert contents(path) == wanted


KEPT = np.array([17, 3, *range(4, 17), 0, 1, 2])  # all but the unused 18 and 19, in another order
CUT = {"codebook": CODEBOOK[KEPT], "tokenizer": {"name": "cut"}}


def make_and_cut(path: Path, split: str) -> None:
    """Some codes are left out when all shards are there; once the store is, its codebook is that of the split."""
    if path.exists():
        begin(path, split, **CUT).publish()
        return
    make(path, split, tokenizer={"name": "whole"})
    staging = begin(path, split, tokenizer={"name": "whole"})
    staging.keep(KEPT, CUT["tokenizer"])
    staging.publish()


def test_codes_are_left_out_when_all_shards_are_there(tmp_path):
    staging = make(tmp_path / "s")
    ids, labels, columns = images(range(N))
    assert np.array_equal(staging.counts(), np.bincount(ids.ravel(), minlength=20))
    new_ids = np.argsort(np.concatenate([KEPT, [18, 19]]))
    with StoreWriter(tmp_path / "expected", **{**COMMON, **CUT}) as out:
        out.add_batch(new_ids[ids], labels, columns)
    wanted, at = contents(tmp_path / "expected"), 1
    while run_killed(make_and_cut, tmp_path / str(at) / "s", "train", at=at):
        make_and_cut(tmp_path / str(at) / "s", "train")
        assert contents(tmp_path / str(at)) == {f"s/{name}": data for name, data in wanted.items()}
        at += 1
    assert at > 30 and contents(tmp_path / str(at) / "s") == wanted


def test_a_code_that_is_in_use_is_not_left_out(tmp_path):
    staging = make(tmp_path / "s")
    staging.keep(KEPT[1:], None)
    with pytest.raises(ValueError, match="negative"):
        staging.publish()
    assert not (tmp_path / "s").exists()


@pytest.fixture(scope="module")
def killed_folder(tmp_path_factory) -> Path:
    """A store whose writer got no further than the last rename, and what it left beside it."""
    path, at = tmp_path_factory.mktemp("killed") / "s", 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "SHARD_IMAGES", SHARD)
        while not path.exists():
            assert run_killed(make_and_publish, path, "train", at=at)
            at += 1
    return path.parent


@pytest.fixture
def published_and_killed(killed_folder, tmp_path) -> Path:
    shutil.copytree(killed_folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / "s"


def test_a_published_split_is_neither_written_again_nor_touched(published_and_killed, expected):
    path = published_and_killed
    times = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    ranks = [begin(path), begin(path)]
    assert all(rank.finished() == {0, 1, 2} for rank in ranks)
    ranks[0].publish()
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == times
    assert contents(path) == expected["one"]
    with pytest.raises(StoreError, match="has a split 'train' already"):
        begin(path)


@pytest.mark.parametrize(
    "changes",
    [{"num_images": 51}, {"columns": {}}, {"class_names": ["a", "c"]}, {"codebook": CODEBOOK + 1}],
    ids=["images", "columns", "classes", "codebook"],
)
def test_another_command_does_not_take_the_published_split_for_its_own(published_and_killed, changes):
    with pytest.raises(StoreError, match="has a split 'train' already"):
        begin(published_and_killed, **changes)
    assert begin(published_and_killed).published


def test_a_split_that_somebody_else_published_meanwhile_is_refused(tmp_path):
    path, staging = tmp_path / "s", make(tmp_path / "s")
    with StoreWriter(path, **COMMON) as out:
        out.add_batch(*images(range(10)))
    before = contents(tmp_path)
    with pytest.raises(StoreError, match="has a split 'train' already"):
        begin(path)
    with pytest.raises(StoreError, match="has a split 'train' already"):
        staging.publish()
    assert contents(tmp_path) == before


def test_only_missing_shards_are_made_again(tmp_path):
    assert run_killed(make, tmp_path / "s", at=12)
    finished = begin(tmp_path / "s").finished()
    assert finished and len(finished) < 3
    times = {path: path.stat().st_mtime_ns for path in begin(tmp_path / "s").folder.glob("shard*")}
    make(tmp_path / "s")
    assert len(times) == len(finished)
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())


FORK = multiprocessing.get_context("fork")


def make_until(path: Path, rank: int, shards: int, waiting: multiprocessing.Event) -> None:
    """One of two processes, which waits when it has written so many shards."""
    real, left = SplitStaging.write, shards

    def counted(*args, **kwargs):
        nonlocal left
        if left == 0:
            waiting.set()
            time.sleep(60)
        left -= 1
        real(*args, **kwargs)

    SplitStaging.write = counted
    make(path, rank=rank, ranks=2)


def start(path: Path, shards: int) -> list[tuple]:
    """Both processes, each with what tells that it waits."""
    pairs = []
    for rank in range(2):
        waiting = FORK.Event()
        process = FORK.Process(target=make_until, args=(path, rank, shards, waiting))
        process.start()
        pairs.append((process, waiting))
    return pairs


def test_two_processes_killed_and_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(spec, "SHARD_IMAGES", 2)
    path = tmp_path / "s"
    for child, waiting in start(path, shards=4):
        assert waiting.wait(60)
        child.kill()
        child.join()
    assert begin(path).finished() == set(range(8))
    # 13 of the remaining shards are the first one's, were it not for what is there.
    for child, waiting in start(path, shards=9):
        child.join()
        assert child.exitcode == 0 and not waiting.is_set()
    begin(path).publish()
    assert contents(path) == contents(write(tmp_path / "one"))


# Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (6, 4)}, r"begun with grid \[4, 6\], got \[6, 4\]"),
        ({"grid": None}, r"begun with grid \[4, 6\], got None"),
        ({"codec": "packed"}, "begun with codec ans, got packed"),
        ({"codebook": CODEBOOK + 1}, r"begun with codebook \(20, 3\) \w{12}, got \(20, 3\) \w{12}"),
        ({"class_names": ["a", "c"]}, r"begun with class_names \['a', 'b'\], got \['a', 'c'\]"),
        ({"tokenizer": {"name": "other"}}, "begun with tokenizer None, got .*other"),
        ({"columns": {}}, "begun with columns .*file.*, got {}"),
        ({"num_images": 51}, "begun with num_images 50, got 51"),
    ],
)
def test_a_split_is_not_continued_with_something_else(tmp_path, changes, message):
    make(tmp_path / "s")
    with pytest.raises(StoreError, match=message):
        begin(tmp_path / "s", **changes)
    begin(tmp_path / "s").publish()


def test_other_shard_sizes_are_not_continued(tmp_path, monkeypatch):
    make(tmp_path / "s")
    monkeypatch.setattr(spec, "SHARD_IMAGES", 10)
    with pytest.raises(StoreError, match="begun with shard_images 20, got 10"):
        begin(tmp_path / "s")


def test_a_damaged_record_or_shard_is_refused(tmp_path):
    staging = make(tmp_path / "s")
    shard = staging.folder / "shard-00001.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match=r"shard-00001.arrow: no shard"):
        staging.publish()
    shard.write_bytes(data)
    (staging.folder / "staging.json").write_text("{")
    with pytest.raises(StoreError, match="to begin anew"):
        begin(tmp_path / "s")


def test_missing_shards_are_refused(tmp_path):
    staging = begin(tmp_path / "s")
    write_images(staging, 1, range(20, 40))
    with pytest.raises(StoreError, match="2 shards are not finished, the first is 0"):
        staging.publish()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("shard", "numbers", "message"),
    [
        (3, range(20), "shard 3: expected 0 .. 2"),
        (-1, range(20), "shard -1: expected 0 .. 2"),
        (1, range(20, 41), "shard 1: got 21 images, expected at most 20"),
        (2, range(40, 51), "labels from image 40"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_shards_are_refused(tmp_path, shard, numbers, message):
    staging = begin(tmp_path / "s")
    with pytest.raises(StoreError, match=message):
        write_images(staging, shard, numbers)
    assert staging.finished() == set()


def test_images_are_named_by_their_number_in_the_split(tmp_path):
    staging = begin(tmp_path / "s")
    ids, labels, columns = images(range(20, 40))
    ids[5] = 20
    with pytest.raises(StoreError, match=r"image 25: ids 20 .. 20"):
        staging.write(1, ids, labels, columns=columns)


def test_a_published_or_foreign_split_is_refused(tmp_path):
    make_and_publish(tmp_path / "s", "train")
    with pytest.raises(StoreError, match="has a split 'train' already"):
        begin(tmp_path / "s")
    (tmp_path / "s" / "test").mkdir()
    with pytest.raises(StoreError, match="left by an interrupted writer"):
        begin(tmp_path / "s", "test")
    with pytest.raises(StoreError, match="num_images: got 0"):
        begin(tmp_path / "t", num_images=0)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_shards_of_other_images_are_made_again(tmp_path) -> None:
    def staged(names: str, finished: set[int]) -> SplitStaging:
        """Three shards of images that are called so, of which some are finished already."""
        staging = begin(
            tmp_path / "s", num_images=len(names), digest=lambda images: names[images.start : images.stop]
        )
        assert staging.finished() == finished
        return staging

    names = "a" * SHARD + "b" * SHARD + "c" * 10
    staging = staged(names, set())
    for shard in (0, 1):
        write_images(staging, shard, staging.images(shard))
    staged(names, {0, 1})
    other = names[:SHARD] + "x" + names[SHARD + 1 :]  # as many images, one of which is another
    write_images(staged(other, {0}), 2, range(40, 50))
    staged(other[:-1], {0})  # an image is removed: what lies before it stays
    staging = staged("z" * 40, set())
    write_images(staging, 0, range(20))
    write_images(staging, 1, range(20, 40))
    staging.publish()
    assert len(TokenStore(tmp_path / "s")) == 40 and [path.name for path in tmp_path.iterdir()] == ["s"]
    with pytest.raises(StoreError, match=r"begun with num_images 50, got 49"):
        begin(tmp_path / "t")
        begin(tmp_path / "t", num_images=49)


def publish_at_once(path: Path, split: str, start: multiprocessing.Barrier) -> None:
    staging = None if split.startswith("written") else make(path, split)
    start.wait()
    if staging is None:
        write(path, split)
    else:
        staging.publish()


@pytest.mark.parametrize("exists", [False, True])
def test_splits_that_are_written_at_once_are_all_there(tmp_path, exists) -> None:
    path = write(tmp_path / "s") if exists else tmp_path / "s"
    splits, fork = ["validation", "test", "written", "written_too"], multiprocessing.get_context("fork")
    start = fork.Barrier(len(splits))
    processes = [fork.Process(target=publish_at_once, args=(path, split, start)) for split in splits]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(splits)
    written = layout.read_document(path)["splits"]
    assert {*written} == {*splits, *(["train"] if exists else [])}
    assert all(len(TokenStore(path, split)) == N for split in written)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_who_publishes_waits_for_the_lock_of_the_store(tmp_path, capfd) -> None:
    staging = make(tmp_path / "s")
    code = (
        "import sys, time; from pathlib import Path; from seitpp.files import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(1)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".s.lock")], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"locked\n"
    staging.publish()
    assert f"waiting for process {child.pid} on " in capfd.readouterr().err
    child.communicate()
    assert len(TokenStore(tmp_path / "s")) == N


def test_a_link_in_the_place_of_a_staging_folder_is_refused(tmp_path) -> None:
    kept = tmp_path / "kept/file"
    kept.parent.mkdir()
    kept.write_text("content")
    (tmp_path / ".s-train.staging").symlink_to(kept.parent)
    with pytest.raises(StoreError, match=r".s-train.staging: a link, expected a folder"):
        begin(tmp_path / "s")
    assert kept.read_text() == "content" and len([*kept.parent.iterdir()]) == 1
