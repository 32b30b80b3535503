"""The folder of a run: found or refused before anything is written, then locked."""

import json
from collections.abc import Mapping
from pathlib import Path

from seitpp import files
from seitpp.engine.config import current_names
from seitpp.errors import UserError

# Settings that say where and how a run is watched, not what it computes: a resumed run may change them.
FREE_SETTINGS = {
    *("out", "resume", "overwrite", "accumulation", "workers", "log_steps", "trackers"),
    *("compile", "grad_checkpointing", "dry_run"),
}
CONFIG, LOCK = "config.json", ".lock"


class RunError(UserError):
    """An output folder, a batch size or a loss that a run cannot go on with."""


def choose_folder(
    name: str, settings: Mapping, out: str | None, resume: bool, overwrite: bool
) -> tuple[Path, bool]:
    """The folder of a run, and whether a run in it is to go on. Nothing is written yet.

    The folder is `out`, or the first free one of runs/NAME, runs/NAME-2, ... With `resume` the run in `out` goes
    on; where there is none yet it begins, so that one command serves both. Raises RunError for a folder in use
    (unless `overwrite` says so, and then only one that holds a run), and with `resume` for a run with other
    settings, or a folder that holds something else.
    """
    if resume and not out:
        raise RunError("--resume without --out: name the folder of the run")
    folder = Path(out) if out else _free_folder(Path("runs") / name)
    begun = (folder / CONFIG).is_file()
    if resume and begun:
        _check_settings(folder, settings)
        return folder, True
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        if not begun:
            raise RunError(f"{folder} is not empty and holds no run (no {CONFIG}): name another --out")
        if not overwrite:
            raise RunError(f"{folder} is not empty: name another --out, or pass --resume or --overwrite")
    return folder, False


def enter_folder(folder: Path, settings: Mapping, resumed: bool, overwrite: bool) -> int:
    """Lock the folder that `choose_folder` gave; for a new run, empty it and store `settings` there (config.json).

    Returns the lock. Raises RunError if another process holds it, or has begun a run there meanwhile.
    """
    files.make_folder(folder)
    lock = files.lock(folder / LOCK)
    if lock is None:
        owner = (folder / LOCK).read_text()
        raise RunError(f"{folder} is in use by {owner}: wait for its end, stop it, or name another --out")
    if not resumed:
        if (folder / CONFIG).exists() and not overwrite:
            raise RunError(f"{folder}: another process has run there just now; name another --out")
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
