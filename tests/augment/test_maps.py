"""Maps, views and keyed randomness: agreement with references, identity, invariance to the batch."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torchvision import transforms

from seitpp.augment import EvalView, Keys, SeitPPFinetuneView, SeitPPView, crop_resize, random_resized_boxes
from seitpp.augment.keyed import philox4x32
from seitpp.codebook import LOOKUPS, embed, nearest


def words(*hexadecimal: str) -> list[torch.Tensor]:
    return [torch.tensor([int(word, 16)]) for word in hexadecimal]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the authors of Philox publish with Random123
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    got = philox4x32(tuple(words(*counter.split())), tuple(int(word, 16) for word in key.split()))
    assert [word.item() for word in got] == [int(word, 16) for word in expected.split()]


def test_draws_belong_to_the_image_and_not_to_its_batch() -> None:
    whole = Keys(7, 3, torch.arange(100)).uniform("crop", 10)
    some = torch.tensor([42, 3, 99])
    assert torch.equal(Keys(7, 3, some).uniform("crop", 10), whole[some])
    for other in (Keys(8, 3, some), Keys(7, 4, some), Keys(7, 3, some + 2**32)):
        assert not torch.equal(other.uniform("crop", 10), whole[some])
    assert not torch.equal(Keys(7, 3, some).uniform("mask", 10), whole[some])


def test_draws_are_uniform() -> None:
    draws = Keys(1, 0, torch.arange(2000)).uniform("anything", 7).flatten().numpy()
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


def reference_crop_resize(maps: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    crops = [m[None, :, y : y + h, x : x + w] for m, (y, x, h, w) in zip(maps, boxes.tolist(), strict=True)]
    return torch.cat([F.interpolate(crop, (size, size), mode="bicubic", align_corners=False) for crop in crops])


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 28), (8, 8, 8), (9, 14, 5), (3, 2, 6)])
def test_crop_resize_equals_interpolate_of_every_crop(height: int, width: int, size: int) -> None:
    maps = torch.randn(40, 5, height, width, dtype=torch.float64)
    boxes = random_resized_boxes(Keys(0, 0, torch.arange(40)), (height, width), (0.08, 1))
    # The reference runs in float64: in float32 it rounds the coordinates.
    torch.testing.assert_close(
        crop_resize(maps, boxes, size), reference_crop_resize(maps, boxes, size), atol=2e-6, rtol=0
    )


def test_crop_resize_of_vectors_is_that_of_one_hots() -> None:
    codebook = torch.randn(20, 6)
    ids = torch.randint(20, (16, 32, 32))
    boxes = random_resized_boxes(Keys(0, 1, torch.arange(16)), (32, 32), (0.08, 1))
    one_hots = F.one_hot(ids, 20).permute(0, 3, 1, 2).double()
    expected = torch.einsum("bkhw,kd->bdhw", reference_crop_resize(one_hots, boxes, 28), codebook.double())
    torch.testing.assert_close(crop_resize(embed(ids, codebook), boxes, 28).double(), expected, atol=1e-5, rtol=0)


def test_crop_resize_of_the_whole_grid_is_the_identity() -> None:
    maps = torch.randn(3, 4, 28, 28)
    assert torch.equal(crop_resize(maps, torch.tensor([[0, 0, 28, 28]] * 3), 28), maps)


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.9, 1.0)])
def test_boxes_lie_inside_and_follow_the_law_of_torchvision(scale: tuple[float, float]) -> None:
    boxes = random_resized_boxes(Keys(0, 0, torch.arange(4000)), (32, 32), scale)
    top, left, height, width = boxes.unbind(1)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (top + height <= 32).all() and (left + width <= 32).all()
    torch.manual_seed(0)
    image = torch.zeros(1, 32, 32)
    draw = transforms.RandomResizedCrop.get_params
    reference = torch.tensor([draw(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)])
    for ours, theirs in zip(boxes.T, reference.T, strict=True):
        assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-3
    assert stats.ks_2samp((height * width).numpy(), (reference[:, 2] * reference[:, 3]).numpy()).pvalue > 1e-3


def test_nearest_is_cosine_and_finds_every_code_itself() -> None:
    codebook = torch.randn(50, 8)
    ids = torch.randint(50, (2, 5, 7))
    assert torch.equal(nearest(embed(ids, codebook) * 3, codebook), ids)
    maps = torch.randn(2, 8, 5, 7)
    vectors = maps.permute(0, 2, 3, 1).unsqueeze(-2)
    assert torch.equal(nearest(maps, codebook), F.cosine_similarity(vectors, codebook, dim=-1).argmax(-1))


def test_view_without_crop_keeps_the_ids() -> None:
    ids = torch.randint(64, (4, 8, 8), dtype=torch.int32).to(torch.uint16)
    view = SeitPPView(torch.randn(64, 16), size=None, tokenadapt_fraction=0)
    assert torch.equal(view(ids, Keys(0, 0, torch.arange(4))), ids.long())


def test_view_crops_each_image_by_its_own_key() -> None:
    codebook, ids = torch.randn(391, 32), torch.randint(391, (6, 32, 32))
    view = SeitPPView(codebook, size=28, tokenadapt_fraction=0)
    whole = view(ids, Keys(5, 2, torch.arange(6)))
    assert whole.shape == (6, 28, 28) and whole.dtype == torch.int64 and 0 <= whole.min() <= whole.max() < 391
    assert torch.equal(view(ids[4:], Keys(5, 2, torch.arange(4, 6))), whole[4:])
    assert not torch.equal(view(ids, Keys(5, 3, torch.arange(6))), whole)


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_an_untouched_grid_comes_back_whole_by_the_lookup_of_its_tokenizer(lookup: str) -> None:
    """A crop of the whole grid moves nothing. FSQ's codes lie on few directions: by cosine many would change."""
    levels = [(torch.arange(n) - n // 2) / (n // 2) for n in (8, 5, 5, 5)]
    codebook = torch.cartesian_prod(*levels) if lookup == "euclidean" else torch.randn(1000, 4)
    ids, few = torch.randint(1000, (4, 16, 16)), Keys(0, 0, torch.arange(4))
    settings = {"size": 16, "scale": (1.0, 1.0), "tokenadapt_fraction": 0, "lookup": lookup}
    assert torch.equal(SeitPPView(codebook, **settings)(ids, few), ids)
    fine = SeitPPFinetuneView(codebook, color=None, cutmix=0.0, **settings)
    assert torch.equal(fine(ids, torch.zeros(4, dtype=torch.long), few)[0], ids)
    if lookup == "euclidean":
        settings["lookup"] = "cosine"
        assert (SeitPPView(codebook, **settings)(ids, few) != ids).float().mean() > 0.05


def test_evaluation_takes_the_central_window() -> None:
    ids = torch.arange(32 * 32).view(1, 32, 32)
    assert torch.equal(EvalView((28, 28))(ids), ids[:, 2:30, 2:30])
    assert torch.equal(EvalView((32, 32))(ids), ids)
