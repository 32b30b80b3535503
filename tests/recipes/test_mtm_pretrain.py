"""Recipes as a user runs them: through the command line, killed, resumed, on two processes, with bad input."""

import dataclasses
import importlib
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import mtm_pretrain
import numpy as np
import probe
import pytest
import torch
from safetensors.torch import load_file
from support.paths import RECIPES
from support.running import distributed, kill_when, metrics, run

from seitpp import StoreWriter
from seitpp.data.digits import digits
from seitpp.engine.probe import ProbeError
from seitpp.recipe import rehearse, run_recipe

STEPS, CHECKPOINT_STEPS = 22, 6  # of the smoke preset: 2 epochs of 11 steps, a checkpoint every half epoch


def what_was_learned(folder: Path) -> list[tuple]:
    return [
        (line["step"], line["loss"], line["grad_norm"], line["lr"], line["mask_ratio"]) for line in metrics(folder)
    ]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """An uninterrupted run of the smoke preset, launched as the README says."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    line = ["accelerate", "launch", str(RECIPES / "mtm_pretrain.py"), "smoke", "--out", str(folder)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    finished = subprocess.run(line, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 90  # however busy the machine is
    return folder


def test_result_and_report(smoke: Path) -> None:
    result = json.loads((smoke / "result.json").read_text())
    for name in ("linear_probe_top1", "linear_probe_top1_untrained", "knn_top1", "knn_top1_untrained"):
        assert result[name] * 3.6 == pytest.approx(round(result[name] * 3.6)), "a percentage of 360 images"
    assert 40 < result["payload_bytes_per_image"] < 50
    assert result["images_per_second"] > 0 and result["seconds"] > 0 and result["steps"] == STEPS
    page = (smoke / "report.html").read_text()
    assert [sentence.split(":")[0] for sentence in result["findings"]] == [
        "Not learning yet",
        "The encoder is not clearly better than an untrained one",
    ]
    assert all(sentence in page for sentence in result["findings"])
    for picture in ("loss.png", "reconstructions.png"):
        assert picture in page and (smoke / picture).read_bytes().startswith(b"\x89PNG")
    assert (smoke / "model.safetensors").stat().st_mode & 0o044, "readable by others where the umask allows it"


def test_metrics_have_every_step_and_the_loss_falls_from_ln_k(smoke: Path) -> None:
    lines = metrics(smoke)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    losses = [line["loss"] for line in lines]
    assert abs(losses[0] - np.log(64)) < 0.05 and np.mean(losses[-5:]) < losses[0] - 0.05
    assert lines[0]["lr"] == 0 and lines[11]["lr"] == pytest.approx(3e-3)
    for name in ("images_per_second", "data_wait", "mfu", "memory_gib", "accuracy"):
        assert lines[-1][name] >= 0


def test_killed_in_mid_epoch_and_resumed_gives_the_same_bits(smoke: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    file = folder / "metrics.jsonl"
    kill_when(
        lambda: file.exists() and file.read_text().count("\n") >= CHECKPOINT_STEPS + 2,
        *("mtm_pretrain", "smoke", "--out", folder),
        logs=tmp_path,
    )
    assert len(metrics(folder)) < STEPS and not (folder / "result.json").exists()

    resumed = run("mtm_pretrain", "smoke", "--out", folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "from step 6" in resumed.stdout or "from step 12" in resumed.stdout or "from step 18" in resumed.stdout
    assert what_was_learned(folder) == what_was_learned(smoke)
    last = f"checkpoints/step-{STEPS:08d}"
    for name in ("model.safetensors", f"{last}/model.safetensors", f"{last}/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (smoke / name).read_bytes(), name


@pytest.mark.parametrize(
    "recipe", ["mtm_pretrain", "seit_train", "finetune", "tokenadapt_train", "tokenizer_train"]
)
def test_dry_run_tries_every_part_and_keeps_nothing(
    recipe: str, smoke: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module = importlib.import_module(recipe)
    changes = {"checkpoint": str(smoke)} if recipe == "finetune" else {}
    rehearse(module.main, dataclasses.replace(module.PRESETS["smoke"], dry_run=True, **changes))
    printed = capsys.readouterr().out
    exported = recipe not in ("tokenadapt_train", "tokenizer_train")
    assert f"resumed, evaluated, reported{', exported' if exported else ''} in" in printed
    if recipe != "tokenizer_train":
        assert "from step 0" in printed and "from step 1" in printed
    assert not list(tmp_path.iterdir())


def test_two_processes_and_accumulation_train_the_same_model(tmp_path: Path) -> None:
    """Without dropout, which is drawn for each process."""
    one, two = tmp_path / "one", tmp_path / "two"
    line = ["smoke", "--dropout", "0", "--epochs", "1", "--warmup-epochs", "0.5"]
    alone = run("mtm_pretrain", *line, "--out", one)
    assert alone.returncode == 0, alone.stderr
    line += ["--accumulation", "2", "--workers", "1"]
    together = distributed(2, RECIPES / "mtm_pretrain.py", *line, "--out", two)
    assert together.returncode == 0, together.stderr
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
    assert (first["processes"], second["processes"]) == (1, 2)
    for alone_line, together_line in zip(metrics(one), metrics(two), strict=True):
        assert together_line["mask_ratio"] == alone_line["mask_ratio"] and together_line["lr"] == alone_line["lr"]
        assert together_line["loss"] == pytest.approx(alone_line["loss"], abs=1e-6)
    for name, value in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(load_file(two / "model.safetensors")[name], value, atol=1e-4, rtol=0)
    for name in ("linear_probe_top1", "knn_top1"):
        assert abs(first[name] - second[name]) * 3.6 < 2.5, "at most 2 of 360 images, by rounding"
    for name in ("masked_loss_train", "masked_loss_validation"):
        assert second[name] == pytest.approx(first[name], abs=1e-5)


def test_probe_repeats_the_figures_of_the_run(smoke: Path, tmp_path: Path) -> None:
    finished = run("probe", "--checkpoint", smoke, "--out", tmp_path / "probe")
    assert finished.returncode == 0, finished.stderr
    found, expected = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "probe", smoke))
    for name in ("linear_probe_top1", "knn_top1"):
        assert found[name] == expected[name]


def small_store(path: Path, grid: tuple[int, int], seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for split, images in (("train", 200), ("validation", 40)):
        with StoreWriter(path, codebook=CODEBOOK * seed, grid=grid, split=split, class_names=["a", "b"]) as writer:
            writer.add_batch(generator.integers(64, size=(images, *grid)), generator.integers(2, size=images))
    return path


CODEBOOK = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)


def test_any_store_trains_without_its_tokenizer(tmp_path: Path) -> None:
    store = small_store(tmp_path / "store", (12, 8), seed=1)
    finished = run("mtm_pretrain", "smoke", "--store", store, "--crop-size", "6", "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run/reconstructions.png").exists()


def call(monkeypatch, *arguments: object) -> None:
    """The command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["mtm_pretrain.py", *map(str, arguments)])
    run_recipe(mtm_pretrain.main, mtm_pretrain.PRESETS, "digits", settle=mtm_pretrain.choose)


