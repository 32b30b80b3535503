"""The cosine tokenizer: agreement with scipy's transform, mirrored images, and photographs."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from sklearn.datasets import load_sample_images

from seitpp import tokenizers
from seitpp.tokenizers import PatchDCT, TokenizerError
from seitpp.tokenizers.dct import cosines


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    photograph = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1).float() / 255
    return photograph.unfold(1, 64, 64).unfold(2, 64, 64).flatten(1, 2).transpose(0, 1)[:40].contiguous()


@pytest.fixture(scope="module")
def tokenizer(images: torch.Tensor) -> PatchDCT:
    return PatchDCT.fit(images[::2], image_size=64, patch=8, num_codes=64, code_dim=31)


def test_the_coefficients_are_those_of_jpeg() -> None:
    block = np.random.default_rng(0).random((8, 8))
    zigzag = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0), (4, 0), (3, 1)]
    expected = [dctn(block, norm="ortho")[place] for place in zigzag]
    np.testing.assert_allclose(cosines(8, 12).numpy() @ block.ravel(), expected, atol=1e-6)
    every = cosines(4, 16)
    torch.testing.assert_close(every @ every.T, torch.eye(16), atol=1e-6, rtol=0)
    for count in (0, 65):
        with pytest.raises(TokenizerError, match=f"{count} frequencies of 8 x 8 pixels: expected 1 to 64"):
            cosines(8, count)


def test_mirrored_images_have_mirrored_coefficients(tokenizer: PatchDCT, images: torch.Tensor) -> None:
    maps = tokenizer.features(images)
    # Across, the frequencies 0, 1, 0, 0, 1, 2, 3, 2, 1, 0 of the zigzag; three channels each, and the constant.
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1, -1, 1, -1, 1]).repeat_interleave(3)
    signs = torch.cat([signs, torch.ones(1)]).view(1, -1, 1, 1)
    torch.testing.assert_close(tokenizer.features(images.flip(3)), maps.flip(3) * signs, atol=1e-4, rtol=1e-4)


def test_held_out_images_decode_and_a_saved_tokenizer_is_the_same(
    tokenizer: PatchDCT, images: torch.Tensor, tmp_path
) -> None:
    assert tokenizer.features(images[::2])[:, :30].var(dim=(0, 2, 3)).sub(1).abs().max() < 0.1
    ids = tokenizer.encode(images[1::2])
    error = (tokenizer.decode(ids) - images[1::2]).square().mean()
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    assert error < 0.25 * (mean - images[1::2]).square().mean()
    tokenizer.save(tmp_path / "dct.safetensors")
    loaded = tokenizers.load(tmp_path / "dct.safetensors")
    assert isinstance(loaded, PatchDCT) and torch.equal(loaded.encode(images[1::2]), ids)
    assert loaded.fingerprint == tokenizer.fingerprint
    with pytest.raises(TokenizerError, match="code_dim 30: expected 1 more than a multiple of 3"):
        PatchDCT.fit(images, image_size=64, patch=8, num_codes=64, code_dim=30)
