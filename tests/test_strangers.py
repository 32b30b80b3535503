"""Wrong files of strangers: one line that names the file, before memory is made for what they claim."""

import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from long import headers
from safetensors.torch import save_file
from scipy.io import savemat
from support.finegrained import write_set
from support.pictures import encoded, make_tar, write
from support.strangers import KINDS
from torch import Tensor

from downstream.finegrained.matlab import MOST, read_variables
from downstream.finegrained.sets import SetError, read_set
from seitpp.errors import LONGEST, UserError, refusing
from seitpp.files import parse_json, read_json
from seitpp.images.class_lists import read_classes
from seitpp.images.decode import ImageError
from seitpp.images.labels import LabelError, LabelRules, read_label_file, resolve
from seitpp.images.sources import open_source
from seitpp.tensors import load_checkpoint
from seitpp.tokenizers import TokenizerError, TokenizerSpec, load


def one_line(message: str, path: Path) -> None:
    assert message.isprintable() and str(path) in message and " at 0x" not in message


def test_a_message_is_one_line_that_no_terminal_obeys() -> None:
    assert str(UserError("a\n\x1b[31mb\u202ec\ud800 \u00e4")) == "a\\n\\x1b[31mb\\u202ec\\ud800 \u00e4"
    assert len(str(UserError("x" * 10**6))) < LONGEST + 10
    expected = pytest.raises(UserError, match=r"^f cannot be read \(no 'x'\); expected y$")
    with expected, refusing(UserError, "f cannot be read", "y"):
        {}["x"]
    for passes in (MemoryError, ImageError):  # an error of ours says enough, and memory may not run out
        with pytest.raises(passes), refusing(LabelError, "f", "y"):
            raise passes


