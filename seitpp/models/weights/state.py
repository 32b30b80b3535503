"""Read official checkpoints without running code, and copy their tensors into a model by name."""

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

SHOWN = 8  # the most missing tensors that an error names


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file and strip the prefix `module.`. Raises ModelError naming the file."""
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}: expected a file of torch.save or safetensors")
    if path.suffix == ".safetensors":
        content = load_tensors(path, "", ModelError)[1]
    else:  # DeiT saves its arguments together with the model
        content = load_checkpoint(path, ModelError, harmless=(argparse.Namespace,))
    state = content.get("model", content) if isinstance(content, dict) else content
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise ModelError(f"{path} holds no state dict: expected tensors by name, at the top or under 'model'")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


class ReleasedState(dict):
    """The tensors of a checkpoint by name; looking up a missing one raises ModelError with the path and `kind`."""

    def __init__(self, path: Path, kind: str, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.path, self.kind = path, kind

    def __missing__(self, name: str) -> Tensor:
        raise self._lacks([name])

    def need(self, prefixes: tuple[str, ...]) -> None:
        """Raise ModelError naming every prefix with which no tensor begins."""
        if missing := [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in self)]:
            raise self._lacks([prefix + "*" if prefix.endswith(".") else prefix for prefix in missing])

    def fill(
        self, model: nn.Module, names: dict[str, str], *, expected_unused: Set[str] = frozenset()
    ) -> nn.Module:
        """Copy the tensors into `model`, whose names `renamed` maps by `names`, and return it in eval mode.

        Unused tensors are listed in one warning, except those in `expected_unused`. Raises ModelError as `shaped`.
        """
        model.load_state_dict(self.shaped(model, names))
        theirs = {renamed(name, names) for name in model.state_dict()}
        if unused := sorted(set(self) - theirs - expected_unused):
            warnings.warn(f"{self.path}: {len(unused)} tensors are not used: {', '.join(unused)}", stacklevel=3)
        return model.eval()

    def shaped(self, model: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
        """Return the tensors of `model`, under its names and in its shapes.

        Raises ModelError naming the missing tensors, or the first tensor of a wrong shape.
        """
        wanted = model.state_dict()
        if missing := [theirs for name in wanted if (theirs := renamed(name, names)) not in self]:
            raise self._lacks(missing)
        return {name: self._shaped(renamed(name, names), tensor.shape) for name, tensor in wanted.items()}

    def size(self) -> dict[str, int]:
        """Return the width, depth and number of heads of the encoder, as arguments of timm."""
        width = self["cls_token"].shape[-1]
        return {"embed_dim": width, "depth": self.depth("blocks."), "num_heads": self.heads(width, HEAD)}

    def depth(self, prefix: str) -> int:
        """Return the number of blocks under `prefix`, at least 1, so that `fill` reports a missing block.

        Raises ModelError for a number that the file cannot hold.
        """
        numbers = [name.split(".")[1] for name in self if name.startswith(prefix)]
        if wrong := [number for number in numbers if not number.isdecimal() or int(number) >= len(self)]:
            raise ModelError(
                f"{self.path}: {prefix}{wrong[0]} of {len(self)} tensors, expected blocks numbered from 0"
            )
        return 1 + max(map(int, numbers), default=0)

    def heads(self, width: int, channels: int) -> int:
        """Return the number of heads. Raises ModelError unless `width` is a multiple of the head's `channels`."""
        if width % channels:
            raise ModelError(
                f"{self.path}: got width {width}, expected a multiple of {channels}, the channels of a head"
            )
        return width // channels

    def side(self) -> int:
        """Return the number of patches along one side of the grid. Raises ModelError if the grid is not square."""
        patches = self["pos_embed"].shape[-2] - 1
        if math.isqrt(patches) ** 2 != patches:
            raise ModelError(f"{self.path}: got {patches} positions besides that of cls, expected a square grid")
        return math.isqrt(patches)

    def _lacks(self, missing: list[str]) -> ModelError:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        names = ", ".join(missing[:SHOWN]) + more
        return ModelError(f"{self.path} ({self.kind}) lacks {names}: name a file that holds all of it")

    def _shaped(self, name: str, shape: torch.Size) -> Tensor:
        """Return a tensor reshaped to `shape`, which may differ only in axes of size 1."""
        tensor = self[name]
        if [n for n in tensor.shape if n > 1] != [n for n in shape if n > 1]:
            raise ModelError(f"{self.path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        return tensor.reshape(shape)


def renamed(name: str, names: dict[str, str]) -> str:
    """Replace the prefix of `name` by the first entry of `names` that matches."""
    for ours, theirs in names.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
