"""The loss of classifiers: of one class or of several, mixed, smoothed, weighted; it agrees with dense targets."""

import pytest
import torch
import torch.nn.functional as F

from seitpp.augment import Keys, SoftLabels
from seitpp.augment.mix import Mix
from seitpp.objectives import soft_label_loss, top1_accuracy

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0])
SHARE = torch.tensor([0.0, 0.3, 1.0, 0.5, 0.25, 0.9])
SEVERAL = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [255] * 4, [0, 0, 1, 0]]).byte()
KNOWN = torch.tensor([True, True, True, False, False, True])  # after mixing with the partner of `mixed`


def mixed() -> SoftLabels:
    return SoftLabels(SEVERAL, SEVERAL[[1, 2, 0, 4, 3, 5]], SHARE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_several_classes_are_trained_with_binary_cross_entropy(smoothing: float) -> None:
    targets = mixed()
    for weights in (None, WEIGHTS):
        dense = targets.dense(4, smoothing)[KNOWN]
        expected = -(WEIGHTS if weights is not None else 1) * dense * F.logsigmoid(LOGITS[KNOWN])
        expected -= (1 - dense) * F.logsigmoid(-LOGITS[KNOWN])
        loss = soft_label_loss(LOGITS, targets, smoothing, class_weights=weights)
        torch.testing.assert_close(loss, expected.mean(dim=1).sum() / 6)
    halves = [
        soft_label_loss(LOGITS[part], SoftLabels(*(field[part] for field in targets)), smoothing)
        for part in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(halves) / 2, soft_label_loss(LOGITS, targets, smoothing))


def test_unknown_labels_have_no_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    soft_label_loss(logits, mixed(), 0.1).backward()
    assert torch.equal(logits.grad.abs().sum(dim=1) > 0, KNOWN)


def test_several_classes_are_mixed_like_the_maps() -> None:
    maps, keys = torch.randn(8, 2, 4, 4), Keys(0, 0, torch.arange(8))
    several = torch.eye(8, dtype=torch.uint8) | torch.eye(8, dtype=torch.uint8).roll(1, 0)
    _, one = Mix(1.0, 0.8)(maps, torch.arange(8), keys)
    _, soft = Mix(1.0, 0.8)(maps, several, keys)
    expected = one.weight.view(-1, 1) * several + (1 - one.weight.view(-1, 1)) * several[torch.arange(8) ^ 2]
    torch.testing.assert_close(soft.dense(8), expected)
    assert torch.equal(Mix(0.0)(maps, several, keys)[1].dense(8), several.float())


def test_the_weight_of_a_class_multiplies_the_loss_of_its_images() -> None:
    labels, others = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 3, 3, 3, 2, 2])
    targets = SoftLabels(labels, others, SHARE)
    own, other = (F.cross_entropy(LOGITS, x, reduction="none", label_smoothing=0.1) for x in (labels, others))
    expected = SHARE * WEIGHTS[labels] * own + (1 - SHARE) * WEIGHTS[others] * other
    torch.testing.assert_close(soft_label_loss(LOGITS, targets, 0.1, class_weights=WEIGHTS), expected.mean())
    dense = F.cross_entropy(LOGITS, targets.dense(4, 0.1))
    torch.testing.assert_close(soft_label_loss(LOGITS, targets, 0.1, class_weights=torch.ones(4)), dense)
    torch.testing.assert_close(soft_label_loss(LOGITS, targets, 0.1), dense)


def test_an_image_is_right_if_its_most_likely_class_is_one_of_its_own() -> None:
    likely = LOGITS.argmax(dim=1)
    assert top1_accuracy(LOGITS, likely) == 1 and top1_accuracy(LOGITS, (likely + 1) % 4) == 0
    expected = sum(SEVERAL[i, likely[i]] == 1 for i in range(6)) / 6
    assert top1_accuracy(LOGITS, SEVERAL) == pytest.approx(float(expected)) and 0 < expected < 1
