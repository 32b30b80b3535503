"""What a GPU would refuse or wait for, seen on a CPU: every recipe on a device of pretend_gpu.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seitpp import StoreWriter

PRETEND = Path(__file__).parent / "pretend_gpu.py"
SHORT = ["smoke", "--precision", "bf16", "--epochs"]


def pretend(jobs: list[tuple[str, list]], *flags: str) -> list[dict]:
    """The reports of `jobs`, (recipe, arguments), run one after the other by one process."""
    lines = json.dumps([[recipe, [str(word) for word in words]] for recipe, words in jobs])
    done = subprocess.run(
        [sys.executable, str(PRETEND), *flags], input=lines, capture_output=True, text=True, env=dict(os.environ)
    )
    reports = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("report ")]
    assert len(reports) == len(jobs), done.stderr[-3000:]
    return reports


def check(report: dict) -> None:
    """No fault, and nothing in a step for which the host waits."""
    name = f"{report['recipe']} {report['arguments']}"
    assert report["error"] is None, f"{name}: {report['error']}"
    for kind in ("faults", "waits", "copies"):
        assert not report[kind], f"{kind} of {name}: {json.dumps(report[kind], indent=1)}"


def test_every_recipe_from_its_first_step_to_its_result(tmp_path: Path) -> None:
    """Training steps, checkpoints, evaluations, files and pictures, with numbers."""
    adapt, mtm, fine, segment = (tmp_path / name for name in ("adapt", "mtm", "fine", "segment"))
    through = ["--tokenadapt", adapt, "--adapted", 0.5]
    jobs = [
        ("tokenadapt_train", [*SHORT, 0.1, "--out", adapt]),
        ("mtm_pretrain", [*SHORT, 0.2, "--out", mtm, "--crop", 8, *through, "--colour", "coloradapt"]),
        (
            "finetune",
            [*SHORT, 0.2, "--out", fine, "--checkpoint", mtm, *through, "--colour", "seitpp", "--mixup", 0.8],
        ),
        ("seit_train", [*SHORT, 0.2, "--out", tmp_path / "seit", *through, "--colour", "seitpp", "--mixup", 0.8]),
        ("tokenizer_train", [*SHORT, 0.03, "--out", tmp_path / "tokenizer", "--adversarial"]),
        ("segment_ade20k", ["smoke", "--precision", "bf16", "--out", segment, "--steps", 2, "--warmup-steps", 1]),
        ("probe", ["smoke", "--out", tmp_path / "probe", "--checkpoint", mtm]),
        ("inpaint", ["smoke", "--out", tmp_path / "inpaint", "--checkpoint", mtm]),
        ("evaluate", ["smoke", "--out", tmp_path / "evaluate", "--checkpoint", fine]),
        ("evaluate_segmentation", ["smoke", "--out", tmp_path / "scenes", "--checkpoint", segment]),
    ]
    for report in pretend(jobs):
        check(report)
    assert {path.name for path in tmp_path.iterdir()} == {
        Path(words[words.index("--out") + 1]).name for _, words in jobs
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as the published one: 32 x 32 tokens of 391 codes, 1,000 classes, few images."""
    folder, generator = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    codebook = generator.standard_normal((391, 32), np.float32)
    for split, n in (("train", 64), ("validation", 8)):
        with StoreWriter(
            folder / "store",
            codebook=codebook,
            grid=(32, 32),
            split=split,
            class_names=[str(c) for c in range(1000)],
        ) as writer:
            writer.add_batch(generator.integers(391, size=(n, 32, 32), dtype=np.uint16), np.arange(n))
    return folder
