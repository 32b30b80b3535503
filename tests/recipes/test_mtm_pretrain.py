"""Recipes as a user runs them: through the command line, killed, resumed, on two processes, with bad input."""

import dataclasses
import importlib
import json
import resource
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.paths import RECIPES
from support.running import command, metrics, run, torchrun

from seitpp import StoreWriter
from seitpp.data.digits import digits
from seitpp.recipe import rehearse

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
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 30  # however busy the machine is
    return folder


def test_result_and_report(smoke: Path) -> None:
    result = json.loads((smoke / "result.json").read_text())
    for name in ("linear_probe_top1", "linear_probe_top1_untrained", "knn_top1", "knn_top1_untrained"):
        assert result[name] * 3.6 == pytest.approx(round(result[name] * 3.6)), "a percentage of 360 images"
    assert 40 < result["payload_bytes_per_image"] < 50
    assert result["images_per_second"] > 0 and result["seconds"] > 0 and result["steps"] == STEPS
    page = (smoke / "report.html").read_text()
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
    process = subprocess.Popen(command("mtm_pretrain", "smoke", "--out", folder), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < CHECKPOINT_STEPS + 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
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
    alone = run("mtm_pretrain", "smoke", "--dropout", "0", "--out", one)
    assert alone.returncode == 0, alone.stderr
    together = torchrun(2, "smoke", "--dropout", "0", "--accumulation", "2", "--workers", "1", "--out", two)
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


def test_the_first_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    finished = run("mtm_pretrain", "smoke", "--base-lr", "1e20", "--log-steps", "5", "--out", tmp_path / "run")
    assert finished.returncode == 2
    message = finished.stderr.splitlines()[-1]
    assert message.startswith("error: loss is nan at step 3 on rank 0") and "no checkpoint yet" in message
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/result.json").exists()


def refused(*cases: tuple[list, list]) -> None:
    """Each (command line, words): exit status 2 and one line on stderr that holds the words. Two at a time."""
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(lambda case: run(*case[0]), cases)
        for (line, words), finished in zip(cases, outcomes, strict=True):
            assert finished.returncode == 2, (line, finished.stderr)
            lines = [text for text in finished.stderr.splitlines() if text.strip()]
            assert len(lines) == 1 and lines[0].startswith("error: "), finished.stderr
            for word in words:
                assert str(word) in lines[0], lines[0]


def test_bad_command_lines_are_refused() -> None:
    refused(
        (["mtm_pretrain", "smok"], ["unknown preset 'smok'", "did you mean smoke?"]),
        (["mtm_pretrain", "smoke", "--batchsize", "3"], ["unknown flag --batchsize", "--batch-size"]),
        (["mtm_pretrain", "smoke", "--trackers", "no_such_tracker"], ["no_such_tracker", "seitpp[trackers]"]),
        (["mtm_pretrain", "smoke", "--accumulation", "3"], ["global batch 128", "3 accumulation steps"]),
        (["probe"], ["--checkpoint"]),
    )


def test_bad_folders_are_refused_and_left_alone(smoke: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in smoke.rglob("*")}
    refused(
        (["mtm_pretrain", "smoke", "--out", smoke], [smoke, "not empty", "--resume"]),
        (["mtm_pretrain", "smoke", "--out", smoke, "--resume", "--seed", "1"], ["seed 0 -> 1"]),
        (["mtm_pretrain", "smoke", "--out", smoke.parent, "--resume"], [smoke.parent, "holds no run"]),
        (["probe", "--checkpoint", tmp_path / "none", "--out", tmp_path / "p"], ["no model file"]),
    )
    assert {path: path.stat().st_mtime_ns for path in smoke.rglob("*")} == before


def test_bad_stores_are_refused(smoke: Path, tmp_path: Path) -> None:
    other = small_store(tmp_path / "other", (8, 8), seed=2)
    cut = small_store(tmp_path / "cut", (8, 8), seed=2)
    shard = next((cut / "train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    mixed = tmp_path / "mixed"
    for split in ("train", "validation"):
        with StoreWriter(mixed, codebook=CODEBOOK, grid=None, split=split) as writer:
            writer.add_batch([np.zeros((4, 6), int), np.ones((6, 6), int)], [0, 1])
    out = tmp_path / "run"
    refused(
        (
            ["mtm_pretrain", "smoke", "--store", mixed, "--batch-size", "2", "--out", out],
            [mixed, "expected one grid"],
        ),
        (["probe", "--checkpoint", smoke, "--store", other, "--out", out], ["codebook", other, smoke]),
        (["mtm_pretrain", "published", "--out", out], ["needs --store"]),
        (
            ["mtm_pretrain", "smoke", "--crop-size", "28", "--out", out],
            ["--crop-size 28", "(8, 8)", digits().store],
        ),
        (["mtm_pretrain", "smoke", "--store", cut, "--out", out], [shard]),
        (["mtm_pretrain", "smoke", "--store", tmp_path / "none", "--out", out], [tmp_path / "none"]),
    )
    assert not out.exists(), "no folder of a run that could not start"