@pytest.mark.parametrize("text", [b"{", b"[" * 10**5, b'"\\uD800"', b"\xff", b"9" * 5000, b"[1]", b"null", b""])
def test_what_is_no_json_object(text: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", text)
    with pytest.raises(UserError, match=r"expected .*a config") as refused:
        read_json(path, UserError, "a config")
    one_line(str(refused.value), path)
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"


# Fine-grained sets


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(kind: int, shape: tuple[int, ...], name: str, *parts: bytes) -> bytes:
    head = [element(6, struct.pack("<II", kind, 0)), element(5, struct.pack(f"<{len(shape)}i", *shape))]
    return element(14, b"".join([*head, element(1, name.encode()), *parts]))


def mat(*variables: bytes) -> bytes:
    return b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + b"".join(variables)


def compressed(variable: bytes) -> bytes:
    packed = zlib.compress(variable)
    return struct.pack("<II", 15, len(packed)) + packed


def edited(path: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda root: write(root / path, (root / path).read_text().replace(old, new))


def replaced(path: str, data: bytes | str) -> Callable[[Path], object]:
    return lambda root: write(root / path, data)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(path: str) -> Callable[[Path], object]:
    return lambda root: write(root / path, (root / path).read_bytes()[:-20])


def numbers(**variables: list[float]) -> Callable[[Path], object]:
    """The labels of the flowers as other numbers."""
    return lambda root: savemat(root / "imagelabels.mat", {key: np.array([row]) for key, row in variables.items()})


WRONG_SETS = {
    "empty mat": ("flowers102", replaced("imagelabels.mat", b""), "version 5"),
    "text": ("flowers102", replaced("imagelabels.mat", "labels: 1 2 3"), "version 5"),
    "version 7.3": ("flowers102", replaced("setid.mat", b"M" * 124 + b"\x00\x02IM" + b"\x89HDF"), "version 5"),
    "version 4": (
        "flowers102",
        lambda root: savemat(root / "setid.mat", {"trnid": [[1]]}, format="4"),
        "version 5",
    ),
    "cut": ("flowers102", cut("setid.mat"), "bytes where"),
    "another variable": ("flowers102", numbers(classes=[1, 2]), "no 'labels'"),
    "fewer labels": ("flowers102", numbers(labels=[1, 2, 3]), "no "),
    "label 0": ("flowers102", numbers(labels=[0, 1, 2, 2, 3, 1, 2]), "class -1"),
    "a label of a fraction": ("flowers102", numbers(labels=[1.5, 1, 2, 2, 3, 1, 2]), "do not go together"),
    "a label of 10^9": ("flowers102", numbers(labels=[10**9, 1, 2, 2, 3, 1, 2]), "class 1000000000 of 7"),
    "a label that is nan": ("flowers102", numbers(labels=[float("nan")] * 7), "do not go together"),
    "a bomb": (
        "flowers102",
        replaced("setid.mat", mat(compressed(bytes(MOST + 100)))),
        "setid.mat: cannot be read",
    ),
    "a size of 4 GB": (
        "flowers102",
        replaced("setid.mat", mat(struct.pack("<II", 14, 2**32 - 1))),
        "4,294,967,295",
    ),
    "cells by the billion": (
        "cars",
        replaced("devkit/cars_meta.mat", mat(matrix(1, (2**30, 2**30), "class_names"))),
        "0 cells",
    ),
    "an object": ("cars", replaced("devkit/cars_meta.mat", mat(matrix(3, (1, 1), "class_names"))), "class 3"),
    "cells for ever": (
        "cars",
        replaced("devkit/cars_meta.mat", mat(matrix(1, (1, 1), "class_names", element(1, b"x")))),
        "for a cell",
    ),
    "another structure": (
        "cars",
        lambda root: savemat(root / "devkit/cars_train_annos.mat", {"annotations": np.arange(3)}),
        "do not go together",
    ),
    "a path out of the folder": ("cub200", edited("images.txt", "1 001", "1 ../../001"), "outside the folder"),
    "an absolute path": ("inat18", edited("train2018.json", '"train_val', '"/train_val'), "outside the folder"),
    "a line of three words": ("cub200", edited("classes.txt", "1 001", "1 x 001"), "classes.txt"),
    "an image without class": ("cub200", edited("image_class_labels.txt", "2 1", "9 1"), "no '2'"),
    "a class that is no number": ("cub200", edited("image_class_labels.txt", "2 1", "2 x"), "invalid literal"),
    "a class too many": ("cub200", edited("image_class_labels.txt", "2 1", "2 7"), "class 6 of"),
    "a name twice": ("food101", replaced("meta/classes.txt", "waffles\napple_pie\nwaffles\n"), "twice"),
    "no names": ("food101", replaced("meta/classes.txt", ""), "do not go together"),
    "no text": ("food101", replaced("meta/train.txt", b"\xff\xfe"), "train.txt: cannot be read"),
    "a folder for a list": ("food101", lambda root: make_folder(root / "meta/train.txt"), "train.txt"),
    "an unknown class": ("food101", edited("meta/train.txt", "waffles", "wafers"), "no 'wafers'"),
    "empty JSON": ("inat19", replaced("val2019.json", ""), "val2019.json: cannot be read"),
    "deep JSON": ("inat19", replaced("val2019.json", "[" * 10**5), "nested too deep"),
    "JSON of another shape": ("inat19", replaced("val2019.json", '{"images": 7}'), "do not go together"),
    "JSON without categories": ("inat19", edited("train2019.json", "categories", "kinds"), "no 'categories'"),
    "a name that is a number": ("inat19", edited("train2019.json", '"7477"', "7477"), "names of classes"),
    "an image of no number": (
        "inat19",
        edited("train2019.json", '"image_id": 7', '"image_id": [7]'),
        "unhashable",
    ),
    "an empty line": ("pets", edited("annotations/test.txt", "beagle_1 2 2 3", ""), "do not go together"),
    "a word for a class": (
        "pets",
        edited("annotations/test.txt", "beagle_1 2", "beagle_1 two"),
        "invalid literal",
    ),
    "a class of the test alone": ("pets", edited("annotations/test.txt", "beagle_1 2", "beagle_1 99"), "class 98"),
}


@pytest.mark.parametrize("case", WRONG_SETS)
def test_a_wrong_list_of_a_fine_grained_set(case: str, tmp_path: Path) -> None:
    name, spoil, message = WRONG_SETS[case]
    write_set(name, tmp_path / "set")
    spoil(tmp_path / "set")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SetError) as refused:
        read_set(name, tmp_path / "set")
    one_line(str(refused.value), tmp_path / "set")
    assert message in str(refused.value) and sorted(tmp_path.rglob("*")) == before


def test_matlab_files_are_read_as_scipy_wrote_them(tmp_path: Path) -> None:
    """Numbers, texts, cells and structs, compressed or not; the axes are read column by column."""
    struct_of = np.empty((1, 2), [("name", object), ("box", object)])
    struct_of[0, 0], struct_of[0, 1] = ("a", np.array([[1, 2]])), ("\u00e4b", np.array([[3.5]]))
    variables = {
        "table": np.array([[1, 2], [3, 4]], np.uint16),
        "wide": np.array([[-5, 2**40]]),
        "cells": np.array([["x", ""]], object),
        "structs": struct_of,
        "none": np.zeros((0, 0)),
    }
    expected = {
        "table": [1, 3, 2, 4],
        "wide": [-5, 2**40],
        "cells": ["x", ""],
        "structs": [{"name": "a", "box": [1, 2]}, {"name": "\u00e4b", "box": [3.5]}],
        "none": [],
    }
    for packed in (False, True):
        savemat(tmp_path / "v.mat", variables, do_compression=packed)
        assert read_variables(tmp_path / "v.mat") == expected


# Tables, tars, labels, classes


def table(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


PICTURE = encoded(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": pa.array([1, 2])}, "0 can be"),
        ({"image": pa.array([[PICTURE]])}, "0 can be"),
        ({"image": pa.array([{"bytes": "x", "path": "y"}])}, "0 can be"),
        ({"image": pa.array([{"bytes": 7, "path": None}])}, "0 can be"),
        ({"picture": pa.array(["a.png"])}, "0 can be"),
        ({"image": pa.array([PICTURE]), "label": pa.array([1.5])}, "a label of type float"),
        ({"image": pa.array([PICTURE]), "label": pa.array([{"a": 1}])}, "a label of type dict"),
        ({"image": pa.array([PICTURE]), "label": pa.array([[[1]]])}, "a label of type list"),
        ({"image": pa.array([PICTURE]), "label": pa.array([b"x"])}, "a label of type bytes"),
        ({"image": pa.array([PICTURE]), "label": pa.array([2**40])}, "less than 16,777,216"),
        ({"image": pa.array([], pa.binary())}, "no rows"),
        ({"image": pa.nulls(10**6, pa.binary())}, "more rows than"),
    ],
)
def test_a_parquet_file_of_another_form(columns: dict[str, pa.Array], message: str, tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", **columns)
    with pytest.raises(UserError, match=message) as refused:
        open_source(str(path))
    assert str(refused.value).isprintable()


def test_rows_of_a_parquet_file_without_an_image_in_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "secret.png", PICTURE)
    write(tmp_path / "set" / "a.png", PICTURE)
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = ["a.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "gone.png", "x\0y", "", "."]
    rows = [*({"bytes": None, "path": path} for path in paths), None]
    source = open_source(str(table(tmp_path / "set" / "t.parquet", image=pa.array(rows, kind))))
    assert source.read(0).data == PICTURE
    for index in range(1, len(rows)):
        with pytest.raises(
            ImageError, match=r"below|cannot be read|no image in this row|expected the file"
        ) as refused:
            source.read(index)
        assert str(refused.value).isprintable()


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", image=pa.array([PICTURE] * 50))
    whole = path.read_bytes()
    for size in range(0, len(whole), 60):
        path.write_bytes(whole[:size])
        with pytest.raises(ImageError, match=r"cannot be read as Parquet .* copy it again") as refused:
            open_source(str(path))
        one_line(str(refused.value), path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.json", '{"a": {"b": 1}}', "a label of type dict"),
        ("l.json", '{"a": [[1]]}', "a label of type list"),
        ("l.json", "[" * 10**5, "nested too deep"),
        ("l.json", "[[1, 2, 3]]", "too many values"),
        ("l.json", "7", "cannot be read"),
        ("l.json", '{"a": "\\ud800"}', "surrogates"),
        ("l.jsonl", '{"name": "a", "label": 1}\n{', "cannot be read"),
        ("l.csv", f"name,label\na,{'x' * 200_000}\n", "field larger"),
        ("l.csv", "name,label\na\n", "has no label"),
    ],
)
def test_a_label_file_of_another_form(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(LabelError, match=message) as refused:
        resolve(list(read_label_file(path).values()), ["1.png"], LabelRules(), origin=str(path))
    one_line(str(refused.value), path)


def test_digits_that_are_no_number_are_names(tmp_path: Path) -> None:
    text = "a --5\nb \u00b2\nc " + "9" * 5000 + "\n"
    assert set(map(type, read_label_file(write(tmp_path / "l.txt", text)).values())) == {str}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", '[{"id": 1e400, "name": "a"}]', "cannot be read"),
        ("c.json", "[" * 10**5, "nested too deep"),
        ("c.json", '{"a": true, "b": []}', "cannot be read"),
        ("c.json", '["\\udfff"]', "surrogates"),
        ("c.cls", b"\xff\xfe", "utf-8"),
        ("c.txt", "a" + " 1" * 10**5, "more than 1,000 characters"),
        ("c.txt", "a\n" * 50_000, "occurs twice"),
        ("objectInfo.txt", "Idx\tName\nx\ty\n", "invalid literal"),
        ("objectInfo.txt", "", "not enough values"),
    ],
)
def test_a_class_list_of_another_form(name: str, text: bytes | str, message: str, tmp_path: Path) -> None:
    path, began = write(tmp_path / name, text), time.process_time()
    with pytest.raises(ImageError, match=message) as refused:
        read_classes(path)
    one_line(str(refused.value), path)
    assert time.process_time() - began < 2
    assert read_classes(write(path.with_name("digits.txt"), "9" * 500 + " a\n")).values is None


