"""The folder of a run: chosen and checked before anything is written, then locked."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from seitpp import files
from seitpp.engine.config import VERSION, current_names
from seitpp.engine.contents import content_fingerprint
from seitpp.errors import UserError
from seitpp.files import read_json

# Settings that do not change what a run computes: a resumed run may have other values.
FREE_SETTINGS = {
    *("out", "resume", "overwrite", "accumulation", "workers", "log_steps", "trackers"),
    *("compile", "grad_checkpointing", "dry_run"),
}
# Settings that name what a run reads: a resumed run may read the same content elsewhere.
INPUTS = ("store", "data", "tokenizer", "tokenadapt", "init_from", "checkpoint", "perceptual_vgg", "scores")
# Settings that say how long a run trains: a resumed run may train longer.
LENGTHS = ("epochs", "steps")
CONFIG, CONTENTS, LOCK, RESULT = "config.json", "inputs.json", ".lock", "result.json"
# Settings that every run has, so that a config.json without them is that of something else.
OF_EVERY_RUN = {"preset", "seed", "precision", "overwrite"}
# Everything that a run of any recipe writes into its folder, and the folders of its trackers.
WRITTEN = re.compile(
    r"config\.json|inputs\.json|result\.json|metrics\.jsonl|evaluations\.jsonl|skipped\.txt|\.lock|\..*\.tmp"
    r"|model(_ema)?\.safetensors|tokenizer\.safetensors|broken-step-\d{8}-rank-\d+\.safetensors"
    r"|checkpoints(/step-\d{8}|/LATEST|/\..*\.tmp)?|report\.html|classes\.txt|labels|seitpp|wandb"
    r"|stored|rows|scores\.txt"
    r"|(per_class|confusion|predictions|table)\.csv|(\.embeddings-\d{5}|embeddings)\.parquet"
    r"|(augmented|confusion|corrupted|curves|held_out|inpainting|legend|loss|loss_by_ratio|losses|matrix|memory"
    r"|nearest|pictures|probes|reconstructions|tradeoff|validation)\.png"
)
OF_A_RUN = "the config of a run"
NOTHING: Mapping[str, Any] = MappingProxyType({})


class RunError(UserError):
    """Raised when a run cannot start or continue: its folder, its launch, its batch size, its loss."""


def choose_folder(
    name: str,
    settings: Mapping[str, Any],
    *,
    out: str | None,
    resume: bool,
    overwrite: bool,
    defaults: Mapping[str, Any] = NOTHING,
) -> tuple[Path, bool]:
    """Return the folder of a run, and whether it holds a run that is to be resumed. Nothing is written.

    The folder is `out`, or the first unused one of runs/NAME, runs/NAME-2, ... With `resume` the run in `out`
    continues, or starts if there is none yet, so that the same command does both. Raises RunError for `resume`
    without `out`, and for a folder that is not empty, unless it holds a run alone and `overwrite` is set, or
    `resume` is set and the run has the same settings: settings in `INPUTS` need the same content, those in
    `LENGTHS` and `FREE_SETTINGS` are not compared, and one that an older run does not have counts as its value in
    `defaults`.
    """
    if resume and not out:
        raise RunError("--resume without --out: name the folder of the run with --out")
    folder = Path(out) if out else _free_folder(Path("runs") / name)
    holds_run = (folder / CONFIG).is_file()
    if resume and holds_run:
        _check_settings(folder, settings, defaults)
        return folder, True
    if folder.exists() and (
        not folder.is_dir() or any(path.name not in (LOCK, CONTENTS) for path in folder.iterdir())
    ):
        if not holds_run:
            raise RunError(f"{folder} is not empty and holds no run (no {CONFIG}): name another --out")
        if not overwrite:
            raise RunError(f"{folder} is not empty: name another --out, or pass --resume or --overwrite")
        _check_only_a_run(folder)
    return folder, False


def enter_folder(folder: Path, settings: Mapping[str, Any], *, resumed: bool, overwrite: bool) -> files.Lock:
    """Lock the folder from `choose_folder` and return the lock.

    For a new run, also empty the folder and write `settings` to its config.json. The fingerprints of what the
    settings point to are written to its inputs.json, if there are any and it does not have them yet. Raises
    RunError if another process holds the lock, or has started a run there since the folder was chosen.
    """
    files.make_folder(folder)
    lock = files.lock(folder / LOCK)
    if lock is None:
        owner = files.owner(folder / LOCK)
        raise RunError(f"{folder} is in use by {owner}: wait until it ends, stop it, or name another --out")
    if not resumed:
        if (folder / CONFIG).exists() and not overwrite:
            raise RunError(f"{folder}: another process has started a run there meanwhile: name another --out")
        files.empty_folder(folder, but=(LOCK, CONFIG))
    files.remove_temporary(folder)
    if not (folder / CONTENTS).exists() and (contents := _contents(settings)):
        files.replace_json(folder / CONTENTS, contents)
    if not resumed:
        # Last: it makes the folder that of a run.
        files.replace_json(folder / CONFIG, {"version": VERSION, **settings})
    return lock


def unknown_files(folder: Path) -> list[str]:
    """Return what no run writes, by its name in a folder."""
    paths = [*folder.iterdir(), *(folder / "checkpoints").glob("*")]
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if not WRITTEN.fullmatch(name)]


def _check_only_a_run(folder: Path) -> None:
    """Raise RunError unless a folder holds a run alone, so that --overwrite removes only what runs write."""
    advice = "nothing is removed: name another --out"
    if not read_json(folder / CONFIG, RunError, f"the config of a run, {advice}").keys() >= OF_EVERY_RUN:
        raise RunError(f"{folder / CONFIG} is not that of a run, {advice}")
    if unknown := unknown_files(folder):
        raise RunError(
            f"{folder} holds {unknown[0]}, which no run writes, nothing is removed: move it away, or name another "
            "--out"
        )


def planned_lengths(
    folder: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any] = NOTHING
) -> dict[str, float]:
    """Return the `LENGTHS` that the run in a folder was last planned with, where they are others in `settings`."""
    stored = _stored_settings(folder, settings, defaults)
    return {name: stored[name] for name in LENGTHS if name in settings and stored[name] != settings[name]}


def change_lengths(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write other lengths into the config.json of a run, and remove the result of the shorter one."""
    stored = read_json(folder / CONFIG, RunError, OF_A_RUN)
    if (folder / RESULT).exists():
        files.remove_file(folder / RESULT)
    files.replace_json(folder / CONFIG, stored | {name: settings[name] for name in LENGTHS if name in settings})


