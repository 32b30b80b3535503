"""Build the model of a file again from its header, which may be a stranger's: nothing is allocated unchecked."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seitpp.books import MAX_DIGITS
from seitpp.errors import reason
from seitpp.models.stem import ModelError
from seitpp.tensors import built_for

MOST = 1 << 20  # of any size in a header
Check = Callable[[Any], bool]


def is_size(value: object) -> bool:
    """Whether a value is a size: an integer of at least 1."""
    return type(value) is int and 1 <= value <= MOST


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 0."""
    return (value == 0 and type(value) is int) or is_size(value)


def is_pair(value: object) -> bool:
    """Whether a value is (height, width)."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_size, value))


def is_codes(value: object) -> bool:
    """Whether a value is a number of codes, or the number of values of each digit of a token."""
    several = isinstance(value, list | tuple) and 2 <= len(value) <= MAX_DIGITS and all(map(is_size, value))
    return is_size(value) or several


def is_side(value: object) -> bool:
    """Whether a value is the side of a square, or (height, width)."""
    return is_size(value) or is_pair(value)


def is_fraction(value: object) -> bool:
    """Whether a value is a number in [0, 1]."""
    return type(value) in (int, float) and 0 <= value <= 1


def is_text(value: object) -> bool:
    """Whether a value is a string."""
    return isinstance(value, str)


def is_texts(value: object) -> bool:
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(map(is_text, value))


def is_object(value: object) -> bool:
    """Whether a value is a JSON object."""
    return isinstance(value, dict)


def optional(check: Check) -> Check:
    """Return the check of a value that may also be None."""
    return lambda value: value is None or check(value)


def one_of(*values: str) -> Check:
    """Return the check of a value that is one of some strings."""
    return lambda value: isinstance(value, str) and value in values


def checked(
    path: Path, found: object, checks: Mapping[str, Check], *, needs: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the object `found` in a header, of which each value passes the check of its name.

    Raises ModelError, which names the file, for a name without a check, a missing one of `needs`, or a wrong
    value.
    """
    if not is_object(found):
        raise ModelError(f"{path}: its header has {_brief(found)} for an object; save the model again")
    for name, value in found.items():
        if name not in checks or not checks[name](value):
            raise ModelError(f"{path}: its header has {name} {_brief(value)}, which no model has; save it again")
    if missing := [name for name in needs if name not in found]:
        raise ModelError(f"{path}: its header lacks {missing[0]}; save the model again")
    return found


def rebuild(path: Path, build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], *, depth: int) -> nn.Module:
    """Build a model of `depth` blocks, in eval mode, with the tensors of its file; see `check_tensors`."""
    check_tensors(path, build, tensors, depth=depth)
    model = build()
    model.load_state_dict(dict(tensors))
    return model.eval()


def check_tensors(
    path: Path, build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], *, depth: int
) -> None:
    """Raise ModelError, which names the file, unless its tensors are those of the model that `build` builds.

    The model is built without memory, so that a header cannot ask for more than its file has, and not to its end
    if it has far more parameters; not at all if the file has fewer tensors than blocks.
    """
    if depth > len(tensors):
        raise ModelError(f"{path}: its header has {depth:,} blocks, but it has {len(tensors):,} tensors")
    try:
        with torch.device("meta"), built_for(len(tensors)):
            expected = {name: tensor.shape for name, tensor in build().state_dict().items()}
    except Exception as problem:  # of timm or torch, for sizes that do not go together
        raise ModelError(f"{path}: its header describes no model ({reason(problem)}); save it again") from problem
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        name = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        shapes = [tuple(shapes[name]) if name in shapes else "no tensor" for shapes in (found, expected)]
        raise ModelError(f"{path}: {name} is {shapes[0]}, expected {shapes[1]} by its header; save it again")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}.."
