"""TokenAdapt: agreement with a plain forward under the released names, shapes, gradients, files, its objective."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.release_reference import plain_convert, plain_invert, tokenadapt_state
from torch import Tensor

from seitpp.augment import Keys, apply_geometry, random_geometry
from seitpp.codebook import embed
from seitpp.data.photographs import PhotographWindows
from seitpp.engine.reconstruction import MEASURES, augment_directly, augment_in_every_way, compare, token_accuracy
from seitpp.models import ModelError, TokenAdapt, from_release, load_tokenadapt
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.objectives.adapt import adapt_loss, tokenizer_pair
from seitpp.tokenizers import PatchKMeans, TokenizerError, TokenizerSpec

UNTOUCHED = {"flip": 0.0, "affine": 0.0, "scale": None}


def small_model(**changes) -> TokenAdapt:
    settings = {
        "grid": (4, 4),
        "crop": (3, 3),
        "num_codes": 11,
        "code_dim": 6,
        "width": 32,
        "heads": 2,
        "mlp": 40,
    }
    torch.manual_seed(0)
    return TokenAdapt(**{**settings, **changes})


def test_a_released_state_gives_the_plain_forward(tmp_path) -> None:
    state = tokenadapt_state(grid=5, crop=3, codes=13, dim=6, width=48, heads=2, mlp=40)
    torch.save(state, tmp_path / "adapt.pth")
    model = from_release(tmp_path / "adapt.pth")
    assert not model.training and model.settings == {
        "grid": (5, 5),
        "crop": (3, 3),
        "num_codes": 13,
        "code_dim": 6,
        "width": 48,
        "heads": 2,
        "mlp": 40,
    }
    whole, augmented = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 6, 6)
    space, logits = model.convert(whole), model.invert(augmented)
    assert space.shape == (2, 6, 10, 10) and logits.shape == (2, 13, 3, 3)
    torch.testing.assert_close(space, plain_convert(whole, state), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, plain_invert(augmented, state), atol=1e-5, rtol=1e-5)


def test_published_size() -> None:
    model = TokenAdapt()
    assert sum(p.numel() for p in model.parameters()) == 3_810_087
    assert model.convert(torch.randn(1, 32, 32, 32)).shape == (1, 32, 64, 64)
    assert model.invert(torch.randn(1, 32, 56, 56)).shape == (1, 391, 28, 28)


@pytest.mark.parametrize(("grid", "crop"), [((4, 4), (4, 4)), ((6, 4), (5, 3))])
def test_any_grid(grid: tuple[int, int], crop: tuple[int, int]) -> None:
    model = small_model(grid=grid, crop=crop)
    assert model.convert(torch.randn(2, 6, *grid)).shape == (2, 6, 2 * grid[0], 2 * grid[1])
    assert model.invert(torch.randn(2, 6, 2 * crop[0], 2 * crop[1])).shape == (2, 11, *crop)


def batch() -> tuple[Tensor, Tensor, tuple]:
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(8, 6, 4, 4, generator=generator)
    ids = torch.randint(11, (8, 3, 3), generator=generator)
    return maps, ids, random_geometry(Keys(0, 0, torch.arange(8)), 4, 3)


def test_forward_is_convert_augment_invert() -> None:
    model, (maps, ids, geometry) = small_model(), batch()
    torch.nn.init.normal_(model.head.weight)
    expected = model.invert(apply_geometry(model.convert(maps), geometry))
    assert torch.equal(model(maps, geometry), expected)
    assert adapt_loss(expected, ids).item() == pytest.approx(
        -expected.log_softmax(dim=1).gather(1, ids.unsqueeze(1)).mean().item(), rel=1e-5
    )


def test_first_loss_is_ln_k_and_every_parameter_learns() -> None:
    model, (maps, ids, geometry) = small_model(), batch()
    loss = adapt_loss(model(maps, geometry), ids)
    assert loss.item() == pytest.approx(math.log(11), rel=1e-6)
    torch.nn.init.normal_(model.head.weight, std=0.02)  # from zero, it is the only one that moves at first
    adapt_loss(model(maps, geometry), ids).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_half_precision_moves_nothing() -> None:
    """Autocast leaves the geometry alone: coordinates of 8 bits would be cells apart."""
    model, (maps, _, geometry) = small_model().eval(), batch()
    torch.nn.init.normal_(model.head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(maps, geometry)
    assert F.cosine_similarity(logits.float().flatten(1), model(maps, geometry).flatten(1)).min() > 0.999


def test_save_and_load(tmp_path) -> None:
    model, (maps, _, geometry) = small_model(), batch()
    torch.nn.init.normal_(model.head.weight)
    save_pretrained(tmp_path / "model.safetensors", model, codebook="abc")
    loaded, codebook, *_ = load_tokenadapt(tmp_path / "model.safetensors")
    assert codebook == "abc" and torch.equal(loaded(maps, geometry), model(maps, geometry))
    with pytest.raises(ModelError, match=r"no model file at .*tokenadapt_train"):
        load_tokenadapt(tmp_path / "none.safetensors")


# ---------------------------------------------------------------------------------------------- its objective


def exact_tokenizer() -> PatchKMeans:
    """Codes are the eight colors with channels 0 or 1, in patches of 6 x 6 pixels."""
    tokenizer = PatchKMeans(TokenizerSpec("patch_kmeans", (24, 24), 6, num_codes=8, code_dim=4))
    colors = torch.tensor([[n >> 2 & 1, n >> 1 & 1, n & 1] for n in range(8)]).float()
    tokenizer.components.copy_(torch.eye(3).repeat_interleave(36, dim=1) / 36)
    tokenizer.mean.fill_(0.5)
    tokenizer.codebook.copy_(torch.cat([colors - 0.5, torch.full((8, 1), 3**0.5)], dim=1))
    return tokenizer.eval()


def test_direct_augmentation_of_flat_patches_is_exact_where_nothing_is_resampled() -> None:
    tokenizer = exact_tokenizer()
    ids = torch.randint(8, (4, 4, 4), generator=torch.Generator().manual_seed(3))
    keys = Keys(0, 0, torch.arange(4))
    mirror = random_geometry(keys, 4, 2, **{**UNTOUCHED, "flip": 1.0})
    assert torch.equal(augment_directly(ids, mirror, tokenizer), ids.flip(2)[:, 1:3, 1:3])


def test_every_way_and_its_figures() -> None:
    tokenizer = exact_tokenizer()
    pair = tokenizer_pair(tokenizer, 24, 2)
    assert (pair.whole.spec.grid, pair.augmented.spec.grid) == ((4, 4), (2, 2))
    assert tokenizer.spec.image_size == (24, 24)
    ids = torch.arange(16).view(1, 4, 4) % 8
    images = embed(ids, torch.tensor([[n >> 2 & 1, n >> 1 & 1, n & 1] for n in range(8)]).float())
    images = images.repeat_interleave(6, dim=2).repeat_interleave(6, dim=3)
    model = small_model(grid=(4, 4), crop=(2, 2), num_codes=8, code_dim=4)
    model.head.bias.data[5] = 1  # says 5 everywhere
    mirror = random_geometry(Keys(0, 0, torch.arange(1)), 4, 2, **{**UNTOUCHED, "flip": 1.0})
    made = augment_in_every_way(model, pair, originals=images, geometry=mirror)
    assert torch.equal(made.images, images.flip(3)[:, :, 6:18, 6:18])
    assert made.ids.tolist() == made.direct.tolist() == [[[6, 5], [2, 1]]]
    assert made.tokenadapt.tolist() == [[[5, 5], [5, 5]]] and made.unchanged.tolist() == [[[5, 6], [1, 2]]]
    found = dict(zip(MEASURES, compare(made, pair.augmented)[0].tolist(), strict=True))
    assert found["accuracy_tokenadapt"] == 25 and found["accuracy_unchanged"] == 0
    assert found["accuracy_direct"] == 100 and found["psnr_direct"] == found["psnr_true_tokens"]
    assert found["psnr_tokenadapt"] < found["psnr_direct"]
    assert token_accuracy(made.tokenadapt, made.ids).tolist() == [0.25]


def test_pairs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="a crop of 5 tokens, which is 30 pixels, expected at most the 24"):
        tokenizer_pair(exact_tokenizer(), 24, 5)
    with pytest.raises(TokenizerError, match="not a multiple of patch 6"):
        tokenizer_pair(exact_tokenizer(), 25, 2)


def test_photographs_are_held_out_by_place() -> None:
    train, validation = PhotographWindows(96, "train"), PhotographWindows(96, "validation")
    assert (len(train), len(validation)) == (966, 84)
    images, labels = validation.__getitems__([0, 83])[1:]
    assert images.shape == (2, 3, 96, 96) and images.dtype == torch.uint8 and labels.tolist() == [0, 1]
    assert torch.equal(images[0], train.images[0, :, :96, 256:352])
    assert all(left + 96 <= 256 or left >= 368 for _, _, left in train.positions)
    assert all(left >= 256 and left + 96 <= 368 for _, _, left in validation.positions)
