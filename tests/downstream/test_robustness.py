"""Corruptions, sets with the classes of ImageNet, gradients through a tokenizer, and attacks."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from support.pictures import encoded, write
from torch import Tensor, nn
from torch.utils.data import Dataset

import seitpp.models  # noqa: F401 (registers our models in timm)
from downstream.robustness.attacks import auto_attack, pgd, white_box
from downstream.robustness.classifiers import TEMPERATURE, PixelClassifier, TokenClassifier, check_differentiable
from downstream.robustness.corruptions import (
    ALEXNET,
    CORRUPTIONS,
    CorruptedImages,
    check_corruptible,
    corrupt,
    mean_corruption_error,
)
from downstream.robustness.evaluation import AttackSettings, CleanTokens, Evaluated, attack_by_auto_attack, score
from downstream.robustness.extra import RobustnessError
from downstream.robustness.sets import CorruptedFolder, canonical, list_corrupted, map_classes, open_set, wnids
from seitpp.augment import EvalView
from seitpp.augment.maps import center_window
from seitpp.codebook import nearest
from seitpp.data.dataset import evaluation_loader
from seitpp.data.digits import DigitsSource, digits_images
from seitpp.images.batches import ImageDataset, Pixels
from seitpp.tokenizers import PatchKMeans, TokenizerSpec, adapters

EPS = 8 / 255
IMAGES = ImageDataset(DigitsSource("validation"), (32, 32))


@pytest.fixture(scope="module")
def tokenizer() -> PatchKMeans:
    """Of 32 codes in 8 dimensions, on images of 32 x 32 pixels."""
    return PatchKMeans.fit(digits_images("train")[0][:100], image_size=32, patch=4, num_codes=32, code_dim=8)


def test_a_corruption_belongs_to_its_image() -> None:
    """Not to the batch, the order or the process that loads it; numpy's own generator goes on as it was."""
    clean = IMAGES.__getitems__([7])[1][0].numpy()
    for name in CORRUPTIONS[:16]:
        chosen = CorruptedImages(IMAGES, name, 4, seed=1)
        np.random.seed(5)  # noqa: NPY002
        state = np.random.get_state()[1].copy()  # noqa: NPY002
        together = chosen.__getitems__([2, 7, 5]).images
        assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
        alone = torch.from_numpy(corrupt(clean, name, 4, seed=1, index=7))
        assert alone.shape == (3, 32, 32) and not torch.equal(alone, torch.from_numpy(clean))
        assert torch.equal(together[1], alone)
    chosen = CorruptedImages(IMAGES, "gaussian_noise", 4, seed=1)
    own, others = (list(evaluation_loader(chosen, 100, rank=0, ranks=1, workers=workers)) for workers in (0, 2))
    assert torch.equal(torch.cat([batch.images for batch in own]), torch.cat([batch.images for batch in others]))
    keyed = [(1, 4, 7), (2, 4, 7), (1, 5, 7), (1, 4, 8)]
    noise = [corrupt(clean, "shot_noise", severity, seed=seed, index=index) for seed, severity, index in keyed]
    assert len({image.tobytes() for image in noise}) == 4
    gray = corrupt(clean[:1], "fog", 3, seed=0, index=0)
    assert gray.shape == (1, 32, 32) and gray.dtype == np.uint8


def test_gaussian_noise_has_the_published_strengths() -> None:
    gray = np.full((3, 256, 256), 128, np.uint8)
    for severity, sigma in enumerate((0.08, 0.12, 0.18, 0.26, 0.38), 1):
        unclipped = corrupt(gray, "gaussian_noise", severity, seed=0, index=0).astype(float) / 255
        inside = np.abs(unclipped - 128 / 255) < sigma  # 68.3 % of a normal distribution, wherever it is clipped
        assert inside.mean() == pytest.approx(0.683, abs=0.02)