def _free_folder(folder: Path) -> Path:
    candidates = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in range(1, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())


def _stored_settings(folder: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    stored = current_names(read_json(folder / CONFIG, RunError, OF_A_RUN), settings, folder / CONFIG)
    return json.loads(json.dumps({name: defaults.get(name) for name in settings})) | stored


def _check_settings(folder: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    stored, given = _stored_settings(folder, settings, defaults), json.loads(json.dumps(settings))
    lengths = {name for name in LENGTHS if stored.get(name) is not None and given.get(name) is not None}
    compared = sorted((stored.keys() | given) - FREE_SETTINGS - lengths - {*INPUTS})
    changes = [
        f"{name} {stored.get(name)!r} -> {given.get(name)!r}"
        for name in compared
        if stored.get(name) != given.get(name)
    ]
    path = folder / CONTENTS
    recorded = read_json(path, RunError, "fingerprints by setting") if path.exists() else {}
    for name in INPUTS:
        changes += _input_changes(name, stored.get(name), given.get(name), recorded=recorded)
    if changes:
        raise RunError(
            f"the run in {folder} has other settings ({', '.join(changes)}): pass the same ones, or another --out"
        )


def _input_changes(name: str, stored: Any, given: str | None, *, recorded: Mapping[str, Any]) -> list[str]:
    """Say how what a setting points to differs from what the run read; an empty list where it does not."""
    if not isinstance(stored, str) or not isinstance(given, str):
        return [] if stored == given else [f"{name} {stored!r} -> {given!r}"]
    content = content_fingerprint(given)
    expected = recorded.get(name)
    if not isinstance(expected, str):
        expected = content_fingerprint(stored) if stored != given else None
    if content is None or expected is None:
        # The checkpoint knows the fingerprint of its store, which is compared when the store is open.
        remote = name == "store" and ("://" in stored or "://" in given)
        return [] if stored == given or remote else [f"{name} {stored!r} -> {given!r}"]
    if content != expected:
        return [f"{name} {given} has the content {content[:16]}, expected {expected[:16]} of {stored}"]
    return []


def _contents(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprints of what the settings point to, by setting."""
    named = {name: settings[name] for name in INPUTS if settings.get(name) is not None}
    found = {name: content_fingerprint(value) for name, value in named.items()}
    return {name: content for name, content in found.items() if content is not None}
