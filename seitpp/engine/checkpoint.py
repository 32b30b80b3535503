"""Atomic checkpoints: written to a staging folder, synced, renamed, and verified before they are used.

    checkpoints/
      LATEST                     the name of the newest checkpoint
      step-00000120/
        model.safetensors        weights
        optimizer.safetensors    the optimizer's tensors, by parameter name
        ema.safetensors          the moving average of the weights, where the run keeps one
        scaler.safetensors       the loss scale and its counter, with fp16
        state.json               version, step, and the fingerprint of the training data
        manifest.json            size and SHA-256 of the other files, written last

No random state is saved: every random number is keyed by seed, epoch, image and step.
"""

import hashlib
import json
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from seitpp import files
from seitpp.engine.distributed import OptimizerState, split_as
from seitpp.engine.precision import LossScaler
from seitpp.errors import UserError, check_version, refusing
from seitpp.tensors import undisturbed

VERSION = 1  # of a checkpoint, as a number in each; none is 1
KEPT = 2
NAME = re.compile(r"step-\d{8}")  # a folder of another name is a copy that somebody has made
MANIFEST = "manifest.json"

Groups = dict[str, dict[str, Tensor]]  # tensors by name, in files by name


class CheckpointError(UserError):
    """Raised when a checkpoint cannot be written or read, or is of another model or other data."""


class Checkpoint(NamedTuple):
    """A checkpoint read from `path`: the tensors after `step` updates on data with this fingerprint."""

    path: Path
    step: int
    data_fingerprint: str
    tensors: Groups


def tensors_of(
    model: nn.Module,
    optimizer: OptimizerState,
    *,
    ema: ModelEmaV3 | None,
    scaler: LossScaler | None = None,
) -> Groups:
    """Return the tensors of a checkpoint in the groups "model", "optimizer", "ema" and "scaler".

    Those of the optimizer are named "parameter name/key". "ema" and "scaler" are left out where the run has none.
    """
    groups = {"model": model.state_dict(), "optimizer": optimizer.tensors(model)}
    if ema:
        groups["ema"] = ema.module.state_dict()
    if scaler:
        groups["scaler"] = scaler.tensors()
    return groups


def save(folder: Path, step: int, *, data_fingerprint: str, tensors: Groups) -> None:
    """Write a checkpoint under `folder`, then let LATEST name it, then remove all but the newest two.

    Raises CheckpointError if writing fails; earlier checkpoints are then intact, and LATEST names one of them.
    """
    target = folder / f"step-{step:08d}"
    staging = folder / f".{target.name}.tmp"
    try:
        files.make_folder(folder)
        files.remove_temporary(folder)  # left by a killed process
        files.remove_folder(staging)
        files.make_folder(staging)
        _fill(staging, step, data_fingerprint, tensors)
        files.remove_folder(target)  # a damaged one, where a resumed run reaches this step again
        files.publish_folder(staging, target)
        files.replace_text(folder / "LATEST", target.name)
        for old in steps_in(folder)[:-KEPT]:
            files.remove_folder(old)
    except OSError as error:
        with suppress(OSError):
            files.remove_folder(staging)
        raise CheckpointError(
            f"saving step {step} in {folder} failed: {error.strerror}; {latest(folder)}: make room on the disk "
            "or repair it, then continue with --resume"
        ) from error


def _fill(folder: Path, step: int, data_fingerprint: str, tensors: Groups) -> None:
    """Write the files one by one, so that at most one group is in memory twice."""
    manifest = {}

    def write(name: str, data: bytes) -> None:
        files.write_file(folder / name, data)
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for name, group in tensors.items():
        write(f"{name}.safetensors", safetensors.torch.save(_contiguous(group)))
    write("state.json", json.dumps({"version": VERSION, "step": step, "store": data_fingerprint}).encode())
    files.write_file(folder / MANIFEST, _manifest_file(manifest))


