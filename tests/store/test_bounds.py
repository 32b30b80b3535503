"""What a store claims is bounded before work: each hostile store is one line, in under 2 s and 200 MB."""

import json
import os
import resource
import struct
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from seitpp import StoreWriter, TokenStore
from seitpp import codec as codecs
from seitpp.codec import CodecError, ans, context, escape, huffman, packed
from seitpp.errors import UserError
from seitpp.store import StoreError, layout, shards
from seitpp.store.recode import recode
from seitpp.store.shards import write_shard

SECONDS, BYTES = 2.0, 200e6
SHARD = layout.shard_name("train", 0, 1)


class Cost(NamedTuple):
    """The line of the error, or "" without one; processor time; and memory beyond that of the test."""

    line: str
    seconds: float
    size: float


def cost(action: Callable[[], object]) -> Cost:
    """Run `action` in a fork of this process: a signal, as SIGBUS, ends only that one, and the test fails."""
    read, write = os.pipe()
    if not (child := os.fork()):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**32, mapped + 2**32))
        try:
            action()
            line = ""
        except UserError as error:
            line = str(error)
        except BaseException as error:
            line = f"not one of our errors: {error!r}"[:2000]
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(write, json.dumps([line, time.process_time() - started, 1024 * (after - before)]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"ended by signal {os.WTERMSIG(status)}"
    return Cost(*json.loads(answer))


def refused(action: Callable[[], object], *words: str) -> None:
    line, seconds, size = cost(action)
    assert line and "\n" not in line and len(line) < 1000, line[:2000]
    assert all(word in line for word in words), line
    assert seconds < SECONDS and size < BYTES, f"{seconds:.1f} s, {size / 1e6:.0f} MB: {line}"


def write(path: Path, n: int = 7, **changes: Any) -> Path:
    arguments = {"codebook": np.zeros((20, 3)), "grid": (4, 6), **changes}
    height, width = arguments["grid"] or (4, 6)
    ids = np.arange(n * height * width).reshape(n, height, width) % 20
    with StoreWriter(path, **arguments) as out:
        out.add_batch(ids, np.arange(n) % 3, {name: [b"x"] * n for name in arguments.get("columns", ())})
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write(tmp_path / "store")


def edit(path: Path, **changes: Any) -> None:
    """Change tokens.json as a hostile writer can: under a right checksum."""
    layout.write_document(path, {**json.loads((path / layout.DOCUMENT).read_bytes()), **changes})


def replace(path: Path, name: str, data: bytes) -> None:
    """Put another file into a store, and into its tokens.json."""
    (path / name).write_bytes(data)
    files = json.loads((path / layout.DOCUMENT).read_bytes())["files"]
    edit(path, files={**files, name: layout.file_entry(path / name)})


def replace_columns(path: Path, columns: dict[str, pa.Array], payload_bytes: int) -> None:
    with (path / SHARD).open("wb") as file:
        write_shard(file, pa.record_batch(columns))
    replace(path, SHARD, (path / SHARD).read_bytes())
    entry = {"rows": len(columns["tokens"]), "payload_bytes": payload_bytes, "num_classes": 3}
    edit(path, splits={"train": entry})


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


# Payloads


@pytest.mark.parametrize("name", codecs.CODECS)
def test_eight_megabytes_for_four_tokens_are_refused_unread(name: str) -> None:
    table = codecs.ContextCodec.learn(np.zeros((1, 2, 2), int), np.eye(20)).table if name == "context" else None
    codec = codecs.build(name, 20, [1] * 20, grid=(2, 2), table=table)
    body = b"\1" * 2**23
    data = body if name == "escape" else codec._checksum.wrap(body, 4)
    refused(lambda: codec.decode(data, 4), f"payload of {len(data)} bytes, expected at most", "for 4 tokens")


@pytest.mark.parametrize("name", codecs.CODECS)
@pytest.mark.parametrize("num_codes", [2, 300, 65536])
def test_the_largest_payload_is_read(name: str, num_codes: int) -> None:
    """Every token is one that takes the most bytes: the rarest code, or the one with the largest id."""
    table = None
    if name == "context":
        table = codecs.ContextCodec.learn(np.zeros((9, 8, 8), int), np.eye(num_codes, 2)).table
    counts = np.append(2**50, np.zeros(num_codes - 1, int))
    codec = codecs.build(name, num_codes, counts, grid=(40, 25), table=table)
    ids = np.full(1000, num_codes - 1)
    assert (codec.decode(codec.encode(ids), 1000) == ids).all()


def test_images_in_pieces_are_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).geometric(0.02, 23 * 17) % 300
    counts = np.bincount(ids, minlength=300)
    table = codecs.ContextCodec.learn(ids.reshape(1, 23, 17), np.random.default_rng(1).normal(size=(300, 4))).table
    grids = {"grid": (23, 17), "table": table}
    build = [lambda name=name: codecs.build(name, 300, counts) for name in codecs.CODECS if name != "context"]
    build.append(lambda: codecs.build("context", 300, **grids))
    whole = [make().encode(ids) for make in build]
    for module in (ans, escape, huffman, packed):
        monkeypatch.setattr(module, "PIECE", 8)
    monkeypatch.setattr(context, "BLOCK", 16)
    monkeypatch.setattr(context, "KEPT", 900)
    monkeypatch.setattr(context, "KEPT_PER_BYTE", 0)
    for make, data in zip(build, whole, strict=True):
        codec = make()
        assert codec.encode(ids) == data
        assert (codec.decode(data, ids.size) == ids).all()
        for size in range(len(data)):
            with pytest.raises(CodecError):
                codec.decode(data[:size], ids.size)


def test_a_table_of_a_few_bytes_for_the_largest_grid(store: Path) -> None:
    """1,024 tables of 65,536 codes, and the neighbors of 2^24 tokens: 1.5 GB if they were made at once."""
    num_codes, classes = 2**16, 256
    table = u32(num_codes, classes, 1) + bytes(num_codes + classes) + bytes(num_codes)
    table += b"\1" * (4 * classes) + bytes(8 * classes)
    replace(store, layout.CODEBOOK, write_codebook(num_codes))
    replace(store, layout.TABLE, table)
    edit(store, grid=[4096, 4096], num_codes=num_codes, code_dim=1)
    edit(store, codec={"name": "context", "counts": [1] * num_codes})
    found = cost(lambda: TokenStore(store))
    assert found.line == "" and found.seconds < SECONDS and found.size < BYTES, found
    refused(lambda: TokenStore(store)[0], "image 0", "checksum does not match")


def write_codebook(num_codes: int) -> bytes:
    header = {"codebook": {"dtype": "F32", "shape": [num_codes, 1], "data_offsets": [0, 4 * num_codes]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4 * num_codes)


def test_a_sparse_table_is_refused_before_it_is_read(store: Path) -> None:
    edit(store, grid=[4, 6], codec={"name": "context", "counts": [1] * 20})
    for size in (2**26, 2**40):
        (store / layout.TABLE).write_bytes(u32(20, 1, 1))
        os.truncate(store / layout.TABLE, size)
        files = json.loads((store / layout.DOCUMENT).read_bytes())["files"]
        edit(store, files={**files, layout.TABLE: {"bytes": size, "sha256": "0" * 64}})
        refused(lambda: TokenStore(store, verify=False), "expected")


# Images


def test_a_thousand_images_of_2_to_the_24_tokens_in_two_bytes_each(tmp_path: Path) -> None:
    store = write(tmp_path / "store", grid=None)
    blank = TokenStore(store).codec.encode(np.zeros(2**24, np.uint8))
    assert len(blank) == 2
    sides = pa.array([4096] * 1024, pa.int32())
    columns = {"tokens": pa.array([blank] * 1024), "label": pa.array([0] * 1024), "height": sides, "width": sides}
    replace_columns(store, columns, 2048)
    refused(lambda: TokenStore(store), "17179869184 tokens in 2048 bytes of payloads, expected at most")
    # A few of them are legal: copied one by one, and not decoded all at once.
    few = {name: column[:3] for name, column in columns.items()}
    replace_columns(store, few, 6)
    assert TokenStore(store)[2][0].shape == (4096, 4096)
    refused(lambda: TokenStore(store).ids([0, 1, 2] * 6), "ids of 18 images: 301989888 tokens in 36 bytes")


def test_images_are_copied_in_batches_of_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = StoreWriter.add_batch
    monkeypatch.setattr("seitpp.store.recode.BATCH_TOKENS", 50)
    monkeypatch.setattr(StoreWriter, "add_batch", lambda *a: (sizes.append(len(a[1])), real(*a)))
    for grid in ((4, 6), (20, 10)):
        source = write(tmp_path / f"{grid[0]}", grid=grid)
        sizes.clear()
        recode(source, tmp_path / f"{grid[0]}-packed", "packed")
        assert sizes == ([2, 2, 2, 1] if grid == (4, 6) else [1] * 7)
        copy = TokenStore(tmp_path / f"{grid[0]}-packed")
        assert (copy.ids(range(7)) == TokenStore(source).ids(range(7))).all()


def test_a_split_that_no_reader_would_take_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "FREE_TOKENS", 100)
    monkeypatch.setattr(layout, "TOKENS_PER_BYTE", 0)
    with pytest.raises(StoreError, match="168 tokens in"):
        write(tmp_path / "store")
    assert not list(tmp_path.glob("store*"))


def test_classes_without_end_are_refused_where_they_take_memory(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    edit(store, splits={"train": {**TokenStore(store)._document["splits"]["train"], "num_classes": 2**50}})
    opened = TokenStore(store)
    refused(lambda: opened.multi_hot([0]), f"{2**50} classes", "expected at most 1048576")
    refused(lambda: opened.require_classes("training"), "training:", f"{2**50} classes")


# tokens.json


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": {"a": [{}] * 2**21}}, "values, expected at most 2097152"),
        ({"grid": ["x" * 2**22]}, "grid ['xxx"),
        ({"codec": {"name": "ans", "counts": ["x" * 2**20, *["x"] * 2**18]}}, "expected 20 integers"),
        (
            {"splits": {f"s{n}": {"rows": 1, "payload_bytes": 1, "num_classes": 1} for n in range(1025)}},
            "1025 splits",
        ),
        ({"num_codes": 2**16, "code_dim": 2**11}, "a codebook of 134217728 numbers, expected at most 67108864"),
    ],
    ids=["values", "long", "counts", "splits", "codebook"],
)
def test_claims_of_tokens_json(store: Path, changes: dict[str, Any], words: str) -> None:
    edit(store, **changes)
    refused(lambda: TokenStore(store), words)


