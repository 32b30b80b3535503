"""A recipe reads --store from a bucket: its run has the bits of the run on the local store, also after a stop."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import mtm_pretrain
import numpy as np
import pytest
from support import running
from support.buckets import BUCKET, served, upload
from support.running import call, refused, torchrun

from seitpp import StoreWriter, TokenStore
from seitpp.data.digits import digits
from seitpp.files import cache_root
from seitpp.store import spec

SHARD = 16


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A local store of 10 shards and its copy in a bucket."""
    path, url = tmp_path_factory.mktemp("local") / "tokens", f"s3://{BUCKET}/tokens"
    with pytest.MonkeyPatch.context() as patch, served(patch):
        patch.setattr(spec, "SHARD_IMAGES", SHARD)
        for split, images in (("train", 160), ("validation", 32)):
            whole = TokenStore(digits().store, split)
            chosen = np.arange(images)
            common = {"codebook": whole.codebook, "grid": whole.grid, "class_names": whole.class_names}
            with StoreWriter(path, split=split, tokenizer=whole.tokenizer, **common) as writer:
                writer.add_batch(whole.ids(chosen), whole.labels[chosen])
        upload(path, url)
        yield path, url


def pretrain(store: object, out: Path, *more: object) -> None:
    words = ["--store", store, "--batch-size", 16, "--epochs", 2, "--warmup-epochs", 0, "--workers", 1]
    call(mtm_pretrain, "smoke", *words, "--out", out, *more)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("windows", [(), ("--window-shards", 3)])
def test_the_bits_are_those_of_the_local_store(stores: tuple[Path, str], tmp_path: Path, windows: tuple) -> None:
    for name, store in zip(("local", "bucket"), stores, strict=True):
        pretrain(store, tmp_path / name, *windows)
    assert len(losses(tmp_path / "local")) == 20
    assert losses(tmp_path / "local") == losses(tmp_path / "bucket")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("local", "bucket"))
    assert one == other


def test_a_run_goes_on_in_mid_epoch_on_more_processes(
    stores: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    monkeypatch.setattr("support.running.ON_CPU", {**running.ON_CPU, **server})
    whole, part = tmp_path / "whole", tmp_path / "part"
    words = ("--window-shards", 3, "--checkpoint-epochs", 0.5)
    pretrain(stores[1], whole, *words)
    pretrain(stores[1], part, *words)
    for checkpoint in sorted((part / "checkpoints").iterdir()):
        if checkpoint.name > "step-00000005":  # of 10 in an epoch
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    for name in ("result.json", "model.safetensors", "ema.safetensors"):
        (part / name).unlink(missing_ok=True)
    settings = ["--store", stores[1], "--batch-size", 16, "--epochs", 2, "--warmup-epochs", 0, "--workers", 0]
    line = ["smoke", *settings, *words, "--resume", "--out", part]
    done = torchrun(2, Path(mtm_pretrain.__file__), *line)  # forks could not open a bucket
    assert done.returncode == 0, done.stderr
    assert np.allclose(losses(part), losses(whole), rtol=1e-3) and len(losses(part)) == 20


def test_windows_and_a_missing_store_are_refused(
    stores: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    out = ["--out", tmp_path / "run"]
    refused(capfd, monkeypatch, mtm_pretrain, ["smoke", "--store", f"{stores[1]}s", *out], "no such object")
    words = ["smoke", "--store", stores[1], "--window-shards", 0, *out]
    refused(capfd, monkeypatch, mtm_pretrain, words, "--window-shards 0", "at least 1")
    assert not (tmp_path / "run").exists() and (cache_root() / "buckets").is_dir()
