"""Sources of encoded images: the same pictures in every packing, and files as people have them."""

import os
from pathlib import Path

import datasets
import pytest
from support.pictures import (
    CLASSES,
    PACKINGS,
    as_dataset,
    as_folder,
    as_parquet,
    make_tar,
    photograph_crops,
    write,
)

from seitpp.images.batches import ImageDataset
from seitpp.images.decode import ImageError, decode_image
from seitpp.images.inventory import describe, digest, inventory
from seitpp.images.labels import LabelRules
from seitpp.images.sources import hold_out, open_every_split, open_source, split_names


@pytest.fixture(scope="module")
def samples() -> list[tuple[bytes, int]]:
    return photograph_crops()


def read_all(source) -> list[tuple[bytes, object]]:
    return [(sample.data, sample.label) for sample in map(source.read, range(len(source)))]


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_the_same_bytes_labels_and_classes(packing: str, samples, tmp_path) -> None:
    data = PACKINGS[packing](tmp_path / "pictures", samples)
    rules = LabelRules(file=str(tmp_path / "labels.csv")) if packing == "flat" else LabelRules()
    source = open_source(str(data), None, rules)
    assert read_all(source) == samples and source.class_names == CLASSES
    assert len({source.read(index).name for index in range(6)}) == 6 and len(source.names) == 6
    assert [source.read(index).data for index in (5, 0, 4)] == [samples[index][0] for index in (5, 0, 4)]
    assert str(source.left_out) == "nothing" and inventory(source)["classes"] == {"china": 3, "flower": 3}


def test_a_data_set_of_the_hub_needs_its_prefix(samples, monkeypatch) -> None:
    """What `datasets` gives for a name on the hub; only the download is left out."""
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return as_dataset(samples, label="kind")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("hf://somebody/photographs", "validation")
    assert asked == [("somebody/photographs", "validation")] and read_all(source) == samples
    with pytest.raises(ImageError, match=r"^photographs: no such file or folder; .* hf://owner/name"):
        open_source("photographs")
    assert len(asked) == 1


def test_a_folder_as_people_have_it(samples, tmp_path) -> None:
    """Hidden folders, files of other kinds, links, images without a suffix, and packed files beside images."""
    root, (data, _) = tmp_path / "photos", samples[0]
    write(root / "b" / "1.JPG", data)
    write(root / "b" / "scan", data)
    write(root / "b" / "holiday.jpg_large", data)
    write(root / "b" / "deep" / "3.png", data)
    for hidden in (".ipynb_checkpoints/1.jpg", "__MACOSX/1.jpg", "b/._1.jpg", "b/Thumbs.db"):
        write(root / hidden, data)
    write(root / "notes.txt", "x")
    write(root / "b" / "clip.mp4", "x")
    write(root / "b" / "unknown", "x" * 600)
    write(root / "stray.tar", "x")
    write(root / "stray.parquet", "x")
    write(tmp_path / "elsewhere" / "4.png", data)
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "gone.jpg").symlink_to(root / "nowhere")
    (root / "b" / "folder.jpg").mkdir()
    (root / "empty").mkdir()
    source = open_source(str(root))
    assert source.names == ["a/4.png", "b/1.JPG", "b/deep/3.png", "b/gone.jpg", "b/holiday.jpg_large", "b/scan"]
    assert source.labels.values == [0, 1, 1, 1, 1, 1] and source.class_names == ["a", "b", "empty"]
    with pytest.raises(ImageError, match=r"^b/gone.jpg: cannot be read \(No such file"):
        source.read(3)
    text = describe(source)
    assert "6 images, classes by folder names\n3 classes: b 5, a 1, empty 0" in text
    assert source.left_out.counts == {
        "hidden": 4, ".txt file": 1, ".mp4 file": 1, "no image by its content": 1, "packed file beside images": 2
    }  # fmt: skip
    (root / "b" / "deep" / "up").symlink_to(root)
    with pytest.raises(ImageError, match="a link to a folder that it lies in"):
        open_source(str(root))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission_is_an_unreadable_image(samples, tmp_path) -> None:
    root = as_folder(tmp_path, samples)
    (root / "secret").mkdir(mode=0)
    source = open_source(str(root))
    with pytest.raises(ImageError, match=r"^secret: cannot be read"):
        source.read(source.names.index("secret"))


