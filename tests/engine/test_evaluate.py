"""Scores and confusions agree with sklearn and with dense matrices; classes are found by name."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import average_precision_score, balanced_accuracy_score, confusion_matrix
from torch import nn
from torch.utils.data import Dataset

from seitpp import plots
from seitpp.data.dataset import Batch
from seitpp.engine.confusion import Confusions
from seitpp.engine.evaluate import (
    Predictions,
    average_precisions,
    class_map,
    class_precisions,
    mean_of_known,
    predict,
)
from seitpp.errors import UserError

RANDOM = np.random.default_rng(0)


class Given(Dataset):
    """Images whose logits are given, 16 to a grid of 2 x 2 tokens."""

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor):
        self.logits, self.labels = logits, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        return Batch(torch.tensor(indices), self.logits[indices], self.labels[indices])


def judged(function, data: Given, **settings):
    model = nn.Identity()
    model.num_classes = data.logits.shape[1]
    given = {"inputs": lambda batch: batch.ids, "accelerator": Accelerator(cpu=True), "batch_size": 7}
    return function(model, data, **given, **settings)


def test_average_precision_agrees_with_sklearn() -> None:
    """With ties, in part across the two kinds; of a class without images it is not known."""
    scores, targets = RANDOM.normal(size=(500, 6)).astype("f4"), RANDOM.random((500, 6)) < 0.3
    scores[:, 1] = scores[:, 1].round()  # many ties
    scores[:, 2] = 0.0  # nothing but ties
    targets[:, 3], targets[:, 4] = False, True
    found = average_precisions(torch.from_numpy(scores), torch.from_numpy(targets).byte())
    for at in (0, 1, 2, 4, 5):
        assert found[at].item() == pytest.approx(average_precision_score(targets[:, at], scores[:, at]), abs=1e-12)
    assert found[3].isnan() and found[2].item() == pytest.approx(targets[:, 2].mean())
    assert mean_of_known(found) == pytest.approx(100 * found[[0, 1, 2, 4, 5]].mean().item())


def test_precisions_of_a_dataset_leave_out_what_is_not_known() -> None:
    logits, labels = torch.randn(50, 5), (torch.rand(50, 5) < 0.4).byte()
    labels[[3, 20]] = 255
    known = labels[:, 0] != 255
    expected = average_precisions(logits[known], labels[known])
    assert torch.equal(judged(class_precisions, Given(logits, labels)), expected)
    chosen = class_map("abcde", "abcde", ["d", "b"], model="M")
    found = judged(class_precisions, Given(logits, labels), classes=chosen)
    assert torch.equal(found, expected[[3, 1]])


def test_balanced_accuracy_is_the_mean_recall_of_classes_that_occur() -> None:
    labels, predicted = (
        RANDOM.choice([0, 2, 3, 9], p=[0.7, 0.1, 0.1, 0.1], size=300),
        RANDOM.integers(12, size=300),
    )
    predicted[:200] = labels[:200]
    ranked = torch.from_numpy(np.stack([predicted, *[np.full(300, -1)] * 4], axis=1))
    found = Predictions(ranked, torch.from_numpy(labels)).accuracies()
    expected = np.mean([(predicted[labels == one] == one).mean() for one in (0, 2, 3, 9)])
    assert found["balanced_accuracy"] == pytest.approx(100 * expected)
    both = np.isin(predicted, labels)  # sklearn knows no predictions of classes that do not occur
    some = Predictions(ranked[both], torch.from_numpy(labels[both]))
    agreed = balanced_accuracy_score(labels[both], predicted[both])
    assert some.balanced_accuracy() == pytest.approx(100 * agreed) != pytest.approx(some.top(1).percent)


def test_classes_are_found_by_name() -> None:
    """Images of c and a, in this order, and one of x: the model cannot answer b or d."""
    logits = torch.tensor([[3.0, 9, 1, 9], [1, 9, 2, 9], [5, 9, 4, 9], [0, 0, 0, 0]])
    data = Given(logits, torch.tensor([1, 0, 0, 2]))
    chosen = class_map("abcd", ["c", "a", "b"], ["a", "c"], model="M")
    assert (
        chosen.names == ["a", "c"] and chosen.outputs.tolist() == [0, 2] and chosen.labels.tolist() == [1, 0, -1]
    )
    found = judged(predict, data, classes=chosen)
    assert found.labels.tolist() == [0, 1, 1], "the image of b is left out"
    assert found.ranked[:, :2].tolist() == [[0, 1], [1, 0], [0, 1]] and found.ranked[:, 2:].eq(-1).all()
    permuted = class_map("abcd", "dcba", None, model="M")
    assert judged(predict, data, classes=permuted).labels.tolist() == [1, 0, 0, 2]
    assert judged(predict, data, classes=permuted).ranked[0, :4].tolist() in ([0, 2, 3, 1], [2, 0, 3, 1])


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(UserError, match=r"class 'x' and 1 more is not among the 4 classes of RUN"):
        class_map("abcd", ["a", "x", "y"], None, model="RUN")
    with pytest.raises(UserError, match=r"no class of the images is one of the 1 of --classes.*'b'.*'a'"):
        class_map("abcd", ["b"], ["a"], model="RUN")
    with pytest.raises(UserError, match="1 of 4 images have no label"):
        judged(predict, Given(torch.zeros(4, 3), torch.tensor([0, -1, 2, 1])))
    some = class_map("abc", "abc", ["c"], model="RUN")
    with pytest.raises(UserError, match="none of 2 images is of the 1 evaluated classes"):
        judged(predict, Given(torch.zeros(2, 3), torch.tensor([0, 1])), classes=some)


def test_confusions_agree_with_the_dense_matrix() -> None:
    labels, predicted = RANDOM.integers(9, size=(2, 400))
    predicted[labels == 4] = 4
    labels[labels == 7] = 6
    found, dense = Confusions.count(labels, predicted, 10), confusion_matrix(labels, predicted, labels=range(10))
    matrix = np.zeros((10, 10), int)
    matrix[found.labels, found.predictions] = found.images
    assert np.array_equal(matrix, dense) and found.images.min() > 0
    assert np.array_equal(found.images_of, dense.sum(axis=1)) and np.array_equal(
        found.correct_of, dense.diagonal()
    )
    wrong = dense * (1 - np.eye(10, dtype=int))
    expected = np.where(wrong.any(axis=1), wrong.argmax(axis=1), -1)
    assert np.array_equal(found.taken_for, expected) and expected[4] == expected[7] == -1
    errors = wrong.sum(axis=0) + wrong.sum(axis=1)
    chosen = found.most_confused(4)
    assert chosen.tolist() == sorted(chosen) and errors[chosen].min() >= np.delete(errors, chosen).max()
    part = dense[np.ix_(chosen, chosen)] / dense.sum(axis=1)[chosen, None]
    assert np.allclose(found.fractions(chosen), part)
    assert np.array_equal(found.most_confused(), np.arange(10)) and not found.fractions(np.arange(10))[7].any()


def test_confusions_of_very_many_classes_are_small(tmp_path: Path) -> None:
    """A dense matrix of 21,841 classes has 3.8 GB, its fractions as much again."""
    classes, images = 21_841, 50_000
    labels = RANDOM.integers(classes, size=images)
    predicted = np.where(RANDOM.random(images) < 0.7, labels, RANDOM.integers(classes, size=images))
    tracemalloc.start()
    found = Confusions.count(labels, predicted, classes)
    plots.confusion(found, [str(name) for name in range(classes)], tmp_path / "confusion.png")
    taken, peak = found.taken_for, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.images.sum() == images and len(taken) == classes
    assert peak < 150e6
