"""Tokenizers of other projects through the command line: pictures become a store, and the store pictures again."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tokenize_images
import torch
from PIL import Image
from support.running import call, run
from support.vqgans import VQVAES, small_vqvae

from seitpp import TokenStore, cli, tokenizers
from seitpp.images.batches import DecodedImages
from seitpp.images.sources import open_source
from seitpp.tokenizers.encoding import encode


@pytest.fixture
def pictures(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a/1", "b/2"):
        file = tmp_path / f"pictures/{name}.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(256, size=(256, 256, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


def vq_folder(folder: Path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        num_vq_embeddings=20,
        vq_embed_dim=4,
    ).save_pretrained(folder)
    return folder


def test_pictures_to_tokens_to_pictures(pictures, tmp_path, monkeypatch, capsys) -> None:
    path, out = vq_folder(tmp_path / "tokenizer"), tmp_path / "tokens"
    settings = ("--data", pictures, "--tokenizer", path, "--out", out, "--workers", 0)
    finished = run("tokenize_images", "smoke", *settings, "--compact")
    assert finished.returncode == 0, finished.stderr
    store, tokenizer = TokenStore(out), tokenizers.load(path)
    images = [np.asarray(Image.open(file)) for file in sorted(pictures.rglob("*.png"))]
    expected = tokenizer.encode(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255)
    compact = tokenizers.load(tmp_path / "tokens-tokenizer.safetensors")
    assert store.tokenizer["fingerprint"] == compact.fingerprint and len(store) == 2
    found = torch.from_numpy(store.codebook[store.ids([0, 1]).astype(int)])
    torch.testing.assert_close(found, tokenizer.codebook[expected])
    show = ["seitpp", "show", out, "--tokenizer", tmp_path / "tokens-tokenizer.safetensors", "--out"]
    monkeypatch.setattr(sys, "argv", [*map(str, show), str(tmp_path / "shown.png")])
    cli.main()
    assert (tmp_path / "shown.png").read_bytes().startswith(b"\x89PNG")
    wrong = [*map(str, show), str(tmp_path / "other.png"), "--tokenizer-kind", "llamagen"]
    monkeypatch.setattr(sys, "argv", wrong)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main()
    assert "expected one of llamagen" in capsys.readouterr().err


@pytest.mark.parametrize("name", VQVAES)
def test_the_classes_of_transformers(pictures, tmp_path, name) -> None:
    small_vqvae(name, levels=4).save_pretrained(tmp_path / "tokenizer")
    words = ["--data", pictures, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "tokens"]
    call(tokenize_images, "smoke", *words, "--short-side", 64, "--workers", 0)
    store, tokenizer = TokenStore(tmp_path / "tokens"), tokenizers.load(tmp_path / "tokenizer")
    decoded = DecodedImages(open_source(str(pictures)), (64, 64)).__getitems__([0, 1])
    expected = np.stack(encode(tokenizer, decoded, torch.device("cpu")))
    assert tokenizer.spec.kind == f"{name.removesuffix('VQVAE').lower()}_vq"
    assert store.tokenizer["fingerprint"] == tokenizer.fingerprint
    assert expected.shape == (2, 8, 8) and np.array_equal(store.ids([0, 1]), expected)
    assert np.array_equal(store.codebook, tokenizer.codebook.detach().numpy())
