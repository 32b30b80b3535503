"""The pictures of a report: what is in them, read from the axes before they are saved."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from seitpp import plots

RATIOS = [0.4, 0.41, 0.44, 0.62, 0.63, 1.0]
RECORDS = [
    *({"step": step, "loss": 9.0, "mask_ratio": 0.9} for step in range(1, 13)),
    *({"step": 13 + i, "loss": float(i), "mask_ratio": ratio} for i, ratio in enumerate(RATIOS)),
]
RESULT = {
    "linear_probe_top1": 90.0,
    "linear_probe_top1_untrained": 50.0,
    "knn_top1": 80.0,
    "knn_top1_untrained": 40.0,
}
EVALUATIONS = [{"step": 5, "linear_probe_top1": 70.0, "knn_top1": 60.0}]


@pytest.fixture
def drawn(monkeypatch) -> Iterator[list]:
    """The axes of the figures that matplotlib was told to close."""
    axes = []
    with monkeypatch.context() as patched:
        patched.setattr(plt, "close", lambda figure: axes.extend(figure.axes))
        yield axes
    plt.close("all")


def test_loss_by_ratio_shows_the_last_third_and_its_means(drawn, tmp_path: Path) -> None:
    plots.loss_by_ratio(RECORDS, tmp_path / "x.png")
    updates, means = (line.get_xydata() for line in drawn[0].lines)
    assert updates.tolist() == [[ratio, float(i)] for i, ratio in enumerate(RATIOS)]
    np.testing.assert_allclose(means, [[1.25 / 3, 1.0], [0.625, 3.5], [1.0, 5.0]])


def test_probe_curve_goes_from_untrained_to_trained(drawn, tmp_path: Path) -> None:
    plots.probe_curve(EVALUATIONS, RESULT, steps=18, path=tmp_path / "x.png")
    linear, neighbors = (line.get_xydata().tolist() for line in drawn[0].lines)
    assert linear == [[0, 50], [5, 70], [18, 90]] and neighbors == [[0, 40], [5, 60], [18, 80]]


@pytest.mark.parametrize("evaluations", [[], EVALUATIONS])
def test_report_shows_every_picture(evaluations, tmp_path: Path) -> None:
    pictures = {"original": torch.rand(2, 3, 8, 8)}
    logs = {"records": RECORDS, "evaluations": evaluations}
    plots.write_report(tmp_path, title="A <title>", result=RESULT, **logs, num_codes=64, pictures=pictures)
    page = (tmp_path / "report.html").read_text()
    assert "<h1>A &lt;title&gt;</h1>" in page and "<td>linear_probe_top1</td><td>90</td>" in page
    shown = re.findall(r'<img src="([^"]+)"', page)
    assert sorted(shown) == sorted(path.name for path in tmp_path.glob("*.png")) and len(shown) == 4
    for name in shown:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
