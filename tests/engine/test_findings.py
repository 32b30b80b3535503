"""What a report says about the figures of a run, for figures made up for each sentence."""

from math import nan

import numpy as np
import pytest

from seitpp.engine.findings import (
    augmented,
    classified,
    findings,
    inpainted,
    learned,
    probed,
    segmented,
    tokenized,
    withstood,
)

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


ATTACKED = {"clean": 90.0, "fgsm": 60.0, "pgd": 40.0}
SEGMENTED = {"aAcc": 73.4, "mIoU": 38.3}
SAID = [
    (classified({"top1": 50.0}, images=100, classes=2), "50.0 % get the right class, give or take 10.0 points"),
    (classified({"top1": 58.0}, images=100, classes=2), "not clearly better than guessing"),
    (
        classified({"top1": 80.0, "top1_ema": 81.0}, images=100, classes=2),
        "moving average of the weights it is 81.0",
    ),
    (
        classified({"top1": 80.0, "balanced_accuracy": 60.0}, images=100, classes=2),
        "rare and frequent ones are not",
    ),
    (classified({"mAP": 41.2}, images=1000, classes=80), "Average precision is 41.2 %, the mean over 80 classes"),
    (
        probed({"linear_probe_top1": 90.0, "knn_top1": 50.0}, images=100, classes=10),
        "k-NN 50.0 % (give or take 10.0",
    ),
    (
        inpainted({"accuracy_one_shot": 20.0, "accuracy_iterative": 25.0, "accuracy_one_code": 30.0}, 4),
        "does not do",
    ),
    (segmented(SEGMENTED, ["sky", "sea", "sand"], [50.0, 26.6, nan]), "the mean over 2 classes"),
    (
        segmented(SEGMENTED, ["sky", "sea", "sand"], [50.0, 26.6, nan]),
        "largest for sky (50.0 %) and smallest for sea",
    ),
    (tokenized({"codes_used": 9, "perplexity": 5.0, "psnr": 20.0, "ssim": 0.8}, [64]), "use 9 of 64 codes"),
    (tokenized({"codes_used": 9, "perplexity": 5.0, "psnr": 20.0, "ssim": 0.8}, [64]), "Few codes are used"),
    (
        tokenized({"codes_used": 20, "perplexity": 1e5, "variance_kept": 0.94}, [8, 8, 8]),
        "use 20 of 24 codes, with a perplexity of 100,000.0, the product over 3 digits",
    ),
    (augmented({"a_accuracy_tokenadapt": 20.0, "a_accuracy_direct": 30.0}, "a"), "not more with TokenAdapt"),
    (learned({"average_accuracy": 40.0, "forgetting": 12.5}, 3, 480), "12.5 points are forgotten"),
    (
        withstood({"images": 10, "top1": 90.0, "attacks": {"images": 8, "4/255": {"correct": ATTACKED}}}),
        "right under the strongest attack, pgd",
    ),
]


@pytest.mark.parametrize(("sentences", "words"), SAID, ids=[words for _, words in SAID])
def test_what_figures_say(sentences: list[str], words: str) -> None:
    assert sum(words in sentence for sentence in sentences) == 1


def test_what_figures_do_not_say() -> None:
    good = classified({"top1": 80.0, "balanced_accuracy": 79.0}, images=100, classes=2)
    assert len(good) == 1
    assert len(learned({"average_accuracy": 40.0, "forgetting": None}, 1, 480)) == 1
    assert len(tokenized({"codes_used": 64, "perplexity": 5.0, "psnr": 20.0, "ssim": 0.8}, [64])) == 1
    assert len(withstood({"images": 10, "top1": 90.0})) == 1
