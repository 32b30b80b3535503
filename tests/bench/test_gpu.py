"""tests/bench/gpu.py, which is to work the first time where there is a GPU: every row of it, tiny, here."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

BENCH = ROOT / "tests/bench/gpu.py"
ON_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
# What a row measures, which must be numbers; in the order of the rows.
FIGURES = {
    "setup": {"float32 TFLOP/s", "bfloat16 TFLOP/s"},
    "presets": {"loss", "on a CPU", "relative difference"},
    "mtm": {"images/s", "MFU", "data wait %", "view %", "peak GiB", "saved by count"},
    "others": {"images/s", "MFU", "data wait %", "peak GiB"},
    "tokenize": {"images/s"},
    "probing": {"seconds", "top-1 %", "peak GiB", "by count"},
    "precisions": {"loss 1", "loss 4", "mean relative difference"},
    "fsdp": {"updates", "first loss", "last loss"},
    "resume": {"same bits", "largest difference of a loss"},
    "compiled": {"images/s", "MFU", "data wait %", "view %", "peak GiB"},
    "goals": {"measured", "met"},
}


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = map(str, [sys.executable, BENCH, *arguments])
    return subprocess.run(list(line), capture_output=True, text=True, env=ON_CPU)


def test_without_a_gpu_it_is_one_line() -> None:
    done = bench()
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"setup: \d+ s no CUDA device here .*: --small runs every row.*\n", done.stderr), (
        done.stderr
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The JSON and the printed table of every row, tiny."""
    out = tmp_path_factory.mktemp("bench") / "gpu.json"
    done = bench("--small", "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["rows"], done.stdout


def test_every_row_gives_numbers(small: tuple[dict, str]) -> None:
    rows, table = small
    assert list(rows) == list(FIGURES)
    for name, row in rows.items():
        assert row["error"] is None, f"{name}: {row['error']}\n{row.get('log')}"
        assert all(math.isfinite(value) for figures in row["lines"].values() for value in figures.values())
        assert set().union(*row["lines"].values()) >= FIGURES[name], name
        assert all(f"| {name} | {line} | " in table for line in row["lines"])
        assert row["seconds"] >= 0 and len(table.splitlines()) == 2 + sum(len(r["lines"]) for r in rows.values())


def test_what_must_be_equal_on_one_device_is(small: tuple[dict, str]) -> None:
    rows, _ = small
    assert all(figures["relative difference"] == 0 for figures in rows["presets"]["lines"].values())
    assert all(figures["same bits"] for figures in rows["resume"]["lines"].values())
    assert list(rows["resume"]["lines"])[1] == "killed after 7, resumed from step-00000004"
    differences = [figures["mean relative difference"] for figures in rows["precisions"]["lines"].values()]
    assert differences[0] == 0 and all(0 < difference < 1e-2 for difference in differences[1:])


def test_the_docs_have_every_row() -> None:
    section = (ROOT / "docs/results.md").read_text().split("## On a GPU")[1]
    assert [row for row in FIGURES if f"| {row} |" not in section] == []


def failing(at: object) -> Iterator[tuple[str, dict]]:
    yield "begun", {"figure": 1}
    raise ValueError("a first line\nand a second one")


def killed(at: object) -> Iterator[tuple[str, dict]]:
    yield "begun", {"figure": 1}
    os.kill(os.getpid(), signal.SIGKILL)


def late(at: object) -> Iterator[tuple[str, dict]]:
    yield "begun", {"process": subprocess.Popen(["sleep", "100"]).pid}
    time.sleep(100)


def test_a_row_that_fails_dies_or_is_late_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    rows = importlib.import_module("rows")
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)  # other tests ask for devices
    at = rows.Bench(tmp_path, small=True)
    found = {row.__name__: rows.apart(row, at, seconds=2) for row in (failing, killed, late)}
    errors = [row["error"] for row in found.values()]
    assert errors == ["ValueError: a first line", "its process died", "stopped after 2 s"]
    assert all(list(row["lines"]) == ["begun"] and row["seconds"] < 10 for row in found.values())
    assert "and a second one" in found["failing"]["log"]
    sleeping = Path(f"/proc/{found['late']['lines']['begun']['process']}/stat")
    assert not sleeping.exists() or sleeping.read_text().split()[2] == "Z"  # nobody buries it here
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert "CUDA was in use" in rows.apart(failing, at, seconds=2)["error"]