def test_many_splits_of_many_files_are_looked_through_once(store: Path) -> None:
    document = json.loads((store / layout.DOCUMENT).read_bytes())
    splits = {f"s{n}": document["splits"]["train"] for n in range(1000)}
    entry = {"bytes": 1, "sha256": "0" * 64}
    shards = {f"s{n % 1000}/data-{n:05d}-of-00001.arrow": entry for n in range(20_000)}
    edit(store, splits={**document["splits"], **splits}, files={**document["files"], **shards})
    found = cost(lambda: TokenStore(store))
    assert found.line == "" and found.seconds < SECONDS and found.size < BYTES, found


@pytest.mark.parametrize(("name", "size"), [("README.md", 2**27), (layout.CODEBOOK, 2**27), (SHARD, 2**35)])
def test_sparse_files_are_refused_before_they_are_read(store: Path, name: str, size: int) -> None:
    os.truncate(store / name, size)
    files = json.loads((store / layout.DOCUMENT).read_bytes())["files"]
    edit(store, files={**files, name: {"bytes": size, "sha256": "0" * 64}})
    refused(lambda: TokenStore(store), f"file '{name}': {size} bytes, expected at most")


def test_a_document_of_a_gigabyte_or_a_million_levels(store: Path) -> None:
    (store / layout.DOCUMENT).write_bytes(b"[" * 10**6)
    refused(lambda: TokenStore(store), "no JSON")
    os.truncate(store / layout.DOCUMENT, 2**30)
    refused(lambda: TokenStore(store), f"{2**30} bytes, expected at most")