def test_mce_of_a_table_made_by_hand() -> None:
    errors = {name: [mean] * 5 for name, mean in reversed(ALEXNET.items())}
    assert mean_corruption_error(errors) == pytest.approx(100)
    errors["fog"] = [0.1, 0.2, 0.3, 0.4, 0.5]  # 100 * 1.5 / (5 * 0.819324) = 36.6155
    errors["gaussian_blur"] = [1.0] * 5  # not one of the 15
    assert mean_corruption_error(errors) == pytest.approx((14 * 100 + 36.6155) / 15, abs=1e-4)
    assert mean_corruption_error({**errors, "snow": [0.5] * 4}) is None
    assert tuple(ALEXNET) == CORRUPTIONS[:15]


def linear(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, classes)).requires_grad_(False)


def test_attacks_on_a_linear_model_are_the_closed_form() -> None:
    model, images = linear(2), 0.3 + 0.4 * torch.rand(6, 3, 4, 4)
    images[0, 0] = 0.0  # at the edge of what an image can be
    labels, weights = torch.tensor([0, 1] * 3), model[1].weight
    away = (weights[1 - labels] - weights[labels]).sign().view_as(images)
    moved = pgd(model, images, labels, eps=EPS, start=torch.rand_like(images))
    assert torch.allclose(moved, (images + EPS * away).clamp(0, 1), atol=1e-6)
    model, images, eps = linear(5), 0.3 + 0.4 * torch.rand(64, 3, 4, 4), 2 / 255
    model[1].bias.copy_(-0.5 * model[1].weight.sum(dim=1))  # else one class would have most of the images
    labels, weights = model(images).argmax(dim=1), model[1].weight
    labels[:3] = (labels[:3] + 1) % 5  # wrong before any attack
    others = F.one_hot(labels, 5) == 0
    differences = weights[labels].unsqueeze(1) - weights
    margins = model(images).gather(1, labels.unsqueeze(1)) - model(images) - eps * differences.abs().sum(dim=2)
    expected = (margins[others].view(64, 4) > 0).all(dim=1)
    assert 5 < expected.sum() < 59
    before = torch.random.get_rng_state()
    attacked = auto_attack(model, images, labels, eps=eps, parts=("apgd-ce", "apgd-t"), seed=0)
    assert torch.equal(attacked.robust, expected) and torch.equal(torch.random.get_rng_state(), before)
    assert (attacked.images - images).abs().max() <= eps + 1e-6
    square = auto_attack(model, images, labels, eps=eps, parts=("square",), seed=0, queries=200)
    again = auto_attack(model, images, labels, eps=eps, parts=("square",), seed=0, queries=200)
    assert not (expected & ~square.robust).any() and torch.equal(square.images, again.images)
    assert white_box("custom", 3) == ("apgd-ce",) and white_box("standard", 4) == ("apgd-ce", "apgd-t", "fab-t")
    fab = auto_attack(linear(3), images[:8], labels[:8] % 3, eps=eps, parts=white_box("standard", 3), seed=0)
    assert fab.robust.shape == (8,)


def test_autoattack_is_the_worst_case_of_its_parts() -> None:
    """Of a batch it always finds the same; an image that is wrong before any attack is never robust."""
    model = linear(5)
    classifier = PixelClassifier(model, None)
    evaluated = Evaluated(model, classifier, classifier.view.standardize, Accelerator(), 0)
    images = 0.3 + 0.4 * torch.rand(32, 3, 4, 4)
    labels = classifier(images).argmax(dim=1)
    labels[:3] = (labels[:3] + 1) % 5
    attack = attack_by_auto_attack(evaluated, AttackSettings(8 / 255, 0, 100), "custom")
    outcome, again = (attack(3, images, labels, torch.arange(32)) for _ in range(2))
    found = outcome.robust
    assert found["clean"] == 29 and 0 < found["autoattack"] <= min(found["apgd"], found["square"]) < 29
    assert outcome == again and outcome.changed == {}


