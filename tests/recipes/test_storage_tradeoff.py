"""recipes/storage_tradeoff.py as a user runs it: all rows, again after an interruption, and what it refuses."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import storage_tradeoff
from PIL import Image
from support.running import call, refused

from downstream.storage.sizes import listed
from seitpp.engine.folder import unknown_files

FAMILIES = [
    *("originals", "uniform", "high score", "resolution", "JPEG", "WEBP"),
    *("tokens", "tokens + MTM", "tokens of a part", "tokens of crops"),
]


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tradeoff") / "run"
    call(storage_tradeoff, "smoke", "--seeds", 1, "--out", folder)
    return folder


def test_all_rows_with_their_bytes(finished: Path) -> None:
    table, result = table_of(finished), json.loads((finished / "result.json").read_text())
    assert [row["family"] for row in table] == FAMILIES
    parts = ("payload", "offsets", "labels", "codebook", "codec_table", "metadata")
    for row in table:
        folder = finished / "stored" / f"{row['family']}-{row['setting']}".replace(" ", "-")
        folder = finished / "stored/tokens" if row["setting"] == "all" and "tokens" in row["family"] else folder
        assert sum(int(row[part]) for part in parts) == int(row["bytes"]) == sum(listed(folder).values())
        assert (
            float(row["GB"]) * 1e9 == pytest.approx(float(row["GiB"]) * 2**30) == pytest.approx(int(row["bytes"]))
        )
        assert 0 <= float(row["top1"]) <= 100
        assert bool(row["top1_matched"]) == (row["family"] in ("resolution", "JPEG", "WEBP")), "lossy pixels"
    assert result["budgets"]["10B"] is None and result["budgets"]["150B"]
    assert any("AVIF" in line for line in result["unmet"]) and result["tokenizer_bytes"] > 10_000
    assert unknown_files(finished) == [] and (finished / "tradeoff.png").stat().st_size > 10_000


def test_resumed_it_trains_what_is_missing_and_gives_the_same_table(
    finished: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    kept = tmp_path / "run/rows/originals-all-seed-0.json"
    kept.write_text('{"top1": 99.0}')  # a row that is finished is not trained again
    for name in ("JPEG-q1-seed-0", "tokens-+-MTM-all-seed-0"):
        (tmp_path / f"run/rows/{name}.json").unlink()
    shutil.rmtree(tmp_path / "run/stored/tokens-of-crops-2")
    (tmp_path / "run/result.json").unlink()
    call(storage_tradeoff, "smoke", "--seeds", 1, "--out", tmp_path / "run", "--resume")
    before, after = table_of(finished), table_of(tmp_path / "run")
    assert after[0]["top1"] == "99.0" and after[1:] == before[1:]
    printed = capsys.readouterr().out
    assert "10B an image: no family meets it, the smallest is tokens of a part 0.2" in printed
    assert "150B an image: originals all" in printed and "top-1" in printed


def test_a_folder_of_pictures_with_scores(tmp_path: Path) -> None:
    """The images with the lowest scores, a fitted tokenizer, and an image that cannot be read and is left out."""
    generator = np.random.default_rng(0)
    for at in range(44):
        pixels = generator.integers(64, size=(40, 36, 3), dtype=np.uint8)
        pixels[..., at % 2] += 128
        folder = tmp_path / "pictures" / ("red", "green")[at % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{at:02}.jpg")
    (tmp_path / "pictures/red/99.jpg").write_bytes(b"no picture")
    (tmp_path / "scores").write_text("".join(f"{at}\n" for at in range(42)))
    none = ["--uniform", "--resolution", "--jpeg-quality", "--token-fractions", "--crops"]
    data = ["--data", tmp_path / "pictures", "--split", None, "--validation-split", None, "--by-score", 0.5]
    few = ["--seeds", 1, "--batch-size", 16, "--budgets", "1kB"]
    scored = ["--scores", tmp_path / "scores", "--keep", "low"]
    call(storage_tradeoff, "smoke", *none, *data, *few, *scored, "--skip-errors", "--out", tmp_path / "run")
    assert "99.jpg" in (tmp_path / "run/skipped.txt").read_text() and unknown_files(tmp_path / "run") == []
    table = {row["family"]: row for row in table_of(tmp_path / "run")}
    assert table["low score"]["images"] == "21" and table["WEBP"]["setting"].startswith("q")
    assert (tmp_path / "run/tokenizer.safetensors").is_file()
    assert not (tmp_path / "run/scores.txt").exists(), "no training for scores that are there"
    assert "low" in json.loads((tmp_path / "run/result.json").read_text())["scores"]


def test_what_is_refused(tmp_path: Path, capfd, monkeypatch) -> None:
    (tmp_path / "flat").mkdir()
    for at in range(40):
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / f"{at}.png")
    (tmp_path / "scores").write_text("1\n2\n")
    flat = ["--data", tmp_path / "flat", "--split", None, "--validation-split", None]
    for arguments, *words in (
        (["published", "--precision", "no"], "--data"),
        (["smoke", "--budgets", "0"], "--budgets 0", "at least 1 byte"),
        (["smoke", "--budgets", "much"], "--budgets much", "574MB"),
        (["smoke", "--precision", "fp16"], "--precision"),
        (["smoke", "--size", 7], "--size 7 7", "8 x 8", "even"),
        (["smoke", "--size", 10], "--size 10 10", "8 x 8"),
        (["smoke", *flat], "needs classes"),
        (["smoke", "--data", tmp_path / "none"], "none"),
        (["smoke", "--tokenizer", tmp_path / "none"], "none"),
        (["smoke", "--jpeg-quality", 101], "--jpeg-quality 101"),
        (["smoke", "--resume"], "--out"),
    ):
        refused(capfd, monkeypatch, storage_tradeoff, [*arguments], *words)
    assert not (tmp_path / "run").exists()
    line = ["smoke", "--scores", tmp_path / "scores", "--out", tmp_path / "run"]
    refused(capfd, monkeypatch, storage_tradeoff, line, "scores", "1,437 lines")
