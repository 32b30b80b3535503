"""Several classes an image, rare classes, some of the classes, and grids that are no squares, in recipes."""

import csv
import shutil
from pathlib import Path

import evaluate
import finetune
import mtm_pretrain
import numpy as np
import pytest
import seit_train
import torch
from PIL import Image
from support.running import accuracies, call, lines_of, refused, result_of

from seitpp import StoreWriter, TokenStore
from seitpp.export import export_model
from seitpp.models import load_pretrained

RANDOM = np.random.default_rng(0)
CODEBOOK = RANDOM.standard_normal((40, 16)).astype("f4")
# Two steps an epoch, of 32 of the 64 training images.
LENGTH = ["--batch-size", 32, "--warmup-epochs", 1, "--checkpoint-epochs", 1, "--evaluation-epochs", 2]


def store_of(path: Path, labels: dict[str, list], grid: tuple[int, int], names: str = "abcde") -> Path:
    """A store whose images show their classes: class c paints three columns with code c."""
    several = isinstance(labels["train"][0], tuple)
    for split, own in labels.items():
        ids = RANDOM.integers(5, 40, size=(len(own), *grid))
        for image, label in zip(ids, own, strict=True):
            for one in label if several else (label,):
                column = 3 * "abcde".index(names[one]) % grid[1]
                image[:, column : column + 3] = "abcde".index(names[one])
        settings = {"codebook": CODEBOOK, "grid": grid, "split": split, "class_names": list(names)}
        with StoreWriter(path, **settings, multi_label=several) as writer:
            writer.add_batch(ids, own)
    return path


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """Of 8 x 16 tokens, with 0 to 5 classes an image; no validation image has class e."""
    labels = {
        "train": [tuple(np.flatnonzero(RANDOM.random(5) < 0.4).tolist()) for _ in range(64)],
        "validation": [tuple(np.flatnonzero(RANDOM.random(4) < 0.4).tolist()) for _ in range(21)],
    }
    return store_of(tmp_path_factory.mktemp("several") / "store", labels, (8, 16))


@pytest.fixture(scope="module")
def oblong(tmp_path_factory) -> Path:
    """Of 8 x 16 tokens; of 64 training images 40 are of class a, 6 of each other class."""
    labels = {"train": [0] * 40 + [1, 2, 3, 4] * 6, "validation": [0, 1, 2, 3, 4] * 4}
    return store_of(tmp_path_factory.mktemp("oblong") / "store", labels, (8, 16))


@pytest.fixture(scope="module")
def classifier(oblong: Path, tmp_path_factory) -> Path:
    """A run with every class equally often, which knows a, b, c, d and e."""
    out = tmp_path_factory.mktemp("classifier") / "run"
    call(
        seit_train, "smoke", "--store", oblong, *LENGTH, "--epochs", 4, "--class-balance", "sampling", "--out", out
    )
    return out


def resumed(module, line: list, out: Path, again: Path) -> None:
    """Without its last checkpoint, the run goes on with the same bits."""
    shutil.copytree(out, again)
    shutil.rmtree(sorted((again / "checkpoints").iterdir())[-1])
    call(module, *line, "--out", again, "--resume")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    losses = [[at["loss"] for at in lines_of(run / "metrics.jsonl")] for run in (out, again)]
    assert losses[0] == losses[1] and len(losses[0]) > 2


