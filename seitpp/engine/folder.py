"""The folder of a run: found, refused or resumed before anything is written."""

import json
from collections.abc import Mapping
from pathlib import Path

from seitpp import files
from seitpp.errors import UserError

# Settings that say where and how a run is watched, not what it computes: a resumed run may change them.
FREE_SETTINGS = {
    *("out", "resume", "overwrite", "accumulation", "workers", "log_steps", "trackers"),
    *("compile", "grad_checkpointing"),
}


class RunError(UserError):
    """An output folder, a batch size or a loss that a run cannot go on with."""


def choose_folder(name: str, settings: Mapping, out: str | None, resume: bool, overwrite: bool) -> Path:
    """The folder of a run: `out`, or the first free one of runs/NAME, runs/NAME-2, ... Nothing is written yet.

    Raises RunError for a folder in use (unless `overwrite` says so, and then only one that holds a run), and with
    `resume` for a folder that holds no run or one with other settings.
    """
    if resume:
        return _resumed_folder(settings, out)
    folder = Path(out) if out else _free_folder(Path("runs") / name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise RunError(f"{folder} is not empty: name another --out, or pass --resume or --overwrite")
        if not (folder / "config.json").is_file():
            raise RunError(f"{folder} holds no run (no config.json): it is not overwritten; name another --out")
    return folder


def start_folder(folder: Path, settings: Mapping) -> None:
    """Empty the folder that `choose_folder` gave and store `settings` there as config.json."""
    files.empty_folder(folder)
    files.replace_json(folder / "config.json", settings)


def _free_folder(folder: Path) -> Path:
    candidates = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in range(1, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())


def _resumed_folder(settings: Mapping, out: str | None) -> Path:
    if not out:
        raise RunError("--resume without --out: name the folder of the run")
    path = Path(out) / "config.json"
    if not path.is_file():
        raise RunError(
            f"no run to resume in {out} (no config.json): name the run's folder, or start without --resume"
        )
    stored, given = json.loads(path.read_text()), json.loads(json.dumps(settings))
    different = sorted(
        k for k in stored.keys() | given if k not in FREE_SETTINGS and stored.get(k) != given.get(k)
    )
    if different:
        changes = ", ".join(f"{key} {stored.get(key)!r} -> {given.get(key)!r}" for key in different)
        raise RunError(f"the run in {out} has other settings ({changes}): pass the same ones, or another --out")
    return Path(out)
