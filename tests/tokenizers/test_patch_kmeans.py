"""The offline tokenizer and the embedded digits, on real images: digits and scikit-learn's photographs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from seitpp import tokenizers
from seitpp.tokenizers import PatchKMeans, TokenizerError, TokenizerSpec, patch_kmeans


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
    mean_color = images.mean(dim=(0, 2, 3), keepdim=True).expand_as(images)
    assert psnr(tokenizer.decode(ids), images) > psnr(mean_color, images) + 6


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


def test_large_fits_go_in_batches_and_come_close(tokenizer, photographs, monkeypatch) -> None:
    images, held_out = torch.cat(photographs)[::2], torch.cat(photographs)[1::2]
    monkeypatch.setattr(patch_kmeans, "EXACT_CELLS", 0)
    monkeypatch.setattr(patch_kmeans, "BATCH", 1000)
    monkeypatch.setattr(patch_kmeans, "PART", 50)
    monkeypatch.setattr(patch_kmeans, "CHUNK", 777)
    fits = [PatchKMeans.fit(images, image_size=64, patch=8, num_codes=128, code_dim=32) for _ in range(2)]
    assert fits[0].fingerprint == fits[1].fingerprint != tokenizer.fingerprint
    torch.testing.assert_close(fits[0].components, tokenizer.components, atol=1e-4, rtol=0)
    torch.testing.assert_close(fits[0].scale, tokenizer.scale)
    exact, batches = (psnr(t.decode(t.encode(held_out)), held_out) for t in (tokenizer, fits[0]))
    assert batches > exact - 0.3


def test_bad_input_is_named(tokenizer, tmp_path) -> None:
    with pytest.raises(TokenizerError, match=r"expected \(B, 3, 64, 64\)"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(TokenizerError, match="distinct patches cannot give 128 codes"):
        PatchKMeans.fit(torch.zeros(2, 3, 64, 64), image_size=64, patch=8, num_codes=128, code_dim=32)
    with pytest.raises(TokenizerError, match="128 patches cannot give 129 codes"):
        PatchKMeans.fit(torch.rand(2, 3, 64, 64), image_size=64, patch=8, num_codes=129, code_dim=32)
    with pytest.raises(TokenizerError, match="not a multiple of patch"):
        PatchKMeans.fit(torch.zeros(2, 3, 64, 64), image_size=60, patch=8, num_codes=2, code_dim=32)
    with pytest.raises(TokenizerError, match="no tokenizer file"):
        tokenizers.load(tmp_path / "none")
    (tmp_path / "broken").write_bytes(bytes(100))
    with pytest.raises(TokenizerError, match="cannot be read"):
        tokenizers.load(tmp_path / "broken")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"num_codes": 2**40}, r"1099511627776, .* expected positive integers up to 1,048,576"),
        ({"num_codes": 2**20}, r"codebook is .*, expected \(1048576, 32\)"),
        ({"patch": 2**20, "image_size": [2**20, 2**20]}, r"mean is \(192,\), expected \(3298534883328,\)"),
        ({"patch": 0}, "expected positive integers"),
        ({"code_dim": 32.0}, "expected positive integers"),
        ({"image_size": "64"}, "expected positive integers"),
        ({"kind": "other"}, "holds no known tokenizer"),
        ({"channels": 4}, "3 means and 3 deviations, expected one for each of 4 channels"),
        ({"color": 1}, "not the spec of a tokenizer"),
        (None, "its header says None"),
    ],
)
def test_a_header_that_lies_is_refused_before_allocating(tokenizer, tmp_path, header, message) -> None:
    spec = None if header is None else {**tokenizer.description()["spec"], **header}
    save_file(tokenizer.state_dict(), tmp_path / "bad", {"tokenizer": json.dumps(spec)})
    with pytest.raises(TokenizerError, match=message):
        tokenizers.load(tmp_path / "bad")


# --- any channels, grids and pictures


def pictures(*shape: int) -> torch.Tensor:
    """Smooth random images, uint8, whose channels resemble each other."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(shape[0], 1, 4, 4, generator=generator)
    coarse = coarse * torch.rand(1, shape[1], 1, 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().byte()


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize(("size", "patch"), [((8, 8), 8), (2, 1), ((7, 7), 1), (14, 7), ((24, 40), 8)])
def test_any_channels_patch_and_grid(channels, size, patch, tmp_path) -> None:
    images = pictures(60, channels, *((size, size) if isinstance(size, int) else size)) / 255
    code_dim = min(9, channels * patch**2 + 1)
    tokenizer = PatchKMeans.fit(images, image_size=size, patch=patch, num_codes=8, code_dim=code_dim)
    ids = tokenizer.encode(images)
    assert ids.shape == (60, *tokenizer.spec.grid) and tokenizer.decode(ids).shape == images.shape
    assert psnr(tokenizer.decode(ids), images) > psnr(images.mean(dim=(0, 2, 3), keepdim=True), images) + 1
    tokenizer.save(tmp_path / "tokenizer")
    loaded = tokenizers.load(tmp_path / "tokenizer")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.spec.channels == channels
    assert json.loads(json.dumps(tokenizer.description()))["spec"]["channels"] == channels
    with pytest.raises(TokenizerError, match=f"of 3 channels given to the patch_kmeans .* expected {channels}:"):
        tokenizer.encode(torch.zeros(1, 3, *tokenizer.spec.image_size))


def test_three_channels_leave_no_trace(tokenizer) -> None:
    """Stores and fingerprints of RGB tokenizers stay as they were before there were other channels."""
    assert "channels" not in tokenizer.description()["spec"]
    with pytest.raises(TokenizerError, match=r"images of 4 channels .* patch_kmeans tokenizer, expected 3:"):
        tokenizer.encode(torch.zeros(1, 4, 64, 64))


def test_a_fit_to_many_images_needs_no_memory_for_them(photographs, capsys, monkeypatch) -> None:
    """Batches of any size and any split give the same tokenizer, nearly as good as one from all patches."""
    images = (torch.cat(photographs)[::2] * 255).round().byte()
    settings = {"image_size": 64, "num_codes": 128}
    whole = PatchKMeans.fit_to_images([images], **settings)
    assert PatchKMeans.fit_to_images(images.split(7), **settings).fingerprint == whole.fingerprint
    monkeypatch.setattr(patch_kmeans, "FIT_PATCHES", 2000)
    monkeypatch.setattr(patch_kmeans, "FIT_PATCHES_PER_CODE", 1)
    few, again = (PatchKMeans.fit_to_images(images.split(size), **settings) for size in (1, 9))
    assert few.fingerprint == again.fingerprint != whole.fingerprint
    assert PatchKMeans.fit_to_images([images], seed=1, **settings).fingerprint != few.fingerprint
    assert capsys.readouterr().out == ""
    held_out = torch.cat(photographs)[1::2]
    scores = [psnr(t.decode(t.encode(held_out)), held_out) for t in (whole, few)]
    assert scores[1] > scores[0] - 0.5


def test_a_fit_to_few_patches_has_fewer_codes_and_says_so(capsys) -> None:
    flat = torch.full((3, 3, 16, 24), 77, dtype=torch.uint8)
    tokenizer = PatchKMeans.fit_to_images([flat], image_size=(16, 24))
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(flat / 255)), flat / 255, atol=1e-5, rtol=0)
    assert tokenizer.spec.num_codes == 1 and "1 of 391 codes are kept" in capsys.readouterr().out
    one = pictures(1, 1, 16, 16)
    tokenizer = PatchKMeans.fit_to_images([one], image_size=16, patch=4)
    assert tokenizer.spec.num_codes == 16 and tokenizer.spec.code_dim == 17
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(one / 255)), one / 255, atol=1e-4, rtol=0)
    mixed = torch.cat([one, one, torch.zeros_like(one)])  # repeated, and black
    assert PatchKMeans.fit_to_images([mixed], image_size=16, patch=4).spec.num_codes == 17
    with pytest.raises(TokenizerError, match="no images to fit a tokenizer to"):
        PatchKMeans.fit_to_images([], image_size=16)
    with pytest.raises(TokenizerError, match="not a multiple of patch 8"):
        PatchKMeans.fit_to_images([one], image_size=12)