def test_several_classes_from_training_to_export(several: Path, tmp_path: Path) -> None:
    line = ["smoke", "--store", several, *LENGTH, "--epochs", 4, "--class-balance", "weights"]
    call(seit_train, *line, "--out", tmp_path / "run")
    first, last = (lines_of(tmp_path / "run/metrics.jsonl")[at]["loss"] for at in (0, -1))
    assert 0.3 < last < first < 1.5, "a binary cross-entropy begins at about ln 2"
    assert set(lines_of(tmp_path / "run/evaluations.jsonl")[0]) == {"step", "mAP", "mAP_ema"}
    resumed(seit_train, line, tmp_path / "run", tmp_path / "again")

    call(evaluate, "smoke", "--checkpoint", tmp_path / "run", "--store", several, "--out", tmp_path / "judged")
    found, rows = result_of(tmp_path / "judged"), list(csv.DictReader((tmp_path / "judged/per_class.csv").open()))
    assert found["mAP"] == result_of(tmp_path / "run")["mAP_ema"] and "top1" not in found
    assert [row["class"] for row in rows] == list("abcde") and rows[4]["average_precision"] == ""
    mean = np.mean([float(row["average_precision"]) for row in rows[:4]])
    assert mean == pytest.approx(found["mAP"], abs=0.01)

    export_model(tmp_path / "run", tmp_path / "exported")
    saved = load_pretrained(tmp_path / "exported")
    assert saved.multi_label and saved.window == (8, 16) and saved.class_names == list("abcde")
    assert "5 independent classes" in (tmp_path / "exported/README.md").read_text()

    tuned = ["smoke", "--store", several, *LENGTH, "--epochs", 1, "--warmup-epochs", 0, "--smoothing", 0]
    call(finetune, *tuned, "--checkpoint", tmp_path / "exported", "--out", tmp_path / "tuned")
    assert lines_of(tmp_path / "tuned/metrics.jsonl")[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert result_of(tmp_path / "tuned")["mAP"] > 0 and load_pretrained(tmp_path / "tuned").multi_label


def test_oblong_maps_from_training_to_export(oblong: Path, classifier: Path, tmp_path: Path) -> None:
    line = ["smoke", "--store", oblong, *LENGTH, "--epochs", 4, "--class-balance", "sampling"]
    resumed(seit_train, line, classifier, tmp_path / "again")
    call(evaluate, "smoke", "--checkpoint", classifier, "--store", oblong, "--out", tmp_path / "judged")
    assert accuracies(tmp_path / "judged") == accuracies(classifier, "_ema")
    part = ["--eval-window", 6, 12, "--crop-mode", "window", "--size", 6, 12]
    call(seit_train, *line, *part, "--epochs", 1, "--out", tmp_path / "part")
    assert load_pretrained(tmp_path / "part").model.patch_embed.img_size == (6, 12)
    call(evaluate, "smoke", "--checkpoint", tmp_path / "part", "--store", oblong, "--out", tmp_path / "window")
    assert accuracies(tmp_path / "window") == accuracies(tmp_path / "part", "_ema")
    card = (export_model(classifier, tmp_path / "exported") / "README.md").read_text()
    assert "EvalView((8, 16), store.books, (8, 16))" in card
    assert load_pretrained(tmp_path / "exported").model.patch_embed.img_size == (8, 16)


def test_oblong_ids_and_oblong_pictures(oblong: Path, tmp_path: Path) -> None:
    few = ["smoke", *LENGTH, "--epochs", 1, "--warmup-epochs", 0]
    call(mtm_pretrain, *few, "--store", oblong, "--crop-size", 6, 12, "--out", tmp_path / "mtm")
    line = [*few, "--epochs", 2, "--checkpoint", tmp_path / "mtm", "--store", oblong, "--size", 8, 12]
    call(finetune, *line, "--out", tmp_path / "tokens")
    resumed(finetune, line, tmp_path / "tokens", tmp_path / "again")
    saved = load_pretrained(tmp_path / "tokens")
    assert saved.window == (8, 12) == saved.model.patch_embed.img_size
    call(evaluate, "smoke", "--checkpoint", tmp_path / "tokens", "--store", oblong, "--out", tmp_path / "judged")
    assert accuracies(tmp_path / "judged") == accuracies(tmp_path / "tokens")

    for number in range(48):
        folder = tmp_path / "pictures" / ("validation" if number < 16 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = RANDOM.integers(256, size=(40, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    pictures = ["--data", tmp_path / "pictures"]
    line = [*few, *pictures, "--size", 32, 64, "--checkpoint", tmp_path / "mtm", "--class-balance", "sampling"]
    call(finetune, *line, "--out", tmp_path / "pixels")
    assert load_pretrained(tmp_path / "pixels").model.patch_embed.img_size == (32, 64)
    call(evaluate, "smoke", "--checkpoint", tmp_path / "pixels", *pictures, "--out", tmp_path / "seen")
    assert accuracies(tmp_path / "seen") == accuracies(tmp_path / "pixels")

    flat, names = tmp_path / "flat", {}
    flat.mkdir()
    for picture in (tmp_path / "pictures" / "validation").rglob("*.png"):
        names[picture.name] = picture.parent.name
        shutil.copy(picture, flat)
    (tmp_path / "labels.csv").write_text("name,label\n" + "".join(f"{a},{b}\n" for a, b in names.items()))
    flat = ["--data", flat, "--labels", tmp_path / "labels.csv", "--split", None]
    call(evaluate, "smoke", "--checkpoint", tmp_path / "pixels", *flat, "--out", tmp_path / "flat-seen")
    assert accuracies(tmp_path / "flat-seen") == accuracies(tmp_path / "pixels")


def test_some_of_the_classes_are_judged_among_themselves(oblong: Path, classifier: Path, tmp_path: Path) -> None:
    """A store of classes e and b, and the same two of a store with all five; the model's other outputs are out."""
    some = store_of(tmp_path / "some", {"train": [0, 1], "validation": [0, 1, 1] * 5}, (8, 16), names="eb")
    (tmp_path / "names.txt").write_text("e\n\nb\n")
    for name, data in (
        ("some", ["--store", some]),
        ("all", ["--store", oblong, "--classes", tmp_path / "names.txt"]),
    ):
        call(evaluate, "smoke", "--checkpoint", classifier, *data, "--out", tmp_path / f"judged-{name}")
        rows = list(csv.DictReader((tmp_path / f"judged-{name}/per_class.csv").open()))
        assert [row["class"] for row in rows] == ["e", "b"]
        pairs = list(csv.DictReader((tmp_path / f"judged-{name}/confusion.csv").open()))
        assert {pair["predicted"] for pair in pairs} <= {"e", "b"}
        counted = {pair["label"]: 0 for pair in pairs}
        for pair in pairs:
            counted[pair["label"]] += int(pair["images"])
        assert counted == ({"e": 5, "b": 10} if name == "some" else {"e": 4, "b": 4})
    store = TokenStore(some, "validation")
    model = load_pretrained(classifier).model
    maps = torch.from_numpy(store.codebook)[store.ids(np.arange(15)).astype(np.int64)].permute(0, 3, 1, 2)
    with torch.no_grad():
        right = model(maps)[:, [4, 1]].argmax(dim=1).numpy() == store.labels
    assert accuracies(tmp_path / "judged-some")[0] == pytest.approx(100 * right.mean())


def test_labels_that_do_not_fit_are_refused(
    several: Path, oblong: Path, classifier: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    (tmp_path / "other.txt").write_text("a\nzebra\n")
    out, few = ["smoke", "--out", tmp_path / "run"], {"train": [0, None] * 32, "validation": [1, 0]}
    partly = store_of_missing(tmp_path / "partly", few)
    judge = ["--checkpoint", classifier, "--store"]
    for module, arguments, *words in (
        (seit_train, ["--store", several, "--class-balance", "sampling"], "--class-balance weights"),
        (seit_train, ["--store", partly], "seit_train needs classes", "32 of 64", partly),
        (finetune, ["--store", partly, "--checkpoint", classifier], "finetune needs classes", partly),
        (evaluate, [*judge, partly, "--split", "train"], "evaluate needs classes", partly),
        (evaluate, [*judge, oblong, "--classes", tmp_path / "twice.txt"], "each once", tmp_path / "twice.txt"),
        (evaluate, [*judge, oblong, "--classes", tmp_path / "other.txt"], "'zebra'", "5 classes", classifier),
        (evaluate, [*judge, oblong, "--eval-window", 8, 17], "8 x 17", "8 x 16"),
    ):
        refused(capfd, monkeypatch, module, [*out, *arguments], *words)


def store_of_missing(path: Path, labels: dict[str, list]) -> Path:
    """A store of 8 x 16 tokens where None is no label."""
    for split, own in labels.items():
        settings = {"codebook": CODEBOOK, "grid": (8, 16), "split": split, "class_names": list("ab")}
        with StoreWriter(path, **settings) as writer:
            for label in own:
                writer.add(np.zeros((8, 16), int), label)
    return path
