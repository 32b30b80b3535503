"""Read a million hostile files of every kind: each is read, or refused by one line; nothing else happens.

    PYTHONPATH=tests python tests/long/headers.py --inputs 1000000 [--processes 2] [--seed 0] [--kinds run mtm]
    PYTHONPATH=tests python tests/long/headers.py --repeat "classifier 1234"

A file of each kind of support/strangers.py has bytes changed, cut, put in, repeated or swapped; or its JSON loses
keys, gets others, or has values that nobody would write; or tensors of a checkpoint change. An input fails if
reading it raises anything but a UserError in one line, takes 2 s of computing or 200 MB, asks the network, starts
a process, unpickles an object, or touches a file outside of its folder. Failing inputs stay in
tests/long/headers-failures (--keep). Ctrl-C ends it early, with the table of what it did.

Prints a table: kind, inputs, refused, read, longest ms, largest MB. The exit status is not 0 after any failure.
"""

import argparse
import copy
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import torch
from support.strangers import KINDS, Files, Kind

from seitpp.errors import UserError

SECONDS, MEGABYTES = 2.0, 200
STUCK = 120.0  # seconds after which a process that no signal stops is killed
PAGE = os.sysconf("SC_PAGE_SIZE")
LARGEST = 1 << 20  # bytes that a file gets besides its own
FORK = multiprocessing.get_context("fork")
KEPT = 3  # failing inputs of a kind that fail alike
SECRET = "secret.txt"  # a file beside the folder of an input, which no input may read

# What events of Python may not happen at all, and those that change files, by the number of paths in them.
FORBIDDEN = {
    *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto"),
    *("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"),
    *("pickle.find_class", "urllib.Request", "webbrowser.open"),
}
CHANGES = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"), 2),
    **dict.fromkeys(("shutil.rmtree", "shutil.unpack_archive"), 1),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

ADDRESS = re.compile("0x7f[0-9a-f]{8}")
ROOT = Path(__file__).resolve().parents[2]
# Where the interpreter and its libraries read.
LIBRARIES = tuple(map(str, {sys.prefix, sys.base_prefix, ROOT, "/usr", "/lib", "/proc", "/sys", "/dev"}))

