"""recipes/tokenize_images.py --crops: N keyed crops of each image, with the labels of images or of label maps."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenize_images
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from support.paths import RECIPES
from support.running import call, distributed, refused, run

from seitpp import TokenStore, tokenizers
from seitpp.augment import Crops, Keys, RandomBoxes, random_resized_boxes
from seitpp.errors import UserError
from seitpp.images.decode import ImageError
from seitpp.images.inventory import digest
from seitpp.images.label_maps import LabelMaps, pooled_class
from seitpp.images.sources import open_source
from seitpp.store import spec
from seitpp.tokenizers import PatchKMeans

IMAGES, CROPS, SIDE, SHARD, SEED = 12, 3, 32, 10, 5  # a shard ends within the crops of an image


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "SHARD_TOKENS", SHARD * 64)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Lossless images of two classes and of several sizes, a tokenizer, and label maps of every image."""
    root, rng = tmp_path_factory.mktemp("crops"), np.random.default_rng(0)
    photographs = load_sample_images().images
    for number in range(IMAGES):
        name = f"{('china', 'flower')[number % 2]}/{number:02d}"
        height, width = rng.integers(60, 120, size=2)
        top, left = rng.integers(300), rng.integers(500)
        picture = Image.fromarray(photographs[number % 2][top : top + height, left : left + width])
        label_map = torch.rand(2, 5, 15, 15)
        label_map[1] = torch.rand(5, 15, 15).argsort(dim=0) // 3  # some cells list a class, 0 or 1, several times
        label_map[1] = torch.stack([label_map[1][0], 1 - label_map[1][0], *[label_map[1][0]] * 3])
        label_map[0, 2:] = label_map[0, :1]
        for folder, suffix in (("images", ".png"), ("maps", ".pt")):
            path = (root / folder / name).with_suffix(suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path) if suffix == ".png" else torch.save(label_map, path)
    whole = torch.cat([torch.tensor(image).permute(2, 0, 1)[None] / 255 for image in photographs])
    PatchKMeans.fit(whole, image_size=SIDE, patch=4, num_codes=32, code_dim=8).save(root / "tokenizer.safetensors")
    return root


def arguments(root: Path, out: Path, *more: object) -> list:
    line = ["--data", root / "images", "--tokenizer", root / "tokenizer.safetensors", "--out", out, "--workers", 1]
    line += ["--hold-out", 4, "--batch-size-per-process", 4, "--keep-source", "--label-maps", root / "maps"]
    return [*line, "--crops", CROPS, "--crop-scale", 0.1, 0.9, "--seed", SEED, *more]


@pytest.fixture(scope="module")
def store(root, tmp_path_factory) -> Path:
    """Made by one process without an interruption."""
    out = tmp_path_factory.mktemp("store") / "tokens"
    finished = run("tokenize_images", *arguments(root, out))
    assert finished.returncode == 0, finished.stderr
    return out


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_each_crop_is_what_its_box_says_and_other_splits_have_whole_images(root, store) -> None:
    tokens, model = TokenStore(store), tokenizers.load(root / "tokenizer.safetensors")
    names = [path.relative_to(root / "images").as_posix() for path in sorted((root / "images").rglob("*.png"))]
    kept = [name for number, name in enumerate(names) if number % 4 != 3]
    assert len(tokens) == CROPS * len(kept) and tokens.inventory["found"] == len(kept)
    assert tokens.inventory["crops"] == {
        "of_each_image": CROPS,
        "scale": [0.1, 0.9],
        "seed": SEED,
        "labels": "label maps",
    }
    assert [tokens.column("file_name")[row] for row in range(len(tokens))] == [
        name for name in kept for _ in range(CROPS)
    ]
    labels = []
    for row in range(len(tokens)):
        image, crop = divmod(row, CROPS)
        with Image.open(root / "images" / kept[image]) as picture:
            width, height = picture.size
            keys = Keys(SEED, crop, torch.tensor([image]))
            box = random_resized_boxes(keys, torch.tensor([[height, width]]), (0.1, 0.9))[0].tolist()
            top, left, rows, columns = box
            corners = left, top, left + columns, top + rows
            pixels = np.array(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, corners))
        ids, label = tokens[row]
        encoded = model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0].numpy()
        assert np.array_equal(ids, encoded), (row, box)
        label_map = torch.load(root / "maps" / Path(kept[image]).with_suffix(".pt"), weights_only=True)
        labels.append(label)
        assert label == pooled_class(label_map, box, (height, width))
    assert set(labels) == {0, 1}
    held_out = TokenStore(store, "validation")
    assert len(held_out) == IMAGES - len(kept) and "crops" not in held_out.inventory
    assert [label for _, label in map(held_out.__getitem__, range(len(held_out)))] == [
        names.index(name) * 2 // IMAGES for name in names if name not in kept
    ]


def test_stopped_and_continued_by_two_processes_gives_the_same_bytes(root, store, tmp_path) -> None:
    out, maps = tmp_path / "made/tokens", tmp_path / "maps"
    shutil.copytree(root / "maps", maps)
    missing = (maps / "flower/09.pt").rename(tmp_path / "last.pt")
    line = arguments(root, out, "--label-maps", maps)
    stopped = run("tokenize_images", *line)
    assert stopped.returncode == 2 and not out.exists()
    problem = stopped.stderr.splitlines()[-1]
    assert problem.startswith(f"error: flower/09.png: no label map {maps / 'flower/09.pt'}"), problem
    missing.rename(maps / "flower/09.pt")
    finished = distributed(2, RECIPES / "tokenize_images.py", *line)
    assert finished.returncode == 0, finished.stderr
    assert "in 3 shards, 2 of them finished" in finished.stdout and "2 process(es)" in finished.stdout
    assert content(out) == content(store)


