"""The pictures of a report: what is in them, read from the axes before they are saved."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from downstream.segmentation import prediction
from seitpp import cli, plots
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
    "masked_loss_train": 2.0,
    "masked_loss_validation": 2.5,
}
EVALUATIONS = [
    {"step": 3, "linear_probe_top1": 65.0, "knn_top1": 55.0},  # as an older version wrote it
    {
        "step": 5,
        "linear_probe_top1": 70.0,
        "knn_top1": 60.0,
        "masked_loss_train": 3.0,
        "masked_loss_validation": 3.5,
    },
]


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
    assert linear == [[0, 50], [3, 65], [5, 70], [18, 90]]
    assert neighbors == [[0, 40], [3, 55], [5, 60], [18, 80]]


def test_held_out_curve_ends_with_the_result(drawn, tmp_path: Path) -> None:
    plots.held_out_curve(EVALUATIONS, RESULT, steps=18, path=tmp_path / "x.png")
    train, held_out = (line.get_xydata().tolist() for line in drawn[0].lines)
    assert train == [[5, 3], [18, 2]] and held_out == [[5, 3.5], [18, 2.5]]


def test_loss_curve_shows_what_guessing_gives(drawn, tmp_path: Path) -> None:
    plots.loss_curve(RECORDS, [np.array([2, 1, 1, 0])], tmp_path / "x.png")
    *_, uniform, frequencies = (line.get_ydata()[0] for line in drawn[0].lines)
    assert (uniform, frequencies) == pytest.approx((np.log(4), 1.5 * np.log(2)))


@pytest.mark.parametrize(("evaluations", "probes"), [([], True), (EVALUATIONS, True), ([], False)])
def test_a_report_of_pretraining_shows_every_picture(evaluations, probes: bool, tmp_path: Path) -> None:
    result = {name: value for name, value in RESULT.items() if probes or "top1" not in name}
    rows = {"original": torch.rand(2, 3, 8, 8), "reconstruction": torch.rand(2, 3, 8, 8)}
    data = {"records": RECORDS, "evaluations": evaluations, "counts": [np.arange(64)]}
    shown = plots.pretraining_plots(tmp_path, result=result, **data, pictures=rows)
    assert sorted(part.file for part in shown) == sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(shown) == 4 + probes
    *drawn, filled = shown
    for part in drawn:
        assert [picture.png for picture in part.pictures] == [(tmp_path / part.file).read_bytes()]
        assert 4 < part.pictures[0].inches < 5.5, "so narrow that its letters can be read on a phone"
    assert [picture.label for picture in filled.pictures] == list(rows)


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


def test_names_are_drawn_as_they_are_written(tmp_path: Path) -> None:
    """A dollar sign begins no formula."""
    names = ["$10_and_$20", "a\\frac{", "<b>&"]
    found = Confusions.count(np.array([0, 1, 2]), np.array([1, 1, 2]), 3)
    plots.confusion(found, names, tmp_path / "confusion.png")
    prediction._draw_legend(names, np.zeros((3, 3), np.uint8), tmp_path / "legend.png")
    cli._draw([torch.zeros(3, 4, 4)] * 3, names, tmp_path / "shown.png")
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir()) and len([*tmp_path.iterdir()]) == 3


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
