"""Tests neither reach the network nor touch the user's cache, and use one thread a process."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="seitpp-test-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
