"""Own images through the recipes: the same set in any packing gives the same store; predictions and vectors."""

import csv
from dataclasses import replace
from pathlib import Path

import embed
import evaluate
import numpy as np
import predict
import pyarrow.parquet as pq
import pytest
import seit_train
import tokenize_images
import torch
from support.models import tiny_mtm
from support.paths import RECIPES
from support.pictures import CLASSES, PACKINGS, as_folder, encoded, photograph_crops, write
from support.running import call, digits_codebook, distributed, result_of

from seitpp import TokenStore
from seitpp.data.digits import DigitsSource, digits
from seitpp.errors import UserError
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.tokenizers import PatchKMeans


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    images = torch.from_numpy(np.random.default_rng(0).random((8, 3, 16, 16), dtype=np.float32))
    PatchKMeans.fit(images, image_size=16, patch=4, num_codes=16, code_dim=8).save(path)
    return path


def test_the_same_set_in_any_packing_gives_the_same_store(tokenizer, tmp_path) -> None:
    samples, stores = photograph_crops(40), {}
    for packing, make in PACKINGS.items():
        out = tmp_path / packing / "tokens"
        labels = ["--labels", tmp_path / packing / "labels.csv"] if packing == "flat" else []
        data = make(tmp_path / packing / "pictures", samples)
        call(
            tokenize_images,
            "smoke",
            "--data",
            data,
            "--tokenizer",
            tokenizer,
            "--out",
            out,
            *labels,
            "--workers",
            0,
        )
        stores[packing] = content(out)
    assert all(store == stores["folder"] for store in stores.values())
    train, validation = (TokenStore(tmp_path / "folder" / "tokens", split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (38, 2) and train.class_names == CLASSES
    assert train.inventory["classes"] == {"china": 19, "flower": 19} and train.inventory["left_out"] == {}


def test_splits_labels_and_what_is_left_out(tokenizer, tmp_path, capsys) -> None:
    samples = photograph_crops(8)
    as_folder(tmp_path / "set" / "train", samples)
    as_folder(tmp_path / "set" / "val", samples[6:])  # flowers alone: class 1, as in train
    write(tmp_path / "set" / "train" / "china" / "broken.jpg", b"no picture")
    write(tmp_path / "set" / "train" / "notes.txt", "x")
    line = [
        "smoke",
        "--data",
        tmp_path / "set",
        "--tokenizer",
        tokenizer,
        "--out",
        tmp_path / "tokens",
        "--workers",
        0,
    ]
    with pytest.raises(UserError, match="has the splits train, val, which are no classes"):
        call(tokenize_images, *line)
    with pytest.raises(UserError, match=r"broken\.jpg: cannot be read as an image"):
        call(tokenize_images, *line, "--splits")
    call(tokenize_images, *line, "--splits", "--skip-errors")
    printed = capsys.readouterr().out
    assert "9 images, classes by folder names\n2 classes: china 5, flower 4\nleft out: 1 .txt file" in printed
    assert "skipped           1 unreadable images of 9" in printed
    train, validation = (TokenStore(tmp_path / "tokens", split) for split in ("train", "validation"))
    assert (train.labels.tolist(), validation.labels.tolist()) == ([0] * 4 + [1] * 4, [1, 1])
    assert (train.inventory["unreadable"], train.inventory["left_out"]) == (1, {".txt file": 1})
    assert "broken.jpg" in Path(f"{tmp_path / 'tokens'}-train-skipped.txt").read_text()
    assert "unreadable" in (tmp_path / "tokens" / "README.md").read_text()
    # A part with labels in another file, without some, into the same store: its classes are found by name.
    for number, (data, _) in enumerate(samples[:3]):
        write(tmp_path / "flat" / f"{number}.png", data)
    labels = write(tmp_path / "labels.csv", "name,label\n0.png,flower\n1.png,china\n")
    line[2], more = tmp_path / "flat", ["--split", "test", "--labels", labels]
    with pytest.raises(UserError, match=r"^2\.png: has no label"):
        call(tokenize_images, *line, *more)
    call(tokenize_images, *line, *more, "--unlabeled", "keep")
    test = TokenStore(tmp_path / "tokens", "test")
    assert test.labels.tolist() == [1, 0, -1] and test.num_labeled == 2


def test_how_images_are_read_is_recorded(tokenizer, tmp_path) -> None:
    pixels = np.zeros((20, 60), np.uint16)
    pixels[:, 20:40] = 4095
    for number in range(2):
        write(tmp_path / "scans" / f"{number}.png", encoded(pixels))
    line = ["smoke", "--data", tmp_path / "scans", "--tokenizer", tokenizer, "--workers", 0]
    ids = {}
    for name, more in {"squash": [], "crop": ["--resize", "center_crop"], "pad": ["--resize", "pad"]}.items():
        call(tokenize_images, *line, "--out", tmp_path / name, "--intensity", 0, 4095, *more)
        store = TokenStore(tmp_path / name)
        ids[name] = store[0][0]
        assert store.tokenizer["reading"] == {
            "orientation": "exif", "resize": more[1] if more else "squash", "intensity": [0, 4095]
        }  # fmt: skip
        assert store[0][1] is None
    assert len(np.unique(ids["crop"])) == 1 and not np.array_equal(ids["squash"], ids["pad"])
    with pytest.raises(UserError, match="expected two values, the lower first"):
        call(tokenize_images, *line, "--out", tmp_path / "x", "--intensity", 5, 5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A classifier of the digits."""
    folder = tmp_path_factory.mktemp("seit") / "run"
    seit_train.main(replace(seit_train.PRESETS["smoke"], out=str(folder)))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Some digits as files, without labels, and one that is damaged."""
    root, source = tmp_path_factory.mktemp("pictures"), DigitsSource("validation")
    for index in range(70):
        write(root / f"{index:02d}.png", source.read(index).data)
    write(root / "damaged.png", b"no picture")
    return root


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def test_predictions_are_those_of_an_evaluation(trained, pictures, tmp_path) -> None:
    labels = DigitsSource("validation").labels.values
    for path in pictures.glob("[0-9]*.png"):
        write(tmp_path / "labeled" / str(labels[int(path.stem)]) / path.name, path.read_bytes())
    labeled = ["--checkpoint", trained, "--data", tmp_path / "labeled", "--tokenizer", digits().tokenizer]
    call(predict, *labeled, "--out", tmp_path / "labels")
    call(evaluate, *labeled, "--split", "None", "--out", tmp_path / "evaluation")
    rows = sorted(rows_of(tmp_path / "labels"), key=lambda row: row["name"][-6:])
    right = sum(row["class"] == row["name"][0] for row in rows)
    assert 100 * right / 70 == pytest.approx(result_of(tmp_path / "evaluation")["top1"])
    probabilities = [float(rows[0][name]) for name in ("probability", *(f"probability_{n}" for n in range(2, 6)))]
    assert probabilities == sorted(probabilities, reverse=True) and 0.1 < sum(probabilities) <= 1.0001
    call(predict, "--checkpoint", trained, "--out", tmp_path / "digits")
    assert len(rows_of(tmp_path / "digits")) == 360

    line = ["--checkpoint", trained, "--data", pictures, "--tokenizer", digits().tokenizer, "--workers", 0]
    with pytest.raises(
        UserError, match=r"^damaged.png: cannot be read .*; repair or remove it, or pass --skip-errors"
    ):
        call(predict, *line, "--out", tmp_path / "stopped")
    finished = distributed(2, RECIPES / "predict.py", *line, "--skip-errors", "--out", tmp_path / "two")
    assert finished.returncode == 0, finished.stderr
    files = rows_of(tmp_path / "two")
    assert [row["name"] for row in files] == [f"{index:02d}.png" for index in range(70)]
    assert [row["class"] for row in files] == [row["class"] for row in rows]
    assert (tmp_path / "two/skipped.txt").read_text().startswith("damaged.png: ")


def test_vectors_of_pictures(trained, pictures, tmp_path) -> None:
    line = ["--checkpoint", trained, "--data", pictures, "--tokenizer", digits().tokenizer, "--skip-errors"]
    call(embed, *line, "--workers", 0, "--out", tmp_path / "one")
    finished = distributed(2, RECIPES / "embed.py", *line, "--out", tmp_path / "two")
    assert finished.returncode == 0, finished.stderr
    one, two = (pq.read_table(tmp_path / name / "embeddings.parquet") for name in ("one", "two"))
    assert one["name"].to_pylist() == two["name"].to_pylist() == [f"{index:02d}.png" for index in range(70)]
    vectors, others = (np.array(table["vector"].to_pylist()) for table in (one, two))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) and np.allclose(vectors, others, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "one").glob("*.p*")) == ["embeddings.parquet", "nearest.png"]


def test_what_does_not_fit_is_refused(trained, pictures, tokenizer, tmp_path) -> None:
    untrained = save_untrained(tmp_path)
    for recipe, line, message in (
        (predict, [], "no model: name a run's folder or a model file"),
        (predict, ["smoke", "--checkpoint", untrained], "has no classification head"),
        (
            predict,
            ["--checkpoint", trained, "--data", pictures],
            "takes tokens: name its tokenizer with --tokenizer",
        ),
        (embed, ["--checkpoint", trained, "--data", pictures, "--tokenizer", tokenizer], "is not the codebook"),
        (embed, ["--checkpoint", trained, "--data", tmp_path / "gone"], "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            call(recipe, *line, "--overwrite", "--out", tmp_path / "out")


def save_untrained(folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_pretrained(path, tiny_mtm(), digits_codebook())
    return path
