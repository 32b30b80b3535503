"""The commands that a recipe shows at its end: each is one that the recipe, or the program, takes."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import pytest
from support.running import recipe

from seitpp import cli
from seitpp.engine.config import parse
from seitpp.engine.next_steps import AFTER, Step, block, command, next_steps

# Settings of a run on somebody's own data, as far as a recipe has them.
OWN = {
    "store": {"store": "my tokens"},
    "data": {
        "data": "photos",
        "tokenizer": "photos-tokenizer.safetensors",
        "split": "train",
        "validation_split": "val",
        "labels": "labels.csv",
    },
}
LEARNED, UNLABELED = {"linear_probe_top1": 80.0, "classes": 3}, {"loss": 1.0}


def taken(step: Step) -> None:
    """Parse a command as its program does; SystemExit or an error of one line would end the test."""
    if step.program == "seitpp":
        cli._parse(list(step.words))
        return
    module = recipe(step.program)
    parse(module.PRESETS, next(name for name in ("digits", "scenes") if name in module.PRESETS), list(step.words))


def settings(name: str, **own: str):
    config = recipe(name).PRESETS["smoke"]
    names = {field.name for field in dataclasses.fields(config)}
    checkpoint = {"checkpoint": "runs/first"}
    return dataclasses.replace(config, **{k: v for k, v in (own | checkpoint).items() if k in names})


@pytest.mark.parametrize("own", [{}, *OWN.values()], ids=["nothing named", *OWN])
@pytest.mark.parametrize("name", AFTER)
def test_every_command_can_be_run(name: str, own: dict, tmp_path: Path) -> None:
    config, out = settings(name, **own), tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    found = [next_steps(name, config, out, result=result) for result in (LEARNED, UNLABELED, {"annotated": True})]
    (out / "labels").mkdir()
    for steps in [*found, next_steps(name, config, out, result={})]:
        assert len(steps) <= 3
        for step in steps:
            taken(step)
    assert found[0]


def test_commands_name_what_the_run_has_written_and_read(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/checkout/recipes/mtm_pretrain.py", "--store", "my tokens"])
    lines = block(next_steps("mtm_pretrain", settings("mtm_pretrain", **OWN["store"]), "runs/a", result=LEARNED))
    assert lines.splitlines()[:3] == [
        "next:",
        "  # fine-tune it with labels",
        "  accelerate launch /checkout/recipes/finetune.py --checkpoint runs/a --store 'my tokens'",
    ]
    assert shlex.split(lines.splitlines()[2])[-1] == "my tokens" and len(lines.splitlines()) == 7
    unlabeled = next_steps("mtm_pretrain", settings("mtm_pretrain"), "runs/a", result=UNLABELED)
    assert [step.program for step in unlabeled] == ["inpaint", "seitpp"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/pytest"])
    assert command(unlabeled[0]) == "accelerate launch recipes/inpaint.py --checkpoint runs/a"


def test_another_program_has_no_next_steps() -> None:
    assert next_steps("tiny", None, "runs/a", result={}) == []


def test_every_recipe_has_next_steps() -> None:
    names = {path.stem for path in Path(recipe("mtm_pretrain").__file__).parent.glob("*.py")}
    assert set(AFTER) == names
