"""Linear probe and k-NN: against plain references, on several processes, in memory and operations by count."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from support.models import tiny_mtm
from support.paths import ROOT, SUPPORT
from support.probed import figures
from support.running import distributed
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from seitpp import StoreWriter, TokenStore
from seitpp.augment import EvalView
from seitpp.data.dataset import Chosen, TokenDataset
from seitpp.data.digits import digits
from seitpp.engine import probe
from seitpp.engine.probe import Features, ProbeError, extract_features, fit, knn, labeled_sets, linear_probe

ALONE = Accelerator(cpu=True)
IMAGENET = {"images": 1_281_167, "queries": 50_000, "width": 2 * 768}


def features(vectors: Tensor, labels: Tensor) -> Features:
    return Features(vectors.half(), labels, torch.arange(len(labels)))


def digit_vectors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float32 vectors that float16 has to round, and labels: of 1,200 images to learn from and 597 others."""
    data = load_digits()
    mixed = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    vectors, labels = torch.tensor(data.data).float() @ mixed / 16 + 1, torch.tensor(data.target)
    return vectors[:1200], labels[:1200], vectors[1200:], labels[1200:]


def random_features(images: int, width: int, classes: int) -> Features:
    random = torch.Generator().manual_seed(images)
    labels = torch.randint(classes, (images,), generator=random)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    return features(centers[labels] + 2 * torch.randn(images, width, generator=random), labels)


# ---------------------------------------------------------------------------------------------------- k-NN


@pytest.mark.parametrize("cells", [probe.SIMILARITIES, 1024 * 50])
def test_knn_agrees_with_scikit_learn(cells: int, monkeypatch) -> None:
    monkeypatch.setattr(probe, "SIMILARITIES", cells)
    train, train_labels, test, test_labels = digit_vectors()
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = reference.fit(train.double(), train_labels).score(test.double(), test_labels)
    score = knn(features(train, train_labels), features(test, test_labels), num_classes=10, accelerator=ALONE)
    assert score.total == 597 and abs(score.correct - round(expected * 597)) <= 1


def test_similarities_are_whole_numbers_close_to_cosines() -> None:
    vectors = torch.randn(300, 1536, generator=torch.Generator().manual_seed(0))
    vectors[:, 3] *= 500  # nearly parallel: similarities of almost 1
    found = probe._integers(vectors.half())
    exact = found.double() @ found.double().T
    assert exact.abs().max() < 2**24 and torch.equal(found, found.round())
    for order in (torch.arange(1536), torch.randperm(1536)):
        assert torch.equal((found[:, order] @ found[:, order].T).double(), exact)
    cosines = F.normalize(vectors.double(), dim=1)
    assert (exact / probe._length(1536) ** 2 - cosines @ cosines.T).abs().max() < 1e-3


def test_of_equal_images_the_earlier_are_neighbors_and_of_equal_votes_the_lower_class_wins(monkeypatch) -> None:
    monkeypatch.setattr(probe, "SIMILARITIES", 7)
    one = torch.ones(1, 8)
    labels = torch.tensor([3] * 11 + [1] * 30)
    assert (
        knn(
            features(one.expand(41, 8), labels), features(one, labels[:1]), num_classes=4, accelerator=ALONE
        ).correct
        == 1
    )
    assert (
        knn(
            features(one.expand(41, 8), labels.flip(0)),
            features(one, labels[:1]),
            num_classes=4,
            accelerator=ALONE,
        ).correct
        == 0
    )
    equal = torch.tensor([3] * 10 + [1] * 10)
    assert (
        knn(
            features(one.expand(20, 8), equal), features(one, torch.tensor([1])), num_classes=4, accelerator=ALONE
        ).correct
        == 1
    )