def test_splits_are_no_classes(samples, tmp_path) -> None:
    for split, chosen in (("train", samples), ("val", samples[3:])):
        as_folder(tmp_path / "set" / split, chosen)
    with pytest.raises(ImageError, match=r"has the splits train, val, which are no classes: name the one to read"):
        open_source(str(tmp_path / "set"))
    assert len(open_source(str(tmp_path / "set"), "train")) == 6
    splits = open_every_split(str(tmp_path / "set"), LabelRules())
    assert list(splits) == ["train", "validation"]
    # A part without some classes keeps the numbers of the others.
    assert read_all(splits["validation"]) == samples[3:] and splits["validation"].class_names == CLASSES
    as_parquet(tmp_path / "tables", samples)
    for number, name in enumerate(("train", "test")):
        (tmp_path / "tables" / f"pictures-{number}.parquet").rename(tmp_path / "tables" / f"{name}-00000.parquet")
    assert split_names(str(tmp_path / "tables")) == ["test", "train"]
    assert read_all(open_source(str(tmp_path / "tables"), "train")) == samples[:3]
    both = datasets.DatasetDict({"train": as_dataset(samples), "test": as_dataset(samples[:2])})
    both.save_to_disk(str(tmp_path / "arrow"))
    arrow = open_every_split(str(tmp_path / "arrow"), LabelRules())
    assert {name: len(source) for name, source in arrow.items()} == {"train": 6, "test": 2}
    with pytest.raises(ImageError, match="--splits, but it has none"):
        open_every_split(str(tmp_path / "set" / "train"), LabelRules())


def test_names_of_splits(samples, tmp_path) -> None:
    """val is validation; two names of one split, and splits beside other folders, are never mixed in silence."""
    root = tmp_path / "set"
    for split, chosen in (("train", samples), ("val", samples[3:]), ("devkit", samples[:2])):
        as_folder(root / split, chosen)
    assert len(open_source(str(root), "validation")) == 3
    with pytest.raises(ImageError, match="has the splits train, val, which are no classes"):
        open_source(str(root))
    as_folder(root / "valid", samples[:1])
    with pytest.raises(ImageError, match="no folder 'validation' below it"):
        open_source(str(root), "validation")
    with pytest.raises(ImageError, match="val and valid are both the split validation"):
        open_every_split(str(root), LabelRules())
    vehicles = tmp_path / "vehicles"
    for name in ("train", "tram"):
        write(vehicles / name / "1.png", samples[0][0])
    assert open_source(str(vehicles)).class_names == ["train", "tram"]
    make_tar(as_parquet(tmp_path / "mixed", samples) / "more.tar", {"1.png": samples[0][0]})
    assert open_source(str(tmp_path / "mixed")).left_out.counts == {"packed file beside .parquet files": 1}


def test_every_nth_image_is_held_out(samples, tmp_path) -> None:
    source = open_source(str(as_folder(tmp_path / "set", samples)))
    train, validation = hold_out(source, 3, "set")
    assert validation.names == [source.names[2], source.names[5]] and len(train) == 4
    assert read_all(train) + read_all(validation) == [samples[index] for index in (0, 1, 3, 4, 2, 5)]
    with pytest.raises(ImageError, match="6 images in set: expected at least 20"):
        hold_out(source, 20, "set")


@pytest.mark.parametrize(
    "members, names",
    [
        ({"0001.input.jpg": b"", "0001.target.cls": "0"}, ["0001.input.jpg"]),
        ({"a/k.jpg": b"", "a/k.seg.png": b"", "a/k.cls": "0"}, ["a/k.jpg"]),
        (
            {"v.1.001.jpg": b"", "v.1.002.jpg": b"", "v.1.001.cls": "0", "v.1.002.cls": "1"},
            ["v.1.001.jpg", "v.1.002.jpg"],
        ),
        ({"n01/n01_1.JPEG": b"", "n02/n02_1.JPEG": b"", "._x.jpg": b""}, ["n01/n01_1.JPEG", "n02/n02_1.JPEG"]),
    ],
)
def test_no_naming_habit_loses_an_image_of_a_tar(members, names, tmp_path) -> None:
    source = open_source(str(make_tar(tmp_path / "t.tar", members)))
    assert [name.partition("/")[2] for name in source.names] == names
    assert source.labels.values == list(range(len(names)))


