"""What a report says about the figures of a run, for figures made up for each sentence."""

import numpy as np
import pytest

from seitpp.engine.findings import findings

COUNTS = np.array([60, 20, 10, 10])  # entropy 1.089 nats
GOOD = {
    "masked_loss_train": 0.8,
    "masked_loss_validation": 0.82,
    "masked_accuracy_validation": 70.0,
    **{"linear_probe_top1": 80.0, "linear_probe_top1_untrained": 60.0},
    **{"knn_top1": 75.0, "knn_top1_untrained": 50.0},
}


def found(
    counts: np.ndarray = COUNTS, probed: int = 400, left_out: str | None = None, **changes: float
) -> list[str]:
    return findings(GOOD | changes, counts=[counts], probed=probed, left_out=left_out)


def test_a_good_run_is_called_one() -> None:
    learning, encoder = found()
    assert learning.startswith("Learning: hidden tokens of training images have loss 0.80, the frequencies of the")
    assert "codes 1.09" in learning and "70.0 % are predicted" in learning and "60.0 % of all" in learning
    assert encoder == (
        "The encoder has learned about the classes: linear probe 80.0 %, 60.0 % before training; k-NN 75.0 %, "
        "50.0 % before training (of 400 images)."
    )


@pytest.mark.parametrize(
    ("changes", "sentence", "advice"),
    [
        ({"masked_loss_train": 1.08, "masked_loss_validation": 1.08}, "Not learning yet", "--epochs"),
        ({"masked_loss_validation": 0.9}, "Overfitting: the loss is 0.90 on held-out images, 0.80", "--model"),
        ({"counts": np.array([60, 40, 0, 0, 0])}, "Few codes: the images use 2 of 5", "--compact"),
        ({"counts": np.array([60, 0])}, "Nothing to learn: all tokens of the store are the same", "tokenizer"),
        ({"linear_probe_top1": 61.0, "knn_top1": 49.0}, "not clearly better than an untrained", "too few images"),
        ({"probed": 4}, "not clearly better than an untrained", "chance"),
        ({"linear_probe_top1": 60.0}, "as far as k-NN shows", "75.0 %"),
        ({"left_out": "no labels"}, "No probes: no labels.", "No probes"),
    ],
)
def test_each_flaw_is_named_with_what_helps(changes: dict, sentence: str, advice: str) -> None:
    matching = [text for text in found(**changes) if sentence in text]
    assert len(matching) == 1 and advice in matching[0]
    assert not any(sentence in text for text in found())


def test_figures_on_the_good_side_of_a_limit_are_no_flaw() -> None:
    assert "Overfitting" not in " ".join(found(masked_loss_validation=0.88))
    assert "Few codes" not in " ".join(found(counts=np.array([60, 40, 0, 0])))
    assert "Not learning" not in " ".join(found(masked_loss_train=1.06, masked_loss_validation=1.07))