# --- the protocol: lookups, ids, compact copies, the spec, usage


TF32_SETTINGS = """
import torch
from seitpp.codebook import full_precision
{set}
with torch.autocast("cpu", dtype=torch.bfloat16):
    with full_precision(torch.device("cpu")):
        assert {off}
        assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_enabled("cpu")
assert {on}
"""
LEGACY = "torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32"
NEW = "torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision"


def test_a_compact_copy_keeps_the_used_codes_by_frequency(tokenizer, photographs) -> None:
    images = photographs[0][:6]
    ids = tokenizer.encode(images)
    counts = tokenizers.code_counts(ids, 128)
    compact = tokenizer.compact(counts)
    used = int((counts > 0).sum())
    assert compact.spec.num_codes == used < 128 and compact.codebook.shape == (used, 32)
    fewer = compact.encode(images)
    assert (torch.bincount(fewer.flatten(), minlength=used).diff() <= 0).all()
    assert torch.equal(compact.codebook[fewer], tokenizer.codebook[ids])
    assert torch.equal(compact.decode(fewer), tokenizer.decode(ids))
    assert tokenizer.codebook.shape == (128, 32)
    again = tokenizer.select(compact.codebook)
    assert again.fingerprint == compact.fingerprint and again.codebook is not compact.codebook
    ties = tokenizer.compact(torch.tensor([0, 3, 3, 7, *[0] * 124]))
    assert torch.equal(ties.codebook, tokenizer.codebook[[3, 1, 2]])
    for bad in (torch.zeros(128), torch.ones(127), -torch.ones(128)):
        with pytest.raises(TokenizerError, match=r"expected \(128,\), none negative, not all zero"):
            tokenizer.compact(bad)