# Shards


class Table(NamedTuple):
    """A table of a flatbuffer: its fields by number, each a format and a value, or a table, list or string."""

    fields: dict[int, Any]


def flatbuffer(root: Table) -> bytes:
    """Encode tables; one that is in several places is written once."""
    out, waiting, placed = bytearray(4), deque([(0, root)]), {}
    while waiting:
        place, part = waiting.popleft()
        if id(part) not in placed:
            out.extend(bytes(-len(out) % 8))
            if isinstance(part, Table):
                last = max(part.fields)
                starts = {field: 8 + 8 * number for number, field in enumerate(part.fields)}
                places = [starts.get(field, 0) for field in range(last + 1)]
                head = struct.pack(f"<HH{last + 1}H", 4 + 2 * len(places), 8 + 8 * len(starts), *places)
                out.extend(head + bytes(-len(head) % 8))
                placed[id(part)] = start = len(out)
                out.extend(struct.pack("<i", len(head) + -len(head) % 8) + bytes(4 + 8 * len(starts)))
                for field, value in part.fields.items():
                    if isinstance(value, tuple) and not isinstance(value, Table):
                        struct.pack_into(value[0], out, start + starts[field], value[1])
                    else:
                        waiting.append((start + starts[field], value))
            else:
                placed[id(part)] = start = len(out)
                out.extend(struct.pack("<I", len(part)))
                if isinstance(part, bytes):
                    out.extend(part + b"\0")
                else:
                    waiting += [(start + 4 + 4 * number, value) for number, value in enumerate(part)]
                    out.extend(bytes(4 * len(part)))
        struct.pack_into("<I", out, place, placed[id(part)] - place)
    return bytes(out)


