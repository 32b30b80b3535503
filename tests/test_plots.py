"""The pictures of a report: what is in them, read from the axes before they are saved."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from seitpp import plots
from seitpp.engine.confusion import Confusions

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


def test_confusion_shows_names_that_a_font_can_draw(drawn, tmp_path: Path) -> None:
    """U+1D81 is in a font of matplotlib, not in its first; U+10FFFE is in none, as Chinese on many machines."""
    names = ["cat", "\u1d81 hook", "\U0010fffe", "$5 and $6", "a name as long as those of ImageNet, with synonyms"]
    found = Confusions.count(np.array([0, 1, 2, 2, 3, 4]), np.array([0, 1, 0, 2, 3, 4]), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a character that it cannot draw
        plots.confusion(found, names, tmp_path / "x.png")
    shown = ["cat", "\u1d81 hook", "2", "$5 and $6", "a name as long as those of.."]
    for labels in (drawn[0].get_xticklabels(), drawn[0].get_yticklabels()):
        assert [label.get_text() for label in labels] == shown
    assert drawn[0].get_title() == "" and drawn[0].images[0].get_array()[2].tolist() == [0.5, 0, 0.5, 0, 0]


def test_confusion_of_many_classes_shows_those_with_most_wrong_images(drawn, tmp_path: Path) -> None:
    labels = np.repeat(np.arange(200), 4)
    predicted = labels.copy()
    predicted[400:500] = 7  # all images of classes 100 to 124
    predicted[0] = 60
    plots.confusion(
        Confusions.count(labels, predicted, 200), [f"class {n}" for n in range(200)], tmp_path / "x.png"
    )
    shown = [label.get_text() for label in drawn[0].get_yticklabels()]
    assert len(shown) == 50 and {
        "class 0",
        "class 7",
        "class 60",
        *(f"class {n}" for n in range(100, 125)),
    } <= set(shown)
    assert drawn[0].get_title() == "the 50 of 200 classes with most wrong images"
    rows = drawn[0].images[0].get_array()
    assert rows[shown.index("class 110"), shown.index("class 7")] == 1 and rows[shown.index("class 0")].sum() == 1
