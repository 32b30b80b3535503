"""A run and its folder: never written over, locked, every step written down once; its rate and its end."""

import gc
import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch
from support.tiny_run import train
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from seitpp import files
from seitpp.engine.folder import RunError, choose_folder, enter_folder
from seitpp.engine.metrics import MetricsLog, count_flops
from seitpp.engine.run import Run
from seitpp.engine.training import Training


def test_a_folder_with_something_in_it_is_never_written_over(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume, overwrite in ((False, False), (False, True), (True, False)):
        with pytest.raises(RunError, match="not empty and holds no run"):
            choose_folder("x", {}, out=str(tmp_path), resume=resume, overwrite=overwrite)
    with pytest.raises(RunError, match="--resume without --out"):
        choose_folder("x", {}, out=None, resume=True, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_overwritten_only_when_told_and_resumed_only_as_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/x", "runs/x-2"):
        folder, resumed = choose_folder("x", {"lr": 1}, out=None, resume=False, overwrite=False)
        assert str(folder) == expected and not folder.exists() and not resumed
        files.unlock(enter_folder(folder, {"lr": 1}, resumed=resumed, overwrite=False))
    run = Path("runs/x")
    assert choose_folder("x", {"lr": 1, "workers": 3}, out="runs/x", resume=True, overwrite=False) == (run, True)
    assert choose_folder("x", {"lr": 1}, out="runs/y", resume=True, overwrite=False) == (Path("runs/y"), False)
    with pytest.raises(RunError, match="lr 1 -> 2"):
        choose_folder("x", {"lr": 2}, out="runs/x", resume=True, overwrite=False)
    with pytest.raises(RunError, match="not empty: name another --out, or pass --resume or --overwrite"):
        choose_folder("x", {"lr": 2}, out="runs/x", resume=False, overwrite=False)
    (run / "metrics.jsonl").touch()
    with pytest.raises(RunError, match="another process has started a run there meanwhile"):
        enter_folder(run, {"lr": 2}, resumed=False, overwrite=False)
    with pytest.raises(RunError, match=r"runs/x/config.json is not that of a run, nothing is removed"):
        choose_folder("x", {"lr": 2}, out="runs/x", resume=False, overwrite=True)
    settings = {"lr": 2, "preset": "smoke", "seed": 0, "precision": "no", "overwrite": False}
    (run / "config.json").write_text(json.dumps(settings))
    for name in ("notes.txt", "checkpoints/step-best/model.safetensors", "labels.csv", "loss.png.old"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
        name = name.removesuffix("/model.safetensors")
        with pytest.raises(RunError, match=f"runs/x holds {name}, which no run writes, nothing is removed"):
            choose_folder("x", settings, out="runs/x", resume=False, overwrite=True)
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    folder, resumed = choose_folder("x", settings, out="runs/x", resume=False, overwrite=True)
    files.unlock(enter_folder(folder, settings, resumed=resumed, overwrite=True))
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.json"]
    assert json.loads((run / "config.json").read_text()) == {"version": 1, **settings}


def test_a_folder_is_locked_while_its_owner_lives(tmp_path) -> None:
    fork = multiprocessing.get_context("fork")
    locked = fork.Event()

    def live() -> None:
        enter_folder(tmp_path, {}, resumed=False, overwrite=False)
        locked.set()
        time.sleep(60)

    owner = fork.Process(target=live)
    owner.start()
    assert locked.wait(60)
    with pytest.raises(RunError, match=rf"in use by process {owner.pid} on "):
        enter_folder(tmp_path, {}, resumed=True, overwrite=False)
    owner.kill()
    owner.join()
    files.unlock(enter_folder(tmp_path, {}, resumed=True, overwrite=False))


def test_metrics_have_no_line_twice_after_a_kill(tmp_path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write([{"step": step, "loss": 1.0} for step in range(1, 6)])
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')
    log.keep_until(3)
    log.write([{"step": 4, "loss": 2.0}])
    assert [(line["step"], line["loss"]) for line in log.read()] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_flops_are_those_of_a_real_step() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16))
    # Forward, and twice that backward; the first layer's input needs no gradient.
    forward = 2 * (64 * 32 + 32 * 16)
    assert count_flops(model, torch.zeros(3, 64, device="meta")) == 3 * (3 * forward - 2 * 64 * 32)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 64)).sum().backward()
    assert counter.get_total_flops() == count_flops(model, torch.zeros(3, 64, device="meta"))
    assert all(p.grad is not None and p.device.type == "cpu" for p in model.parameters())


def test_a_run_that_is_over_is_gone_with_its_last_name(tmp_path) -> None:
    """Without the garbage collector: threads of process groups that live to the interpreter's end can abort it."""
    gc.collect()
    gc.disable()
    try:
        train(tmp_path / "run", steps=2)
        alive = [thing for thing in gc.get_objects() if type(thing) in (Run, Training)]
    finally:
        gc.enable()
    assert not alive
