"""SeiT's views: their order, identity, independence of the batch, what they refuse and print."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from seitpp.augment import EvalView, Keys, SeitPPView, SeitView, crop_resize
from seitpp.augment.color import ColorAugment
from seitpp.augment.ids import TokenEDA
from seitpp.augment.maps import random_window
from seitpp.augment.mix import Mix, PairingError
from seitpp.augment.views import ViewError
from seitpp.books import Books
from seitpp.codebook import Codebook, embed

CODEBOOK = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def keys(n: int, first: int = 0, epoch: int = 0) -> Keys:
    return Keys(3, epoch, torch.arange(first, first + n))


def test_random_window_is_a_window_and_any_window() -> None:
    windows = random_window(torch.arange(63).view(1, 7, 9).repeat(500, 1, 1), keys(500), 5)
    corner = windows[:, :1, :1]
    offsets = torch.arange(5).view(-1, 1) * 9 + torch.arange(5)
    assert torch.equal(windows, corner + offsets)
    assert stats.chisquare(corner.flatten().bincount()[corner.unique()].numpy()).pvalue > 1e-3
    assert len(corner.unique()) == 3 * 5


@pytest.mark.parametrize("crop", ["resized", "window", None])
def test_view_with_nothing_else_is_the_crop(crop: str | None) -> None:
    ids, labels = torch.randint(40, (5, 12, 12)), torch.arange(5)
    view = SeitView(CODEBOOK, size=12, crop=crop, scale=(1.0, 1.0), eda=None, color=None, cutmix=0.0)
    maps, soft = view(ids.to(torch.uint16), labels, keys(5))
    # A resized crop of the whole area finds no box of another ratio, so it takes the whole grid.
    assert torch.equal(maps, embed(ids, CODEBOOK))
    assert torch.equal(soft.labels, labels) and torch.equal(soft.weight, torch.ones(5))


@pytest.mark.parametrize("digits", [(), (2,)])
def test_flip_mirrors_its_share_of_the_grids(digits: tuple[int, ...]) -> None:
    """Also of tokens with two digits, in both views, and before the crop."""
    codebook = Books.join([CODEBOOK.numpy()[:8], CODEBOOK.numpy()[8:24]], "concat") if digits else CODEBOOK
    ids, labels = torch.randint(8, (400, *digits, 6, 6)), torch.zeros(400, dtype=torch.long)
    plain = {"eda": None, "color": None, "cutmix": 0.0}
    maps, _ = SeitView(codebook, size=6, crop=None, flip=0.25, **plain)(ids, labels, keys(400))
    flipped = SeitPPView(codebook, size=None, flip=0.25, tokenadapt_fraction=0.0)(ids, keys(400))
    mirrored = (flipped == ids.flip(-1)).flatten(1).all(dim=1)
    assert ((flipped == ids).flatten(1).all(dim=1) ^ mirrored).all() and 70 < mirrored.sum() < 130
    assert torch.equal(maps, Codebook.of(codebook).embed(flipped))
    crop = {"size": 4, "crop": "window", **plain}
    expected = SeitView(codebook, **crop)(flipped, labels, keys(400))[0]
    assert torch.equal(SeitView(codebook, flip=0.25, **crop)(ids, labels, keys(400))[0], expected)


@pytest.mark.parametrize("crop", ["resized", "window"])
@pytest.mark.parametrize("color", ["paper", "seitpp"])
def test_view_depends_on_the_image_and_its_partner_only(crop: str, color: str) -> None:
    ids, labels = torch.randint(40, (32, 16, 16)), torch.arange(32)
    view = SeitView(CODEBOOK, size=14, crop=crop, color=color, mixup=0.8)
    maps, soft = view(ids, labels, keys(32))
    assert maps.shape == (32, 6, 14, 14) and maps.dtype == torch.float32 and maps.isfinite().all()
    part, part_soft = view(ids[8:16], labels[8:16], keys(8, first=8))
    torch.testing.assert_close(part, maps[8:16], atol=1e-6, rtol=1e-6)
    assert all(torch.equal(a, b[8:16]) for a, b in zip(part_soft, soft, strict=True))
    assert not torch.equal(view(ids, labels, keys(32, epoch=1))[0], maps)


def test_view_goes_in_the_order_of_seit() -> None:
    ids, labels, few = torch.randint(40, (16, 32, 32)), torch.arange(16), keys(16)
    view = SeitView(CODEBOOK, size=28, crop="window", eda="paper", color="release")
    vectors = embed(random_window(TokenEDA(CODEBOOK, "paper")(ids, few), few, 28), CODEBOOK)
    expected, _ = Mix()(ColorAugment("release")(vectors, few), labels, few)
    assert torch.equal(view(ids, labels, few)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_maps_keep_the_type_of_the_codebook(dtype: torch.dtype) -> None:
    ids, labels = torch.randint(40, (8, 16, 16)), torch.arange(8)
    expected, maps = (
        SeitView(codebook, size=14, eda=None, color="seitpp", mixup=0.8)(ids, labels, keys(8))[0]
        for codebook in (CODEBOOK, CODEBOOK.to(dtype))
    )
    assert maps.dtype == dtype
    torch.testing.assert_close(maps.float(), expected, atol=0.15, rtol=0)


def test_view_names_what_does_not_fit() -> None:
    ids, labels = torch.zeros(4, 8, 8, dtype=torch.long), torch.arange(4)
    with pytest.raises(ViewError, match="window: got 9 x 9 tokens"):
        SeitView(CODEBOOK, size=9, crop="window")(ids, labels, keys(4))
    with pytest.raises(ViewError, match="without a crop, expected 7 x 7"):
        SeitView(CODEBOOK, size=7, crop=None)(ids, labels, keys(4))
    with pytest.raises(ViewError, match="window: got 8 x 10"):
        EvalView((8, 10))(ids)
    with pytest.raises(PairingError):
        SeitView(CODEBOOK, size=8, crop=None)(ids[:3], labels[:3], keys(3))


def test_evaluation_gives_maps() -> None:
    ids = torch.randint(40, (2, 32, 32), dtype=torch.int32).to(torch.uint16)
    window = ids.long()[:, 2:30, 2:30]
    maps = EvalView((28, 28), CODEBOOK)(ids)
    assert torch.equal(maps, embed(window, CODEBOOK))
    half = EvalView((28, 28), CODEBOOK, size=14)(ids)
    torch.testing.assert_close(half, F.interpolate(maps, (14, 14), mode="bicubic"), atol=1e-5, rtol=0)
    assert torch.equal(crop_resize(maps, torch.tensor([[0, 0, 28, 28]] * 2), 14), half)


def test_views_print_their_parameters() -> None:
    printed = repr(
        SeitView(CODEBOOK, size=28, scale=(0.3, 0.9), flip=0.5, eda="paper", color="seitpp", cutmix=0.6, mixup=0.7)
    )
    for word in (
        *(
            "size=28",
            "scale=(0.3, 0.9)",
            "flip=0.5",
            "cutmix=0.6",
            "mixup=0.7",
            "emb_noise=0.375",
            "color_adapt=0.125",
        ),
        *(
            "replaced_images=1.0",
            "replaced_tokens=0.25",
            "swapped_images=0.25",
            "synonyms=5",
            "largest_square=0.25",
        ),
    ):
        assert word in printed
    assert "size=14" in repr(EvalView((28, 28), CODEBOOK, size=14)) and "(28, 28)" in repr(EvalView((28, 28)))
