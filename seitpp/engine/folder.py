"""The folder of a run: chosen and checked before anything is written, then locked."""

import json
from collections.abc import Mapping
from pathlib import Path

from seitpp import files
from seitpp.engine.config import current_names
from seitpp.errors import UserError

# Settings that do not change what a run computes: a resumed run may have other values.
FREE_SETTINGS = {
    *("out", "resume", "overwrite", "accumulation", "workers", "log_steps", "trackers"),
    *("compile", "grad_checkpointing", "dry_run"),
}
CONFIG, LOCK = "config.json", ".lock"


class RunError(UserError):
    """Raised when a run cannot start or continue: its folder, its launch, its batch size, its loss."""


def choose_folder(
    name: str, settings: Mapping, *, out: str | None, resume: bool, overwrite: bool
) -> tuple[Path, bool]:
    """Return the folder of a run, and whether it holds a run that is to be resumed. Nothing is written.

    The folder is `out`, or the first unused one of runs/NAME, runs/NAME-2, ... With `resume` the run in `out`
    continues, or starts if there is none yet, so that the same command does both. Raises RunError for `resume`
    without `out`, and for a folder that is not empty, unless it holds a run and `overwrite` is set, or `resume` is
    set and the run has the same settings.
    """
    if resume and not out:
        raise RunError("--resume without --out: name the folder of the run with --out")
    folder = Path(out) if out else _free_folder(Path("runs") / name)
    holds_run = (folder / CONFIG).is_file()
    if resume and holds_run:
        _check_settings(folder, settings)
        return folder, True
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        if not holds_run:
            raise RunError(f"{folder} is not empty and holds no run (no {CONFIG}): name another --out")
        if not overwrite:
            raise RunError(f"{folder} is not empty: name another --out, or pass --resume or --overwrite")
    return folder, False


def enter_folder(folder: Path, settings: Mapping, *, resumed: bool, overwrite: bool) -> int:
    """Lock the folder from `choose_folder` and return the lock.

    For a new run, also empty the folder and write `settings` to its config.json. Raises RunError if another
    process holds the lock, or has started a run there since the folder was chosen.
    """
    files.make_folder(folder)
    lock = files.lock(folder / LOCK)
    if lock is None:
        owner = (folder / LOCK).read_text()
        raise RunError(f"{folder} is in use by {owner}: wait until it ends, stop it, or name another --out")
    if not resumed:
        if (folder / CONFIG).exists() and not overwrite:
            raise RunError(f"{folder}: another process has started a run there meanwhile: name another --out")
        files.empty_folder(folder, but=(LOCK, CONFIG))
        files.replace_json(folder / CONFIG, settings)
    return lock


def _free_folder(folder: Path) -> Path:
    candidates = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in range(1, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())


def _check_settings(folder: Path, settings: Mapping) -> None:
    stored, given = json.loads((folder / CONFIG).read_text()), json.loads(json.dumps(settings))
    stored = current_names(stored, given)
    different = sorted(
        k for k in stored.keys() | given if k not in FREE_SETTINGS and stored.get(k) != given.get(k)
    )
    if different:
        changes = ", ".join(f"{key} {stored.get(key)!r} -> {given.get(key)!r}" for key in different)
        raise RunError(f"the run in {folder} has other settings ({changes}): pass the same ones, or another --out")
