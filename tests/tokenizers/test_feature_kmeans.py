"""Tokens of a network's features: what the tables keep, a saved file, and the command line."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from seitpp import tokenizers
from seitpp.tokenizers import FeatureKMeans, TokenizerError, open_network

NAMES = {"vit_tiny_patch16_224": 16, "resnet18": 32}
SIZE = 64


@pytest.fixture(scope="module")
def images() -> Tensor:
    photograph = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1)
    return photograph.unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE).flatten(1, 2).transpose(0, 1)[:24].contiguous()


def weights(name: str, path: Path) -> Path:
    """A file with the weights of a whole classifier of timm, as people have them."""
    torch.manual_seed(0)
    save_file(
        timm.create_model(name, num_classes=5, **({"img_size": SIZE} if "vit" in name else {})).state_dict(), path
    )
    return path


def network(name: str, tmp_path: Path) -> nn.Module:
    return open_network(name, str(weights(name, tmp_path / "weights.safetensors")), SIZE)


@pytest.mark.parametrize(("name", "patch"), NAMES.items())
def test_each_digit_keeps_more_of_the_features(name: str, patch: int, images: Tensor, tmp_path: Path) -> None:
    one, three = (
        FeatureKMeans.fit(
            images.split(8), network(name, tmp_path), image_size=SIZE, num_codes=8, digits=digits, code_dim=6
        )
        for digits in (1, 3)
    )
    prepared, side = images.float() / 255, SIZE // patch
    features = three.features(prepared)
    errors = []
    for tokenizer, shape in ((one, (24, side, side)), (three, (24, 3, side, side))):
        ids = tokenizer.encode(prepared)
        assert ids.shape == shape
        errors.append((tokenizer.books.embed(ids) - features).square().mean())
    assert torch.equal(one.features(prepared), features) and errors[1] < 0.8 * errors[0] < 0.8
    assert torch.equal(three.encode(prepared)[:, 0], one.encode(prepared)), "the first table is the same"
    decoded = three.decode_features(three.encode(prepared))
    assert decoded.shape == (24, three.network.num_features, side, side)
    torch.testing.assert_close(
        (decoded.permute(0, 2, 3, 1) - three.mean) @ three.components.T / three.scale,
        three.books.embed(three.encode(prepared)).permute(0, 2, 3, 1),
        atol=1e-4,
        rtol=1e-4,
    )
    three.save(tmp_path / "tokenizer.safetensors")
    loaded = tokenizers.load(tmp_path / "tokenizer.safetensors")
    assert torch.equal(loaded.encode(prepared), three.encode(prepared)) and loaded.fingerprint == three.fingerprint
    for refused in (
        lambda: three.decode(three.encode(prepared)),
        lambda: three.set_image_size(2 * SIZE),
        lambda: three.codebook,
    ):
        with pytest.raises(
            TokenizerError, match=r"decodes to features of|is for images of|has 3 digits, expected one"
        ):
            refused()
    assert torch.equal(one.codebook, one.books.tables[0])


def test_networks_that_cannot_be_opened(tmp_path: Path) -> None:
    file = str(weights("resnet18", tmp_path / "resnet18.safetensors"))
    for name, path, message in (
        ("resnet81", file, "timm has no model 'resnet81'"),
        ("resnet18", None, "no weights for resnet18: name their file"),
        ("resnet18", str(tmp_path / "none"), "no file"),
        ("resnet34", file, "has no weights of resnet34"),
        ("hf-hub:owner/name", file, "has weights of its own"),
    ):
        with pytest.raises(TokenizerError, match=message):
            open_network(name, path, SIZE)


def test_a_file_with_tensors_of_another_network(images: Tensor, tmp_path: Path) -> None:
    """One that timm's name does not say, or a name of far more layers than the file has."""
    path = tmp_path / "tokenizer.safetensors"
    for name, changes in (("vit_tiny_patch16_224", {"depth": 1}), ("resnet18", {"layers": (1, 1, 1, 1)})):
        made = timm.create_model(name, num_classes=0, **changes, **({"img_size": SIZE} if "vit" in name else {}))
        FeatureKMeans.fit(images.split(8), made, image_size=SIZE, num_codes=8, digits=2, code_dim=6).save(path)
        with pytest.raises(TokenizerError, match=f"{path} is not a complete feature_kmeans tokenizer"):
            tokenizers.load(path)


def test_few_patches_and_many_dimensions(images: Tensor, tmp_path: Path) -> None:
    sizes = {"image_size": SIZE, "digits": 2}
    with pytest.raises(TokenizerError, match="96 patches cannot give 1000 codes"):
        FeatureKMeans.fit(images.split(8), network("resnet18", tmp_path), num_codes=1000, **sizes)
    with pytest.raises(TokenizerError, match="code_dim 600: expected 1 to 512"):
        FeatureKMeans.fit(images.split(8), network("resnet18", tmp_path), num_codes=4, code_dim=600, **sizes)
    with pytest.raises(TokenizerError, match="expected multiples of 32, which one token covers"):
        FeatureKMeans.fit(images.split(8), network("resnet18", tmp_path), image_size=48)
