"""Windows that is not there, as far as Python can pretend it on Linux.

    python tests/support/other_system.py OUT

The libraries are imported first, as Linux has them. Then the modules that Windows lacks cannot be imported, and
`os` refuses what it refuses: to open a folder, to sync a file that is open for reading, to rename what is open or
mapped, to rename onto what is there, and to write a newline as it is into a file that is not binary. The embedded
digits are tokenized, into the cache that the environment names, and as --compact does, and a small run is trained,
stopped and resumed.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import accelerate.tracking  # noqa: F401
import datasets  # noqa: F401
import filelock  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import sklearn.cluster
import sklearn.datasets  # noqa: F401
import timm.optim  # noqa: F401
import torch.utils.data
from torch import Tensor

LACKING = ("fcntl", "resource", "pwd", "grp", "termios")
LACKING_OS = ("sched_getaffinity", "fork", "geteuid", "getuid", "uname", "posix_fadvise", "fchmod", "fdatasync")
BINARY = 1 << 30  # a flag that Linux does not have


def refuse(path: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def held_open() -> set[str]:
    """The files that this process has open or mapped."""
    names = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    maps = Path("/proc/self/maps").read_text().splitlines()
    return names | {line.split(maxsplit=5)[5] for line in maps if line.count("/")}


def pretend_windows() -> None:
    """Let this process look like one on Windows, for what is imported from now on."""
    for name in LACKING:
        sys.modules[name] = None  # to import it is an ImportError
    for name in LACKING_OS:
        delattr(os, name)
    sys.platform = "win32"
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "replace")}
    binary: set[int] = set()

    def opened(path: object, flags: int, *rest: object, **named: object) -> int:
        if Path(str(path)).is_dir():
            refuse(path)
        descriptor = real["open"](path, flags & ~BINARY, *rest, **named)
        (binary.add if flags & BINARY else binary.discard)(descriptor)
        return descriptor

    def write(descriptor: int, data: bytes) -> int:
        if descriptor not in binary:
            real["write"](descriptor, bytes(data).replace(b"\n", b"\r\n"))
            return len(data)
        return real["write"](descriptor, data)

    def fsync(descriptor: int) -> None:
        access = int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split()[3], 8) & 3
        if access == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real["fsync"](descriptor)

    def moved(name: str):
        def move(source: object, target: object) -> None:
            for path in (Path(source).absolute(), Path(target).absolute()):
                if any(f"{held}/".startswith(f"{path}/") for held in held_open()):
                    refuse(path)
            if name == "rename" and Path(str(target)).exists():
                raise FileExistsError(errno.EEXIST, "File exists", str(target))
            real[name](source, target)

        return move

    os.O_BINARY = BINARY
    os.open, os.write, os.fsync, os.rename, os.replace = opened, write, fsync, moved("rename"), moved("replace")


def refuses(act: Callable[[], object]) -> bool:
    try:
        act()
    except PermissionError:
        return True
    return False


def main(out: Path) -> None:
    pretend_windows()
    import tokenize_images
    from support.tiny_run import STEPS, train  # as Windows has them

    from seitpp import TokenStore, files
    from seitpp.data.digits import digits
    from seitpp.engine import checkpoint, system
    from seitpp.engine.signals import Stopped

    tokens = replace(tokenize_images.PRESETS["smoke"], out=str(out / "tokens"), compact=True, workers=0)
    for split in ("train", "validation"):
        tokenize_images.main(replace(tokens, split=split))
    assert TokenStore(out / "tokens").splits == TokenStore(digits().store).splits

    def stop(step: int, micro: int, rank: int, loss: Tensor) -> Tensor:
        if step == 7:
            signal.raise_signal(signal.SIGTERM)
        return loss

    folder = out / "run"
    try:
        train(folder, stop)
    except Stopped as stopped:
        print(stopped)
    train(folder)
    assert checkpoint.load(checkpoint.newest(folder / "checkpoints")).step == STEPS
    assert b"\r" not in (folder / "config.json").read_bytes() + (folder / "metrics.jsonl").read_bytes()
    held = files.lock(folder / ".lock")
    assert held is not None and not isinstance(held, int)
    files.unlock(held)
    assert system.peak_memory(torch.device("cpu")) > 0 and system.cores() >= 1

    # And this Windows does refuse.
    assert refuses(lambda: os.open(out, os.O_RDONLY))
    with (out / "file").open("wb"):
        assert refuses(lambda: (out / "file").replace(out / "other"))
    descriptor = os.open(out / "text", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"a\n")
    os.close(descriptor)
    assert (out / "text").read_bytes() == b"a\r\n"
    print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
