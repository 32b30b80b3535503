"""recipes/tokenize_images.py: any source, killed and continued, on two processes, with unreadable images."""

import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from support.paths import RECIPES
from support.running import distributed, kill_when, run

from seitpp import TokenStore, tokenizers
from seitpp.images.decode import decode_image
from seitpp.images.sources import open_source
from seitpp.store import spec
from seitpp.tokenizers import PatchKMeans

IMAGES, SIZE, GRID, SHARD = 50, 512, (128, 128), 20


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """A shard has as many tokens as twenty images; so it has in forks of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "SHARD_TOKENS", SHARD * math.prod(GRID))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Crops of two photographs in two class folders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir()
        for number in range(IMAGES // 2):
            top, left = rng.integers(300), rng.integers(500)
            crop = photograph[top : top + 100, left : left + 120]
            Image.fromarray(crop).save(root / name / f"{number:03d}.jpg")
    return root


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Fitted on small images; then for an image size that makes many tokens."""
    photographs = [torch.tensor(image).permute(2, 0, 1)[None] / 255 for image in load_sample_images().images]
    tokenizer = PatchKMeans.fit(torch.cat(photographs), image_size=64, patch=4, num_codes=32, code_dim=8)
    tokenizer.set_image_size(SIZE)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    tokenizer.save(path)
    return path


def arguments(folder: Path, tokenizer: Path, out: Path, *more: object) -> list:
    line = ["--data", folder, "--tokenizer", tokenizer, "--out", out, "--batch-size-per-process", 8]
    return [*line, "--workers", 1, "--hold-out", 0, *more]


def tokenize(*line: object) -> subprocess.CompletedProcess:
    return run("tokenize_images", *arguments(*line))


@pytest.fixture(scope="module")
def store(folder, tokenizer, tmp_path_factory) -> Path:
    """Made by one process without an interruption."""
    out = tmp_path_factory.mktemp("store") / "tokens"
    finished = tokenize(folder, tokenizer, out, "--keep-source")
    assert finished.returncode == 0, finished.stderr
    return out


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_the_store_holds_what_the_tokenizer_makes_of_the_images(store, folder, tokenizer) -> None:
    tokens, source, model = TokenStore(store), open_source(str(folder), None), tokenizers.load(tokenizer)
    assert len(tokens) == IMAGES and tokens.class_names == ["china", "flower"] and tokens.grid == GRID
    assert tokens.tokenizer["fingerprint"] == model.fingerprint
    assert len(list((store / "train").glob("*.arrow"))) == 3
    for index in (0, SHARD - 1, SHARD, IMAGES - 1):
        sample = source.read(index)
        pixels = torch.from_numpy(decode_image(sample, (SIZE, SIZE)))[None].float() / 255
        ids, label = tokens[index]
        assert label == sample.label and np.array_equal(ids, model.encode(pixels)[0].numpy())
        assert tokens.column("file_name")[index] == sample.name
        assert tokens.column("source_bytes")[index] == len(sample.data)


def test_killed_and_started_again_gives_the_same_bytes(store, folder, tokenizer, tmp_path) -> None:
    out, root = tmp_path / "store/tokens", tmp_path / "store"
    line = arguments(folder, tokenizer, out, "--keep-source")
    kill_when(
        lambda: list(root.glob(".tokens-train.staging/shard-*.arrow")), "tokenize_images", *line, logs=tmp_path
    )
    assert not out.exists()
    finished = tokenize(folder, tokenizer, out, "--keep-source")
    assert finished.returncode == 0, finished.stderr
    assert "0 of them finished" not in finished.stdout
    assert content(out) == content(store)
    assert [path.name for path in root.iterdir()] == ["tokens"]


def test_two_processes_give_the_same_bytes(store, folder, tokenizer, tmp_path) -> None:
    line = arguments(folder, tokenizer, tmp_path / "tokens", "--keep-source")
    finished = distributed(2, RECIPES / "tokenize_images.py", *line)
    assert finished.returncode == 0, finished.stderr
    assert "2 process(es)" in finished.stdout
    assert content(tmp_path / "tokens") == content(store)


def test_an_unreadable_image_stops_or_is_listed(folder, tokenizer, tmp_path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))[:6]):
        (images / f"{number}.jpg").write_bytes(path.read_bytes() if number != 3 else b"no jpeg")
    out = tmp_path / "tokens"
    stopped = tokenize(images, tokenizer, out)
    assert stopped.returncode == 2 and not out.exists()
    assert stopped.stderr.splitlines()[-1].startswith("error: 3.jpg: cannot be read as an image")
    finished = tokenize(images, tokenizer, out, "--skip-errors")
    assert finished.returncode == 0, finished.stderr
    assert len(TokenStore(out)) == 5
    assert (tmp_path / "tokens-train-skipped.txt").read_text().startswith("3.jpg: cannot be read")


def test_without_arguments_it_tokenizes_the_digits_and_adds_splits(tmp_path) -> None:
    for split, images in (("train", 1437), ("validation", 360)):
        line = ["--out", tmp_path / "digits", "--split", split]
        assert run("tokenize_images", *line).returncode == 0
        assert len(TokenStore(tmp_path / "digits", split)) == images
    again = run("tokenize_images", *line)
    assert again.returncode == 2 and "has a split 'validation' already" in again.stderr.splitlines()[-1]