def schema(fields: list[Table], pairs: list[Table]) -> bytes:
    header = Table({1: fields, 2: pairs})
    data = flatbuffer(Table({0: ("<h", 4), 1: ("<B", 1), 2: header, 3: ("<q", 0)}))
    data += bytes(-len(data) % 8)
    return u32(0xFFFFFFFF, len(data)) + data


def field(name: bytes, *, children: list[Table], pairs: list[Table]) -> Table:
    kind = {2: ("<B", 13), 3: Table({0: ("<B", 0)})} if children else {2: ("<B", 4), 3: Table({0: ("<B", 0)})}
    return Table({0: bytes(bytearray(name)), **kind, 5: children, 6: pairs})


def test_a_schema_that_repeats_itself_is_refused(store: Path) -> None:
    batch = (store / SHARD).read_bytes()
    with pa.ipc.open_stream(batch) as stream:
        rest = batch[len(stream.schema.serialize()) :]
    plain, other = (field(b"x", children=[], pairs=[]) for _ in range(2))
    pair = Table({0: b"key", 1: b"v" * 2**20})
    deep = plain
    for _ in range(11):
        deep = field(b"d", children=[deep, deep], pairs=[])
    for fields, pairs, words in (
        ([plain] * 10**5, [], "more than 4096 columns"),
        ([plain], [pair] * 4000, "more bytes than"),
        ([field(b"n" * 2**20, children=[], pairs=[])] * 4000, [], "more bytes than"),
        ([field(b"x", children=[], pairs=[pair] * 1000)] * 3, [], "more bytes than"),
        ([deep, other, other], [], "more bytes than"),
    ):
        data = schema(fields, pairs)
        replace(store, SHARD, data + rest)
        refused(lambda: TokenStore(store, verify=False), f"{SHARD}: no shard of a token store", words)
    # That such a schema is one for Arrow, so that it was refused for its size.
    assert pa.ipc.read_schema(pa.py_buffer(schema([plain, plain], [Table({0: b"k", 1: b"v"})]))).names == [
        "x",
        "x",
    ]


def test_messages_without_end_and_rows_beyond_the_limit(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (store / SHARD).read_bytes()
    with pa.ipc.open_stream(data) as stream:
        start = len(stream.schema.serialize())
    replace(store, SHARD, data[:start] + data[start:-8] * 20_000)
    refused(lambda: TokenStore(store), "expected a schema and one record batch")
    replace(store, SHARD, data)
    monkeypatch.setattr(shards, "MAX_SHARD_ROWS", 6)
    refused(lambda: TokenStore(store), "7 images, expected at most 6")


def test_payloads_that_overlap_are_refused(store: Path) -> None:
    payloads = pa.array([b"0123456789"] * 7)
    for offsets in ([0, 9, 0, 9, 0, 9, 0, 70], [0, 10, 10, 20, 30, 40, 50, 70]):
        buffers = [None, pa.py_buffer(np.array(offsets, np.int32)), payloads.buffers()[2]]
        tokens = pa.Array.from_buffers(pa.binary(), 7, buffers)
        replace_columns(store, {"tokens": tokens, "label": pa.array([0] * 7)}, 70)
        refused(lambda: TokenStore(store), SHARD, "overlap or are empty")


# Files that change while they are open


@pytest.mark.parametrize("size", [0, 100])
def test_a_shard_cut_while_it_is_open_is_an_error_and_no_signal(tmp_path: Path, size: int) -> None:
    store = write(tmp_path / "store", n=2000, columns={"file": "binary"})
    opened = TokenStore(store)
    column = opened.column("file")
    assert opened[1999][1] == 1 and column[0] == b"x"
    whole = (store / SHARD).stat().st_size
    os.truncate(store / SHARD, size)
    for read in (
        lambda: opened[1999],
        lambda: opened.ids([3, 1999]),
        lambda: opened.labels,
        lambda: opened.payload_sizes,
        lambda: opened.multi_hot([1999]),
        lambda: opened.column("file"),
        lambda: column[1999],
        lambda: opened.verify(),
    ):
        words = (
            "bytes, expected"
            if read.__code__.co_names == ("verify",)
            else f"cut to {size} bytes while it was open"
        )
        refused(read, str(store / SHARD), words, str(whole))


def test_a_shard_renamed_or_replaced_while_it_is_open_is_read_on(store: Path) -> None:
    """As `seitpp append` does it: the map is of the file that was opened."""
    opened = TokenStore(store)
    first = opened[0][0]
    (store / SHARD).rename(store / "elsewhere")
    assert (opened[0][0] == first).all()
    (store / SHARD).write_bytes(b"shorter")
    assert (opened[0][0] == first).all()
