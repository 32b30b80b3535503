"""Labels as data sets come with them: a missing one is None, classes are found by name, doubts are refused."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from support.pictures import CLASSES, as_folder, make_tar, photograph_crops, write

from seitpp import StoreWriter
from seitpp.errors import UserError
from seitpp.images.labels import LabelError, LabelRules, read_class_names, read_label_file, resolve
from seitpp.images.sources import open_source
from seitpp.images.tables import choose_columns


@pytest.mark.parametrize(
    "name, text, labels",
    [
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\nv1,n02 5 6 7 8 n02 1 2 3 4\nv2,n01 1 2 3 4\n",
            ["n02", "n01"],
        ),
        ("val.txt", "v1.JPEG 65\nv2.JPEG 970\n", [65, 970]),
        ("labels.csv", "v1.jpg,cat\nv2.jpg,dog\n", ["cat", "dog"]),
        ("labels.tsv", "file_name\tother\tclass\nv1.jpg\tx\tcat\nv2.jpg\ty\t\n", ["cat", None]),
        ("several.csv", "Image Index,Labels\n", None),
        ("several.csv", "path,labels\nv1.jpg,cat|dog\nv2.jpg,dog\n", [["cat", "dog"], "dog"]),
        ("labels.json", '{"v1": "cat", "v2": null}', ["cat", None]),
        ("labels.json", '[{"file_name": "v1", "label": 3}, {"file_name": "v2", "label": [1, 2]}]', [3, [1, 2]]),
        ("dataset.json", '{"labels": [["v1", 3], ["v2", 4]]}', [3, 4]),
        ("metadata.jsonl", '{"file_name": "v1", "label": "7"}\n{"file_name": "v2", "label": "b"}\n', ["7", "b"]),
        ("twice.csv", "name,label\nv1,a\nv1,b\n", None),
        ("lonely.txt", "v1\nv2\n", None),
        ("broken.json", "{", None),
    ],
)
def test_label_files_in_the_forms_that_data_sets_have(name: str, text: str, labels, tmp_path) -> None:
    path = write(tmp_path / name, text)
    if labels is None:
        with pytest.raises(LabelError, match=rf"^--labels {path}: "):
            read_label_file(path)
    else:
        assert list(read_label_file(path).values()) == labels


def test_imagenet_as_downloaded(tmp_path) -> None:
    """train/WNID/, val/ flat, and the labels of val in a table: by name, in the order of train's classes."""
    samples = photograph_crops()
    as_folder(tmp_path / "train", samples)
    for number, (data, _) in enumerate(samples):
        write(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", data)
    rows = [f"ILSVRC2012_val_{number:08d},{CLASSES[label]} 1 2 3 4" for number, (_, label) in enumerate(samples)]
    file = write(
        tmp_path / "LOC_val_solution.csv",
        "\n".join(["ImageId,PredictionString", *reversed(rows), "gone,china 1 2 3 4"]),
    )
    flat = open_source(str(tmp_path / "val"))
    assert flat.labels.values == [None] * 6 and flat.class_names is None
    assert flat.labels.origin == "no labels: they lie in no class folders"
    rules = LabelRules(file=str(file), classes=tuple(open_source(str(tmp_path / "train")).class_names))
    labeled = open_source(str(tmp_path / "val"), None, rules)
    assert labeled.labels.values == [label for _, label in samples]
    assert labeled.left_out.counts == {"label in LOC_val_solution.csv of no image here": 1}
    wrong = write(tmp_path / "wrong.csv", "name,label\nelse.jpg,china\n")
    with pytest.raises(LabelError, match=r"none of its 1 names is that of an image, such as .*_00000000\.JPEG"):
        open_source(str(tmp_path / "val"), None, LabelRules(file=str(wrong)))
    write(tmp_path / "val" / "metadata.csv", "file_name,label\n")
    assert "metadata.csv may have some: --labels" in open_source(str(tmp_path / "val")).labels.origin


@pytest.mark.parametrize(
    "files, labels, names",
    [
        ({"cls": "7"}, [7], None),
        ({"cls": "cat"}, [0], ["cat"]),
        ({"label": "3", "json": '{"label": 9}'}, [3], None),
        ({"json": '{"label": "cat"}'}, [0], ["cat"]),
        ({"json": '{"class": 4}'}, [4], None),
        ({"json": "5"}, [5], None),
        ({"json": '{"labels": ["b", "a"]}'}, [(0, 1)], ["a", "b"]),
        ({"json": '{"caption": "x"}'}, [None], None),
        ({"cls": ""}, [None], None),
        ({}, [None], None),
    ],
)
def test_every_place_where_makers_of_tars_keep_labels(files, labels, names, tmp_path) -> None:
    members = {"k.jpg": b"", **{f"k.{suffix}": text for suffix, text in files.items()}}
    source = open_source(str(make_tar(tmp_path / "t.tar", members)))
    assert source.labels.values == labels and source.class_names == names


def test_the_label_key_of_a_tar_can_be_named(tmp_path) -> None:
    content = json.dumps({"kind": "x", "size": 1.5})
    tar = make_tar(tmp_path / "t.tar", {"k.jpg": b"", "k.cls": "1", "k.json": content})
    assert open_source(str(tar), None, LabelRules(key="kind")).class_names == ["x"]
    with pytest.raises(UserError, match=r"label 1\.5, expected a number or a name"):
        open_source(str(tar), None, LabelRules(key="size"))
    with pytest.raises(LabelError, match=r"--label-key kinds: no image has a label there"):
        open_source(str(tar), None, LabelRules(key="kinds"))


def test_the_label_column_of_a_table() -> None:
    image, fine = datasets.Image(), datasets.ClassLabel(names=["x", "y"])
    features = datasets.Features(
        {"img": image, "fine_label": fine, "coarse_label": fine, "id": datasets.Value("int64")}
    )
    with pytest.raises(UserError, match="several columns can have the labels, fine_label, coarse_label: name one"):
        choose_columns(features, LabelRules(), "cifar100")
    assert choose_columns(features, LabelRules(column="coarse_label"), "cifar100") == (
        "img",
        "coarse_label",
        ["x", "y"],
    )
    with pytest.raises(UserError, match="no column 'fine', it has img, fine_label"):
        choose_columns(features, LabelRules(column="fine"), "cifar100")
    only = datasets.Features(
        {"jpg": datasets.Value("binary"), "fine_label": fine, "width": datasets.Value("int64")}
    )
    assert choose_columns(only, LabelRules(), "t").label == "fine_label"
    none = datasets.Features({"image": image, "width": datasets.Value("int64")})
    assert choose_columns(none, LabelRules(), "t").label is None
    with pytest.raises(UserError, match="columns a, b: expected one of images, 2 can be"):
        choose_columns(datasets.Features({"a": image, "b": image}), LabelRules(), "t")


def test_a_label_is_never_invented() -> None:
    names = ["1.jpg", "2.jpg", "3.jpg"]
    with pytest.raises(LabelError, match=r"^2.jpg: has no label \(x\), but other images have"):
        resolve([0, None, 1], names, LabelRules(), origin="x")
    kept = resolve([0, -1, None], names, LabelRules(unlabeled="keep"), origin="x")
    assert kept.values == [0, None, None]
    assert resolve([None] * 3, names, LabelRules(), origin="x").values == [None] * 3
    assert resolve(["b", "a", "b"], names, LabelRules(), origin="x")[:2] == ([1, 0, 1], ["a", "b"])
    several = resolve([[1, 0, 1], -1, 2], names, LabelRules(unlabeled="keep"), origin="x")
    assert several.values == [(0, 1), None, (2,)]
    with pytest.raises(LabelError, match="-1 is among several labels"):
        resolve([[1, -1], 0, 1], names, LabelRules(), origin="x")
    order = LabelRules(classes=("b", "c", "a"))
    assert resolve(["b", "a", "b"], names, order, origin="x")[:2] == ([0, 2, 0], ["b", "c", "a"])
    assert resolve([1, 0, 1], names, order, origin="x", class_names=["a", "b"]).values == [0, 2, 0]
    for raw, rules, message in (
        (["b", 1, 2], LabelRules(), "1.jpg: the label is a name, those of other images are numbers"),
        ([0, -2, 1], LabelRules(), "2.jpg: label -2, expected 0 or more, or -1 for none"),
        ([0, 3, 1], order, "2.jpg: label 3, expected 0 to 2"),
        (["b", "d", "a"], order, "1 of 3 classes .* not in --classes, the first is 'd'"),
    ):
        with pytest.raises(LabelError, match=message):
            resolve(raw, names, rules, origin="x")


def test_class_lists(tmp_path) -> None:
    assert read_class_names(write(tmp_path / "names.txt", "b\n\na\n")) == ("b", "a")
    assert read_class_names(write(tmp_path / "names.json", '["b", "a"]')) == ("b", "a")
    codebook = np.eye(2, dtype=np.float32)
    with StoreWriter(tmp_path / "store", codebook=codebook, grid=(1, 1), class_names=["b", "a"]) as writer:
        writer.add(np.array([[0]]), 1)
    assert read_class_names(tmp_path / "store") == ("b", "a")
    for text in ("", "a\na\n"):
        with pytest.raises(UserError, match=r"expected names of classes|the name a occurs twice"):
            read_class_names(write(tmp_path / "bad.txt", text))
    with pytest.raises(UserError, match="No such file"):
        read_class_names(Path(tmp_path / "gone.txt"))