def test_a_cut_or_damaged_tar_is_refused(samples, tmp_path) -> None:
    whole = make_tar(
        tmp_path / "whole.tar", {f"{n}.png": data for n, (data, _) in enumerate(samples)}
    ).read_bytes()
    header = whole.index(b"3.png")
    damaged = whole[:header] + b"\xff" + whole[header + 1 :]
    cuts = {
        "inside": whole[: header - 700],
        "between": whole[:header],
        "header": whole[: header + 100],
        "damaged": damaged,
    }
    for name, data in cuts.items():
        path = write(tmp_path / f"{name}.tar", data)
        with pytest.raises(ImageError, match=r"(cut|damaged|cannot be read as an uncompressed tar) .*copy"):
            open_source(str(path))


def test_bad_sources_are_refused_in_one_line(samples, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    several = {
        "1.input.png": samples[0][0],
        "1.target.png": samples[1][0],
        "2.input.png": b"",
        "2.target.png": b"",
    }
    cases = {
        "no images below it": tmp_path / "empty",
        "no folder 'validation' below it": as_folder(tmp_path / "f", samples),
        "no file whose name begins with 'validation', it has pictures-0": as_parquet(tmp_path / "p", samples),
        "cannot be read as Parquet": write(tmp_path / "broken.parquet", b"PAR1 not really"),
        "cannot be read as an uncompressed tar": write(tmp_path / "broken.tar", b"no tar" * 200),
        "expected a folder, a .parquet or an uncompressed .tar": write(tmp_path / "photos.zip", b"PK"),
        "several pictures of one sample": make_tar(tmp_path / "pairs.tar", several),
        "no images in 1 tar file": make_tar(tmp_path / "texts.tar", {"1.txt": "x"}),
    }
    for message, path in cases.items():
        with pytest.raises(ImageError, match=message) as caught:
            open_source(str(path), "validation" if "validation" in message else None)
        assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)


def test_a_dataset_decodes_whole_batches(samples, tmp_path) -> None:
    source = open_source(str(as_folder(tmp_path / "source", samples)))
    indices, images, labels = ImageDataset(source, (32, 32)).__getitems__([4, 1])
    assert indices.tolist() == [4, 1] and images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [source.read(4).label, source.read(1).label]
    assert (images[0].numpy() == decode_image(source.read(4), (32, 32))).all()


def test_labels_of_a_batch_are_classes_or_rows(samples, tmp_path: Path) -> None:
    root = as_folder(tmp_path / "source", samples)
    write(root / "stray.png", samples[0][0])
    source = open_source(str(root), None, LabelRules(unlabeled="keep"))
    assert ImageDataset(source, (8, 8)).__getitems__([0, 5, 6])[2].tolist() == [0, 1, -1]
    names = ["china|flower", "flower", "", "china", "flower|flower", "china", "china"]
    rows = [f"{name}\t{label}" for name, label in zip(source.names, names, strict=True)]
    file = write(tmp_path / "labels.tsv", "name\tlabels\n" + "\n".join(rows))
    source = open_source(str(root), None, LabelRules(file=str(file), unlabeled="keep"))
    assert source.labels.multi_label and source.labels.values[:3] == [(0, 1), (1,), None]
    assert ImageDataset(source, (8, 8)).__getitems__([0, 1, 2])[2].tolist() == [[1, 1], [0, 1], [255, 255]]


def test_a_digest_knows_names_labels_and_the_ends(samples, tmp_path: Path) -> None:
    root = as_folder(tmp_path / "set", samples)

    def found() -> list[str]:
        source = open_source(str(root))
        return [digest(source, range(0, 3)), digest(source, range(3, 6))]

    first, second = found()
    assert found() == [first, second] and first != second
    last = root / CLASSES[1] / "005.png"
    last.write_bytes(samples[0][0])
    assert found()[0] == first and found()[1] != second
    last.write_bytes(b"no picture")  # is read as it is: decoding comes later
    assert found()[0] == first
    (root / CLASSES[0] / "001.png").rename(root / CLASSES[0] / "0001.png")
    assert found()[0] != first