def test_a_finished_run_that_is_resumed_keeps_its_result(smoke: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(smoke, tmp_path / "run")
    call(monkeypatch, "smoke", "--out", tmp_path / "run", "--resume")
    results = [json.loads((folder / "result.json").read_text()) for folder in (smoke, tmp_path / "run")]
    assert results[0].keys() == results[1].keys() and results[0]["images_per_second"] > 0
    assert {name for name in results[0] if results[0][name] != results[1][name]} <= {"seconds", "git_commit"}


def own_images(path: Path, labels: list, grid: tuple[int, int]) -> Path:
    """A store with the split train alone."""
    ids = np.random.default_rng(0).integers(40, size=(len(labels), *grid))
    with StoreWriter(path, codebook=CODEBOOK, grid=grid) as writer:
        writer.add_batch(ids, labels)
    return path


@pytest.mark.parametrize("grid", [(7, 9), (2, 4)])
def test_a_store_of_own_images_is_all_that_must_be_named(
    grid: tuple[int, int], tmp_path: Path, monkeypatch, capsys
) -> None:
    """No preset, no labels, no validation split; the grid is not square."""
    store, out = own_images(tmp_path / "tokens", [None] * 100, grid), tmp_path / "run"
    call(monkeypatch, "--store", store, "--epochs", "2", "--out", out)
    printed, result = capsys.readouterr().out, json.loads((out / "result.json").read_text())
    assert re.search(r"^preset +auto +95 training images", printed, re.MULTILINE)
    assert "\nepochs                 2              you said\n" in printed
    assert (
        "\nmodel                  mtm_vit_nano   fewer than 10,000 images: the encoder of the digits\n" in printed
    )
    assert "\ntrackers " not in printed  # at its default
    assert json.loads((out / "config.json").read_text())["preset"] == "auto"
    held_out = "tokens has no split 'validation': every 20th image of its split 'train' is held out, 5 of 100"
    assert held_out in printed and result["data"]["validation"] == held_out
    assert result["data"]["images"] == {"train": 95, "validation": 5} and result["training_images"] == 95
    assert not any("top1" in name for name in result) and result["masked_loss_validation"] > 0
    reason = "one label for each image, of at least two classes: the 95 training images have none"
    assert f"no probes: linear probe and k-NN need {reason}" in printed
    assert [sentence.split(":")[0] for sentence in result["findings"]] == ["Not learning yet", "No probes"]
    assert not (out / "probes.png").exists() and "findings:\n- Not learning yet" in printed
    with pytest.raises(ProbeError, match=reason):
        probe.main(replace(probe.PRESETS["smoke"], checkpoint=str(out), store=str(store), out=str(tmp_path / "p")))


def test_images_without_a_label_are_not_probed(tmp_path: Path, capsys) -> None:
    labels = [None if index % 2 else index % 3 for index in range(1, 101)]
    store, out = own_images(tmp_path / "tokens", labels, (4, 4)), tmp_path / "run"
    mtm_pretrain.main(
        replace(mtm_pretrain.PRESETS["smoke"], store=str(store), batch_size=32, epochs=1, out=str(out))
    )
    assert "probes: on the 45 training and 5 validation images that have labels" in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text())["knn_top1"] * 5 % 100 == pytest.approx(0, abs=1e-9)


