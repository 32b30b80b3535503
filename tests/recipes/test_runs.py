"""The shell files of whole experiments: every command that they start is one that its recipe accepts."""

import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
from support.paths import ROOT

from seitpp.engine.config import RunConfig, parse

SCRIPTS = sorted((ROOT / "recipes/runs").glob("*.sh"))
# Programs that a script starts are replaced by one that writes down its arguments, a line each.
STAND_IN = '#!/bin/sh\nprintf "%s\\0" "$@" >> "$LOG"\nprintf "\\n" >> "$LOG"\n'


def started(script: Path, folder: Path) -> list[list[str]]:
    """The commands of a script whose variables are set to some folder, as lists of arguments."""
    for program in ("accelerate", "seitpp"):
        (folder / program).write_text(STAND_IN)
        (folder / program).chmod(0o755)
    needed = [line.split("=", 1)[0] for line in script.read_text().splitlines() if ":?" in line]
    settings = {"PATH": f"{folder}:/usr/bin:/bin", "LOG": str(folder / "log"), **dict.fromkeys(needed, "/data/x")}
    subprocess.run(["bash", script], cwd=folder, env=settings, check=True, capture_output=True)
    lines = (folder / "log").read_text().splitlines()
    return [line.strip("\0").split("\0") for line in lines]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_command_is_accepted_by_its_recipe(script: Path, tmp_path: Path) -> None:
    commands = [command for command in started(script, tmp_path) if command[0] == "launch"]
    assert commands, "at least one recipe"
    for command in commands:
        name, *arguments = command[next(i for i, word in enumerate(command) if word.endswith(".py")) :]
        recipe = import_module(Path(name).stem)
        config = parse(recipe.PRESETS, "digits", arguments)
        assert config.out, shlex.join(command)
        if isinstance(config, RunConfig) and config.preset != "digits":
            assert config.resume or config.overwrite, f"a second start of {shlex.join(command)} does not go on"
