"""Splits of very many images: the code table is of the first, shards are larger, and opened when they are read."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from seitpp import StoreWriter, TokenStore
from seitpp.store import SplitStaging, StoreError, encoding, fingerprint, layout, publish, spec
from seitpp.store.fingerprint import joined_fingerprint, shard_fingerprint
from seitpp.store.staging import TABLE, encoded_groups

N, SHARD, GROUP, GRID = 103, 8, 3, (4, 6)
CODEBOOK = np.arange(60, dtype=np.float32).reshape(20, 3) / 8
COMMON = {"codebook": CODEBOOK, "grid": GRID, "class_names": ["a", "b"]}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """More than 4 staged shards are a large split, with 3 in each shard of the store; 4 make the code table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "SHARD_IMAGES", SHARD)
        patch.setattr(spec, "FEW_SHARDS", 4)
        patch.setattr(spec, "GROUP", GROUP)
        patch.setattr(publish, "TABLE_IMAGES", 4 * SHARD)
        patch.setattr(fingerprint, "LARGE", 50)
        patch.setattr(publish, "LARGE", 50)
        yield


def images(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(18, size=(N, *GRID)), np.where(rng.random(N) < 0.1, -1, rng.integers(2, size=N))


IDS, LABELS = images()


def begin(path: Path, **changes) -> SplitStaging:
    return SplitStaging(path, **{**COMMON, "num_images": N, **changes})


def stage(staging: SplitStaging, shards: range | list[int], ids: np.ndarray = IDS) -> None:
    for shard in shards:
        if shard not in staging.finished():
            chosen = staging.images(shard)
            staging.write(shard, ids[chosen.start : chosen.stop], LABELS[chosen.start : chosen.stop])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one StoreWriter writes."""
    path = tmp_path_factory.mktemp("whole") / "store"
    with StoreWriter(path, **COMMON) as writer:
        writer.add_batch(IDS, LABELS)
    return path


def test_a_large_split_reads_as_what_was_written(whole: Path) -> None:
    for verify in (True, False):
        store = TokenStore(whole, verify=verify)
        assert (
            len(store) == N and np.array_equal(store.ids(range(N)), IDS) and np.array_equal(store.labels, LABELS)
        )
    assert [len(store._shard(number).batch) for number in range(5)] == [24, 24, 24, 24, 7]
    assert np.array_equal(store.labels_of([100, 0, -1]), LABELS[[100, 0, -1]])
    # The table is that of the first 32 images, and encodes all.
    first = np.bincount(IDS[:32].ravel(), minlength=20)
    assert np.array_equal(store.counts, first) and set(IDS[32:].ravel()) <= set(range(18))
    shards = sorted(whole.glob("train/*.arrow"))
    state = json.loads((whole / "train" / layout.STATE).read_text())
    assert state["_fingerprint"] == joined_fingerprint(map(shard_fingerprint, shards))
    assert state[layout.SHARD_ROWS] == [24, 24, 24, 24, 7]
    store.verify()


def test_shards_are_opened_when_they_are_read(whole: Path) -> None:
    store = TokenStore(whole, verify=False)
    assert set(store._opened) == {0}  # whose columns are those of all
    store.ids([50, 51])
    assert set(store._opened) == {0, 2} and store.labels_of([102])[0] == LABELS[102]
    assert set(store._opened) == {0, 2, 4}


def test_encoded_by_any_process_at_any_time_the_bytes_are_the_same(whole: Path, tmp_path: Path) -> None:
    one, other = begin(tmp_path / "s"), begin(tmp_path / "s")
    stage(one, [3, 4, 5, 0, 1])
    assert one.encode(range(5)) == [], "the table needs shard 2"
    stage(other, [2, 12])
    assert other.encode([1]) == [1] and one.encode([1, 3]) == []
    assert one.finished() == {0, 1, 2, 3, 4, 5, 12} and one.num_written() == 6 * SHARD + 7
    stage(one, range(13))
    assert sorted([*one.encode([4, 2]), *other.encode([0, 1])]) == [0, 2, 4]
    again = SplitStaging.begun(tmp_path / "s", "train")
    again.publish()
    assert contents(tmp_path / "s") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_killed_at_any_call_of_the_system_nothing_is_lost(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def counted(name: str) -> None:
        function = getattr(os, name)

        def call(*arguments, **more):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return function(*arguments, **more)

        monkeypatch.setattr(os, name, call)

    left, first, moments = 0, begin(tmp_path / "s"), 0
    stage(first, range(13))
    for name in ("replace", "unlink", "fsync", "open"):
        counted(name)
    while True:
        left, moments = 7 * moments + 1, moments + 1  # ever later, from what the killed one before has left
        try:
            staging = begin(tmp_path / "s")
            staging.encode(range(5))
            staging.publish()
        except Killed:
            assert moments < 100
            continue
        break
    assert moments > 5 and contents(tmp_path / "s") == contents(whole)


def test_other_images_are_made_again_and_a_new_table_with_them(whole: Path, tmp_path: Path) -> None:
    def digests(ids: np.ndarray):
        return lambda chosen: hashlib.sha256(ids[chosen.start : chosen.stop].tobytes()).hexdigest()

    changed = {"late": IDS.copy(), "early": IDS.copy()}
    changed["late"][100], changed["early"][0] = 3, 3
    for name, ids in changed.items():
        staging = begin(tmp_path / name, digest=digests(IDS))
        stage(staging, range(13))
        assert len(staging.encode(range(4))) == 4
        staging = begin(tmp_path / name, digest=digests(ids))
        kept = {"late": range(12), "early": [12]}[name]  # the first image is in the table, which all have
        assert staging.finished() == set(kept)
        assert (staging.folder / TABLE).exists() == (name == "late")
        stage(staging, range(13), ids)
        staging.encode(range(5))
        staging.publish()
        with StoreWriter(tmp_path / f"{name}-whole", **COMMON) as writer:
            writer.add_batch(ids, LABELS)
        assert contents(tmp_path / name) == contents(tmp_path / f"{name}-whole")


def test_two_splits_have_the_table_of_the_store(whole: Path, tmp_path: Path) -> None:
    stage(train := begin(tmp_path / "s"), range(13))
    stage(other := begin(tmp_path / "s", split="validation"), range(13), images(1)[0])
    train.publish()
    assert len(other.encode(range(5))) == 5 and not (other.folder / TABLE).exists()
    other.publish()
    with StoreWriter(tmp_path / "one", **COMMON) as writer:
        writer.add_batch(IDS, LABELS)
    with StoreWriter(tmp_path / "one", **COMMON, split="validation") as writer:
        writer.add_batch(images(1)[0], LABELS)
    assert contents(tmp_path / "s") == contents(tmp_path / "one")
    TokenStore(tmp_path / "s", "validation").verify()


def test_what_does_not_fit_is_refused(whole: Path, tmp_path: Path) -> None:
    stage(train := begin(tmp_path / "s"), range(13))
    train.encode([1])
    with pytest.raises(StoreError, match="encoded with all codes"):
        train.keep(np.arange(20), None)
    with StoreWriter(tmp_path / "s", **COMMON, split="other") as writer:
        writer.add_batch(images(1)[0], LABELS)
    with pytest.raises(StoreError, match="another code table since; move that store away"):
        train.publish()
    (tmp_path / "s").rename(tmp_path / "away")
    train.publish()
    assert contents(tmp_path / "s") == contents(whole)
    with pytest.raises(StoreError, match="nobody has begun"):
        SplitStaging.begun(tmp_path / "s", "train")
    stage(begin(tmp_path / "t"), [0])
    table = begin(tmp_path / "t").folder / layout.CODEBOOK
    table.write_bytes(table.read_bytes()[:50])
    with pytest.raises(StoreError, match=r"no codebook|damaged"):
        SplitStaging.begun(tmp_path / "t", "train")


@pytest.mark.parametrize("rows", ([24] * 5, [24, 24, 24, 31], [24, 24, 24, 24, 0, 7], [1, 47, 24, 24, 7], "many"))
def test_false_numbers_of_images_are_refused(whole: Path, tmp_path: Path, rows: object) -> None:
    path = tmp_path / "store"
    os.system(f"cp -r {whole} {path}")
    document = layout.read_document(path)
    state = json.loads((path / "train" / layout.STATE).read_text())
    (path / "train" / layout.STATE).write_text(json.dumps({**state, layout.SHARD_ROWS: rows}))
    files = {**document["files"], f"train/{layout.STATE}": layout.file_entry(path / "train" / layout.STATE)}
    layout.write_document(path, {**document, "files": files})
    with pytest.raises(StoreError, match=r"images|numbers of images"):
        TokenStore(path, verify=False)[0]


def test_staged_shards_of_annotations_stay_apart() -> None:
    def groups(**changes) -> int:
        one = spec.SplitSpec(
            "s",
            **{**COMMON, **changes},
            codec="ans",
            split="train",
            tokenizer=None,
            multi_label=False,
        )
        return len(one.groups(13))

    assert groups(columns=None) == groups(columns={"name": "string"}) == 5
    assert groups(columns={"map": "binary"}) == groups(columns=None, grid=None) == 13


def test_the_table_counts_all_of_imagenet() -> None:
    assert encoding.TABLE_IMAGES > 1_281_167 and encoded_groups(Path(__file__).parent) == {}
