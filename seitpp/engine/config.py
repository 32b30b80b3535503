"""The settings of a recipe: a frozen dataclass, named presets, and the command line that changes their fields."""

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import tyro

from seitpp.engine.ranges import out_of_range
from seitpp.errors import UserError, check_version, suggest
from seitpp.files import read_json
from seitpp.tokenizers import Kind

Config = TypeVar("Config")

VERSION = 1  # of a config.json, as a number in each; none is 1

# Names of fields in the previous version -> their present names, of which a recipe has one.
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
    """Raised for a preset, a flag or a config file that the recipe does not know."""


AUTO = "auto"  # the preset whose settings are chosen for the store and the device

# Durations of a classifier's smoke preset: two epochs, with a checkpoint in the middle of each.
SMOKE = {"epochs": 2, "warmup_epochs": 1, "checkpoint_epochs": 0.5, "evaluation_epochs": 1, "log_steps": 1}


class Choice(NamedTuple):
    """The value of a setting that was chosen for the user, and why."""

    value: Any
    reason: str


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The settings of every recipe; the recipe's own Config adds the rest."""

    out: str | None = None  # the run's folder; runs/RECIPE-PRESET where none is named
    overwrite: bool = False
    preset: str = "published"
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"  # of matrix products; weights stay float32

    # Constants where nothing is trained; a TrainConfig makes settings of them.
    resume: ClassVar[bool] = False
    dry_run: ClassVar[bool] = False
    accumulation: ClassVar[int] = 1
    workers: ClassVar[int | None] = 0
    log_steps: ClassVar[int] = 1
    trackers: ClassVar[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True)
class PictureConfig(RunConfig):
    """The settings of every recipe that applies a trained model to new pictures."""

    checkpoint: str | None = None  # folder of a run, or a model file; always needed
    ema: bool = True  # the moving average of the weights, if the run has one
    data: str | None = None  # pictures, as for recipes/tokenize_images.py; None: the held-out digits
    source_split: str | None = None  # the part of the data to read; None: all
    tokenizer: str | None = None  # that of the model's tokens; None: the model takes pixels, or the digits
    tokenizer_kind: Kind | None = None  # None: recognized
    skip_errors: bool = False  # leave out pictures that cannot be read, and list them in OUT/skipped.txt
    workers: int | None = None  # data loading processes, for each process that computes; None: by the CPU cores


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """The settings of every recipe that trains."""

    resume: bool = False  # continue the run in --out where it stopped, or start it if there is none
    dry_run: bool = False  # run every part for about a minute, with two training steps, and keep no output
    fraction: float = 1.0  # of the training images, chosen by the seed, as if the store were smaller
    compile: bool = False  # torch.compile; takes minutes, which pay off on a GPU
    accumulation: int | None = None  # micro-batches per update; None: as few as fit into a GPU's memory, else 1
    workers: int | None = None  # data loading processes, for each process that trains; None: by the CPU cores
    checkpoint_epochs: float = 1
    log_steps: int = 20
    trackers: tuple[str, ...] = ()


def parse(presets: Mapping[str, Config], default: str, arguments: list[str]) -> Config:
    """Read a config from command line arguments: [preset] [--config run/config.json] [--flag value ...].

    The config begins as the preset or the file; each flag sets one field. If no preset is named it is `default`,
    or AUTO where there is such a preset and --store is named. Raises ConfigError for an unknown preset or flag,
    a number out of its range, an unusable file, --tokenizer-kind without --tokenizer, and --skip-errors without
    --data.
    """
    rest = list(arguments)
    if AUTO in presets and "store" in named_settings(rest):
        default = AUTO
    name = rest.pop(0) if rest and not rest[0].startswith("-") else default
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}: expected one of {', '.join(presets)}{suggest(name, presets)}")
    config, rest = _from_file(presets[name], rest)
    rest = _current_flags(config, rest)
    _check_flags(config, rest)
    parsed = tyro.cli(type(config), default=config, args=rest)
    if wrong := out_of_range(parsed):
        raise ConfigError(wrong)
    if getattr(parsed, "tokenizer_kind", None) and not parsed.tokenizer:
        raise ConfigError(f"--tokenizer-kind {parsed.tokenizer_kind}: name its file or folder with --tokenizer")
    if getattr(parsed, "skip_errors", False) and not parsed.data:
        raise ConfigError("--skip-errors is for images: name them with --data, or leave it out")
    return parsed


