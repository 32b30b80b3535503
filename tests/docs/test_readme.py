"""What the README prints works as it is printed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.forks import run_forks
from support.paths import ROOT
from support.pictures import CLASSES, photograph_crops, write

from seitpp import TokenStore

README = (ROOT / "README.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_the_example_runs(tmp_path: Path) -> None:
    example = blocks("python", (ROOT / "docs/quickstart.md").read_text())[0]
    check = "assert picture.shape == (1, 3, 64, 64) and first.shape == (8, 8) and len(store) == 90\n"
    subprocess.run([sys.executable, "-c", example + check], cwd=tmp_path, check=True)


@pytest.mark.parametrize("classes", [False, True])
def test_two_commands_from_a_folder_to_an_encoder(classes: bool, tmp_path: Path) -> None:
    """Through the interpreter, and where there are classes in forks of this process, which need no imports."""
    for number, (picture, label) in enumerate(photograph_crops(44, (48, 64))):
        write(tmp_path / "photos" / (CLASSES[label] if classes else "") / f"{number:02d}.png", picture)
    (block,) = [block for block in blocks("sh") if "recipes/tokenize_images.py" in block]
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [words[:2] for words in commands] == [["accelerate", "launch"]] * 2
    outputs = []
    for words, more in zip(commands, ([], ["--epochs", "2"]), strict=True):
        line = [str(ROOT / words[2]), *words[3:], *more]
        if classes:
            finished = run_forks(*line, cwd=tmp_path)
        else:
            finished = subprocess.run([sys.executable, *line], cwd=tmp_path, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        outputs.append(finished.stdout)
    assert ("2 classes: china 21, flower 21" if classes else "no labels: they lie in no class folders") in outputs[
        0
    ]
    store = TokenStore(tmp_path / "tokens")
    assert (len(store), store.grid, store.num_labeled) == (42, (16, 16), 42 if classes else 0)
    result = json.loads((tmp_path / "runs/mtm_pretrain-auto/result.json").read_text())
    assert ("linear_probe_top1" in result) == classes and result["findings"]
    assert "findings:" in outputs[1] and "batch_size" in outputs[1]
