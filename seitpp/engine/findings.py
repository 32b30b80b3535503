"""What the figures of a run say, in words: by rules, from the figures alone."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from seitpp.store.layout import entropy

LEARNED = 0.98  # of the entropy of the codes: a loss below it comes from the images, not from frequencies
OVERFIT = 1.1  # times the loss of training images: a loss of held-out ones above it is not chance
FEW_CODES = 0.5  # of the codebook: a tokenizer that uses fewer was made for other images
UNEVEN = 5.0  # percentage points between the accuracy of images and the mean over classes that are worth a word
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


def chance_of(percent: float, images: int) -> float:
    """Return the percentage points by which an accuracy of `images` images may be off: two standard errors."""
    part = percent / 100
    return DEVIATIONS * 100 * math.sqrt(max(0.0, part * (1 - part)) / images)


def classified(result: Mapping[str, Any], *, images: int, classes: int) -> list[str]:
    """Return sentences about the accuracies, or the mean average precision, of a classifier on `images` images."""
    if "mAP" in result:
        return [
            f"Average precision is {result['mAP']:.1f} %, the mean over {classes:,} classes, {images:,} images."
        ]
    top1, guess = result["top1"], 100 / classes
    off = chance_of(top1, images)
    compared = f"guessing one of {classes:,} classes gets {guess:.1f} %"
    found = [f"Of {images:,} images {top1:.1f} % get the right class, give or take {off:.1f} points; {compared}."]
    if top1 - off <= guess:
        found.append("That is not clearly better than guessing: train longer, or look at the data.")
    if "top1_ema" in result:
        found.append(f"With the moving average of the weights it is {result['top1_ema']:.1f} %.")
    balanced = result.get("balanced_accuracy")
    if balanced is not None and abs(top1 - balanced) > UNEVEN:
        found.append(f"The mean over the classes is {balanced:.1f} %: rare and frequent ones are not known alike.")
    return found


def probed(result: Mapping[str, float], *, images: int, classes: int) -> list[str]:
    """Return a sentence about the probes of a frozen encoder on `images` images."""
    texts = [
        f"{title} {result[name]:.1f} % (give or take {chance_of(result[name], images):.1f} points)"
        for name, title in PROBES.items()
    ]
    guess = f"guessing one of {classes:,} classes gets {100 / classes:.1f} %"
    return [f"What the frozen encoder knows of {images:,} images: {', '.join(texts)}; {guess}."]


def inpainted(result: Mapping[str, float], rounds: int) -> list[str]:
    """Return sentences about how many hidden tokens are predicted, at once and in rounds."""
    once, by_round, code = (result[f"accuracy_{name}"] for name in ("one_shot", "iterative", "one_code"))
    found = f"Of the hidden tokens {once:.1f} % are predicted at once, {by_round:.1f} % in {rounds} rounds"
    compared = f"the most frequent code is {code:.1f} % of them"
    if max(once, by_round) <= code:
        return [f"{found}; {compared}, so the model does not do better than that code alone."]
    return [f"{found}; {compared}."]


def segmented(
    summary: Mapping[str, float], class_names: Sequence[str], overlaps: Sequence[float] | np.ndarray
) -> list[str]:
    """Return sentences about a segmentation; `overlaps` are the IoU of the classes in percent, NaN if unknown."""
    known = [(value, name) for value, name in zip(overlaps, class_names, strict=True) if not math.isnan(value)]
    classes = "class" if len(known) == 1 else "classes"
    found = [
        f"{summary['aAcc']:.1f} % of the pixels get the right class. Predicted and true regions overlap by "
        f"{summary['mIoU']:.1f} % (mIoU), the mean over {len(known):,} {classes}."
    ]
    if len(known) > 1:
        (most, best), (least, worst) = max(known), min(known)
        found.append(f"The overlap is largest for {best} ({most:.1f} %) and smallest for {worst} ({least:.1f} %).")
    return found


def tokenized(result: Mapping[str, float], sizes: Sequence[int]) -> list[str]:
    """Return sentences about the quality of a tokenizer; `sizes` are the numbers of codes of its digits."""
    used, known = result["codes_used"], sum(sizes)
    digits = f", the product over {len(sizes)} digits" if len(sizes) > 1 else ""
    if "psnr" in result:
        quality = (
            f"Decoded held-out images have a PSNR of {result['psnr']:.1f} dB, an SSIM of {result['ssim']:.3f}"
        )
    else:
        quality = f"Tokens keep {100 * result['variance_kept']:.1f} % of the variance of the features"
    found = [
        f"{quality}. Held-out images use {used:,} of {known:,} codes, with a perplexity of "
        f"{result['perplexity']:,.1f}{digits}."
    ]
    if used < FEW_CODES * known:
        found.append("Few codes are used: fewer (--num-codes) may do as well, or the training was too short.")
    return found


def augmented(result: Mapping[str, float], operation: str) -> list[str]:
    """Return a sentence about the tokens of images under an augmentation: by TokenAdapt, and by vectors."""
    adapt, direct = (result[f"{operation}_accuracy_{way}"] for way in ("tokenadapt", "direct"))
    better = "more" if adapt > direct else "not more"
    return [
        f"Under all augmentations together, TokenAdapt predicts {adapt:.1f} % of the augmented image's tokens, "
        f"augmenting the vectors {direct:.1f} %: {better} with TokenAdapt."
    ]


def learned(result: Mapping[str, Any], tasks: int, held: int) -> list[str]:
    """Return sentences about `tasks` tasks that were learned one after the other with `held` images in memory."""
    found = [
        f"After the last of {tasks} tasks {result['average_accuracy']:.1f} % of the images get the right class, "
        f"the mean over the tasks, with a memory of {held:,} images."
    ]
    if result["forgetting"] is not None:
        found.append(
            f"Of what was known best, {result['forgetting']:.1f} points are forgotten, the mean over tasks."
        )
    return found


def withstood(result: Mapping[str, Any]) -> list[str]:
    """Return sentences about the robustness of a classifier: on clean and corrupted images, and under attacks."""
    found = [f"Of {result['images']:,} clean images {result['top1']:.1f} % get the right class."]
    corruptions = (result.get("corruptions") or result.get("imagenet_c") or {}).get("table", {})
    means = [(mean(row["top1"] for row in rows.values()), name) for name, rows in corruptions.items()]
    if means:
        (most, best), (least, worst) = max(means), min(means)
        found.append(
            f"Over all severities, {worst} leaves the fewest right ({least:.1f} %), "
            f"{best} the most ({most:.1f} %)."
        )
    for bound, attacks in (result.get("attacks") or {}).items():
        if bound != "images":
            correct = {name: value for name, value in attacks["correct"].items() if name != "clean"}
            strongest = min(correct, key=lambda name: correct[name])
            number = result["attacks"]["images"]
            found.append(
                f"Changes of up to {bound} leave {correct[strongest]:.1f} % of {number:,} images right under the "
                f"strongest attack, {strongest}."
            )
    return found
