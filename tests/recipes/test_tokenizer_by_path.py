"""Tokenizers of other projects through the command line: pictures become a store, and the store pictures again."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.running import run

from seitpp import TokenStore, cli, tokenizers


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
