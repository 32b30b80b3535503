"""Tests neither reach the network nor touch the user's cache, use one thread a process, and check shapes.

Nor do they wait for disks: a process that is killed takes nothing from the system that it has written, and tests
cannot cut the power. The programs that they start with an interpreter of their own do sync.
"""

import os
import tempfile
from collections.abc import Iterator

import pytest
import support.shapes  # noqa: F401 (the hook below names it)
from jaxtyping import config, install_import_hook
from support.paths import ROOT

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU could not be forked
os.fsync = lambda descriptor: None
_CACHE = tempfile.TemporaryDirectory(prefix="seitpp-test-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# Shapes and dtypes in the signatures of these rooms are checked at every call of this process. Not those of
# models.weights: its warnings name the line of the caller, from which a check is one frame away.
NETWORKS = (f"models.{path.stem}" for path in (ROOT / "seitpp/models").glob("[!_]*.py"))
ROOMS = ("codec", "store", "augment", "objectives", *NETWORKS)
install_import_hook([f"seitpp.{room}" for room in ROOMS], "support.shapes.checked")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For tests of what our own code says about arrays of a wrong shape or dtype."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
