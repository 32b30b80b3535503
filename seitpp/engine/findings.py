"""What the figures of a pre-training run say, in words: has it learned anything, and what would make it better."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from seitpp.store.layout import entropy

LEARNED = 0.98  # of the entropy of the codes: a loss below it comes from the images, not from frequencies
OVERFIT = 1.1  # times the loss of training images: a loss of held-out ones above it is not chance
FEW_CODES = 0.5  # of the codebook: a tokenizer that uses fewer was made for other images
DEVIATIONS = 2  # standard deviations of a difference of accuracies that could be chance
PROBES = {"linear_probe_top1": "linear probe", "knn_top1": "k-NN"}


def findings(
    result: Mapping[str, Any], *, counts: Sequence[np.ndarray], probed: int, left_out: str | None
) -> list[str]:
    """Return sentences about the `result` of a run of mtm_pretrain, the most important first.

    `counts` are for each digit of a token how often each of its values occurs in the store; `probed` is the number
    of validation images whose class was predicted; `left_out` says why there are no probes.
    """
    found = [learning(result, counts), overfitting(result), codes(counts)]
    found.append(f"No probes: {left_out}." if left_out else gain(result, probed))
    return [sentence for sentence in found if sentence]


def learning(result: Mapping[str, Any], counts: Sequence[np.ndarray]) -> str:
    """Compare the loss of hidden tokens of training images with the entropy of the codes, both in nats.

    With several digits, both are means over these.
    """
    loss, level = result["masked_loss_train"], math.log(2) * mean(map(entropy, counts))
    if level == 0:
        return "Nothing to learn: all tokens of the store are the same code. Look at the images and the tokenizer."
    compared = f"hidden tokens of training images have loss {loss:.2f}, the frequencies of the codes {level:.2f}"
    if loss >= LEARNED * level:
        return (
            f"Not learning yet: {compared}. Predicting from frequencies alone would do as well: train longer "
            "(--epochs), or with a larger learning rate (--base-lr)."
        )
    right = result["masked_accuracy_validation"]
    common = mean(100 * digit.max() / digit.sum() for digit in counts)
    return (
        f"Learning: {compared}. Of the hidden tokens of held-out images {right:.1f} % are predicted; the most "
        f"frequent code is {common:.1f} % of all."
    )


def overfitting(result: Mapping[str, Any]) -> str | None:
    """Compare the losses of held-out and of training images."""
    train, validation = result["masked_loss_train"], result["masked_loss_validation"]
    if validation <= OVERFIT * train:
        return None
    return (
        f"Overfitting: the loss is {validation:.2f} on held-out images, {train:.2f} on training images. More "
        "images, fewer epochs (--epochs), a smaller model (--model) or random crops (--crop-size) help."
    )


def codes(counts: Sequence[np.ndarray]) -> str | None:
    """Say so if the images use few of the codes."""
    used, known = sum(int((digit > 0).sum()) for digit in counts), sum(map(len, counts))
    if used >= FEW_CODES * known:
        return None
    return (
        f"Few codes: the images use {used:,} of {known:,}. The tokenizer was made for other images: train "
        "one on these (recipes/tokenizer_train.py), or drop the unused codes (tokenize_images --compact)."
    )


def gain(result: Mapping[str, Any], probed: int) -> str:
    """Compare the probes of the trained encoder with those of the untrained one, on `probed` images."""
    better, texts = [], []
    for name, title in PROBES.items():
        after, before = result[name], result[f"{name}_untrained"]
        middle = (after + before) / 200
        chance = DEVIATIONS * 100 * math.sqrt(2 * middle * (1 - middle) / probed)
        better += [title] if after - before > chance else []
        texts.append(f"{title} {after:.1f} %, {before:.1f} % before training")
    compared = f"{'; '.join(texts)} (of {probed:,} images)"
    if len(better) == len(PROBES):
        return f"The encoder has learned about the classes: {compared}."
    if better:
        return f"The encoder has learned about the classes as far as {better[0]} shows: {compared}."
    return (
        f"The encoder is not clearly better than an untrained one: {compared}; such differences can be chance. "
        "There were too few images or updates, or tokens do not show what tells the classes apart."
    )
