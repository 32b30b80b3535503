"""`seitpp doctor`: it passes here, and names what is broken, each in one line with what to do."""

import sys

import numpy as np
import pytest
import torch

from seitpp import TokenStore, cli, doctor
from seitpp.codec import CODECS, PackedCodec
from seitpp.models import MTM
from seitpp.store import StoreError


def examined(monkeypatch, capsys) -> tuple[int, list[str], list[str]]:
    """The exit status, the lines of the tables, and the lines after them, which say what is wrong."""
    monkeypatch.setattr(sys, "argv", ["seitpp", "doctor"])
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = stop.code
    tables, _, end = capsys.readouterr().out.partition("\n\n")
    return status, tables.splitlines(), end.splitlines()


def row(lines: list[str], name: str) -> str:
    return next(line[24:].strip() for line in lines if line.strip().startswith(name))


def test_all_is_well_here(monkeypatch, capsys) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-value")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, lines, end = examined(monkeypatch, capsys)
    assert (status, end) == (0, ["all is well"])
    assert [line for line in lines if not line.startswith(" ")] == [
        "versions",
        "machine",
        "environment",
        "self-test",
    ]
    assert torch.__version__.startswith(row(lines, "torch ")) and "float32, bfloat16" in row(lines, "cpu ")
    assert row(lines, "HF_HUB_OFFLINE") == "1" and "hidden-value" not in "\n".join(lines)
    assert any("AWS_SECRET_ACCESS_KEY" in line for line in lines) and "GiB free" in row(lines, "cache ")
    tested = [line.split("  ")[1] for line in lines[lines.index("self-test") + 1 :]]
    assert tested == [
        *(f"codec {name}" for name in CODECS),
        "store",
        *(f"training on {d}" for d in doctor.devices()),
    ]


FORWARD = MTM.forward


def not_finite(self, *arguments, **options) -> tuple:
    loss, accuracy = FORWARD(self, *arguments, **options)
    return loss * float("nan"), accuracy


BROKEN = {
    "codec packed": (PackedCodec, "decode", lambda self, data, n: np.zeros(n, np.uint16), "decoded other tokens"),
    "store": (
        TokenStore,
        "ids",
        lambda self, positions: np.zeros((32, 8, 8)),
        "read other tokens than were written",
    ),
    "training on cpu": (MTM, "forward", not_finite, "the loss is nan"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, monkeypatch, capsys) -> None:
    kind, method, broken, said = BROKEN[name]
    monkeypatch.setattr(kind, method, broken)
    status, lines, end = examined(monkeypatch, capsys)
    assert status == 1 and row(lines, name) == "FAILED"
    assert len(end) == 1 and end[0].startswith(f"{name}: ") and said in end[0] and "; " in end[0]
    assert sum("ok, " in line for line in lines) == len(doctor.checks()) - 1


def test_whatever_is_raised_is_one_line_and_the_other_tests_go_on(monkeypatch, capsys) -> None:
    def damaged(*_: object) -> None:
        raise StoreError("train: checksum does not match")

    def no_driver(*_: object) -> None:
        raise RuntimeError("CUDA error:\n  no kernel image")

    monkeypatch.setattr(TokenStore, "verify", damaged)
    monkeypatch.setattr(doctor, "check_step", no_driver)
    status, _, end = examined(monkeypatch, capsys)
    assert status == 1 and end[0].startswith("store: train: checksum does not match; look at the folder")
    assert end[1].startswith("training on cpu: CUDA error: no kernel image; reinstall torch")


def test_a_missing_package_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package",))
    monkeypatch.setattr(doctor, "checks", list)
    status, lines, end = examined(monkeypatch, capsys)
    assert status == 1 and row(lines, "no-such-package") == "not installed"
    assert end == ["no-such-package: not installed, every recipe needs it; pip install no-such-package"]


def test_a_torch_that_cannot_be_imported_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "seitpp.doctor", None)
    status, lines, _ = examined(monkeypatch, capsys)
    assert status == 1 and lines[0].startswith("import: ") and "--force-reinstall torch torchvision" in lines[0]