def latest(folder: Path) -> str:
    """Describe the newest checkpoint, for error messages."""
    pointer = folder / "LATEST"
    if not pointer.exists():
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {pointer.read_text(errors='replace')[:20]}"


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files are intact, or None if there are no checkpoints.

    Warns about each damaged one and skips it. Raises CheckpointError if all are damaged.
    """
    checkpoints = steps_in(folder)
    for path in reversed(checkpoints):
        try:
            _verify(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
    if checkpoints:
        raise CheckpointError(
            f"none of the {len(checkpoints)} checkpoints under {folder} is intact: start with --overwrite"
        )
    return None


def steps_in(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, intact or damaged, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))


def _entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _manifest_file(manifest: dict[str, dict]) -> bytes:
    return json.dumps(manifest, indent=2).encode()


def _verify(path: Path) -> None:
    try:
        written = (path / MANIFEST).read_bytes()
        manifest = files.parse_json(written)
        if written != _manifest_file(manifest) or not all(name == Path(name).name for name in manifest):
            raise CheckpointError(f"{path / MANIFEST} is not the file that was saved")
        for name in sorted({"model.safetensors", "optimizer.safetensors", "state.json"} | set(manifest)):
            if manifest[name] != _entry(path / name):
                raise CheckpointError(f"{path / name} is not the file that was saved (size or SHA-256 differ)")
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path} is incomplete: {error!r}") from error


def load(path: Path) -> Checkpoint:
    """Read the checkpoint at a path from `newest`.

    Raises CheckpointError for one that no run has saved, or one of a newer version.
    """
    state = files.read_json(path / "state.json", CheckpointError, "the step and the data of a checkpoint")
    check_version(state.get("version", 1), VERSION, path=path, error=CheckpointError)
    step, data = state.get("step"), state.get("store")
    if type(step) is not int or not 0 <= step < 10**8 or not isinstance(data, str):
        raise CheckpointError(f"{path}: step {step!r} on data {data!r}, expected a number and a fingerprint")
    with undisturbed(), refusing(CheckpointError, f"{path} cannot be read", "whole safetensors files"):
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(path, step, data, tensors)


def restore(
    checkpoint: Checkpoint,
    *,
    data_fingerprint: str,
    model: nn.Module,
    optimizer: OptimizerState,
    ema: ModelEmaV3 | None,
    scaler: LossScaler | None = None,
) -> None:
    """Load a checkpoint into a model, its optimizer, its moving average and its loss scaler.

    Raises CheckpointError if `data_fingerprint` is not that of the checkpoint, or if a tensor of the model is
    missing, unknown or of another shape; the message names the first one.
    """
    if checkpoint.data_fingerprint != data_fingerprint:
        raise CheckpointError(
            f"{checkpoint.path} was trained on the data {checkpoint.data_fingerprint[:16]}, this run reads "
            f"{data_fingerprint[:16]}: name the same data, or start anew with another --out"
        )
    modules = {"model": model, "ema": ema.module} if ema else {"model": model}
    for name, module in modules.items():
        _check_same(checkpoint.path, checkpoint.tensors.get(name, {}), module.state_dict())
    for name, module in modules.items():
        current = module.state_dict()
        tensors = checkpoint.tensors[name].items()
        module.load_state_dict({key: split_as(tensor, current[key]) for key, tensor in tensors})
    with refusing(CheckpointError, f"{checkpoint.path} is of another optimizer", "that of this run"):
        if scaler:
            scaler.restore(checkpoint.tensors["scaler"])
        optimizer.restore(model, checkpoint.tensors["optimizer"])


def _check_same(path: Path, stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in sorted(expected.keys() | stored.keys()):
        got = tuple(stored[name].shape) if name in stored else "nothing"
        want = tuple(expected[name].shape) if name in expected else "nothing"
        if got != want:
            raise CheckpointError(
                f"{path} is of another model: {name} is {got} there, {want} in this run: "
                "name the folder of a run with the same model and data, or start anew with --overwrite"
            )
