"""The packages that only the optional extra `robustness` installs."""

import importlib
from types import ModuleType

from seitpp.errors import UserError


class RobustnessError(UserError):
    """Raised for a missing package, and for images and models whose robustness cannot be evaluated."""


def load_extra(name: str) -> ModuleType:
    """Import a package of the extra. Raises RobustnessError if it, or a package that it needs, is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RobustnessError(
            f'robustness needs the package {name} ({error}): pip install "seitpp[robustness]"'
        ) from error
