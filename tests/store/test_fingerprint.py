"""The fingerprint of a store is that of its content, whatever wrote the bytes around it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from support.paths import GOLDEN

from seitpp import TokenStore
from seitpp.engine.contents import content_fingerprint
from seitpp.store import StoreWriter, layout
from seitpp.store.fingerprint import split_fingerprint
from seitpp.store.shards import read_shard, write_shard

CODEBOOK = np.arange(12, dtype=np.float32).reshape(6, 2)
IDS = np.arange(6 * 4).reshape(6, 2, 2) % 6
LABELS = [0, 1, None, 1, 0, 1]
NAMES = ["a", "bb", "c", "", "e", "f"]
BYTES = [1, 2, 3, 4, 5, 6]


def written(
    path: Path, *, ids=IDS, labels=LABELS, names=NAMES, sizes=BYTES, codebook=CODEBOOK, classes=("x", "y"), **more
) -> str:
    """The fingerprint of a store of six images."""
    columns = {"file_name": "string", "source_bytes": "int64"}
    grid = ids.shape[1:]
    with StoreWriter(
        path, codebook=codebook, grid=grid, class_names=list(classes), columns=columns, **more
    ) as out:
        out.add_batch(ids, labels, {"file_name": names, "source_bytes": sizes})
    return TokenStore(path).fingerprint


def test_it_is_what_it_was(tmp_path: Path) -> None:
    assert written(tmp_path / "store") == "cb8c9c287f3f3db81337cbcb412d21d6c3e6a12872ea850a10385efa1c0b7732"


def test_other_content_has_another(tmp_path: Path) -> None:
    other_id, other_codebook = IDS.copy(), CODEBOOK.copy()
    other_id[3, 0, 0] ^= 1
    other_codebook[5, 1] = np.nextafter(other_codebook[5, 1], np.float32(12))
    changes = [
        {},
        {"ids": other_id},
        {"ids": IDS[::-1]},
        {"ids": IDS.reshape(6, 1, 4)},
        {"labels": [0, 1, None, 1, 0, 0]},
        {"labels": [0, 1, 0, 1, 0, 1]},
        {"names": ["ab", "b", "c", "", "e", "f"]},
        {"names": ["a", "bb", "c", "e", "", "f"]},
        {"sizes": [1, 2, 0, 4, 5, 6]},
        {"codebook": other_codebook},
        {"classes": ("x", "z")},
        {"labels": [(0,), (1,), None, (1,), (0,), (1,)], "multi_label": True},
        {"labels": [(0,), (1,), None, (), (0, 1), (1,)], "multi_label": True},
        {"codec": "packed"},
    ]
    found = [written(tmp_path / str(number), **change) for number, change in enumerate(changes)]
    assert len({*found}) == len(changes)


def test_another_split_does_not_change_it(tmp_path: Path) -> None:
    before = written(tmp_path / "store")
    checksum, content = TokenStore(tmp_path / "store").checksum, content_fingerprint(str(tmp_path / "store"))
    with StoreWriter(
        tmp_path / "store", codebook=CODEBOOK, grid=(2, 2), class_names=["x", "y"], split="validation"
    ) as out:
        out.add_batch(IDS[:2], [0, 1])
    store = TokenStore(tmp_path / "store")
    assert store.fingerprint == before != TokenStore(tmp_path / "store", "validation").fingerprint
    assert store.checksum != checksum and content_fingerprint(str(tmp_path / "store")) != content
    # A copy of one split has it, too.
    shutil.rmtree(tmp_path / "store/validation")
    assert TokenStore(tmp_path / "store").fingerprint == before


def test_what_another_library_writes_around_it_does_not_matter(tmp_path: Path) -> None:
    """Other metadata of the shard and of the codebook, and other JSON."""
    store = tmp_path / "store"
    expected = written(store)
    (shard,) = (store / "train").glob("*.arrow")
    batch = read_shard(shard)
    schema = batch.schema.with_metadata({"written": "by another"})
    rewritten = pa.record_batch(batch.columns, schema)
    with (tmp_path / "shard").open("wb") as file:  # the old one is still mapped
        write_shard(file, rewritten)
    (tmp_path / "shard").replace(shard)
    info = store / "train" / layout.DATASET_INFO
    info.write_text(json.dumps(json.loads(info.read_text()), indent=3))
    (store / layout.CODEBOOK).write_bytes(safetensors.numpy.save({"codebook": CODEBOOK}, {"by": "another"}))
    checksum = layout.read_document(store)["checksum"]
    document = layout.read_document(store)
    document["files"] = {name: layout.file_entry(store / name) for name in document["files"]}
    layout.write_document(store, document)
    again = TokenStore(store)
    assert again.fingerprint == expected and again.checksum != checksum
    assert split_fingerprint([shard]) == json.loads((store / "train" / layout.STATE).read_text())["_fingerprint"]


def test_what_lies_behind_a_missing_value_does_not_matter(tmp_path: Path) -> None:
    found = set()
    for hidden, there in ((0, b"\x05"), (7, b"\x05"), (7, b"\xfd")):
        values = [pa.py_buffer(there), pa.py_buffer(np.array([1, hidden, 3], "<i8").tobytes())]
        column = pa.Array.from_buffers(pa.int64(), 3, values)
        lists = pa.Array.from_buffers(
            pa.list_(pa.int64()),
            3,
            [pa.py_buffer(there), pa.py_buffer(np.array([0, 1, 2, 3], "<i4").tobytes())],
            children=[pa.array([1, hidden, 3])],
        )
        path = tmp_path / f"{hidden}-{there[0]}"
        with path.open("wb") as file:
            write_shard(file, pa.record_batch({"size": column.slice(0), "label": lists}))
        found.add(split_fingerprint([path]))
    assert len(found) == 1


@pytest.mark.parametrize("name", ["store_v1", "store_v2"])
def test_a_store_of_before_has_its_checksum(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    store = TokenStore(tmp_path / name)
    assert store.fingerprint == store.checksum