class Given(nn.Module):
    """An embedding that returns the vectors that it was given."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vectors = vectors

    def forward(self, _: Tensor) -> Tensor:
        return self.vectors


def soft_codes(tokenizer: PatchKMeans, features: Tensor) -> Tensor:
    """The softmax over the codes, as the documentation writes it: (B, H, W, K)."""
    vectors, rows = features.permute(0, 2, 3, 1), tokenizer.codebook
    if tokenizer.spec.lookup == "cosine":
        scores = F.cosine_similarity(vectors.unsqueeze(3), rows, dim=-1)
    else:
        scores = -(vectors.unsqueeze(3) - rows).square().sum(dim=-1) / rows.square().sum(dim=1).mean()
    return (scores / TEMPERATURE).softmax(dim=-1)


@pytest.mark.parametrize("lookup", ["cosine", "euclidean"])
@pytest.mark.parametrize("size", [None, (8, 8)])
def test_gradients_of_maps_are_those_of_the_surrogates(lookup: str, size, tokenizer: PatchKMeans) -> None:
    """Straight-through: as if the codes were the features. The logits are those of the nearest codes, exactly."""
    tokenizer.spec = replace(tokenizer.spec, lookup=lookup)
    torch.manual_seed(0)
    shape = size or (6, 6)
    model = timm.create_model("seit_vit_nano", img_size=shape, in_chans=8, num_classes=4).eval()
    view = EvalView((6, 6), tokenizer.codebook, size)
    classifier = TokenClassifier(model, tokenizer, view, outputs=torch.tensor([2, 0]))
    images = tokenizer.preprocess(digits_images("validation")[0][:3]).requires_grad_()
    features = tokenizer.features(images)
    ids = nearest(features, tokenizer.codebook, lookup)
    maps = view(ids).requires_grad_()
    logits = model(maps)[:, [2, 0]]
    with torch.no_grad():
        assert torch.equal(classifier(images), logits)
    direction = torch.randn_like(logits)
    (at_maps,) = torch.autograd.grad(logits, maps, direction)
    identity = center_window(features, (6, 6))
    soft = (soft_codes(tokenizer, identity) @ tokenizer.codebook).permute(0, 3, 1, 2)
    for surrogate, values in {"straight_through": identity, "softmax": soft}.items():
        if size:
            values = F.interpolate(values, size, mode="bicubic")
        (expected,) = torch.autograd.grad(values, images, at_maps, retain_graph=True)
        classifier.surrogate = surrogate
        through = classifier(images)
        assert torch.equal(through, logits)
        (found,) = torch.autograd.grad(through, images, direction)
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-3) and expected.abs().max() > 1e-3


def test_gradients_of_ids_go_through_the_scores_of_the_codes(tokenizer: PatchKMeans) -> None:
    tokenizer.spec = replace(tokenizer.spec, lookup="cosine")
    torch.manual_seed(0)
    model = timm.create_model("mtm_vit_nano", img_size=6, in_chans=5, num_codes=32, num_classes=4).eval()
    classifier = TokenClassifier(model, tokenizer, EvalView((6, 6)))
    images = tokenizer.preprocess(digits_images("validation")[0][:3]).requires_grad_()
    features = center_window(tokenizer.features(images), (6, 6))
    table, ids = model.patch_embed.token_emb.weight, nearest(features, tokenizer.codebook)
    direction, vectors = torch.randn(3, 4), F.embedding(ids, table).detach().requires_grad_()
    through = classifier(images)
    (found,) = torch.autograd.grad(through, images, direction)
    classifier.surrogate = "softmax"
    (soft_found,) = torch.autograd.grad(classifier(images), images, direction)
    embedding, model.patch_embed.token_emb = model.patch_embed.token_emb, Given(vectors)
    logits = model(ids)
    assert torch.equal(logits, through) and not embedding._forward_hooks
    (at_vectors,) = torch.autograd.grad(logits, vectors, direction)
    scores = F.cosine_similarity(features.permute(0, 2, 3, 1).unsqueeze(3), tokenizer.codebook, dim=-1)
    for values, gradient in ((scores, found), (soft_codes(tokenizer, features), soft_found)):
        (expected,) = torch.autograd.grad(values, images, at_vectors @ table.T, retain_graph=True)
        assert torch.allclose(gradient, expected, atol=1e-5, rtol=1e-3) and expected.abs().max() > 1e-3


def test_tokenizers_without_gradients_are_refused(tokenizer: PatchKMeans) -> None:
    check_differentiable(tokenizer, torch.device("cpu"))
    spec = TokenizerSpec.unscaled("mine", 32, 4, num_codes=32, code_dim=8)
    other = adapters.from_functions(tokenizer.encode, tokenizer.codebook, spec=spec)
    with pytest.raises(RobustnessError, match="the mine tokenizer gives ids without features that have gradients"):
        check_differentiable(other, torch.device("cpu"))


def set_of(root: Path, folders: list[str]) -> str:
    """A folder of one gray image for each of the folders."""
    for number, folder in enumerate(folders):
        write(root / folder / "a.png", encoded(np.full((32, 32), number, np.uint8)))
    return str(root)


def test_classes_are_found_by_name(tmp_path: Path) -> None:
    """V2's folders are numbers of sorted wnids, of which "10" sorts before "2"."""
    numbers = [0, 1, 2, 10, 999]
    source = open_set("imagenet_v2", set_of(tmp_path / "v2", [str(number) for number in numbers]))
    assert source.class_names == ["0", "1", "10", "2", "999"]
    known = {
        "wnids in another order": [wnids()[number] for number in (10, 999, 5, 2, 1, 0)],
        "readable": ["brambling", "toilet tissue", "Electric Ray", "great_white_shark", "goldfish", "tench"],
    }
    for names in known.values():
        found = map_classes(source.class_names, names, classes=6, numbered=True, where=("v2", "model"))
        assert found.outputs.tolist() == [5, 4, 0, 3, 1] and found.labels.tolist() == [0, 1, 2, 3, 4]
    unnamed = map_classes(source.class_names, None, classes=1000, numbered=True, where=("v2", "model"))
    assert unnamed.outputs.tolist() == [0, 1, 10, 2, 999]
    own = map_classes(
        ["2", "10"], [str(number) for number in range(11)], classes=11, numbered=True, where=("v2", "m")
    )
    assert own.outputs.tolist() == [2, 10]
    assert canonical("crane") == "crane" and canonical("tench, Tinca tinca") == "n01440764"