DEEP = "@deep@"  # stands for lists in lists, which json.dumps could not write
TEXTS = (
    *("", "a", "\n", "\x1b[31mred", "a\nb", "\ud800", "\u202e", "0", "-1", "nan", "x" * 70000, DEEP),
    *("hf-hub:timm/vit_base_patch16_224", "timm/vit_tiny", "https://example.com/model.bin", "s3://bucket/x"),
    *("../secret.txt", "../../secret.txt", "/etc/passwd", "/dev/zero", "/dev/stdin", "a/../../secret.txt", "\0"),
    *("vit_giant_patch14_dinov2", "tf_efficientnet_l2", "nfnet_f7", "resnet50", "mtm_vit_base", "seit_resnet50"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 64, 255, 256, 1000, 65536, 2**20, 2**20 + 1, 2**24, 2**31 - 1, 2**31, 2**32, 2**53),
    *(2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, -(10**9), 0.0, 0.5, -0.0, 1e-300, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
OTHERS = (None, True, False, [], {}, [[]], [None], {"": None}, [0, 0], [2**20, 2**20], ["a", "a"], {"a": {"a": 1}})


# Damage


def damaged(files: Files, rng: random.Random, kind: Kind) -> Files:
    """Damage one file of a set, rarely two, and mostly bring the checksums around it up to date."""
    changed, names = dict(files), [name for name in files if not name.endswith((".jpg", ".png", ".md"))]
    for _ in range(1 if rng.random() < 0.9 else 2):
        name = rng.choice(names)
        if rng.random() < 0.02:
            del changed[name]
            break
        changed[name] = _damage(name, changed[name], rng)
    if any(len(data) > len(files[name]) + LARGEST for name, data in changed.items()):
        return damaged(files, rng, kind)
    if kind.seal and rng.random() < 0.8:
        try:
            return kind.seal(changed)
        except (KeyError, ValueError):  # nothing is left that could be sealed
            return changed
    return changed


def _damage(name: str, data: bytes, rng: random.Random) -> bytes:
    suffix = name.rpartition(".")[2]
    shaped = SHAPED.get(suffix)
    if shaped is None or rng.random() < 0.25:
        return _bytes(data, rng)
    try:
        return shaped(data, rng)
    except Exception:  # it has been damaged before, and is no file of its kind any more
        return _bytes(data, rng)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, put in, cut, repeat or swap bytes, mostly near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        size = len(changed)
        near = min(size, rng.choice((16, 64, 300, 2000)))
        place = rng.randrange(near if rng.random() < 0.6 else size) if size else 0
        length = rng.choice((1, 2, 4, 8, 100))
        match rng.randrange(7):
            case 0 if size:
                changed[place] ^= 1 << rng.randrange(8)
            case 1 if size:
                changed[place] = rng.choice((0, 1, 9, 10, 32, 34, 46, 47, 48, 57, 91, 93, 123, 125, 127, 128, 255))
            case 2:
                changed[place:place] = rng.choice(
                    (b"\0" * length, rng.randbytes(length), b"9" * length, b"\n", b"-")
                )
            case 3:
                del changed[place : place + length]
            case 4:
                changed[place:place] = changed[place : place + 20 * length]
            case 5 if size:
                other = rng.randrange(size)
                length = min(length, size - max(place, other))
                first, second = changed[place : place + length], changed[other : other + length]
                changed[place : place + length], changed[other : other + length] = second, first
            case 6:
                del changed[place if rng.random() < 0.3 else size - min(size, length) :]
    return bytes(changed)


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(rng.choice((TEXTS, NUMBERS, NUMBERS, OTHERS))))


def tree(value: Any, rng: random.Random) -> Any:
    """Change a JSON value somewhere: a key is lost, added or renamed, or another value is there."""
    root = {"": copy.deepcopy(value)}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        inside, key = rng.choice(list(_places(root)))
        match rng.randrange(8):
            case 0 if key != "":
                del inside[key]
            case 1 if isinstance(inside, dict) and key != "":
                inside[rng.choice(TEXTS)] = inside.pop(key)
            case 2 if isinstance(inside[key], dict):
                inside[key][rng.choice((*TEXTS, "pretrained", "checkpoint_path", "version"))] = _value(rng)
            case 2 | 3 if isinstance(inside[key], list):
                part = inside[key]
                many = part * (200 if len(str(part)) < 100 else 2)
                part[:] = rng.choice((many, part[::-1], part[1:], [*part, _value(rng)]))
            case 4 if type(inside[key]) in (int, float):
                inside[key] = rng.choice((inside[key] + 1, -inside[key], inside[key] * 1000, str(inside[key])))
            case 5:
                inside[key] = rng.choice(([inside[key]], {"a": inside[key]}, str(inside[key])[:100]))
            case _:
                inside[key] = _value(rng)
    return root[""]


def _places(root: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value below a container; of long lists, the first values alone."""
    for key in list(root)[:50] if isinstance(root, dict) else range(min(len(root), 50)):
        yield root, key
        if isinstance(root[key], dict | list):
            yield from _places(root[key])


def _text(value: Any, rng: random.Random) -> bytes:
    depth = rng.choice((20, 900, 990, 100_000))
    return json.dumps(value).replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode()


def _json(data: bytes, rng: random.Random) -> bytes:
    return _text(tree(json.loads(data), rng), rng)


def _json_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = _json(lines[place], rng)
    return b"\n".join(lines) + b"\n" * rng.randrange(2)


def _words(data: bytes, rng: random.Random) -> bytes:
    """Change a word, a line or the delimiter of a text."""
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    place = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            words = lines[place].split(" ")
            words[rng.randrange(len(words))] = str(_value(rng))[:80000]
            lines[place] = " ".join(words)
        case 1:
            lines[place] = str(_value(rng))[:80000]
        case 2:
            lines[place:place] = [lines[place]] * rng.choice((1, 2, 3000))
        case 3:
            lines[place] = lines[place].replace(
                rng.choice(" ,\t/1"), rng.choice(("", "  ", ",", "\t", "999999", "\u00b2"))
            )
        case 4:
            lines[place] += rng.choice((" " * 5000, " 1" * 3000, ",,,,", "|a|b", ";", "\t\t", "\0", "\r"))
    return "\n".join(lines).encode("utf-8", "surrogateescape" if rng.random() < 0.9 else "replace")


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change our header, or that of safetensors, or bytes of the tensors."""
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    choice = rng.random()
    if choice < 0.6 and "__metadata__" in header:
        key = rng.choice(list(header["__metadata__"]))
        header["__metadata__"][key] = _text(tree(json.loads(header["__metadata__"][key]), rng), rng).decode()
        written = json.dumps(header).encode()
    elif choice < 0.9:
        written = _text(tree(header, rng), rng)
    else:
        written, rest = json.dumps(header).encode(), _bytes(rest, rng)
    length = len(written) if rng.random() < 0.97 else rng.choice((0, 1, 2**20, 2**32, 2**63, len(written) - 1))
    return struct.pack("<Q", length) + written + rest


def _torch(data: bytes, rng: random.Random) -> bytes:
    """Change the tensors of a checkpoint, or the bytes of its pickle within its archive."""
    if rng.random() < 0.5:
        content = torch.load(io.BytesIO(data), weights_only=True)
        buffer = io.BytesIO()
        torch.save(_tensors(content, rng), buffer, _use_new_zipfile_serialization=rng.random() < 0.8)
        return buffer.getvalue()
    before, buffer = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, _bytes(content, rng) if name.endswith("data.pkl") else content)
    return buffer.getvalue()


def _tensors(content: dict[str, Any], rng: random.Random) -> Any:
    key = rng.choice(list(content))
    if isinstance(content[key], dict) and rng.random() < 0.9:
        return {**content, key: _tensors(content[key], rng)}
    place = rng.choice(list(content))
    changed, tensor = dict(content), content[place]
    if not torch.is_tensor(tensor):
        return {**content, place: _value(rng)}
    match rng.randrange(8):
        case 0:
            del changed[place]
        case 1:
            changed[rng.choice((*TEXTS, "blocks.1000000.x", "blocks.\u00b2", 7, f"module.{place}"))] = changed.pop(
                place
            )
        case 2:
            changed[place] = tensor.flatten() if rng.random() < 0.5 else tensor[None]
        case 3:
            changed[place] = torch.zeros(rng.choice(((), (0,), (1, 1), (1, 100_000), (300_000,), (3, 0, 2))))
        case 4:
            changed[place] = tensor.to(rng.choice((torch.float16, torch.int64, torch.complex64, torch.bool)))
        case 5:
            changed[place] = torch.full_like(tensor, rng.choice((float("nan"), float("inf"), 0.0)))
        case 6:
            changed[place] = torch.zeros(1).expand(rng.choice(((10**9,), tuple(tensor.shape))))
        case 7:
            changed[place] = rng.choice((tensor.to_sparse(), _value(rng), [tensor, tensor]))
    return changed


def _tar(data: bytes, rng: random.Random) -> bytes:
    """Change a header of a tar and its checksum, or bytes of a member."""
    changed = bytearray(data)
    place = 512 * rng.randrange(len(data) // 512)
    field, size = rng.choice(FIELDS)
    written = rng.choice(
        (
            *(
                b"\x80" + b"\0" * 3 + rng.randbytes(8),
                b"\xff" * size,
                b"7" * size,
                b"\0" * size,
                rng.randbytes(size),
            ),
            *(
                rng.choice(b"0123456789xgLKSVD").to_bytes(1, "little"),
                b"../secret.txt\0",
                b"/etc/passwd\0",
                b"a\nb\0",
            ),
            *(b"00000000000\0", b"77777777777\0", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe\x00"),
        )
    )[:size]
    changed[place + field : place + field + len(written)] = written
    header = bytes(changed[place : place + 148]) + b" " * 8 + bytes(changed[place + 156 : place + 512])
    changed[place + 148 : place + 156] = b"%06o\0 " % sum(header)
    return bytes(changed)


def _matlab(data: bytes, rng: random.Random) -> bytes:
    """Change the bytes of a variable, compressed or not."""
    header, kind = data[:128], struct.unpack("<I", data[128:132])[0]
    if kind != 15:
        return header + _bytes(data[128:], rng)
    body = zlib.compress(_bytes(zlib.decompress(data[136:]), rng))
    return header + struct.pack("<II", 15, len(body)) + body


# Places and sizes in the header of a tar: name, mode, size, time, kind, target of a link, format, folder.
FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
SHAPED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json,
    "jsonl": _json_lines,
    **dict.fromkeys(("txt", "csv", "cls"), _words),
    "safetensors": _safetensors,
    **dict.fromkeys(("pth", "ckpt"), _torch),
    "tar": _tar,
    "mat": _matlab,
}


# Watched reading


class TimeUp(BaseException):
    """Raised by the alarm, past all that catches exceptions."""


class Watch:
    """Sees every file that this process opens, and what else Python tells, while an input is read."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.found.append(f"{event} {arguments!r:.200}")
            raise PermissionError(f"forbidden: {event}")
        if event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & WRITING) or (isinstance(mode, str) and bool(set(mode) & set("wax+")))
            self._check(event, path, writes)
        elif event in CHANGES:
            for path in arguments[: CHANGES[event]]:
                self._check(event, path, True)

    def _check(self, event: str, path: Any, writes: bool) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        place = os.path.realpath(os.fsdecode(path)) if b"\0" not in os.fsencode(path) else "\0"
        if place.startswith(f"{self.folder}/") or place in (self.folder, "\0", "/dev/null"):
            return
        if place.endswith("/<unknown>"):  # a traceback looks for the source of compiled code
            return
        if writes or not place.startswith(LIBRARIES):
            self.found.append(f"{event} {place}{' for writing' if writes else ''}")


@contextmanager
def limited() -> Iterator[None]:
    """Allow 200 MB more than there are, and 2 seconds of computing, or 20 of waiting."""

    def ring(*_: object) -> None:
        raise TimeUp

    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGPROF, ring)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * PAGE
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEGABYTES * 2**20, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


class Outcome(NamedTuple):
    """What became of an input: "read" or "refused", else how it failed; the CPU seconds and bytes that it took."""

    what: str
    seconds: float
    memory: int
    trace: str = ""


class Reader:
    """Writes inputs of one kind into a folder and reads them there."""

    def __init__(self, name: str, whole: Files, *, seed: int, root: Path, watch: Watch):
        self.name, self.whole, self.kind, self.seed, self.watch = name, whole, KINDS[name], seed, watch
        self.folder = root / "input"
        (root / SECRET).write_bytes(b"secret")

    def files(self, number: int) -> Files:
        """Return the files of input `number`, which the seed decides."""
        return damaged(self.whole, random.Random(f"{self.seed} {self.name} {number}"), self.kind)

    def read(self, number: int) -> Outcome:
        """Write input `number` into the folder of inputs, and read it."""
        files = self.files(number)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        write_files(self.folder, files)
        Path("/proc/self/clear_refs").write_text("5")  # the largest memory so far is that of now
        resident, self.watch.found = peak(), []
        self.watch.folder = str(self.folder)
        started, trace = time.process_time(), ""
        try:
            with limited():
                self.kind.read(self.folder)
            what = "read"
        except TimeUp:
            what, trace = "takes too long", traceback.format_exc()
        except Exception as error:
            what, trace = _verdict(error), traceback.format_exc()
        seconds = time.process_time() - started
        self.watch.folder = None
        memory = peak() - resident
        if what in ("read", "refused"):
            if self.watch.found:
                what, trace = f"touches {self.watch.found[0]}", "\n".join(self.watch.found)
            elif left := {path.name for path in self.folder.parent.iterdir()} - {"input", SECRET}:
                what = f"leaves {left}"
            elif seconds >= SECONDS:
                what = "takes too long"
            elif memory > MEGABYTES * 2**20:
                what = "takes too much memory"
        return Outcome(what, seconds, memory, trace)


def _verdict(error: BaseException) -> str:
    """Return "refused" for a UserError in one line that does not hide that memory ran out, else what it is."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            return "runs out of memory"
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, UserError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
    text = str(error)
    if not text.isprintable() or not text or ADDRESS.search(text):
        return "is refused in more than one line, or with an address"
    return "refused"


def whole_files(name: str) -> Files:
    """Return the undamaged files of a kind, after reading them, sealed again if they can be."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, kind = Path(temporary).resolve() / "input", KINDS[name]
        folder.mkdir()
        kind.write(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        whole = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        write_files(folder, kind.seal(whole) if kind.seal else whole)
        kind.read(folder)
        return whole


def write_files(folder: Path, files: Files) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    folder.mkdir(exist_ok=True)


def peak() -> int:
    """Return the largest resident memory of this process since it was cleared."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# Many processes


class Progress:
    """What one process has done so far, in memory that its parent sees, so that a crash loses nothing."""

    FIELDS = ("refused", "read", "longest", "largest", "failed")

    def __init__(self, names: list[str]):
        self.names = names
        self.values = multiprocessing.Array("d", len(self.FIELDS) * len(names), lock=False)
        self.place = multiprocessing.Array("d", 2, lock=False)  # the input in `order`, and when it began

    def add(self, kind: int, outcome: Outcome) -> None:
        base = len(self.FIELDS) * kind
        self.values[base + (0 if outcome.what == "refused" else 1 if outcome.what == "read" else 4)] += 1
        self.values[base + 2] = max(self.values[base + 2], outcome.seconds)
        self.values[base + 3] = max(self.values[base + 3], outcome.memory)


def plan(names: list[str], inputs: int) -> list[int]:
    """Return how many inputs each kind gets."""
    shares = [KINDS[name].share for name in names]
    return [max(1, inputs * share // sum(shares)) for share in shares]


def order(counts: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (kind, number) of all inputs, all kinds in turn, so that what is done early is a fair part."""
    for number in range(max(counts)):
        yield from ((kind, number) for kind, count in enumerate(counts) if number < count)


def work(
    worker: int,
    workers: int,
    *,
    wholes: list[Files],
    counts: list[int],
    progress: Progress,
    seed: int,
    root: Path,
    keep: Path,
) -> None:
    """Read every `workers`-th input, from the place in `progress` on, in the folder `root`."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    root.mkdir(exist_ok=True)
    os.chdir(root)
    watch, seen, first = Watch(), Counter(), int(progress.place[0])
    named = zip(progress.names, wholes, strict=True)
    readers = [Reader(name, whole, seed=seed, root=root, watch=watch) for name, whole in named]
    for place, (kind, number) in enumerate(order(counts)):
        if place < first or place % workers != worker:
            continue
        progress.place[:] = [place, time.time()]
        outcome = readers[kind].read(number)
        progress.add(kind, outcome)
        if outcome.what not in ("read", "refused"):
            seen[kind, outcome.what] += 1
            if seen[kind, outcome.what] <= KEPT:
                keep_input(keep, readers[kind], number, outcome)
    progress.place[0] = sum(counts)


def keep_input(keep: Path, reader: Reader, number: int, outcome: Outcome) -> None:
    """Keep a failing input and how it failed."""
    folder = keep / f"{reader.name} {number}"
    shutil.rmtree(folder, ignore_errors=True)
    write_files(folder / "input", reader.files(number))
    command = (
        f'PYTHONPATH=tests python tests/long/headers.py --seed {reader.seed} --repeat "{reader.name} {number}"'
    )
    (folder / "failure.txt").write_text(f"{outcome.what}\n{command}\n\n{outcome.trace}")


def fuzz(inputs: int, *, processes: int, seed: int, keep: Path, names: list[str]) -> tuple[list[list], int]:
    """Read hostile inputs in forked processes; return the rows of the table, and the number of failures."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    wholes = list(map(whole_files, names))  # before the processes start, since it imports libraries
    states, counts = [Progress(names) for _ in range(processes)], plan(names, inputs)
    with tempfile.TemporaryDirectory() as folder:
        same = {"wholes": wholes, "counts": counts, "seed": seed, "keep": keep}

        def started(worker: int) -> multiprocessing.process.BaseProcess:
            own = {"progress": states[worker], "root": Path(folder).resolve() / str(worker)}
            process = FORK.Process(target=work, args=(worker, processes), kwargs=same | own)
            process.start()
            return process

        for worker, state in enumerate(states):
            state.place[:] = [worker, time.time()]
        _attend(started, states, list(order(counts)))
    return _rows(names, states)


def _attend(
    started: Callable[[int], multiprocessing.process.BaseProcess],
    states: list[Progress],
    inputs: list[tuple[int, int]],
) -> None:
    """Start all processes, and each again behind the input in which it ended or got stuck."""
    running = {worker: started(worker) for worker in range(len(states))}
    try:
        while running:
            for worker, process in list(running.items()):
                process.join(0.2)
                state = states[worker]
                if process.is_alive() and time.time() - state.place[1] < STUCK:
                    continue
                process.kill()
                process.join()
                del running[worker]
                if (place := int(state.place[0])) < len(inputs):
                    kind, number = inputs[place]
                    what = f"ends the process ({process.exitcode})"
                    print(f'"{state.names[kind]} {number}" {what}', flush=True)
                    state.add(kind, Outcome(what, 0, 0))
                    state.place[:] = [place + len(states), time.time()]
                    running[worker] = started(worker)
    except KeyboardInterrupt:  # what is done counts
        for process in running.values():
            process.kill()
            process.join()


def _rows(names: list[str], states: list[Progress]) -> tuple[list[list], int]:
    rows = []
    for index, name in enumerate(names):
        base = index * len(Progress.FIELDS)
        column = [[state.values[base + field] for state in states] for field in range(len(Progress.FIELDS))]
        refused, read, failed = (int(sum(column[field])) for field in (0, 1, 4))
        rows.append([name, refused + read + failed, refused, read, max(column[2]), max(column[3]), failed])
    return rows, sum(row[-1] for row in rows)


def repeat(name: str, number: int, seed: int) -> None:
    """Read one input in this process, and print its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(name, whole_files(name), seed=seed, root=Path(folder).resolve(), watch=Watch())
        outcome = reader.read(number)
    took = f"{outcome.seconds:.3f} s, {outcome.memory / 2**20:.0f} MB"
    print(f"{outcome.trace}{name} {number}: {outcome.what}, {took}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--keep", type=Path, default=Path(__file__).parent / "headers-failures")
    parser.add_argument("--repeat", metavar="KIND NUMBER")
    options = parser.parse_args()
    if options.repeat:
        name, _, number = options.repeat.rpartition(" ")
        repeat(name, int(number), options.seed)
        return
    started = time.perf_counter()
    rows, failures = fuzz(
        options.inputs,
        processes=options.processes,
        seed=options.seed,
        keep=options.keep.resolve(),
        names=options.kinds,
    )
    print("| kind | inputs | refused | read | longest ms | largest MB |\n|---|---|---|---|---|---|")
    for name, inputs, refused, read, seconds, memory, _ in rows:
        print(f"| {name} | {inputs:,} | {refused:,} | {read:,} | {1000 * seconds:.0f} | {memory / 2**20:.0f} |")
    total, longest = sum(row[1] for row in rows), max(row[4] for row in rows)
    largest = max(row[5] for row in rows) / 2**20
    print(
        f"{total:,} hostile inputs in {time.perf_counter() - started:.0f} s: {failures} other errors, at most "
        f"{longest:.2f} s and {largest:.0f} MB each"
    )
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
