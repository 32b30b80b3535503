"""downstream/finegrained: every set from a tiny copy of its authors' layout; one of them to a token store."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import datasets
import numpy as np
import pytest
import torch
from scipy.io import savemat
from sklearn.datasets import load_sample_images
from support.finegrained import cars, draw, write_set
from support.paths import ROOT
from support.running import run
from tokenize_images import PRESETS, main

from downstream.finegrained.sets import SETS, FineGrained, SetError, SetName, differences, read_set
from seitpp import TokenStore, tokenizers
from seitpp.errors import UserError
from seitpp.images.decode import ImageError, decode_image
from seitpp.images.labels import LabelRules
from seitpp.images.tables import DatasetSource
from seitpp.tokenizers import PatchKMeans

FOLDER = ROOT / "downstream/finegrained"


@pytest.mark.parametrize("name", SETS)
def test_splits_labels_and_names_are_those_of_the_lists(name: str, tmp_path: Path) -> None:
    *expected, names = write_set(name, tmp_path)
    splits = read_set(name, tmp_path)
    assert list(splits) == ["train", "validation"]
    for split, images in zip(splits.values(), expected, strict=True):
        assert split.features["label"].names == names
        assert split["label"] == [label for _, label in images]
        source = DatasetSource(split, name, LabelRules())
        for index, (path, label) in enumerate(images):
            sample = source.read(index)
            assert sample[:3] == ((tmp_path / path).read_bytes(), str(tmp_path / path), label)


def test_paths_are_kept_and_no_bytes(tmp_path: Path) -> None:
    images, *_ = write_set("pets", tmp_path)
    split = read_set("pets", tmp_path)["train"]
    assert split[0]["image"] == {"bytes": None, "path": str(tmp_path / images[0][0])}
    assert split.cache_files == []


def test_the_labels_of_the_test_cars_may_lie_in_the_devkit(tmp_path: Path) -> None:
    train, validation, _ = cars(tmp_path, "devkit/cars_test_annos_withlabels.mat")
    for path, _ in train + validation:
        draw(tmp_path / path)
    assert read_set("cars", tmp_path)["validation"]["label"] == [0, 1]


@pytest.mark.parametrize("name", SETS)
def test_what_is_missing_is_named_with_where_the_set_is_to_be_had(name: str, tmp_path: Path) -> None:
    train, validation, _ = write_set(name, tmp_path)
    lists = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".jpg"]
    for path in [*lists, tmp_path / train[0][0], tmp_path / validation[0][0]]:
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(SetError) as caught:
            read_set(name, tmp_path)
        assert str(caught.value).startswith(f"{path}: No such file") and SETS[name].page in str(caught.value)
        path.write_bytes(content)
    read_set(name, tmp_path)


def test_a_missing_image_is_an_image_error(tmp_path: Path) -> None:
    train, *_ = write_set("cub200", tmp_path)
    source = DatasetSource(read_set("cub200", tmp_path)["train"], "cub200", LabelRules())
    (tmp_path / train[1][0]).unlink()
    with pytest.raises(ImageError, match=r"L_1\.jpg: cannot be read \(No such file"):
        source.read(1)


def test_a_data_set_without_images_is_refused() -> None:
    with pytest.raises(ImageError, match="letters: columns text: expected one of images, 0 can be"):
        DatasetSource(datasets.Dataset.from_dict({"text": ["a"]}), "letters", LabelRules())


def test_an_unknown_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetError, match=r"unknown set 'flowers'.*flowers102, cars"):
        read_set("flowers", tmp_path)


def test_numbers_that_differ_from_the_published_ones_are_told(tmp_path: Path) -> None:
    write_set("food101", tmp_path)
    assert differences("food101", read_set("food101", tmp_path)) == [
        "food101: 2 classes, published are 101",
        "food101: 2 train images, published are 75,750",
        "food101: 2 validation images, published are 25,250",
    ]


def test_the_published_numbers_are_not(tmp_path: Path) -> None:
    """The lists of Flowers-102 at their full length, with the two images that are looked for."""
    ids = np.arange(1, 8190, dtype=np.uint16)[None]
    labels = (np.arange(8189) % 102 + 1).astype(np.uint8)[None]
    savemat(tmp_path / "imagelabels.mat", {"labels": labels})
    parts = {"trnid": ids[:, :1020], "valid": ids[:, 1020:2040], "tstid": ids[:, 2040:]}
    savemat(tmp_path / "setid.mat", parts)
    for number in (1, 2041):
        draw(tmp_path / f"jpg/image_{number:05d}.jpg")
    splits = read_set("flowers102", tmp_path)
    assert differences("flowers102", splits) == []
    assert splits["train"]["label"] == [index % 102 for index in range(2040)]


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    page = (FOLDER.parents[1] / "docs/finegrained.md").read_text()
    for name, known in SETS.items():
        assert isinstance(known, FineGrained)
        counts = f"{known.classes:,} | {known.train:,} | {known.validation:,}"
        assert f"| `{name}` | {known.title} | {counts} |" in page and f"<{known.page}>" in page
    assert get_args(SetName) == tuple(SETS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    photographs = [torch.tensor(image).permute(2, 0, 1)[None] / 255 for image in load_sample_images().images]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    PatchKMeans.fit(torch.cat(photographs), image_size=32, patch=4, num_codes=32, code_dim=8).save(path)
    return path


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_a_set_becomes_a_store_also_after_an_interruption(tokenizer: Path, tmp_path: Path) -> None:
    *expected, names = write_set("flowers102", tmp_path / "set")
    line = ["--set", "flowers102", "--workers", 0, "--data", tmp_path / "set"]
    finished = run("tokenize_images", *line, "--tokenizer", tokenizer, "--out", tmp_path / "tokens")
    assert finished.returncode == 0, finished.stderr
    assert "warning: flowers102: 4 train images, published are 2,040" in finished.stdout

    model = tokenizers.load(tokenizer)
    for split, images in zip(("train", "validation"), expected, strict=True):
        store = TokenStore(tmp_path / "tokens", split)
        assert store.splits == ["train", "validation"] and store.class_names == names
        assert store.labels.tolist() == [label for _, label in images]
        source = DatasetSource(read_set("flowers102", tmp_path / "set")[split], "flowers102", LabelRules())
        pixels = np.stack([decode_image(source.read(index), (32, 32)) for index in range(len(images))])
        ids = model.encode(torch.from_numpy(pixels).float() / 255).numpy()
        assert np.array_equal(store.ids(range(len(images))), ids)

    config = replace(
        PRESETS["digits"],
        set="flowers102",
        data=str(tmp_path / "set"),
        tokenizer=str(tokenizer),
        out=str(tmp_path / "again"),
        workers=0,
    )
    broken = tmp_path / "set" / expected[1][1][0]
    image = broken.read_bytes()
    broken.write_bytes(b"no jpeg")
    with pytest.raises(UserError, match=f"{broken}: cannot be read as an image"):
        main(config)
    assert TokenStore(tmp_path / "again").splits == ["train"]
    broken.write_bytes(image)
    main(config)
    assert content(tmp_path / "again") == content(tmp_path / "tokens")
    with pytest.raises(UserError, match="has a split 'train' already"):
        main(config)
    with pytest.raises(UserError, match="flowers102: name its folder with --data"):
        main(replace(PRESETS["digits"], set="flowers102", out="none"))
