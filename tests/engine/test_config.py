"""Configs and the command line: presets, files, names of one version ago, errors of one line."""

import dataclasses
import json
import re
import signal
import sys
from dataclasses import asdict
from typing import get_type_hints

import pytest
import tokenize_images
from support.paths import RECIPES
from support.running import recipe

from seitpp.engine.config import ConfigError, load_config, parse
from seitpp.engine.folder import RunError, choose_folder
from seitpp.engine.ranges import RANGES, out_of_range
from seitpp.engine.signals import Stopped
from seitpp.errors import UserError
from seitpp.recipe import run_recipe


@dataclasses.dataclass(frozen=True)
class Config:
    out: str | None = None
    steps: int = 10
    scale: tuple[float, float] = (0.2, 1.0)
    resume: bool = False


PRESETS = {"published": Config(), "smoke": Config(steps=1)}


def test_command_line() -> None:
    assert parse(PRESETS, "smoke", []) == Config(steps=1)
    assert parse(PRESETS, "smoke", ["published", "--scale", "0.5", "1", "--resume"]) == Config(
        scale=(0.5, 1.0), resume=True
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publisched"], "unknown preset 'publisched': expected one of published, smoke; did you mean published?"),
        (["smoke", "--stepps", "3"], "unknown flag --stepps; did you mean --steps?"),
        (["--config", "none.json"], "--config none.json: expected the config.json of a run"),
    ],
)
def test_command_line_errors_suggest(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(PRESETS, "smoke", arguments)
    assert str(error.value).startswith(message)


def test_a_kind_of_tokenizer_needs_the_tokenizer() -> None:
    presets, kind = tokenize_images.PRESETS, ["--tokenizer-kind", "cosmos"]
    with pytest.raises(ConfigError, match="--tokenizer-kind cosmos: name its file or folder with --tokenizer"):
        parse(presets, "digits", kind)
    assert parse(presets, "digits", [*kind, "--tokenizer", "folder"]).tokenizer_kind == "cosmos"


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_every_number_has_a_range_that_all_presets_keep(name: str) -> None:
    presets = recipe(name).PRESETS
    kind = type(presets["published"])
    hints = {name: str(hint) for name, hint in get_type_hints(kind).items() if name in kind.__dataclass_fields__}
    numbers = {name for name, hint in hints.items() if re.search(r"\b(int|float)\b", hint)}
    assert numbers and numbers <= RANGES.keys()
    assert [out_of_range(preset) for preset in presets.values()] == [None] * len(presets)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accumulation", "-1"], "--accumulation -1: expected at least 1"),
        (["--epochs", "nan"], "--epochs nan: expected more than 0"),
        (["--epochs", "inf"], "--epochs inf: expected more than 0"),
        (["--log-steps", "0"], "--log-steps 0: expected at least 1"),
        (["--crop-scale", "-1", "2"], "--crop-scale -1 2: expected more than 0 and at most 1, the smaller first"),
        (
            ["--crop-scale", "1", "0.5"],
            "--crop-scale 1 0.5: expected more than 0 and at most 1, the smaller first",
        ),
        (["--betas", "0.9", "1"], "--betas 0.9 1: expected at least 0 and less than 1"),
        (["--crop-size", "0", "8"], "--crop-size 0 8: expected at least 1"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--workers", "-1"], "--workers -1: expected at least 0"),
    ],
)
def test_a_number_out_of_its_range_is_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        parse(recipe("mtm_pretrain").PRESETS, "digits", flags)


def test_config_file_repeats_a_run(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(Config(steps=7, scale=(0.3, 0.4)))))
    assert parse(PRESETS, "smoke", ["--config", str(path), "--resume"]) == Config(None, 7, (0.3, 0.4), True)
    path.write_text(json.dumps({"steps": 7}))  # of a version before the other settings
    assert load_config(Config, path) == Config(steps=7)
    path.write_text(json.dumps({"steps": 7, "depth": 3}))
    with pytest.raises(ConfigError, match="another recipe or version: has depth"):
        load_config(Config, path)


def test_what_the_user_can_mend_is_one_line_and_a_defect_keeps_its_traceback(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "smoke"])

    def fails(config: Config) -> None:
        raise RunError("no disk, buy one")

    with pytest.raises(SystemExit) as exit_:
        run_recipe(fails, PRESETS, "smoke")
    assert exit_.value.code == 2 and capsys.readouterr().err == "error: no disk, buy one\n"

    def stops(config: Config) -> None:
        raise Stopped("stopped after step 5", signal.SIGTERM)

    with pytest.raises(SystemExit) as exit_:
        run_recipe(stops, PRESETS, "smoke")
    assert exit_.value.code == 143 and capsys.readouterr().err == "stopped after step 5\n"

    def breaks(config: Config) -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_recipe(breaks, PRESETS, "smoke")


def test_a_field_of_one_version_ago_is_read_under_its_name_of_today(tmp_path, capsys) -> None:
    from mtm_pretrain import PRESETS, Config

    today = parse(PRESETS, "smoke", ["--crop-size", "7", "--tokenadapt-fraction", "0.25", "--color", "seitpp"])
    assert parse(PRESETS, "smoke", ["--crop=7", "--adapted", "0.25", "--colour", "seitpp"]) == today
    assert "--crop is now --crop-size: the old name will be removed in the next version" in capsys.readouterr().err
    settings = asdict(today)
    for new, old in (("crop_size", "crop"), ("tokenadapt_fraction", "adapted"), ("mask_ratio", "mask")):
        settings[old] = settings.pop(new)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load_config(Config, tmp_path / "config.json") == today
    assert choose_folder("run", asdict(today), out=str(tmp_path), resume=True, overwrite=False) == (tmp_path, True)
    with pytest.raises(UserError, match="unknown flag --cropp; did you mean"):
        parse(PRESETS, "smoke", ["--cropp", "7"])