def with_header(data: bytes, field: int, value: bytes) -> bytes:
    """The first header of a tar with another field, and its checksum."""
    changed = bytearray(data)
    changed[field : field + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed[:512])
    return bytes(changed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (124, b"\xff" * 11 + b"\xfe"),  # a negative size, by which reading comes back to the same header
        (124, b"\x80" + b"\0" * 4 + b"\x7f" + b"\xff" * 6),
        (156, b"x"),
        (156, b"L"),
        (156, b"S"),
        (124, b"77777777777\0"),
    ],
)
def test_a_tar_with_a_wrong_header(field: int, value: bytes, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", {"1.png": PICTURE})
    path.write_bytes(with_header(path.read_bytes(), field, value))
    with pytest.raises(ImageError) as refused:
        open_source(str(path))
    one_line(str(refused.value), path)


# Checkpoints and tokenizers


class Call:
    """Pickled as a call."""

    def __init__(self, function: Callable, *arguments: object):
        self.called = function, arguments

    def __reduce__(self) -> tuple:
        return self.called


def doubled(times: int) -> list:
    parts: list = [torch.ones(1)]
    for _ in range(times):
        parts = [parts, parts]
    return parts


@pytest.mark.parametrize(
    "content",
    [{"x": Call(bytearray, 10**12)}, {"x": Call(torch.FloatTensor, 10**12)}, {"x": Call(print, "code")}],
    ids=["bytes", "tensor", "code"],
)
def test_a_checkpoint_calls_nothing_that_makes_memory(content: object, tmp_path: Path) -> None:
    for archive in (True, False):
        path = tmp_path / f"{archive}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=archive)
        with pytest.raises(UserError, match="is not unpickled since that could run code") as refused:
            load_checkpoint(path, UserError)
        one_line(str(refused.value), path)


def test_a_bare_checkpoint_of_more_values_than_bytes_and_one_that_holds_a_part_many_times(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save({"x": torch.zeros(1001), "step": 10**6}, path, _use_new_zipfile_serialization=False)
    assert load_checkpoint(path, UserError)["x"].shape == (1001,)
    many = path.read_bytes().replace(b"M\xe9\x03", b"J\xff\xff\xff\x7f")
    path.write_bytes(many)
    with pytest.raises(UserError, match="numbers of values that are larger than the file"):
        load_checkpoint(path, UserError)
    torch.save(doubled(60), path)
    assert len(load_checkpoint(path, UserError)) == 2


def saved(path: Path, spec: object, **tensors: Tensor) -> Path:
    save_file(tensors, path, {"tokenizer": json.dumps(spec)})
    return path


SPEC = TokenizerSpec.unscaled("patch_kmeans", 16, 4, num_codes=8, code_dim=4).to_json()
WHOLE = {
    "codebook": torch.ones(8, 4),
    "mean": torch.zeros(48),
    "components": torch.zeros(3, 48),
    "scale": torch.ones(()),
}


@pytest.mark.parametrize(
    ("spec", "tensors", "message"),
    [
        ([], {}, "its header is a list"),
        ({**SPEC, "kind": ["patch_kmeans"]}, {}, "holds no known tokenizer"),
        ({**SPEC, "resize": "lanczos"}, {}, "got resize 'lanczos'"),
        ({**SPEC, "patch": True}, {}, "expected positive integers up to 1,048,576"),
        ({**SPEC, "num_codes": 2**40}, {}, "expected positive integers up to 1,048,576"),
        ({**SPEC, "image_size": 16}, {}, "not the spec"),
        ({**SPEC, "mean": 7}, {}, "not the spec"),
        ({**SPEC, "secret": 7}, {}, "not the spec"),
        ({**SPEC, "code_dim": 1}, {"codebook": torch.ones(8, 1), "components": torch.zeros(0, 48)}, "dimension 1"),
        # Each tensor that the header names is there, but not the product of two of them.
        (
            {**SPEC, "code_dim": 2**18, "num_codes": 1, "patch": 256, "image_size": [256, 256]},
            {"codebook": torch.ones(1, 2**18), "mean": torch.zeros(3 * 256**2)},
            r"components is \(3, 48\), expected \(262143, 196608\)",
        ),
        (SPEC, {"scale": torch.zeros(())}, "a scale of 0.0"),
        (SPEC, {"mean": torch.full((48,), float("nan"))}, "mean has values that are not finite"),
    ],
)
def test_a_tokenizer_of_another_form(spec: object, tensors: dict, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "t.safetensors", spec, **{**WHOLE, **tensors})
    with pytest.raises(TokenizerError, match=message) as refused:
        load(path)
    assert str(refused.value).isprintable()


# All kinds together


def test_hostile_files_of_every_kind_are_read_or_refused(tmp_path: Path) -> None:
    """A short form of tests/long/headers.py, which says what it means to fail."""
    names = [name for name, kind in KINDS.items() if kind.share >= 5]
    _, failures = headers.fuzz(1000, processes=2, seed=7, keep=tmp_path, names=names)
    kept = [path.read_text() for path in tmp_path.rglob("failure.txt")]
    assert failures == 0, "\n".join(kept)
