"""The recipe of robustness on models of milliseconds: tokens and pixels, resumes, processes and bad inputs."""

import json
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import robustness
import timm
import torch
from support.paths import RECIPES
from support.pictures import encoded, write
from support.running import call, digits_codebook, distributed, lines_of, refused, result_of

import seitpp.models  # noqa: F401 (registers our models in timm)
from downstream.robustness.sets import wnids
from seitpp.codebook import codebook_fingerprint
from seitpp.data.digits import DigitsSource, digits
from seitpp.engine.folder import unknown_files
from seitpp.images.batches import ImageDataset
from seitpp.models import save_classifier
from seitpp.plots import paint_codes
from seitpp.tokenizers import FeatureKMeans

NAMES = [str(digit) for digit in range(10)]
# Of a run: its time, its processes, and the tree that it was run in.
OF_THE_RUN = ("seconds", "processes", "git_commit")


def pixel_model(path: Path, size: int = 32, names: list[str] = NAMES) -> Path:
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, embed_dim=24, depth=1, num_classes=len(names))
    save_classifier(path, model, None, class_names=names)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Untrained models of the digits' classes, for each kind of input."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for kind, more in {"seit": {}, "mtm": {"num_codes": 64}}.items():
        model = timm.create_model(f"{kind}_vit_nano", img_size=8, in_chans=32, num_classes=10, **more)
        save_classifier(folder / kind, model, digits_codebook(), class_names=NAMES)
    pixel_model(folder / "pixels")
    return {kind: folder / kind for kind in ("seit", "mtm", "pixels")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """70 digits as files in class folders: two batches of attacks."""
    root, source = tmp_path_factory.mktemp("pictures"), DigitsSource("validation")
    for index in range(70):
        write(root / str(source.labels.values[index]) / f"{index:02d}.png", source.read(index).data)
    return root


def figures(folder: Path) -> dict:
    return {name: value for name, value in result_of(folder).items() if name not in OF_THE_RUN}


@pytest.mark.parametrize("kind", ["seit", "mtm"])
def test_tokens_on_any_number_of_processes_and_resumed(
    kind: str, models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """The same figures from two processes, and from the rows of an interrupted run, which are not redone."""
    given = ["--data", pictures, "--split", "None", "--tokenizer", digits().tokenizer]
    line = ["smoke", "--checkpoint", models[kind], *given, "--attack-images", 100, "--out"]
    call(robustness, *line, tmp_path / "one")
    whole, table = figures(tmp_path / "one"), figures(tmp_path / "one")["corruptions"]
    assert list(table["table"]) == ["gaussian_noise", "fog"] and table["mCE"] is None
    changed = [row["tokens_changed"] for row in table["table"]["gaussian_noise"].values()]
    assert 0 < changed[0] < changed[4] <= 100
    attack = whole["attacks"]["8/255"]
    assert set(attack["correct"]) == {"clean", "pgd_straight_through", "pgd_softmax"}
    assert attack["tokens_changed"]["pgd_softmax"] > 0 and whole["attacks"]["images"] == 70
    assert (tmp_path / "one/corrupted.png").read_bytes().startswith(b"\x89PNG")
    assert unknown_files(tmp_path / "one") == [], "--overwrite would refuse them"
    if kind == "seit":
        finished = distributed(2, RECIPES / "robustness.py", *line, tmp_path / "two")
        assert finished.returncode == 0, finished.stderr
        assert figures(tmp_path / "two") == whole
        return
    rows = tmp_path / "one/metrics.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    marked = json.loads(lines[2])
    marked["values"]["top1"] = 12.5
    (tmp_path / "one/result.json").unlink()
    rows.write_bytes(b"".join([*lines[:2], json.dumps(marked).encode() + b"\n", *lines[3:7], lines[7][:20]]))
    call(robustness, *line, tmp_path / "one", "--resume")
    assert [line["row"] for line in lines_of(rows)] == [json.loads(line)["row"] for line in lines]
    resumed = figures(tmp_path / "one")
    assert resumed["corruptions"]["table"][marked["row"].split()[0]].pop("3")["top1"] == 12.5
    whole["corruptions"]["table"][marked["row"].split()[0]].pop("3")
    assert resumed["corruptions"].pop("mean_top1") != whole["corruptions"].pop("mean_top1")
    assert resumed == whole


def test_pixels_take_the_same_command(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """Clean accuracies are those of evaluate.py; ImageNet-C's folders and V2's are read as they are."""
    prepared = tmp_path / "c"
    for severity, level in ((1, 0), (5, 255)):
        for name in ("3", "7"):
            image = encoded(np.full((32, 32, 3), level, np.uint8))
            write(prepared / f"weather/fog/{severity}/{name}/a.png", image)
    given = ["--data", pictures, "--split", "None", "--out"]
    sets = ["--imagenet-c", prepared, "--imagenet-v2", pictures, "--suite", "corruptions", "shift", "attacks"]
    for kind in ("pixels", "seit"):
        tokenizer = [] if kind == "pixels" else ["--tokenizer", digits().tokenizer]
        line = ["smoke", "--checkpoint", models[kind], *tokenizer, *given]
        call(robustness, *line, tmp_path / kind, *sets)
        call(evaluate, *line, tmp_path / f"evaluate-{kind}")
        found, expected = result_of(tmp_path / kind), result_of(tmp_path / f"evaluate-{kind}")
        assert found["top1"] == expected["top1"] == found["imagenet_v2"]["top1"]
        assert found["imagenet_v2"]["images"] == 70
        table = found["imagenet_c"]["table"]
        assert list(table) == ["fog"] and list(table["fog"]) == ["1", "5"]
        assert all(row["top1"] == 50 and row["images"] == 2 for row in table["fog"].values())
        assert "corruptions" not in found and not (tmp_path / kind / "corrupted.png").exists()
        columns = found["attacks"]["8/255"]
        assert ("tokens_changed" in columns) == (kind == "seit") == ("pgd_pixels" not in columns["correct"])


def test_tokens_of_several_digits(pictures: Path, capfd, monkeypatch, tmp_path: Path) -> None:
    """Corruptions take them, and draw their codes where they decode to no picture; attacks refuse them."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", img_size=32, num_classes=0)
    images = [ImageDataset(DigitsSource("validation"), (32, 32)).__getitems__(list(range(100))).images]
    tokenizer = FeatureKMeans.fit(images, network, image_size=32, num_codes=8, digits=2, code_dim=6)
    tokenizer.save(tmp_path / "tokenizer.safetensors")
    model = timm.create_model("seit_vit_nano", img_size=2, in_chans=6, num_classes=10)
    books = tokenizer.books.to_books()
    save_classifier(tmp_path / "model", model, codebook_fingerprint(books), class_names=NAMES)
    line = ["smoke", "--checkpoint", tmp_path / "model", "--data", pictures, "--split", "None"]
    line += ["--tokenizer", tmp_path / "tokenizer.safetensors", "--out", tmp_path / "run"]
    call(robustness, *line, "--suite", "corruptions")
    assert (tmp_path / "run/corrupted.png").read_bytes().startswith(b"\x89PNG")
    noise = result_of(tmp_path / "run")["corruptions"]["table"]["gaussian_noise"]
    assert 0 < noise["5"]["tokens_changed"] <= 100
    first = paint_codes(tokenizer.encode(images[0][:1] / 255), tokenizer.books)
    assert torch.equal(first, paint_codes(tokenizer.encode(images[0][:1] / 255), books)) and first.std() > 0
    refused(
        capfd, monkeypatch, robustness, [*line, "--overwrite"], "gives a token 2 digits, attacks expect one id"
    )


def test_bad_inputs_are_one_line(models, pictures: Path, capfd, monkeypatch, tmp_path: Path) -> None:
    small = pixel_model(tmp_path / "small", 16)
    of_imagenet = pixel_model(tmp_path / "imagenet", names=list(wnids()[:10]))
    data, out = ["--data", pictures, "--split", "None"], ["--out", tmp_path / "run"]
    cases = [
        (["--checkpoint", small, *data], "images of 16 x 16 pixels, expected at least 32"),
        (["--checkpoint", of_imagenet, *data], "10 of 10 classes", "not among the 10", "the first is '0'"),
        (["--checkpoint", models["pixels"], *data, "--imagenet-r", pictures / "3"], "without class folders"),
        (["--checkpoint", models["pixels"], "--imagenet-r", pictures], "--imagenet-r without --data"),
        (["--checkpoint", models["seit"], *data], "takes tokens: name its tokenizer with --tokenizer"),
        (["--checkpoint", models["pixels"], *data, "--tokenizer", digits().tokenizer], "takes pixels: leave"),
        ([*data], "no model: name a run's folder"),
        (["--suite", "shift"], "--suite shift without a set"),
        ([*data, "--imagenet-c", pictures, "--suite", "attacks"], "--imagenet-c belongs to suite corruptions"),
        (["--eps", 300], "--eps 300: expected more than 0"),
    ]
    for arguments, *words in cases:
        refused(capfd, monkeypatch, robustness, ["smoke", *arguments, *out, "--overwrite"], *words)
    for package in ("imagecorruptions", "pyautoattack"):
        monkeypatch.setitem(sys.modules, package, None)
        line = ["smoke", "--checkpoint", models["pixels"], *data, *out, "--overwrite"]
        refused(capfd, monkeypatch, robustness, line, f"needs the package {package}", 'pip install "seitpp[robust')
        monkeypatch.undo()