def settings_table(config: object, chosen: Mapping[str, Choice]) -> str:
    """Format the preset and the settings that are not at their default, one per line.

    A setting that was `chosen` for the user is always there, with its reason.
    """
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in chosen:
            value, reason = chosen[field.name]
            lines.append(f"{field.name:22} {_in_words(value):14} {reason}")
        elif value != field.default or field.name == "preset":
            lines.append(f"{field.name:22} {_in_words(value)}")
    return "\n".join(lines)


def _in_words(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def named_settings(arguments: Sequence[str]) -> set[str]:
    """Return the names of the settings whose flags are among the command line arguments."""
    flags = [argument.split("=", 1)[0] for argument in arguments if argument.startswith("--")]
    return {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}


def current_names(stored: Mapping[str, Any], fields: Collection[str], path: Path) -> dict[str, Any]:
    """Return the settings that a config.json holds, with those of a previous version under the names in `fields`.

    Raises ConfigError if a newer version of this library has written it.
    """
    check_version(stored.get("version", 1), VERSION, path=path, error=ConfigError)
    return {_current_name(name, fields): value for name, value in stored.items() if name != "version"}


def _current_name(name: str, fields: Collection[str]) -> str:
    if name in fields:
        return name
    return next((new for new in RENAMED.get(name, ()) if new in fields), name)


def _current_flags(config: object, arguments: list[str]) -> list[str]:
    """Replace flags of the previous version by their present names, and print a note about each."""
    fields, flags = {field.name for field in dataclasses.fields(config)}, []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and (new := _current_name(name, fields)) != name:
            current = f"--{new.replace('_', '-')}"
            print(f"{flag} is now {current}: the old name will be removed in the next version", file=sys.stderr)
            flag = current
        flags.append(flag + equals + value)
    return flags


def _check_flags(config: object, arguments: list[str]) -> None:
    fields = [field.name.replace("_", "-") for field in dataclasses.fields(config)]
    flags = {f"--{name}" for name in fields} | {f"--no-{name}" for name in fields} | {"--help", "-h"}
    for argument in arguments:
        flag = argument.split("=", 1)[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            raise ConfigError(f"unknown flag {flag}{suggest(flag, flags)}; --help lists all flags")


def _from_file(config: Config, arguments: list[str]) -> tuple[Config, list[str]]:
    if "--config" not in arguments:
        return config, arguments
    index = arguments.index("--config")
    path = Path(arguments[index + 1]) if index + 1 < len(arguments) else None
    if path is None or not path.is_file():
        raise ConfigError(f"--config {path or ''}: expected the config.json of a run")
    return load_config(type(config), path), arguments[:index] + arguments[index + 2 :]


def load_config(kind: type[Config], path: Path) -> Config:
    """Read the config.json of a run; a field that an older run does not have has its default.

    Raises ConfigError if the file cannot be read, names fields that `kind` does not have, or has a value that the
    flag of its field could not have.
    """
    stored, hints = read_json(path, ConfigError, "the config of a run"), get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    stored = current_names(stored, fields, path)
    if unknown := sorted(set(stored) - fields):
        raise ConfigError(f"{path} is the config of another recipe or version: has {', '.join(unknown)}")
    # JSON has no tuples, and every sequence of a config is a tuple.
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ConfigError(f"{path} cannot be the config of a run: {name} is {value!r}; correct it")
    config = kind(**values)
    if wrong := out_of_range(config):
        raise ConfigError(f"{path} cannot be the config of a run: {wrong}")
    return config


def _fits(value: object, hint: Any) -> bool:
    """Return whether a value is of the type of a field: a number, a text, a choice, a tuple, or one of several."""
    kind, choices = get_origin(hint), get_args(hint)
    if kind is Literal:
        return isinstance(value, str) and value in choices
    if kind is tuple:
        parts = choices[:1] * len(value) if choices[-1] is ... and isinstance(value, tuple) else choices
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if choices:
        return any(_fits(value, choice) for choice in choices)
    return type(value) is hint or (hint is float and type(value) is int)
