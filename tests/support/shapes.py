"""The check of array annotations that tests put on every function of the rooms named in pyproject.toml."""

from collections.abc import Callable
from typing import get_args

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable) -> Callable:
    """`function` with its annotations of arrays checked at each call; other annotations are pyrefly's matter."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _has_array(hint)}
    return beartype(function) if function.__annotations__ else function


def _has_array(hint: object) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_array, get_args(hint)))
