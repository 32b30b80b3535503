"""Checkpoints of others: read without running code, asked for tensors by name."""

import argparse
import math
import warnings
from collections.abc import Set
from pathlib import Path

import torch
from torch import Tensor, nn

from seitpp.models.stem import ModelError
from seitpp.tensors import load_checkpoint, load_tensors
from seitpp.tokenizers.transformer import HEAD

SHOWN = 8  # missing tensors that an error names


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without the prefix `module.`. Raises ModelError naming the file."""
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        content = load_tensors(path, "", ModelError)[1]
    else:  # DeiT keeps its arguments beside the model
        content = load_checkpoint(path, ModelError, harmless=(argparse.Namespace,))
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise ModelError(f"{path} holds no state dict: expected names and tensors, alone or under 'model'")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


class ReleasedState(dict):
    """The tensors of a checkpoint of a `kind` by their names; asking for one that is not there is a ModelError."""

    def __init__(self, path: Path, kind: str, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.path, self.kind = path, kind

    def __missing__(self, name: str) -> Tensor:
        raise self._lacks([name])

    def need(self, parts: tuple[str, ...]) -> None:
        """Raise ModelError naming every part, the beginning of names, of which there is no tensor at all."""
        if absent := [part for part in parts if not any(name.startswith(part) for name in self)]:
            raise self._lacks([part + "*" if part.endswith(".") else part for part in absent])

    def fill(self, model: nn.Module, names: dict[str, str], known: Set[str] = frozenset()) -> nn.Module:
        """Put every tensor of `model` in its place, in eval mode.

        What is left over is named in one warning, but for what is `known` to be there. Raises ModelError naming
        every tensor that is missing, or the first of another shape.
        """
        theirs = {name: renamed(name, names) for name in model.state_dict()}
        if absent := [name for name in theirs.values() if name not in self]:
            raise self._lacks(absent)
        model.load_state_dict(
            {name: self._shaped(theirs[name], tensor.shape) for name, tensor in model.state_dict().items()}
        )
        if unused := sorted(set(self) - set(theirs.values()) - known):
            warnings.warn(f"{self.path}: not used, {len(unused)} tensors: {', '.join(unused)}", stacklevel=3)
        return model.eval()

    def size(self) -> dict[str, int]:
        """Width, depth and heads of the encoder."""
        width = self["cls_token"].shape[-1]
        return {"embed_dim": width, "depth": self.depth("blocks."), "num_heads": self.heads(width, HEAD)}

    def depth(self, prefix: str) -> int:
        """How many blocks there are whose names begin like `prefix`; at least one, so that its lack is told."""
        return 1 + max((int(name.split(".")[1]) for name in self if name.startswith(prefix)), default=0)

    def heads(self, width: int, channels: int) -> int:
        """Heads of a width, which must divide."""
        if width % channels:
            raise ModelError(f"{self.path}: width {width}, expected a multiple of {channels}, those of a head")
        return width // channels

    def side(self) -> int:
        """Patches along one side of the square grid."""
        patches = self["pos_embed"].shape[-2] - 1
        if math.isqrt(patches) ** 2 != patches:
            raise ModelError(f"{self.path}: {patches} positions and one of cls, expected a square grid")
        return math.isqrt(patches)

    def _lacks(self, absent: list[str]) -> ModelError:
        more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        names = ", ".join(absent[:SHOWN]) + more
        return ModelError(f"{self.path} ({self.kind}) lacks {names}: name a file that holds all of it")

    def _shaped(self, name: str, shape: torch.Size) -> Tensor:
        """A tensor in a shape that may differ in axes of one element only."""
        tensor = self[name]
        if [n for n in tensor.shape if n > 1] != [n for n in shape if n > 1]:
            raise ModelError(f"{self.path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        return tensor.reshape(shape)


def renamed(name: str, names: dict[str, str]) -> str:
    """`name` with another beginning, by the first in `names` that fits."""
    for ours, theirs in names.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