def test_a_grid_that_cannot_be_masked_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    for preset, grid in (([], (2, 2)), (["smoke"], (2, 2)), ([], (1, 1)), (["smoke", "--crop-size", "2"], (8, 8))):
        store = own_images(tmp_path / f"tokens{len(list(tmp_path.iterdir()))}", [0] * 100, grid)
        with pytest.raises(SystemExit):
            call(monkeypatch, *preset, "--store", store, "--batch-size", "8", "--out", tmp_path / "run")
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and "one to hide and one to see" in error[0]


def test_the_first_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    finished = run("mtm_pretrain", "smoke", "--base-lr", "1e20", "--log-steps", "5", "--out", tmp_path / "run")
    assert finished.returncode == 2
    message = finished.stderr.splitlines()[-1]
    assert message.startswith("error: loss is nan at step 3 on rank 0") and "no checkpoint yet" in message
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/result.json").exists()


def refused(*cases: tuple[list, list]) -> None:
    """Each (command line, words): exit status 2 and one line on stderr that holds the words."""
    for line, words in cases:
        finished = run(*line)
        assert finished.returncode == 2, (line, finished.stderr)
        lines = [text for text in finished.stderr.splitlines() if text.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: "), finished.stderr
        for word in words:
            assert str(word) in lines[0], lines[0]


def test_what_is_wrong_is_refused_and_no_folder_is_touched(smoke: Path, tmp_path: Path) -> None:
    other = small_store(tmp_path / "other", (8, 8), seed=2)
    cut = small_store(tmp_path / "cut", (8, 8), seed=2)
    shard = next((cut / "train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    mixed, out = tmp_path / "mixed", ["--out", tmp_path / "run"]
    for split in ("train", "validation"):
        with StoreWriter(mixed, codebook=CODEBOOK, grid=None, split=split) as writer:
            writer.add_batch([np.zeros((4, 6), int), np.ones((6, 6), int)], [0, 1])
    pretrain = ["mtm_pretrain", "smoke"]
    before = {path: path.stat().st_mtime_ns for path in smoke.rglob("*")}
    refused(
        (["mtm_pretrain", "smok"], ["unknown preset 'smok'", "did you mean smoke?"]),
        ([*pretrain, "--batchsize", "3"], ["unknown flag --batchsize", "--batch-size"]),
        ([*pretrain, "--trackers", "no_such_tracker"], ["no_such_tracker", "seitpp[trackers]"]),
        ([*pretrain, "--accumulation", "3"], ["global batch 128", "3 accumulation steps"]),
        (["probe"], ["--checkpoint"]),
        ([*pretrain, "--out", smoke], [smoke, "not empty", "--resume"]),
        ([*pretrain, "--out", smoke, "--resume", "--seed", "1"], ["seed 0 -> 1"]),
        ([*pretrain, "--out", smoke.parent, "--resume"], [smoke.parent, "holds no run"]),
        (["probe", "--checkpoint", tmp_path / "none", *out], ["no model file"]),
        ([*pretrain, "--store", mixed, "--batch-size", "2", *out], [mixed, "expected one grid"]),
        (["probe", "--checkpoint", smoke, "--store", other, *out], ["codebook", other, smoke]),
        (["mtm_pretrain", "published", *out], ["needs --store"]),
        ([*pretrain, "--crop-size", "28", *out], ["--crop-size 28", "(8, 8)", digits().store]),
        ([*pretrain, "--store", cut, *out], [shard]),
        ([*pretrain, "--store", tmp_path / "none", *out], [tmp_path / "none"]),
    )
    assert {path: path.stat().st_mtime_ns for path in smoke.rglob("*")} == before
    assert not (tmp_path / "run").exists(), "no folder of a run that could not start"
