"""The command that repeats a run, and where each of its settings comes from: the preset, a choice, or a flag.

A recipe's `main` takes only a Config. The preset that its command line began with is therefore kept beside it.
"""

import shlex
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

from seitpp.engine.config import AUTO, Choice, RunConfig

# Settings of a run that a repetition does not share: it has a folder of its own, and begins at the beginning.
OF_ONE_RUN = ("out", "overwrite", "resume", "dry_run")
PRESET: ContextVar[RunConfig | None] = ContextVar(
    "preset", default=None
)  # of the command line; None: there is none


def preset_of(config: RunConfig) -> RunConfig | None:
    """Return the preset that the command line of a run with this config began with; None if none started it."""
    preset = PRESET.get()
    return preset if type(preset) is type(config) and preset.preset == config.preset else None


def origins(config: RunConfig, chosen: Mapping[str, Choice]) -> dict[str, Choice]:
    """Return the value of each setting and in words where it comes from, "" for the preset, which come last.

    `chosen` holds what was chosen for the user, and what the run has found for itself.
    """
    preset, rows = preset_of(config), {}
    for name, value in asdict(config).items():
        if name == "preset" or name in OF_ONE_RUN:
            continue
        if name in chosen:
            rows[name] = chosen[name]
        elif preset is None:
            rows[name] = Choice(value, "of the program that started the run")
        else:
            rows[name] = Choice(value, "" if value == getattr(preset, name) else "named")
    return dict(sorted(rows.items(), key=lambda row: not row[1].reason))


def command(
    recipe: str,
    config: RunConfig,
    *,
    processes: int,
    chosen: Mapping[str, Choice] | None = None,
    accumulation: int | None = None,
) -> str:
    """Return the command that repeats a run: its preset, and every setting that is not the preset's.

    Settings that were `chosen` by preset AUTO are named too, since another machine would choose others. Of a run
    that no command line started, all settings are named. `accumulation` is what a GPU's memory has led to. The
    output goes into a new folder.
    """
    preset, settings = preset_of(config), asdict(config) | ({"accumulation": accumulation} if accumulation else {})
    always = chosen if chosen and config.preset == AUTO else {}
    words = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    words += [f"recipes/{recipe}.py", config.preset]
    for name, value in settings.items():
        same = preset is not None and name not in always and value == getattr(preset, name)
        if name != "preset" and name not in OF_ONE_RUN and not same and not (name in always and value is None):
            words += flag(name, value)
    return shlex.join(words)


def flag(name: str, value: Any) -> list[str]:
    """Return the words that give a setting a value on the command line."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    values = [str(part) for part in (value if isinstance(value, tuple) else [value])]
    if len(values) == 1 and values[0].startswith("-"):
        return [f"--{option}={values[0]}"]  # else it would be read as a flag
    return [f"--{option}", *values]