def test_other_crops_are_made_anew_and_have_the_labels_of_their_images(root, store, tmp_path) -> None:
    config = replace(
        tokenize_images.PRESETS["smoke"],
        data=str(root / "images"),
        tokenizer=str(root / "tokenizer.safetensors"),
        hold_out=0,
        crops=2,
        workers=0,
    )
    stores = {}
    for name, changes in {"one": {}, "other": {"seed": 1}, "small": {"crop_scale": (0.1, 0.2)}}.items():
        tokenize_images.main(replace(config, out=str(tmp_path / name), **changes))
        stores[name] = TokenStore(tmp_path / name)
        assert stores[name].labels.tolist() == [number // IMAGES for number in range(2 * IMAGES)]
        assert stores[name].inventory["crops"]["labels"] == "of the image"
    ids = {name: found.ids(np.arange(2 * IMAGES)) for name, found in stores.items()}
    assert not np.array_equal(ids["one"], ids["other"]) and not np.array_equal(ids["one"], ids["small"])
    assert (ids["one"][::2] != ids["one"][1::2]).any(axis=(1, 2)).sum() > IMAGES / 2  # some are of plain sky
    source = open_source(str(root / "images"))
    boxes = [RandomBoxes(0, (SIDE, SIDE)), RandomBoxes(1, (SIDE, SIDE)), RandomBoxes(0, (SIDE, SIDE), (0.1, 0.2))]
    assert len({digest(Crops(source, 2, each), range(10)) for each in boxes}) == 3  # so that none is continued


def test_the_class_of_a_crop_by_hand() -> None:
    label_map = torch.zeros(2, 2, 4, 4)
    label_map[1, 0], label_map[1, 1] = 7, 3
    label_map[0, 0, :, :2], label_map[0, 1, :, 2:] = 1.0, 1.0  # 7 on the left, 3 on the right
    assert pooled_class(label_map, (0, 0, 80, 30), (80, 60)) == 7
    assert pooled_class(label_map, (0, 30, 80, 30), (80, 60)) == 3
    assert pooled_class(label_map, (10, 20, 10, 25), (80, 60)) == 3
    label_map[0, 0, 0] = 9.0  # the top row: an image of 80 x 60 has it above row 20
    assert pooled_class(label_map, (0, 35, 20, 25), (80, 60)) == 7
    assert pooled_class(label_map, (40, 35, 20, 25), (80, 60)) == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--crops", 0], ["--crops 0", "at least 1"]),
        (["--crop-scale", 0.9, 0.1], ["--crop-scale"]),
        (["--short-side", 64], ["--crops", "--short-side"]),
        (["--split", "validation"], ["--crops", "train", "validation"]),
        (["--label-maps", "nowhere"], ["nowhere", "no such folder"]),
    ],
)
def test_what_cannot_be_cropped_is_refused(more, words, root, tmp_path, capfd, monkeypatch) -> None:
    refused(capfd, monkeypatch, tokenize_images, arguments(root, tmp_path / "tokens", *more), *words)


def test_maps_of_another_form_are_refused(root, tmp_path) -> None:
    good, path = torch.load(root / "maps/china/00.pt", weights_only=True), tmp_path / "china/00.pt"
    path.parent.mkdir()
    unknown, endless = good.clone(), good.clone()
    unknown[1, 0, 0, 0], endless[0, 0, 0, 0] = 2, torch.inf
    maps = LabelMaps(tmp_path, num_classes=2)
    for problem, saved in {
        "class 2, expected below 2": unknown,
        "not finite": endless,
        r"got \(5, 15, 15\)": good[0],
        r"got \(2, 5, 15, 33\).*at most \(2, 16, 32, 32\)": good.new_zeros(2, 5, 15, 33),
        "got dict": {"map": good},
        "not unpickled": Path("x"),
    }.items():
        torch.save(saved, path)
        with pytest.raises(ImageError, match=f"00.pt.*{problem}"):
            maps.label("china/00.JPEG", (0, 0, 9, 9), (9, 9))
    torch.save(good, path)
    (tmp_path / "other").mkdir()
    for name in ("../china/00.JPEG", str(path), "china/01.JPEG"):  # the names in an archive may be hostile
        with pytest.raises(ImageError, match="no label map"):
            LabelMaps(tmp_path / "other", num_classes=2).label(name, (0, 0, 9, 9), (9, 9))
    assert maps.label("china/00.JPEG", (0, 0, 9, 9), (9, 9)) in (0, 1)


def test_masks_and_label_maps_alone_are_refused(root, tmp_path, capfd, monkeypatch) -> None:
    line = ["--data", root / "images", "--out", tmp_path / "tokens", "--label-maps", root / "maps"]
    refused(capfd, monkeypatch, tokenize_images, line, "--label-maps", "--crops N")
    for folder, pixels in (("images", (8, 8, 3)), ("annotations", (8, 8))):
        (tmp_path / folder / "training").mkdir(parents=True)
        picture = Image.fromarray(np.ones(pixels, np.uint8))
        picture.save(tmp_path / folder / "training" / f"0.{'png' if len(pixels) == 2 else 'jpg'}")
    (tmp_path / "names.txt").write_text("nothing\nwall")
    line = ["--data", tmp_path, "--out", tmp_path / "tokens", "--crops", 2, "--background-class"]
    line += ["--classes", tmp_path / "names.txt"]
    with pytest.raises(UserError, match="--crops: crops have one size and no masks"):
        call(tokenize_images, *line)