def test_each_set_is_told_by_its_folders(tmp_path: Path) -> None:
    rendition, natural, sketch = (
        "n01443537",
        "n01498041",
        "n01440764",
    )  # of R alone, of R and A or A alone, of Sketch
    model = [sketch, natural, rendition]
    for name, folders in {
        "imagenet_r": [rendition],
        "imagenet_a": [natural],
        "imagenet_sketch": [sketch, rendition],
    }.items():
        source = open_set(name, set_of(tmp_path / name, folders))
        found = map_classes(source.class_names, model, classes=3, numbered=False, where=(name, "model"))
        assert [model[output] for output in found.outputs] == sorted(folders) == found.names
    with pytest.raises(
        RobustnessError, match="n01440764, which is none of the 200 of ImageNet-R: check --imagenet-r"
    ):
        open_set("imagenet_r", str(tmp_path / "imagenet_sketch"))
    with pytest.raises(RobustnessError, match="'n01498041', expected numbers, 0 to 999, as ImageNet-V2 has"):
        open_set("imagenet_v2", str(tmp_path / "imagenet_a"))
    with pytest.raises(
        RobustnessError, match=r"1 of 2 classes of sketch are not among the 2 of m: the first is 'n0144"
    ):
        map_classes([sketch, rendition], ["x", sketch], classes=2, numbered=False, where=("sketch", "m"))
    with pytest.raises(RobustnessError, match="without class folders"):
        open_set("imagenet_r", set_of(tmp_path / "flat", ["."]))