def test_fewer_images_than_neighbors() -> None:
    bank = features(torch.tensor([[1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 1, 1]))
    queries = features(torch.tensor([[1.0, 0.0], [-0.1, 1.0], [-1.0, 0.0]]), torch.tensor([0, 1, 1]))
    assert knn(bank, queries, num_classes=2, accelerator=ALONE) == (3, 3)


# -------------------------------------------------------------------------------------------- linear probe


def test_linear_probe_agrees_with_scikit_learn() -> None:
    """Weights too, though the reference sees the features in float64."""
    train, train_labels, test, test_labels = digit_vectors()
    mean, deviation = train.double().mean(0), train.double().std(0)
    # scikit-learn minimizes the summed loss plus |w|^2 / (2 C).
    reference = LogisticRegression(C=1 / (2 * 1e-3 * 1200), max_iter=5000, tol=1e-8)
    reference.fit((train - mean) / deviation, train_labels)
    expected = round(reference.score((test - mean) / deviation, test_labels) * 597)
    score = linear_probe(
        features(train, train_labels), features(test, test_labels), num_classes=10, accelerator=ALONE
    )
    assert score.total == 597 and abs(score.correct - expected) <= 1
    found = fit(features(train, train_labels), num_classes=10, accelerator=ALONE)
    torch.testing.assert_close(found.mean, mean.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.deviation, deviation.float(), atol=1e-4, rtol=1e-4)
    weight = torch.from_numpy(reference.coef_.T)
    torch.testing.assert_close(found.weight.double(), weight, atol=0.01, rtol=0.01)


def test_float16_moves_features_less_than_bfloat16() -> None:
    train, labels, test, _ = digit_vectors()
    model = fit(Features(train, labels, torch.arange(1200)), num_classes=10, accelerator=ALONE)
    exact, half, brain = (
        model.logits(model.standardized(test.to(dtype))) for dtype in (torch.float, torch.half, torch.bfloat16)
    )
    assert 0 < (half - exact).abs().max() < (brain - exact).abs().max() / 4


def test_one_class() -> None:
    one, other = random_features(30, 8, 1), random_features(20, 8, 1)
    assert (
        linear_probe(one, other, num_classes=1, accelerator=ALONE)
        == knn(one, other, num_classes=1, accelerator=ALONE)
        == (20, 20)
    )


def test_a_channel_without_variance() -> None:
    some = random_features(50, 8, 2)
    some.vectors[:, 0] = 1000.1
    found = fit(some, num_classes=2, accelerator=ALONE)
    assert not found.weight[0].any() and found.weight.isfinite().all() and found.weight[1:].any()


# ---------------------------------------------------------------------------------------------- extraction


def test_features_are_those_of_the_encoder() -> None:
    store = TokenStore(digits().store, "train")
    encoder = tiny_mtm(num_codes=store.num_codes, code_dim=16).encoder.eval()
    found = extract_features(encoder, TokenDataset(store), view=EvalView((8, 8)), accelerator=ALONE)
    assert np.array_equal(found.labels, store.labels) and torch.equal(found.indices, torch.arange(1437))
    chosen = np.array([0, 255, 256, 1023, 1024, 1436])
    with torch.no_grad():
        output = encoder.forward_features(torch.from_numpy(store.ids(chosen)).long())
    expected = torch.cat([output[:, 0], output[:, 1:].mean(dim=1)], dim=1)
    assert found.vectors.dtype == torch.float16
    torch.testing.assert_close(found.vectors[chosen].float(), expected, atol=1e-5, rtol=2**-11)


# ------------------------------------------------------------------------------------------------- labels


def labeled(path: Path, labels: list, **settings) -> TokenDataset:
    """Images of one code each, with these labels."""
    with StoreWriter(path, codebook=np.eye(64, dtype=np.float32), grid=(4, 4), **settings) as writer:
        writer.add_batch(np.arange(len(labels))[:, None, None] + np.zeros((1, 4, 4), int), labels)
    return TokenDataset(TokenStore(path))


def test_a_probe_sees_the_images_that_have_a_label(tmp_path: Path) -> None:
    whole, some = labeled(tmp_path / "whole", [0, 1, 2]), labeled(tmp_path / "some", [None, 0, None, 2, 1, None])
    assert labeled_sets(whole, whole) == (whole, whole)
    half = Chosen(some, np.array([0, 1, 3, 5]))
    for found, ids in zip(labeled_sets(some, half), ([1, 3, 4], [1, 3]), strict=True):
        batch = found.__getitems__(list(range(len(found))))
        assert batch.ids[:, 0, 0].tolist() == ids and (batch.labels >= 0).all()


def test_labels_that_say_nothing_are_no_probe(tmp_path: Path) -> None:
    good = labeled(tmp_path / "good", [0, 1])
    for name, labels, settings, words in (
        ("none", [None, None], {}, "the 2 training images have none"),
        ("one", [1, 1, None], {"class_names": ["a", "b"]}, "the 3 training images are all of one class"),
        ("lists", [(0, 1), (1,)], {"multi_label": True}, "the training images have several each"),
    ):
        bad = labeled(tmp_path / name, labels, **settings)
        with pytest.raises(ProbeError, match=f"at least two classes: {words}"):
            labeled_sets(bad, good)
        with pytest.raises(ProbeError, match=words.replace("training", "validation")):
            labeled_sets(good, bad)
    with pytest.raises(ProbeError, match="the 1 training images are all of one class"):
        labeled_sets(Chosen(good, np.array([0])), good)


# ----------------------------------------------------------------------------------------------- processes


def test_two_processes_find_the_same_bits(tmp_path: Path) -> None:
    """Of weights, features and predictions; one process has no images of some splits."""
    finished = distributed(2, SUPPORT / "probed.py", tmp_path / "found")
    assert finished.returncode == 0, finished.stderr
    expected = json.loads(json.dumps(figures(ALONE)))
    assert 0.3 < expected["knn"][0] / expected["knn"][1] < 0.95, "neither chance nor too easy"
    for rank in range(2):
        assert json.loads((tmp_path / f"found.{rank}").read_text()) == expected


# ------------------------------------------------------------------------------------------ memory and time


@pytest.fixture(scope="module")
def bench() -> dict:
    return runpy.run_path(str(ROOT / "tests/bench/probe.py"))


@pytest.mark.parametrize(
    ("images", "queries", "width", "classes"), [(9000, 500, 32, 3), (1100, 300, 128, 200), (3000, 1500, 256, 10)]
)
def test_memory_is_what_is_counted(
    images: int, queries: int, width: int, classes: int, bench, monkeypatch
) -> None:
    """Tensors of the features, the probe and k-NN together, at their peak: not above the count, nor far below."""
    monkeypatch.setattr(probe, "SIMILARITIES", 1024 * 64)
    monkeypatch.setattr(probe, "HISTORY", 5)
    bank, queried = (random_features(count, width, classes) for count in (images, queries))
    peaks = []
    for judge in (linear_probe, knn):
        tracker = MemTracker()
        tracker.track_external(*bank, *queried)
        with tracker:
            judge(bank, queried, num_classes=classes, accelerator=ALONE)
        peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
    counted = bench["peak_bytes"](images, queries, width=width, classes=classes)
    assert 0.6 * counted < max(peaks) <= counted


def test_imagenet_fits_by_count(bench) -> None:
    """8 GiB a process; 2 minutes at half of an H100's 67 TFLOP/s in float32."""
    gib = [bench["peak_bytes"](**IMAGENET, classes=1000, ranks=ranks) / 2**30 for ranks in (1, 8)]
    assert 1_281_167 * 1536 * 2 / 2**30 < gib[0] < 8 and gib[1] < 2
    evaluation = bench["evaluation_flops"](IMAGENET["images"], IMAGENET["width"], 1000)
    assert (250 * evaluation + bench["knn_flops"](**IMAGENET)) / 33.5e12 < 120


def test_operations_are_what_is_counted(bench, monkeypatch) -> None:
    train, validation = random_features(3000, 32, 5), random_features(400, 32, 5)
    with FlopCounterMode(display=False) as counter:
        knn(train, validation, num_classes=5, accelerator=ALONE)
    assert counter.get_total_flops() == bench["knn_flops"](3000, 400, 32)
    evaluations, original = [], probe._loss_and_gradient
    monkeypatch.setattr(probe, "_loss_and_gradient", lambda *given: evaluations.append(1) or original(*given))
    with FlopCounterMode(display=False) as counter:
        fit(train, num_classes=5, accelerator=ALONE, max_iterations=20)
    assert counter.get_total_flops() == len(evaluations) * bench["evaluation_flops"](3000, 32, 5)
    assert 10 < len(evaluations) <= 25
