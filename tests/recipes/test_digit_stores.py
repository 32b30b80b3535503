"""Recipes on tokens of several digits and on sequences: from training to evaluation, and what they refuse."""

from pathlib import Path

import evaluate
import finetune
import inpaint
import mtm_pretrain
import numpy as np
import probe
import pytest
import seit_train
from support.running import call, result_of

from seitpp import StoreWriter, TokenStore
from seitpp.books import Books
from seitpp.data.digits import digits
from seitpp.errors import UserError
from seitpp.models import load_pretrained

IMAGES = {"train": 96, "validation": 40}
SHORT = ["--epochs", 1, "--warmup-epochs", 0, "--batch-size", 32]
KINDS = ("concat", "sum", "sequence")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Handwritten digits whose 64 codes are written as two digits of 8, or as sequences of 64 tokens."""
    root, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    for split, number in IMAGES.items():
        source = TokenStore(digits().store, split)
        ids, labels = source.ids(range(number)), source.labels[:number]
        planes = np.stack([ids // 8, ids % 8], axis=1)
        tables = {"concat": [(8, 2), (8, 3)], "sum": [(8, 4), (8, 4)]}
        for kind, shapes in tables.items():
            rng = np.random.default_rng(1)
            books = Books.join([rng.normal(size=shape) for shape in shapes], kind)
            with StoreWriter(root / kind, codebook=books, grid=(8, 8), split=split) as writer:
                writer.add_batch(planes, labels)
        sequence = {"codebook": source.codebook, "grid": (1, 64), "layout": "sequence"}
        with StoreWriter(root / "sequence", **sequence, split=split) as writer:
            writer.add_batch(ids.reshape(number, 1, 64), labels)
    return {kind: root / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_masked_modeling_and_what_follows(kind: str, stores: dict[str, Path], tmp_path: Path) -> None:
    store, runs = (
        ["--store", stores[kind]],
        {name: tmp_path / name for name in ("mtm", "fine", "probe", "inpaint")},
    )
    patch = ["--patch-size", 1, 4] if kind == "sequence" else []
    call(mtm_pretrain, "smoke", *store, *SHORT, *patch, "--out", runs["mtm"])
    result = result_of(runs["mtm"])
    assert 0 < result["masked_loss_validation"] < 4.5 and "linear_probe_top1" in result
    assert (runs["mtm"] / "report.html").is_file()
    model = load_pretrained(runs["mtm"]).model
    assert model.sizes == ((64,) if kind == "sequence" else (8, 8)) and model.encoder.patch_embed.num_patches == 16
    call(probe, "smoke", *store, "--checkpoint", runs["mtm"], "--out", runs["probe"])
    whole = ["--crop-mode", "None"] if kind == "sequence" else []
    call(finetune, "smoke", *store, *SHORT, *whole, "--checkpoint", runs["mtm"], "--out", runs["fine"])
    call(evaluate, "smoke", *store, "--checkpoint", runs["fine"], "--out", tmp_path / "evaluate")
    assert result_of(tmp_path / "evaluate")["top1"] == result_of(runs["fine"])["top1"]
    if kind != "sequence":
        call(inpaint, "smoke", *store, "--checkpoint", runs["mtm"], "--out", runs["inpaint"])
        assert 0 <= result_of(runs["inpaint"])["accuracy_iterative"] <= 100


@pytest.mark.parametrize("kind", KINDS)
def test_supervised_training(kind: str, stores: dict[str, Path], tmp_path: Path) -> None:
    flat = ["--crop-mode", "None", "--stem", "linear"] if kind == "sequence" else []
    call(seit_train, "smoke", "--store", stores[kind], *SHORT, *flat, "--out", tmp_path / "run")
    line = ["smoke", "--store", stores[kind], "--checkpoint", tmp_path / "run", "--out", tmp_path / "evaluate"]
    call(evaluate, *line)
    assert result_of(tmp_path / "evaluate")["top1"] == result_of(tmp_path / "run")["top1_ema"]


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (
            mtm_pretrain,
            ["--crop-size", 6],
            "--crop-size 6: the tokens of .* are sequences of 64",
        ),
        (mtm_pretrain, ["--flip", 0.5], "--flip 0.5: the tokens of .* are sequences .*: pass --flip 0"),
        (seit_train, [], "--crop-mode resized: the tokens of .* are sequences .*: pass --crop-mode None"),
        (
            seit_train,
            ["--crop-mode", "None"],
            "--stem conv4: .* are sequences .*: pass --stem linear",
        ),
    ],
)
def test_sequences_refuse_what_needs_rows(
    recipe, flags: list, message: str, stores: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        call(recipe, "smoke", "--store", stores["sequence"], *SHORT, *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
