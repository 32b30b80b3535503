"""Whatever ends a run, its process ends too: within seconds, with one line, whatever its workers do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.models import tiny_mtm
from support.paths import RECIPES, ROOT, SUPPORT
from support.pictures import encoded, write
from support.running import digits_codebook

from downstream.segmentation.default import FEW_SCENES, default_scenes
from seitpp.data.digits import digits
from seitpp.models.weights.pretrained import save_pretrained

LIMIT = 60  # seconds for a whole run of a smoke preset; what does not end takes for ever


def forked(jobs: list[dict]) -> list[dict]:
    """The reports of `jobs`, see tests/support/forked_recipes.py."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", RECIPES)))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "forked_recipes.py")],
        input="\n".join(json.dumps({"limit": LIMIT, **job}) for job in jobs),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == len(jobs), done.stderr[-3000:]
    return reports


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Pictures of two classes and scenes with masks, in each split a damaged one, and models for them."""
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for split in ("train", "validation"):
        for number in range(64):
            pixels = rng.integers(256, size=(40, 40, 3), dtype=np.uint8)
            write(root / f"pictures/{split}/{'ab'[number % 2]}/{number:02d}.png", encoded(pixels))
        write(root / f"pictures/{split}/b/damaged.png", encoded(pixels)[:1000])
    scenes = default_scenes(FEW_SCENES)
    for path in scenes.images.rglob("*.*"):
        write(root / "scenes" / path.relative_to(scenes.images), path.read_bytes())
    for split in ("training", "validation"):
        first = min((root / f"scenes/images/{split}").iterdir())
        first.write_bytes(first.read_bytes()[:500])
        first.rename(first.with_stem("damaged"))
        mask = root / f"scenes/annotations/{split}/{first.stem}.png"
        mask.rename(mask.with_stem("damaged"))
    save_pretrained(root / "mtm.safetensors", tiny_mtm(), digits_codebook())
    return root


def test_an_unreadable_image_ends_every_recipe_or_is_left_out(files: Path, tmp_path: Path) -> None:
    pictures, scenes = ["--data", files / "pictures"], ["--data", files / "scenes"]
    train = ["--data", files / "pictures/train"]
    tokens = ["--tokenizer", digits().tokenizer]
    splits = ["--split", "train", "--validation-split", "validation"]
    few = ["--batch-size", 16, "--epochs", 1, "--warmup-epochs", 0]
    tuned = ["--checkpoint", tmp_path / "finetune-skipped"]
    segmented = ["--checkpoint", tmp_path / "segment_ade20k-skipped"]
    by_scenes = ["--tokenizer", default_scenes(FEW_SCENES).tokenizer]
    steps = ["--steps", 2, "--warmup-steps", 1, "--short-side", 64]
    recipes = {
        "tokenize_images": [*train, *tokens],
        "tokenizer_train": [*pictures, *splits, *few],
        "tokenadapt_train": [*pictures, *splits, *few, *tokens],
        "finetune": [*pictures, *few, "--size", 32, "--checkpoint", files / "mtm.safetensors"],
        "evaluate": [*pictures, *tuned],
        "predict": [*train, *tuned],
        "embed": [*train, *tokens, "--checkpoint", files / "mtm.safetensors"],
        "segment_ade20k": [*scenes, *by_scenes, *steps],
        "evaluate_segmentation": [*scenes, *by_scenes, *segmented],
    }
    jobs = [
        {
            "recipe": name,
            "arguments": list(
                map(str, ["smoke", *words, "--workers", 2, "--out", tmp_path / f"{name}-{kind}", *more])
            ),
        }
        for kind, more in (("skipped", ["--skip-errors"]), ("stopped", []))
        for name, words in recipes.items()
    ]
    reports = forked(jobs)
    for job, report in zip(jobs, reports, strict=True):
        skips, out = (
            job["arguments"][-1] == "--skip-errors",
            Path(job["arguments"][-2 if "skip" in job["arguments"][-1] else -1]),
        )
        told = f"{job['recipe']}: {report}"
        assert report["status"] == (0 if skips else 2), told
        if skips:
            listed = (
                out.with_name(f"{out.name}-train-skipped.txt")
                if job["recipe"] == "tokenize_images"
                else out / "skipped.txt"
            )
            lines = listed.read_text().splitlines()
            assert lines and all("damaged" in line for line in lines), told
        else:
            last = report["err"].splitlines()[-1]
            assert last.startswith("error: ") and "damaged" in last, told