def test_both_ways_to_unpack_imagenet_c(tmp_path: Path) -> None:
    places = ["fog/1/x", "fog/3/x", "noise/shot_noise/2/x", "extra/gaussian_blur/5/x", "notes"]
    found = list_corrupted(set_of(tmp_path, places))
    assert found == [
        CorruptedFolder("shot_noise", 2, tmp_path / "noise/shot_noise/2"),
        CorruptedFolder("fog", 1, tmp_path / "fog/1"),
        CorruptedFolder("fog", 3, tmp_path / "fog/3"),
        CorruptedFolder("gaussian_blur", 5, tmp_path / "extra/gaussian_blur/5"),
    ]
    with pytest.raises(RobustnessError, match="no folder CORRUPTION/SEVERITY"):
        list_corrupted(str(tmp_path / "notes"))
    set_of(tmp_path / "weather", ["fog/1/x"])
    with pytest.raises(RobustnessError, match="expected one folder fog"):
        list_corrupted(str(tmp_path))


def test_what_cannot_be_corrupted_is_refused(monkeypatch) -> None:
    check_corruptible((32, 40), 1)
    for size, channels, words in (
        ((31, 40), 3, "31 x 40 pixels, expected at least 32"),
        ((32, 32), 4, "4 channels"),
    ):
        with pytest.raises(RobustnessError, match=words):
            check_corruptible(size, channels)
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(
        RobustnessError, match=r'needs the package imagecorruptions .*pip install "seitpp\[robustness\]"'
    ):
        check_corruptible((32, 32), 3)


class Painted(Dataset):
    """The digits with noise in the first rows of pixels."""

    def __init__(self, rows: int):
        self.images, self.rows = ImageDataset(DigitsSource("validation"), (32, 32)), rows

    def __len__(self) -> int:
        return 20

    def __getitems__(self, indices: list[int]) -> Pixels:
        batch = self.images.__getitems__(indices)
        batch.images[:, :, : self.rows] = torch.from_numpy(
            np.random.default_rng(0).integers(256, size=(len(indices), 3, self.rows, 32), dtype=np.uint8)
        )
        return batch


def test_tokens_are_changed_where_the_model_sees_them(tokenizer: PatchKMeans) -> None:
    view = EvalView((4, 4), tokenizer.codebook)
    model = timm.create_model("seit_vit_nano", img_size=4, in_chans=8, num_classes=10)
    evaluated = Evaluated(model, TokenClassifier(model, tokenizer, view), view, Accelerator(cpu=True), 0)
    tokens, clean = CleanTokens(), Painted(0)
    score(evaluated, clean, None, see=tokens.keep)
    changed = []
    for rows in (8, 16):  # the two rows of tokens above the window, and two of its own four
        score(evaluated, Painted(rows), None, see=tokens.compare)
        ids = [
            tokenizer.encode(images.__getitems__(list(range(20))).images / 255)[:, 2:6, 2:6]
            for images in (clean, Painted(rows))
        ]
        changed.append(tokens.fraction())
        assert changed[-1] == pytest.approx((ids[0] != ids[1]).float().mean().item())
    assert changed[0] == 0 < changed[1]


def test_a_token_of_two_digits_changes_once() -> None:
    Accelerator(cpu=True)
    tokens, ids = CleanTokens(), torch.zeros(1, 2, 2, 2, dtype=torch.long)
    tokens.keep(torch.tensor([0]), ids)
    other = ids.clone()
    other[0, :, 0, 0], other[0, 1, 1, 1] = 5, 65_535
    tokens.compare(torch.tensor([0]), other)
    assert tokens.fraction() == 0.5
