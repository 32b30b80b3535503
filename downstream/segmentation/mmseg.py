"""Import of mmsegmentation, which only the optional extra `segmentation` installs."""

import contextlib
import io
import warnings
from functools import cache

from seitpp.errors import UserError


class ExtraError(UserError):
    """Raised when mmsegmentation is not installed or cannot be imported."""


@cache
def load_mmseg() -> None:
    """Import mmsegmentation without its console output, and make its registry the default one for configs.

    A recipe calls this before it imports the modules of this package that import mmsegmentation. It does not
    access the network. Raises ExtraError if a package of the extra is missing or fails to import.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mmengine.logging import MMLogger
            from mmseg.utils import register_all_modules

            register_all_modules(init_default_scope=True)
    except ImportError as error:
        raise ExtraError(
            f'segmentation needs mmsegmentation ({error}): pip install "seitpp[segmentation]"'
        ) from error
    MMLogger.get_current_instance().setLevel("WARNING")
