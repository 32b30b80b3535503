"""SeiT's augmentations: laws of their draws, exact shares, identity, independence of the batch."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from seitpp.augment import Keys
from seitpp.augment.color import COLOR_RATES, ColorAugment, color_adapt, emb_noise
from seitpp.augment.ids import EDA_RATES, TokenEDA, replace_synonyms, swap_squares
from seitpp.augment.mix import Mix, PairingError, SoftLabels, cutmix, mixup, partners
from seitpp.codebook import synonyms

CODEBOOK = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def keys(n: int, first: int = 0, epoch: int = 0) -> Keys:
    return Keys(3, epoch, torch.arange(first, first + n))


def numbered(n: int, height: int, width: int) -> Tensor:
    """Grids in which every token is its own place."""
    return torch.arange(height * width).view(1, height, width).repeat(n, 1, 1)


def own_tokens(mixed: Tensor) -> Tensor:
    """(B,) share of the tokens that come from the image itself, of maps made by `image_numbers`."""
    numbers = torch.arange(len(mixed)).view(-1, 1, 1)
    assert ((mixed[:, 0] == numbers) | (mixed[:, 0] == numbers ^ 2)).all()
    return (mixed[:, 0] == numbers).double().mean(dim=(1, 2))


def image_numbers(n: int, height: int = 28, width: int = 28) -> Tensor:
    return torch.arange(n).view(-1, 1, 1, 1).expand(n, 3, height, width).float()


def test_normal_draws_are_normal_and_belong_to_the_image() -> None:
    draws = keys(300).normal("noise", 1000)
    assert draws.shape == (300, 1000) and draws.dtype == torch.float32
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(draws.mean()) < 0.01 and abs(draws.std() - 1) < 0.01
    assert stats.kstest(draws[:, :2].sum(dim=1).numpy() / 2**0.5, "norm").pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack([draws[:, :500].flatten(), draws[:, 500:].flatten()]))[0, 1]) < 0.01
    assert torch.equal(keys(3, first=200).normal("noise", 1000), draws[200:203])


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keys(20).uniform("x", 9), keys(20).normal("x", 9)
    monkeypatch.setattr("seitpp.augment.keyed.CPU_WORDS", 30)
    assert torch.equal(keys(20).uniform("x", 9), whole[0])
    assert torch.equal(keys(20).normal("x", 9), whole[1])


def test_synonyms_are_the_nearest_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = (CODEBOOK[:, None] - CODEBOOK[None]).double().norm(dim=2)
    expected = distances.argsort(dim=1)[:, 1:6]
    assert torch.equal(synonyms(CODEBOOK), expected)
    monkeypatch.setattr("seitpp.codebook.LOOKUP_CELLS", 100)
    assert torch.equal(synonyms(CODEBOOK), expected)
    assert synonyms(CODEBOOK[:3]).tolist() == [
        [b for b in row if b != a][:2] for a, row in enumerate(distances[:3, :3].argsort(dim=1).tolist())
    ]
    twins = torch.zeros(4, 2)
    assert all(a not in row and len({*row}) == 3 for a, row in enumerate(synonyms(twins).tolist()))


def test_synonyms_replace_the_right_share_and_all_equally() -> None:
    table = synonyms(CODEBOOK)
    ids = torch.randint(40, (200, 16, 16))
    replaced = replace_synonyms(ids, table, keys(200), rate=0.25)
    changed = replaced != ids
    assert (table[ids[changed]] == replaced[changed].unsqueeze(1)).any(dim=1).all()
    assert stats.binomtest(int(changed.sum()), changed.numel(), 0.25).pvalue > 1e-3
    ranks = (table[ids[changed]] == replaced[changed].unsqueeze(1)).int().argmax(dim=1)
    assert stats.chisquare(ranks.bincount(minlength=5).numpy()).pvalue > 1e-3
    assert torch.equal(replace_synonyms(ids, table, keys(200), rate=0.0), ids)


def squares(moved: Tensor) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
    """(side, corner, corner) of every swap, after checking that it is one of two equal squares apart."""
    height, width = moved.shape[1:]
    found = []
    for grid in moved:
        source = grid.flatten()
        changed = (source != torch.arange(height * width)).nonzero().flatten()
        side = math.isqrt(len(changed) // 2)
        assert len(changed) == 2 * side**2
        if side:
            first, second = changed[0].item(), source[changed[0]].item()
            swapped = torch.arange(height * width).view(height, width)
            one, other = (
                (slice(at // width, at // width + side), slice(at % width, at % width + side))
                for at in (first, second)
            )
            swapped[one], swapped[other] = swapped[other].clone(), swapped[one].clone()
            assert torch.equal(grid, swapped)
            found.append((side, divmod(first, width), divmod(second, width)))
    return found


@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 20), (8, 8), (28, 12), (3, 3), (1, 5)])
def test_swap_exchanges_two_squares_that_do_not_overlap(height: int, width: int) -> None:
    found = squares(swap_squares(numbered(400, height, width), keys(400)))
    limit = min(height, width) / 4  # sides are int(limit * U)
    sides = [side for side, *_ in found] + [0] * (400 - len(found))
    expected = [min(side + 1, limit) - side for side in range(math.ceil(limit))]
    counts = [sides.count(side) for side in range(len(expected))]
    assert sum(counts) == 400
    assert limit <= 1 or stats.chisquare(counts, [400 * part / limit for part in expected]).pvalue > 1e-3


def test_every_pair_of_squares_is_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seitpp.augment.ids.LARGEST_SQUARE", 0.6)  # sides up to 2 on 5 x 6 tokens
    found = squares(swap_squares(numbered(20000, 5, 6), keys(20000)))
    for side in (1, 2):
        places = list(itertools.product(range(6 - side), range(7 - side)))
        allowed = {
            (a, b)
            for a, b in itertools.combinations(places, 2)
            if abs(a[0] - b[0]) >= side or abs(a[1] - b[1]) >= side
        }
        pairs = [(a, b) for found_side, a, b in found if found_side == side]
        assert {*pairs} == allowed
        assert stats.chisquare([pairs.count(pair) for pair in sorted(allowed)]).pvalue > 1e-3


@pytest.mark.parametrize("rates", EDA_RATES)
def test_eda_acts_on_its_share_of_the_images(rates: str) -> None:
    ids = torch.randint(40, (800, 32, 32))
    eda, table = TokenEDA(CODEBOOK, rates), synonyms(CODEBOOK)
    replaced = replace_synonyms(ids, table, keys(800), rate=0.25)
    ways = {"": ids, "s": replaced, "r": swap_squares(ids, keys(800)), "sr": swap_squares(replaced, keys(800))}
    done = eda(ids, keys(800))
    assert done.dtype == torch.int64 and done.shape == ids.shape
    kinds = [next(way for way, out in ways.items() if torch.equal(out[i], done[i])) for i in range(800)]
    # A side of 0, one swap in eight, changes nothing, so it counts as no swap.
    expected = {"paper": {"s": 1 - 7 / 32, "sr": 7 / 32}, "release": {"": 17 / 32, "s": 1 / 4, "r": 7 / 32}}[rates]
    assert {*kinds} == {*expected}
    counts = [kinds.count(way) for way in expected]
    assert stats.chisquare(counts, [800 * share for share in expected.values()]).pvalue > 1e-3


def test_noise_is_one_number_a_channel_and_one_a_number_of_the_map() -> None:
    noise = emb_noise(torch.zeros(400, 6, 9, 10), keys(400))
    channel = noise.mean(dim=(2, 3), keepdim=True)
    assert stats.kstest(channel.flatten().numpy(), stats.norm(0, (1 + 1 / 90) ** 0.5).cdf).pvalue > 1e-3
    full = (noise - channel).flatten().numpy() / (1 - 1 / 90) ** 0.5
    assert abs(full.mean()) < 0.01 and abs(full.std() - 1) < 0.01
    assert stats.kstest(full, "norm").pvalue > 1e-3
    maps = torch.randn(8, 6, 9, 10)
    assert torch.equal(emb_noise(maps, keys(8), scale=0.0, std=0.0), maps)
    flat = emb_noise(torch.zeros_like(maps), keys(8), std=0.0)
    assert flat.std(dim=(2, 3)).max() < 1e-6
    torch.testing.assert_close(
        emb_noise(maps, keys(8), scale=2.0),
        maps + flat * 2 + emb_noise(torch.zeros_like(maps), keys(8), scale=0.0),
    )


def test_color_adapt_takes_the_statistics_of_the_partner() -> None:
    maps = torch.randn(8, 5, 14, 14) * (torch.rand(8, 5, 1, 1) + 0.1) + torch.randn(8, 5, 1, 1)
    partner = partners(torch.arange(8))
    adapted = color_adapt(maps, partner)
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(adapted, dim=(2, 3)), statistic(maps[partner], dim=(2, 3)))
    standard = [(z - z.mean(dim=(2, 3), keepdim=True)) / z.std(dim=(2, 3), keepdim=True) for z in (maps, adapted)]
    torch.testing.assert_close(standard[0], standard[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(color_adapt(maps, torch.arange(8)), maps)


def test_color_adapt_of_constant_channels_is_finite() -> None:
    maps = torch.randn(4, 3, 6, 6)
    maps[0], maps[3] = 0.7, -1e6
    adapted = color_adapt(maps, partners(torch.arange(4)))
    assert adapted.isfinite().all()
    torch.testing.assert_close(
        adapted[0], maps[2].mean(dim=(1, 2), keepdim=True).expand(3, 6, 6), atol=0.01, rtol=0
    )
    torch.testing.assert_close(adapted[2], torch.full((3, 6, 6), 0.7))


@pytest.mark.parametrize("rates", COLOR_RATES)
def test_color_acts_on_its_share_of_the_images(rates: str) -> None:
    maps = torch.randn(800, 2, 4, 4)
    ways = [maps, emb_noise(maps, keys(800)), color_adapt(maps, partners(torch.arange(800)))]
    done = ColorAugment(rates)(maps, keys(800))
    same = torch.stack([(way == done).flatten(1).all(dim=1) for way in ways])
    assert (same.sum(dim=0) == 1).all()
    noise, adapt = COLOR_RATES[rates].emb_noise, COLOR_RATES[rates].color_adapt
    for count, share in zip(same.sum(dim=1).tolist(), (1 - noise - adapt, noise, adapt), strict=True):
        assert stats.binomtest(count, 800, share).pvalue > 1e-3


def test_partners_are_near_and_never_themselves() -> None:
    assert partners(torch.arange(8) + 17).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    with pytest.raises(PairingError, match=r"batch of 6 images .* multiple of 4"):
        partners(torch.arange(6))


def test_share_of_cutmix_is_that_of_the_own_tokens() -> None:
    mixed, share = cutmix(image_numbers(2000), keys(2000), 1.0)
    assert share.dtype == torch.float32
    torch.testing.assert_close(share.double(), own_tokens(mixed), atol=1e-7, rtol=0)
    inside = mixed[:, 0] != torch.arange(2000).view(-1, 1, 1)
    sides = inside.any(dim=2).sum(dim=1) * inside.any(dim=1).sum(dim=1)
    assert torch.equal(inside.sum(dim=(1, 2)), sides)  # a box


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_boxes_of_cutmix_follow_their_law(alpha: float) -> None:
    _, share = cutmix(torch.zeros(4000, 1, 28, 20), keys(4000), alpha)
    ratio = torch.distributions.Beta(alpha, alpha).sample((4000,))
    area = torch.ones(4000)
    for length in (28, 20):
        side = ((1 - ratio).sqrt() * length).long()
        start = torch.randint(length, (4000,)) - side // 2
        area *= (start + side).clamp(max=length) - start.clamp(min=0)
    assert stats.ks_2samp(share.numpy(), (1 - area / 560).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0, 4.0])
def test_mixup_blends_by_a_beta_law(alpha: float) -> None:
    maps = image_numbers(40_000, 1, 1)
    mixed, share = mixup(maps, keys(40_000), alpha)
    assert stats.kstest(share.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    expected = share.view(-1, 1, 1, 1) * maps + (1 - share.view(-1, 1, 1, 1)) * maps[torch.arange(40_000) ^ 2]
    torch.testing.assert_close(mixed, expected)


def test_mix_switches_between_its_methods() -> None:
    maps, labels = torch.randn(2000, 2, 8, 8), torch.arange(2000)
    mixed, soft = Mix(cutmix=1.0, mixup=0.8)(maps, labels, keys(2000))
    cut, blended = cutmix(maps, keys(2000), 1.0), mixup(maps, keys(2000), 0.8)
    by_box = soft.weight == cut[1]
    assert stats.binomtest(int(by_box.sum()), 2000, 0.5).pvalue > 1e-3
    torch.testing.assert_close(soft.weight, torch.where(by_box, cut[1], blended[1]))
    assert torch.equal(mixed, torch.where(by_box.view(-1, 1, 1, 1), cut[0], blended[0]))
    assert torch.equal(soft.labels, labels) and torch.equal(soft.others, labels ^ 2)
    for mix, expected in ((Mix(1.0, 0.0), cut), (Mix(0.0, 0.8), blended)):
        assert torch.equal(mix(maps, labels, keys(2000))[0], expected[0])


def test_dense_labels() -> None:
    soft = SoftLabels(torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0.75, 0.3]))
    torch.testing.assert_close(soft.dense(4), torch.tensor([[0.75, 0.25, 0, 0], [0, 0, 1, 0]]))
    smooth = torch.tensor([[0.7, 0.25, 0.025, 0.025], [0.025, 0.025, 0.925, 0.025]])
    torch.testing.assert_close(soft.dense(4, smoothing=0.1), smooth)
    logits = torch.randn(2, 4)
    own, other = (F.cross_entropy(logits, x, reduction="none", label_smoothing=0.1) for x in soft[:2])
    expected = soft.weight * own + (1 - soft.weight) * other
    torch.testing.assert_close(F.cross_entropy(logits, smooth, reduction="none"), expected)
