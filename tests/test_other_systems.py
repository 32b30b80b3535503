"""Windows and Macs: what can be pretended on Linux, and what code for them must not do."""

import ast
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.paths import RECIPES, ROOT, SUPPORT
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset, Subset

from seitpp import TokenStore, files
from seitpp.data.dataset import Batch, Chosen, MicroBatch, TokenDataset
from seitpp.data.digits import DigitsSource, digits
from seitpp.engine import system
from seitpp.images.batches import ImageDataset

FILES = sorted(path for folder in ("seitpp", "downstream", "recipes") for path in (ROOT / folder).rglob("*.py"))
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}
POSIX_NAMES = {
    *("os.fork", "os.sched_getaffinity", "os.getuid", "os.geteuid", "os.uname", "os.statvfs", "os.mkfifo"),
    *("os.fchmod", "os.killpg", "os.setsid", "os.getpgid", "os.sync", "os.fdatasync", "os.posix_fadvise"),
    *("signal.SIGKILL", "signal.SIGUSR1", "signal.SIGUSR2", "signal.SIGHUP", "signal.SIGALRM", "signal.alarm"),
}


def posix_only(tree: ast.Module) -> list[str]:
    """What a file needs of POSIX: modules imported with the file, and names that are used anywhere."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name in POSIX_MODULES and id(node) not in inside]
        if isinstance(node, ast.Attribute) and ast.unparse(node) in POSIX_NAMES:
            found.append(ast.unparse(node))
    return found


def test_nothing_of_posix_is_needed_to_import_and_run() -> None:
    assert [(str(path), name) for path in FILES for name in posix_only(ast.parse(path.read_text()))] == []
    bad = "try:\n    import fcntl\nexcept ImportError:\n    pass\nfrom resource import getrusage\nos.fork()"
    assert posix_only(ast.parse(bad)) == ["resource", "fcntl", "os.fork"]
    assert posix_only(ast.parse("def lock():\n    import fcntl")) == []


def test_windows_as_far_as_it_can_be_pretended(tmp_path: Path) -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", RECIPES)))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "other_system.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr[-3000:]


def test_a_lock_ends_with_its_process_though_a_child_lives(tmp_path: Path) -> None:
    """The workers of a run are forked; a killed run must not keep its folder as long as one of them hangs."""
    path, ready = tmp_path / "lock", tmp_path / "child"
    owner = os.fork()
    if not owner:
        files.lock(path)
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        ready.write_text(str(child))
        time.sleep(60)
        os._exit(0)
    while not (ready.exists() and ready.read_text()):
        time.sleep(0.01)
    try:
        assert files.lock(path) is None and files.owner(path).startswith(f"process {owner} on ")
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        held = files.lock(path)
        assert held is not None
        files.unlock(held)
    finally:
        os.kill(int(ready.read_text()), signal.SIGKILL)


def test_peak_memory_is_in_bytes_on_linux_and_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    on_linux = system.peak_memory(cpu)
    assert on_linux > 50 << 20
    monkeypatch.setattr(sys, "platform", "darwin")
    assert system.peak_memory(cpu) == pytest.approx(on_linux / 1024, rel=0.2)
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert system.peak_memory(cpu) > 50 << 20


class Copies(TorchFunctionMode):
    """Notes what is copied to another device, and whether the host goes on meanwhile; it stays where it is."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is not torch.Tensor.to:
            return function(*arguments, **(keywords or {}))
        tensor, device = arguments
        self.seen.append((device.type, tensor.dtype, bool(keywords and keywords.get("non_blocking"))))
        return tensor


def test_batches_for_the_gpu_of_a_mac_have_its_dtypes_and_wait() -> None:
    batch = Batch(torch.arange(2), torch.tensor([[[0, 65535]]]).to(torch.uint16), torch.arange(2))
    for device, ids, goes_on in (("mps", torch.int32, False), ("cuda", torch.uint16, True)):
        with Copies() as copies:
            moved = batch.to(torch.device(device))
        assert copies.seen == [(device, dtype, goes_on) for dtype in (torch.int64, ids, torch.int64)]
        assert moved.ids.tolist() == [[[0, 65535]]]


def test_nothing_else_copies_to_a_device_without_waiting() -> None:
    assert [str(path) for path in FILES if "non_blocking=True" in path.read_text()] == [
        str(ROOT / "seitpp/tensors.py")
    ]


def test_workers_that_are_spawned_get_the_same_data() -> None:
    """As on Macs and Windows: a data set reaches a worker pickled, and reads the same there."""
    store = TokenStore(digits().store)
    tokens, images = TokenDataset(store), ImageDataset(DigitsSource("train"), (32, 32))
    sets: list[Dataset] = [tokens, Chosen(tokens, np.arange(0, 100, 3)), Subset(tokens, range(9)), images]
    for dataset in sets:
        there = pickle.loads(pickle.dumps(dataset))
        wanted = pickle.loads(pickle.dumps(MicroBatch([1, 5, 2], 3)))
        one, two = (some.__getitems__(wanted) for some in (dataset, there))
        assert type(one) is type(two)
        for mine, yours in zip(one, two, strict=True):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(yours))
    assert wanted.epoch == 3
