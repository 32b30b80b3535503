"""The refined offline tokenizer: it starts as the plain one, gets better, and keeps its promises."""

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from seitpp import tokenizers
from seitpp.tokenizers import PatchKMeans, RefinedPatchKMeans, TokenizerError, code_counts, refine


@pytest.fixture(scope="module")
def crops() -> Tensor:
    """Crops of 64 pixels of both photographs, (N, 3, 64, 64) in [0, 1]."""
    photographs = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    tiles = [image.unfold(1, 64, 64).unfold(2, 64, 64).flatten(1, 2).transpose(0, 1) for image in photographs]
    return torch.cat(tiles)[::4].contiguous()


@pytest.fixture(scope="module")
def plain(crops) -> PatchKMeans:
    return PatchKMeans.fit(crops, image_size=64, patch=8, num_codes=64, code_dim=16)


@pytest.fixture(scope="module")
def refined(plain, crops) -> RefinedPatchKMeans:
    return refine(plain, crops, steps=300)


def error(tokenizer: PatchKMeans, images: Tensor) -> float:
    return (tokenizer.decode(tokenizer.encode(images)) - images).square().mean().item()


def test_at_zero_steps_it_is_the_plain_one(plain, crops) -> None:
    start = refine(plain, crops, steps=0)
    ids = plain.encode(crops)
    assert torch.equal(start.encode(crops), ids) and torch.equal(start.decode(ids), plain.decode(ids))
    assert torch.equal(start.codebook, plain.codebook)


def test_training_improves_the_fitted_crops(plain, refined, crops) -> None:
    assert error(refined, crops) < 0.98 * error(plain, crops)
    counts = code_counts(refined.encode(crops), 64)
    assert (counts.diff() <= 0).all() and counts[40] > 0  # numbered by frequency, and no collapse


def test_gradients_reach_every_parameter(plain, refined, crops) -> None:
    refined.zero_grad()
    refined(crops[:8])[0].backward()
    for name, parameter in refined.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    refined.zero_grad()


def test_the_same_seed_gives_the_same_tokenizer_whatever_the_global_one(plain, crops) -> None:
    torch.manual_seed(1)
    first = refine(plain, crops, steps=3, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert refine(plain, crops, steps=3, seed=5).fingerprint == first.fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    assert refine(plain, crops, steps=3, seed=6).fingerprint != first.fingerprint


def test_save_keeps_it_and_damage_is_named(refined, crops, tmp_path) -> None:
    path = tmp_path / "tokenizer.safetensors"
    refined.save(path)
    loaded = tokenizers.load(path)
    assert isinstance(loaded, RefinedPatchKMeans) and loaded.fingerprint == refined.fingerprint
    ids = refined.encode(crops)
    assert torch.equal(loaded.encode(crops), ids) and torch.equal(loaded.decode(ids), refined.decode(ids))
    compact = refined.compact(code_counts(ids, 64))
    assert torch.equal(compact.encode(crops), ids)  # it was numbered by frequency on these crops
    del loaded.encoder.out
    loaded.save(path)
    with pytest.raises(TokenizerError, match=r"tokenizer.safetensors is not a complete .*encoder.out.weight"):
        tokenizers.load(path)


def test_any_multiple_of_a_window_tokenizes_as_its_windows(plain, refined) -> None:
    image = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1).float()[None, :, :128, :192] / 255
    wide = refine(plain, image, steps=0)
    wide.load_state_dict(refined.state_dict())
    wide.set_image_size((128, 192))
    ids = wide.encode(image)
    assert ids.shape == (1, 16, 24)
    corner = refined.encode(image[..., 64:128, 128:192])
    assert (ids[:, 8:, 16:] == corner).float().mean() > 0.98  # but for rounding, the same window
    patch = refined.decode(ids[:, 8:, 16:])
    torch.testing.assert_close(wide.decode(ids)[..., 64:128, 128:192], patch, atol=1e-5, rtol=0)
    plain_wide = PatchKMeans(plain.spec)
    plain_wide.load_state_dict(plain.state_dict())
    plain_wide.set_image_size((96, 64))
    assert plain_wide.encode(image[..., :96, :64]).shape == (1, 12, 8)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (7, 7), (9, 3)])
@pytest.mark.parametrize("channels", [1, 13])
def test_any_grid_and_any_number_of_channels(grid, channels) -> None:
    """The last windows are filled up with the tokens at the edge, so a larger image of those gives the same."""
    height, width = 4 * grid[0], 4 * grid[1]
    images = torch.rand(90, channels, height, width, generator=torch.Generator().manual_seed(0))
    fitted = PatchKMeans.fit(images, image_size=(height, width), patch=4, num_codes=20, code_dim=8)
    tokenizer = refine(fitted, images, steps=3)
    ids = tokenizer.encode(images)
    assert ids.shape == (90, *grid) and tokenizer.decode(ids).shape == images.shape
    assert (tokenizer.encoder.out.weight != 0).any()
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4)  # (B, C, H, W, 4, 4)
    rows, columns = (torch.arange(-(-side // 8) * 8).clamp(max=side - 1) for side in grid)
    whole = patches[:, :, rows][:, :, :, columns].permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    tokenizer.set_image_size(tuple(whole.shape[2:]))
    assert (tokenizer.encode(whole)[:, : grid[0], : grid[1]] == ids).float().mean() > 0.98  # but for rounding
