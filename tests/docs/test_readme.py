"""What the README prints works as it is printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_runs_and_its_store_trains(tmp_path: Path) -> None:
    (example,) = blocks("python")
    check = "assert picture.shape == (1, 3, 64, 64) and first.shape == (8, 8) and len(store) == 90\n"
    subprocess.run([sys.executable, "-c", example + check], cwd=tmp_path, check=True)
    (training,) = [block for block in blocks("sh") if "--store" in block]
    words = shlex.split(training)
    assert words[:3] == ["accelerate", "launch", "recipes/mtm_pretrain.py"]
    command = [sys.executable, str(ROOT / words[2]), *words[3:], "--epochs", "2", "--out", "run"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "run/reconstructions.png").exists()


def test_links_and_recipes_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link
    for recipe in re.findall(r"recipes/\w+\.py", README):
        assert (ROOT / recipe).exists(), recipe
