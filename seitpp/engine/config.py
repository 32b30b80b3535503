"""The settings of a recipe: a frozen dataclass, its presets, `recipe.py [preset] --flag value ...`."""

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tyro

from seitpp.errors import UserError, suggest

Config = TypeVar("Config")

# Fields of one version ago and what they are called now, in one recipe or another.
RENAMED = {
    "adapted": ("tokenadapt_fraction",),
    "batch_size": ("batch_size_per_process",),
    "colour": ("color",),
    "crop": ("crop_size", "crop_mode"),
    "first_lr": ("warmup_lr",),
    "last_lr": ("min_lr",),
    "mask": ("mask_ratio",),
    "trained": ("trainable",),
    "window": ("eval_window", "sliding_window"),
}


class ConfigError(UserError):
    """A preset, a flag or a config file that this recipe does not have."""


# Durations of a classifier's preset for tests: two epochs, with a checkpoint in the middle of one.
SMOKE = {"epochs": 2, "warmup_epochs": 1, "checkpoint_epochs": 0.5, "evaluation_epochs": 1, "log_steps": 1}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every recipe asks of its run; a recipe's own Config adds the rest."""

    out: str | None = None  # the run's folder; runs/RECIPE-PRESET where none is named
    overwrite: bool = False
    preset: str = "published"
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"  # of matrix products; weights stay float32

    # Fixed where nothing is trained; settings of a TrainConfig.
    resume: ClassVar[bool] = False
    dry_run: ClassVar[bool] = False
    accumulation: ClassVar[int] = 1
    workers: ClassVar[int] = 0
    log_steps: ClassVar[int] = 1
    trackers: ClassVar[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What a recipe that trains asks besides."""

    resume: bool = False  # go on where the run in --out was stopped; begin it where there is none
    dry_run: bool = False  # try every part in a minute, two steps of training among them, and keep nothing
    fraction: float = 1.0  # of the training images, chosen by the seed: a smaller store
    compile: bool = False  # torch.compile; worth its minutes on a GPU
    accumulation: int | None = None  # micro-batches of an update; None: as few as a GPU's memory asks for, else 1
    workers: int = 8  # processes that read batches, for each process that trains
    checkpoint_epochs: float = 1
    log_steps: int = 20
    trackers: tuple[str, ...] = ()


def parse(presets: Mapping[str, Config], default: str, arguments: list[str]) -> Config:
    """An optional preset name, an optional `--config run/config.json`, then flags that change single fields."""
    rest = list(arguments)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else default
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}: expected one of {', '.join(presets)}{suggest(name, presets)}")
    config, rest = _from_file(presets[name], rest)
    rest = _current_flags(config, rest)
    _check_flags(config, rest)
    return tyro.cli(type(config), default=config, args=rest)


def current_names(settings: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """Settings under the names that `fields` have today; some had others one version ago (`RENAMED`)."""
    return {_current_name(name, fields): value for name, value in settings.items()}


def _current_name(name: str, fields: Collection[str]) -> str:
    if name in fields:
        return name
    return next((new for new in RENAMED.get(name, ()) if new in fields), name)


def _current_flags(config: object, arguments: list[str]) -> list[str]:
    """The same flags by their present names; says so of each that has another one now."""
    fields, flags = {field.name for field in dataclasses.fields(config)}, []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and (new := _current_name(name, fields)) != name:
            current = f"--{new.replace('_', '-')}"
            print(f"{flag} is called {current} now; the old name ends with the next version", file=sys.stderr)
            flag = current
        flags.append(flag + equals + value)
    return flags


def _check_flags(config: object, arguments: list[str]) -> None:
    fields = [field.name.replace("_", "-") for field in dataclasses.fields(config)]
    known = {f"--{name}" for name in fields} | {f"--no-{name}" for name in fields} | {"--help", "-h"}
    for argument in arguments:
        flag = argument.split("=", 1)[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            raise ConfigError(f"unknown flag {flag}{suggest(flag, known)}; --help lists them all")


def _from_file(config: Config, arguments: list[str]) -> tuple[Config, list[str]]:
    if "--config" not in arguments:
        return config, arguments
    at = arguments.index("--config")
    path = Path(arguments[at + 1]) if at + 1 < len(arguments) else None
    if path is None or not path.is_file():
        raise ConfigError(f"--config {path or ''}: expected the config.json of a run")
    return load_config(type(config), path), arguments[:at] + arguments[at + 2 :]


def load_config(kind: type[Config], path: Path) -> Config:
    """Read a config.json that a run stored. Raises ConfigError naming fields that are missing or unknown."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as the config of a run: {error}") from error
    fields = {field.name for field in dataclasses.fields(kind)}
    stored = current_names(stored, fields) if isinstance(stored, dict) else stored
    if not isinstance(stored, dict) or set(stored) != fields:
        different = sorted(fields ^ set(stored))
        raise ConfigError(f"{path} is the config of another recipe or version: differs in {', '.join(different)}")
    # JSON has no tuples; every sequence of a config is one.
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
