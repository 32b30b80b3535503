"""The offline tokenizer and the embedded digits, on real images: digits and scikit-learn's photographs."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from seitpp import TokenStore, tokenizers
from seitpp.tokenizers import PatchKMeans, TokenizerError
from seitpp.tokens.digits import digits, digits_images


def crops(photograph: np.ndarray, size: int = 64) -> torch.Tensor:
    """All whole size x size crops of a photograph, (N, 3, size, size) in [0, 1]."""
    image = torch.tensor(photograph).permute(2, 0, 1).float() / 255
    tiles = image.unfold(1, size, size).unfold(2, size, size)
    return tiles.flatten(1, 2).transpose(0, 1).contiguous()


@pytest.fixture(scope="module")
def photographs() -> list[torch.Tensor]:
    return [crops(image) for image in load_sample_images().images]


@pytest.fixture(scope="module")
def tokenizer(photographs) -> PatchKMeans:
    return PatchKMeans.fit(torch.cat(photographs)[::2], image_size=64, patch=8, num_codes=128, code_dim=32)


def psnr(images: torch.Tensor, others: torch.Tensor) -> float:
    return -10 * (images - others).square().mean().log10().item()


def test_ids_of_held_out_crops_decode_to_the_crops(tokenizer, photographs) -> None:
    images = torch.cat(photographs)[1::2]
    ids = tokenizer.encode(tokenizer.preprocess(images))
    assert ids.shape == (len(images), 8, 8) and ids.dtype == torch.int64
    assert len(ids.unique()) > 64
    mean_colour = images.mean(dim=(0, 2, 3), keepdim=True).expand_as(images)
    assert psnr(tokenizer.decode(ids), images) > psnr(mean_colour, images) + 6


def test_codes_are_their_own_nearest_and_numbered_by_popularity(tokenizer, photographs) -> None:
    maps = tokenizer.codebook.T.reshape(1, 32, 128, 1)
    assert torch.equal(tokenizer.quantize(maps).flatten(), torch.arange(128))
    images = torch.cat(photographs)[::2]  # those it was fitted on
    counts = torch.bincount(tokenizer.encode(images).flatten(), minlength=128)
    assert (counts.diff() <= 0).all() and counts.min() > 0


def test_decoding_uses_only_the_direction_of_a_code(tokenizer) -> None:
    ids = torch.randint(128, (2, 8, 8))
    expected = tokenizer.decode(ids)
    longer = PatchKMeans(tokenizer.spec)
    longer.load_state_dict({**tokenizer.state_dict(), "codebook": tokenizer.codebook * 3})
    torch.testing.assert_close(longer.decode(ids), expected, atol=1e-5, rtol=0)


def test_encoding_ignores_autocast(tokenizer, photographs) -> None:
    maps = tokenizer.features(photographs[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tokenizer.quantize(maps)
    assert torch.equal(inside, tokenizer.quantize(maps))


def test_refit_gives_the_same_tokenizer_and_save_keeps_it(tokenizer, photographs, tmp_path) -> None:
    images = torch.cat(photographs)[::2]
    again = PatchKMeans.fit(images, image_size=64, patch=8, num_codes=128, code_dim=32)
    assert again.fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path / "tokenizer.safetensors")
    loaded = tokenizers.load(tmp_path / "tokenizer.safetensors")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))


def test_bad_input_is_named(tokenizer, tmp_path) -> None:
    with pytest.raises(TokenizerError, match=r"expected \(B, 3, 64, 64\)"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(TokenizerError, match="distinct patches cannot give 128 codes"):
        PatchKMeans.fit(torch.zeros(2, 3, 64, 64), image_size=64, patch=8, num_codes=128, code_dim=32)
    with pytest.raises(TokenizerError, match="not a multiple of patch"):
        PatchKMeans.fit(torch.zeros(2, 3, 64, 64), image_size=60, patch=8, num_codes=2, code_dim=32)
    with pytest.raises(TokenizerError, match="no tokenizer file"):
        tokenizers.load(tmp_path / "none")
    (tmp_path / "broken").write_bytes(bytes(100))
    with pytest.raises(TokenizerError, match="cannot be read"):
        tokenizers.load(tmp_path / "broken")


def test_the_split_of_the_digits_never_changes() -> None:
    (train, train_labels), (validation, labels) = digits_images("train"), digits_images("validation")
    assert train.shape == (1437, 3, 8, 8) and validation.shape == (360, 3, 8, 8)
    assert torch.bincount(labels).tolist() == [36] * 10
    assert validation.min() == 0 and validation.max() == 1
    assert labels[:20].tolist() == [0, 1, 6, 7, 9, 3, 8, 0, 6, 4, 6, 3, 1, 0, 6, 5, 8, 9, 0, 9]
    pixels = validation[:, 0].mul(16).sum(dim=(1, 2))
    assert pixels[:8].tolist() == [337.0, 338.0, 378.0, 325.0, 320.0, 327.0, 355.0, 340.0]
    assert len(train_labels) == 1437


def test_digits_are_tokenized_once_and_reused(tmp_path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    code = "from seitpp.tokens.digits import digits; print(digits().store)"
    command = [sys.executable, "-c", code]
    first = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    stores = {process.communicate()[0].strip() for process in first}
    assert [process.returncode for process in first] == [0, 0] and len(stores) == 1
    store = stores.pop()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert (
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
        == store
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert len(list((tmp_path / "seitpp").iterdir())) == 1


def test_stored_digits_are_those_of_the_tokenizer() -> None:
    data = digits()
    tokenizer = tokenizers.load(data.tokenizer)
    for split in ("train", "validation"):
        images, labels = digits_images(split)
        store = TokenStore(data.store, split)
        assert np.array_equal(store.ids(range(len(store))), tokenizer.encode(tokenizer.preprocess(images)).numpy())
        assert np.array_equal(store.labels, labels.numpy())
        assert store.tokenizer["fingerprint"] == tokenizer.fingerprint
    assert np.array_equal(store.codebook, tokenizer.codebook.numpy())
    assert store.class_names == [str(digit) for digit in range(10)]