def test_ids_to_decode_are_checked(tokenizer) -> None:
    for ids, message in (
        (torch.full((1, 8, 8), 128), "ids 128 to 128 .*expected 0 to 127"),
        (torch.full((1, 8, 8), -1), "ids -1 to -1 .*expected 0 to 127"),
        (torch.zeros(1, 8, 8), "dtype torch.float32"),
        (torch.zeros(8, 8, dtype=torch.long), r"expected \(B, H, W\)"),
    ):
        with pytest.raises(TokenizerError, match=message):
            tokenizer.decode(ids)
    ids = torch.randint(128, (2, 8, 8))
    assert torch.equal(tokenizer.decode(ids.to(torch.uint16)), tokenizer.decode(ids))


def test_the_spec_travels_as_json(tokenizer) -> None:
    description = json.loads(json.dumps(tokenizer.description()))
    assert TokenizerSpec.from_json(description["spec"]) == tokenizer.spec
    older = {key: description["spec"][key] for key in ("kind", "image_size", "patch", "num_codes", "code_dim")}
    assert TokenizerSpec.from_json(older) == tokenizer.spec
    with pytest.raises(TokenizerError, match="not the spec of a tokenizer"):
        TokenizerSpec.from_json({**older, "color": "red"})
    with pytest.raises(TokenizerError, match="lookup 'manhattan'"):
        TokenizerSpec.from_json({**older, "lookup": "manhattan"})


def test_the_fingerprint_tells_specs_and_tensors_apart(tokenizer) -> None:
    other = PatchKMeans(replace(tokenizer.spec, mean=(0.5, 0.5, 0.5)))
    other.load_state_dict(tokenizer.state_dict())
    assert other.fingerprint != tokenizer.fingerprint
    other.spec = tokenizer.spec
    assert other.fingerprint == tokenizer.fingerprint
    other.codebook[0, 0] += 1
    assert other.fingerprint != tokenizer.fingerprint
    assert other.bfloat16().fingerprint != tokenizer.fingerprint


def test_usage_counts_and_warns() -> None:
    counts = tokenizers.code_counts(torch.tensor([[0, 0], [1, 1]]), 3)
    assert counts.tolist() == [2, 2, 0]
    report = tokenizers.usage(counts)
    assert report.used == 2 and report.perplexity == pytest.approx(2.0)
    assert str(report) == "2 of 3 codes used (67%), perplexity 2.0"
    with pytest.warns(UserWarning, match="1 of 3 codes used"):
        assert tokenizers.usage(torch.tensor([0, 9, 0])).perplexity == pytest.approx(1.0)


def test_only_dead_codes_are_restarted() -> None:
    codebook, vectors = torch.zeros(4, 2), torch.arange(20.0).view(10, 2) + 1
    counts = torch.tensor([1000, 1000, 10, 9])  # the mean is 504.75, 2 % of it 10.1
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW([codebook])
    assert tokenizers.restart_dead_codes(codebook, counts, vectors, generator=generator, optimizer=optimizer) == 2
    assert (codebook[:2] == 0).all()
    assert all((vectors == row).all(dim=1).any() for row in codebook[2:])
