"""Training TokenAdapt as a user does: through the command line, killed and resumed, bad input."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenadapt_train
import torch
from PIL import Image
from support.running import metrics, run
from torch import Tensor

from seitpp import tokenizers
from seitpp.augment import Keys, random_geometry
from seitpp.codebook import codebook_fingerprint
from seitpp.data.digits import digits
from seitpp.engine.reconstruction import MEASURES, augmentations
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.models import load_tokenadapt
from seitpp.tokenizers import PatchKMeans

# Six steps of 38 images, a checkpoint after the third.
TINY = replace(tokenadapt_train.PRESETS["smoke"], batch_size=6, epochs=1, warmup_epochs=0.0, checkpoint_epochs=0.5)


def test_smoke_through_the_command_line(tmp_path) -> None:
    out = tmp_path / "run"
    finished = run("tokenadapt_train", "smoke", "--out", out)
    assert finished.returncode == 0, finished.stderr
    lines, result = metrics(out), json.loads((out / "result.json").read_text())
    assert [at["step"] for at in lines] == list(range(1, 23))
    assert lines[0]["loss"] == pytest.approx(math.log(64), abs=1e-4) and lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["accuracy"] > lines[0]["accuracy"]
    for name in ("flip", "rotation", "crop", "together"):
        row = [result[f"{name}_{measure}"] for measure in MEASURES]
        assert f"{name:10}" + "".join(f"{value:21.2f}" for value in row) in finished.stdout
        assert all(0 < value < 100 for value in row) and row[5] > max(row[3:5])
    model, codebook, *_ = load_tokenadapt(out / "model.safetensors")
    tokenizer = tokenizers.load(out / "tokenizer.safetensors")
    assert codebook == codebook_fingerprint(tokenizer.codebook.numpy())
    assert model.grid == model.crop == (8, 8)
    for picture in ("augmented.png", "losses.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for at in range(40):
        pixels = np.random.default_rng(at).integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{at:02}.png")
    return root


class Killed(Exception):
    pass


def test_killed_and_resumed_gives_the_same_bits(folder, tmp_path, monkeypatch) -> None:
    whole, broken, file = tmp_path / "whole", tmp_path / "broken", tmp_path / "tokenizer.safetensors"
    shutil.copy(digits().tokenizer, file)
    config = replace(TINY, data=str(folder), tokenizer=str(file))
    tokenadapt_train.main(replace(config, out=str(whole)))
    crop, calls = tokenadapt_train.crop_and_flip, []

    def crop_until_killed(*arguments) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise Killed
        return crop(*arguments)

    monkeypatch.setattr(tokenadapt_train, "crop_and_flip", crop_until_killed)
    with pytest.raises(Killed):
        tokenadapt_train.main(replace(config, out=str(broken)))
    monkeypatch.undo()
    assert [path.name for path in (broken / "checkpoints").glob("step-*")] == ["step-00000003"]
    tokenizers.load(file).compact(torch.arange(64) + 1).save(file)
    with pytest.raises(
        UserError, match=r"tokenizer\.safetensors has the content"
    ):  # its codes mean something else
        tokenadapt_train.main(replace(config, out=str(broken), resume=True))
    shutil.copy(digits().tokenizer, file)
    tokenadapt_train.main(replace(config, out=str(broken), resume=True))
    for name in ("model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    learned = [[(at["loss"], at["accuracy"], at["grad_norm"]) for at in metrics(run)] for run in (whole, broken)]
    assert learned[0] == learned[1] and len(learned[0]) == 6
    results = [json.loads((run / "result.json").read_text()) for run in (whole, broken)]
    assert results[0]["together_psnr_tokenadapt"] == results[1]["together_psnr_tokenadapt"]


def test_two_photographs_make_their_own_tokenizer(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tokenadapt_train, "FIT_IMAGES", 20)
    tiny = {"width": 64, "heads": 1, "batch_size": 16, "epochs": 2 / 65, "warmup_epochs": 0.0}
    tokenadapt_train.main(replace(tokenadapt_train.PRESETS["photos"], out=str(tmp_path / "run"), **tiny))
    model, codebook, *_ = load_tokenadapt(tmp_path / "run" / "model.safetensors")
    assert (model.grid, model.crop) == ((8, 8), (7, 7)) and model.head.out_features == 391
    tokenizer = tokenizers.load(tmp_path / "run" / "tokenizer.safetensors")
    assert codebook == codebook_fingerprint(tokenizer.codebook.numpy())


@pytest.mark.parametrize(
    ("name", "changed"),
    [("flip", (True, False, False)), ("rotation", (False, True, False)), ("crop", (False, False, True))],
)
def test_evaluation_does_one_thing_to_every_image(name: str, changed: tuple[bool, bool, bool]) -> None:
    law = augmentations(tokenadapt_train.PRESETS["photos"].crop_scale)[name]
    geometry = random_geometry(Keys(0, 0, torch.arange(64)), 8, 7, **law)
    moved = (geometry.matrices != torch.eye(3)).flatten(1).any(dim=1)
    boxed = (geometry.boxes != torch.tensor([0, 0, 7, 7])).any(dim=1)
    assert (geometry.flipped == changed[0]).all() and (moved == changed[1]).all() and boxed.any() == changed[2]
    turned = geometry.matrices[:, :2, :2]
    torch.testing.assert_close(turned @ turned.transpose(1, 2), torch.eye(2).expand(64, 2, 2))
    assert not geometry.matrices[:, :2, 2].any()


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("published", {"precision": "no"}, "preset published needs --data"),
        ("published", {"data": ".", "precision": "no"}, "with --data needs --tokenizer"),
        ("smoke", {"data": "."}, "with --data needs --tokenizer"),
        ("smoke", {"tokenizer": "none.safetensors"}, "no tokenizer file at none.safetensors"),
        ("smoke", {"image_size": 30, "crop_size": 7}, "not a multiple of patch 4"),
        ("smoke", {"crop_size": 9}, "a crop of 9 tokens, which is 36 pixels, expected at most the 32"),
        ("smoke", {"image_size": 64}, "--image-size 64: expected at most --load-size 32"),
    ],
)
def test_bad_settings_are_refused(folder, tmp_path, preset: str, changes: dict, message: str) -> None:
    if "data" in changes:
        changes = {**changes, "data": str(folder)}
    out = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        tokenadapt_train.main(replace(tokenadapt_train.PRESETS[preset], out=str(out), **changes))
    assert not out.exists()


def test_a_folder_and_a_tokenizer_of_the_users(folder, tmp_path) -> None:
    config = replace(TINY, data=str(folder), out=str(tmp_path / "unused"))
    train, held_out = tokenadapt_train.open_data(config, Run("tokenadapt_train", config))
    assert (len(train), len(held_out)) == (38, 2)
    images = train.__getitems__(list(range(38))).images / 255
    PatchKMeans.fit(images, image_size=32, patch=8, num_codes=20, code_dim=6).save(
        tmp_path / "tokenizer.safetensors"
    )
    settings = {"data": str(folder), "tokenizer": str(tmp_path / "tokenizer.safetensors"), "crop_size": 3}
    tokenadapt_train.main(replace(TINY, out=str(tmp_path / "run"), **settings))
    model, *_ = load_tokenadapt(tmp_path / "run" / "model.safetensors")
    assert (model.grid, model.crop, model.head.out_features) == ((4, 4), (3, 3), 20)
    assert not (tmp_path / "run" / "tokenizer.safetensors").exists()
