"""Check what every command does where the system refuses: full disk, read-only folder, no HOME, bad names, LANG=C.

    python tests/long/systems.py [--only NAME ..] [--conditions NAME ..] [--points 5]

Needs Linux and root, since it mounts small file systems. Every command of docs/cli.md and every recipe, its preset
smoke, runs under each condition (`CONDITIONS`). It must do what it does elsewhere, or end with exit status 2 and one
line "error: .." that names the file and what to do. There must be no traceback, no file or folder with half of its
content, no change of what was read, and nothing left that hinders or outlives a second start: once there is room,
the same command succeeds and leaves the same files.

Each fault is printed. The last line adds them up, and the exit status is not 0 after any.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from safetensors import safe_open

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from downstream.segmentation.default import FEW_SCENES, default_scenes  # noqa: E402
from seitpp.data.digits import digits  # noqa: E402
from support.paths import RECIPES, ROOT, SUPPORT  # noqa: E402
from support.pictures import encoded  # noqa: E402

PAGE = 4096
LIMIT = 120  # seconds of a run
ROOM = 1 << 30
# A user without an entry in the list of users, as in many containers, who reads what root reads, as Python is.
AS_STRANGER = "setpriv --reuid=54321 --regid=54321 --clear-groups --inh-caps=+dac_read_search".split()
AS_STRANGER.append("--ambient-caps=+dac_read_search")
# What differs between two equal runs, in result.json and in what is printed.
TIMES = ("seconds", "images_per_second", "mfu", "git_commit", "device")
FEW = "--epochs 1 --warmup-epochs 0 --batch-size 16"

# Arguments of every command: IN is the folder of what is read, OUT is what is written.
COMMANDS = {
    "info": "seitpp info IN/store",
    "verify": "seitpp verify IN/store",
    "show": "seitpp show IN/store --tokenizer IN/tokenizer.safetensors --out OUT.png",
    "recode": "seitpp recode IN/store OUT --codec context",
    "append": "seitpp append OUT IN/ones",
    "merge": "seitpp merge OUT IN/store IN/ones",
    "subset": "seitpp subset IN/store OUT --classes 1 2",
    "import-release": "seitpp import-release IN/release OUT",
    "export-release": "seitpp export-release IN/store OUT",
    "export-model": "seitpp export-model IN/seit OUT",
    "push": "seitpp push IN/store me/tokens",
    "pull": "seitpp pull me/tokens OUT",
    "seit_train": "seit_train smoke --epochs 1 --warmup-epochs 0 --store IN/store --resume --out OUT",
    "mtm_pretrain": "mtm_pretrain smoke --epochs 1 --warmup-epochs 0 --store IN/store --tokenizer IN/tokenizer.safetensors --resume --out OUT",
    "finetune": f"finetune smoke --data IN/pictures {FEW} --size 32 --checkpoint IN/mtm --resume --out OUT",
    "tokenadapt_train": f"tokenadapt_train smoke --data IN/pictures --split train --validation-split validation {FEW}"
    " --tokenizer IN/tokenizer.safetensors --resume --out OUT",
    "tokenizer_train": f"tokenizer_train smoke --data IN/pictures --split train --validation-split validation {FEW}"
    " --resume --out OUT",
    "segment_ade20k": "segment_ade20k smoke --data IN/scenes/images --tokenizer IN/scenes/tokenizer.safetensors"
    " --short-side 64 --steps 2 --warmup-steps 1 --resume --out OUT",
    "tokenize_images": "tokenize_images smoke --data IN/pictures/train --keep-source --out OUT",
    "evaluate": "evaluate smoke --data IN/pictures --checkpoint IN/finetuned --overwrite --out OUT",
    "predict": "predict smoke --data IN/pictures/train --checkpoint IN/finetuned --overwrite --out OUT",
    "predict-maps": "predict smoke --data IN/scenes/images/images/validation --checkpoint IN/segmenter"
    " --tokenizer IN/scenes/tokenizer.safetensors --overwrite --out OUT",
    "embed": "embed smoke --data IN/pictures/train --tokenizer IN/tokenizer.safetensors --checkpoint IN/mtm"
    " --overwrite --out OUT",
    "probe": "probe smoke --store IN/store --checkpoint IN/mtm --overwrite --out OUT",
    "inpaint": "inpaint smoke --store IN/store --checkpoint IN/mtm --overwrite --out OUT",
    "evaluate_segmentation": "evaluate_segmentation smoke --data IN/scenes/images --checkpoint IN/segmenter"
    " --tokenizer IN/scenes/tokenizer.safetensors --overwrite --out OUT",
}
READS_ONLY = ("info", "verify", "push")  # of those nothing is written
OFFLINE = ("push", "pull")  # without a network they end in one line wherever they are


@dataclass
class Figures:
    """What was run and what was wrong."""

    runs: int = 0
    faults: Counter = field(default_factory=Counter)


class Server:
    """A process that runs one command after the other in forks of itself, under an environment of its own."""

    def __init__(self, title: str, environment: dict[str, str | Path], *, stranger: bool = False):
        fixed = {"HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": 1}
        paths = os.pathsep.join(map(str, (ROOT, TESTS, RECIPES)))
        every = {"PATH": os.environ["PATH"], "PYTHONPATH": paths, **fixed, **environment}
        self.title = title
        self.process = subprocess.Popen(
            [*(AS_STRANGER if stranger else ()), sys.executable, "-B", SUPPORT / "forked_recipes.py"],
            env={name: str(value) for name, value in every.items()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: list[str], **more: object) -> dict:
        """Run a command and return the report of tests/support/forked_recipes.py."""
        job = {"recipe": words[0], "arguments": words[1:], "limit": LIMIT, **more}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def words_of(name: str, inputs: Path, out: Path | str) -> list[str]:
    """The command line of a command; `out` may begin with a dash."""
    parts = COMMANDS[name].replace("--out OUT", "--out=OUT").replace(" OUT", " ./OUT").split()
    return [part.replace("IN/", f"{inputs}/").replace("OUT", str(out)) for part in parts]


# Small file systems


@contextmanager
def mounted(path: Path, options: str = f"size={ROOM}") -> Iterator[Path]:
    """Mount a small file system at a path for the time of the block."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=777,{options}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


# What is on a disk


def digests(root: Path) -> dict[str, str]:
    """The SHA-256 of every file under a folder, by its relative path."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def facts(disk: Path) -> dict[str, object]:
    """What a command has left on a disk, so that that of two runs can be compared: content, without times."""
    found: dict[str, object] = {}
    for path in sorted(disk.rglob("*")):
        name = str(path.relative_to(disk))
        if name.endswith("result.json"):
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in TIMES}
        elif name.endswith((".safetensors", ".arrow", ".csv", "tokens.json", ".parquet", ".gz", ".ckpt")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = None
    return found


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".png": lambda path: Image.open(path).load(),
    ".parquet": pq.read_table,
    ".html": lambda path: path.read_text().index("</html>"),
    ".csv": lambda path: path.read_text()[-1:].index("\n"),
    ".txt": lambda path: path.read_text()[-1:].index("\n"),
    ".md": lambda path: path.read_text().index("#"),
}


def half_written(disk: Path) -> list[str]:
    """The files under their final names that cannot be read to their end; names with a dot are not final."""
    broken = []
    for path in sorted(disk.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(disk).parts)
        if hidden or not path.is_file():
            continue
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "np") as file:
                    [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
            else:
                READERS.get(path.suffix, lambda path: None)(path)
        except Exception as error:
            broken.append(f"{path.relative_to(disk)} ({type(error).__name__})")
    return broken


def leftovers(disk: Path) -> list[str]:
    """Temporary files and folders, but the lock of a run, which stays in its folder."""
    paths = (path.relative_to(disk) for path in disk.rglob("*") if path.name.startswith("."))
    return sorted(str(path) for path in paths if path.name != ".lock")


# One run


class Checks:
    """The inputs, what each command makes of them elsewhere, and the faults so far."""

    def __init__(self, root: Path, points: int):
        self.root, self.points, self.figures = root, points, Figures()
        self.inputs, self.disk = root / "inputs", root / "disk"
        self.before: dict[str, str] = {}
        self.expected: dict[str, dict] = {}
        self.printed: dict[str, str] = {}
        self.used: dict[str, tuple[int, int]] = {}

    def fault(self, kind: str, where: str, text: str) -> None:
        self.figures.faults[kind] += 1
        print(f"{kind}: {where}: {text}", flush=True)

    def prepare(self, name: str, disk: Path) -> None:
        """Put there what the command changes."""
        if name == "append":
            shutil.copytree(self.inputs / "store", disk / "out")

    def run(self, server: Server, where: str, words: list[str], disk: Path, **more: object) -> dict:
        """Run a command and check all that must hold however it ended."""
        report = server.run(words, **more)
        self.figures.runs += 1
        told = report["err"].splitlines()
        errors = [line for line in told if line.startswith("error")]
        if "Traceback" in report["err"] or "Exception ignored" in report["err"]:
            self.fault("tracebacks", where, " | ".join(told[-3:]))
        elif report["status"] is None:
            self.fault("never ended", where, " ".join(words))
        elif report["status"] == 2 and (len(errors) != 1 or told[-1:] != errors):
            self.fault("lines", where, report["err"][-500:])
        elif report["status"] not in (0, 2, 141):
            self.fault("exit statuses", where, f"{report['status']}: {report['err'][-300:]}")
        if disk.is_dir() and (broken := half_written(disk)):
            self.fault("half-written files", where, ", ".join(broken))
        if digests(self.inputs) != self.before:
            self.fault("inputs changed", where, str(digests(self.inputs).items() ^ self.before.items())[:300])
            raise SystemExit("what is read was changed: nothing more can be said")
        return report | {"line": errors[-1] if errors else ""}

    def must_fail(self, where: str, report: dict, *words: str) -> None:
        """Check that a command was refused, in a line with these words."""
        missing = [word for word in words if word not in report["line"]]
        if report["status"] != 2 or missing:
            told = report["line"] or report["err"][-300:]
            self.fault("wrong refusals", where, f"{report['status']}, without {missing}: {told}")

    def must_succeed(self, where: str, name: str, report: dict, disk: Path) -> None:
        """Check that a command did what it does elsewhere."""
        if name in OFFLINE:
            return self.must_fail(where, report, "me/tokens on the hub")
        if report["status"] != 0:
            return self.fault("failures", where, f"{report['status']}: {report['line'] or report['err'][-300:]}")
        if left := leftovers(disk):
            self.fault("leftovers", where, ", ".join(left))
        found, expected = facts(disk), self.expected[name]
        if found != expected:
            names = [path for path in found.keys() | expected if found.get(path, 0) != expected.get(path, 0)]
            self.fault("other results", where, ", ".join(sorted(names)[:5]))
        return None

    def learn(self, server: Server, name: str) -> None:
        """Run a command where nothing is wrong, to know what it leaves and how much room it takes."""
        with mounted(self.disk):
            self.prepare(name, self.disk)
            report = self.run(
                server, f"{name}, elsewhere", words_of(name, self.inputs, "out"), self.disk, folder=str(self.disk)
            )
            self.expected[name], self.printed[name] = facts(self.disk), report["out"]
            status = os.statvfs(self.disk)
            self.used[name] = status.f_blocks - status.f_bfree, status.f_files - status.f_ffree
            self.must_succeed(f"{name}, elsewhere", name, report, self.disk)
        print(
            f"{name:22} {report['seconds']:5.1f} s, {self.used[name][0]} pages, {self.used[name][1]} files",
            flush=True,
        )


# Conditions


def full_disk(checks: Checks, server: Server, name: str) -> None:
    """A disk that is full at once, or becomes full at points of the run, then gets room again."""
    if name in READS_ONLY:
        return
    pages, files = checks.used[name]
    parts = [number / checks.points for number in range(checks.points)]
    sizes = [{"size": max(1, round(part * pages)) * PAGE, "nr_inodes": 10**5} for part in parts]
    sizes += [{"size": (pages - 1) * PAGE, "nr_inodes": 10**5}]
    sizes += [{"size": ROOM, "nr_inodes": max(1, round(part * files))} for part in parts]
    for number, size in enumerate(sizes):
        where = f"{name}, full disk {size}"
        options = ",".join(f"{key}={value}" for key, value in size.items())
        with mounted(checks.disk, "size=1g"):
            checks.prepare(name, checks.disk)
            if number == 0:
                (checks.disk / "filler").write_bytes(bytes(PAGE))
            taken = os.statvfs(checks.disk)
            used = {"size": (taken.f_blocks - taken.f_bfree) * PAGE, "nr_inodes": taken.f_files - taken.f_ffree}
            options = ",".join(
                f"{key}={max(value, used[key], PAGE if key == 'size' else 1)}" for key, value in size.items()
            )
            remount(checks.disk, options)
            words = words_of(name, checks.inputs, "out")
            report = checks.run(server, where, words, checks.disk, folder=str(checks.disk))
            if report["status"] != 0 and name not in OFFLINE:
                checks.must_fail(where, report, "make room", "out")
            remount(checks.disk, f"size={ROOM},nr_inodes=100000")
            (checks.disk / "filler").unlink(missing_ok=True)
            if report["status"] != 0:
                if name == "append":
                    verified = checks.run(
                        server, where, ["seitpp", "verify", "out"], checks.disk, folder=str(checks.disk)
                    )
                    if verified["status"]:
                        checks.fault("half-written files", where, f"the store: {verified['line']}")
                where += ", then with room"
                report = checks.run(server, where, words, checks.disk, folder=str(checks.disk))
            checks.must_succeed(where, name, report, checks.disk)


def read_only(checks: Checks, server: Server, name: str) -> None:
    """Nothing can be written where the output is to be; and what is read lies where nothing can be written."""
    with mounted(checks.disk):
        checks.prepare(name, checks.disk)
        remount(checks.disk, "ro")
        if name not in READS_ONLY:
            where = f"{name}, read-only folder"
            report = checks.run(
                server, where, words_of(name, checks.inputs, "out"), checks.disk, folder=str(checks.disk)
            )
            if name not in OFFLINE:
                checks.must_fail(where, report, "folder that can be written to", "out")
    remount(checks.inputs, "ro")
    with mounted(checks.disk):
        checks.prepare(name, checks.disk)
        where = f"{name}, read-only inputs"
        report = checks.run(
            server, where, words_of(name, checks.inputs, "out"), checks.disk, folder=str(checks.disk)
        )
        checks.must_succeed(where, name, report, checks.disk)
    remount(checks.inputs, "rw")


def names(checks: Checks, server: Server, name: str) -> None:
    """Names that are too long, and names with letters that need care."""
    if name in READS_ONLY:
        return
    with mounted(checks.disk):
        where = f"{name}, 300 letters"
        checks.prepare(name, checks.disk)
        words = words_of(name, checks.inputs, "n" * 300)
        report = checks.run(server, where, words, checks.disk, folder=str(checks.disk))
        if name not in OFFLINE:
            checks.must_fail(where, report, *([] if name == "append" else ["shorter name"]), "nnn")
        shutil.rmtree(checks.disk / "out", ignore_errors=True)
        if left := sorted(os.listdir(checks.disk)):
            checks.fault("leftovers", where, ", ".join(left)[:100])
    for odd in ("n" * 250, "with space", "Gr\u00f6\u00dfe \u540d", "new\nline", "-dash", "{n}$x%s"):
        where = f"{name}, named {odd[:20]!r}"
        with mounted(checks.disk):
            checks.prepare(name, checks.disk)
            if name == "append":
                (checks.disk / "out").rename(checks.disk / odd)
            words = words_of(name, checks.inputs, odd)
            report = checks.run(server, where, words, checks.disk, folder=str(checks.disk))
            if len(odd) == 250 and report["status"] == 2:
                checks.must_fail(where, report, *([] if name in OFFLINE else ["shorter name"]))
                left = [path for path in os.listdir(checks.disk) if name != "append"]
                if left:
                    checks.fault("leftovers", where, ", ".join(left)[:100])
                continue
            for path in sorted(checks.disk.iterdir()):
                path.rename(path.with_name(path.name.replace(odd, "out")))
            checks.must_succeed(where, name, report, checks.disk)


def outputs(checks: Checks, server: Server, name: str) -> None:
    """Standard output is closed, is a pipe whose reader has ended, or is a file on a full disk."""
    for kind in ("closed", "unread", "/dev/full"):
        where = f"{name}, output {kind}"
        with mounted(checks.disk):
            checks.prepare(name, checks.disk)
            words = words_of(name, checks.inputs, "out")
            report = checks.run(server, where, words, checks.disk, folder=str(checks.disk), stdout=kind)
            if kind == "closed":
                checks.must_succeed(where, name, report, checks.disk)
            elif report["status"] == 2 and name not in OFFLINE:
                checks.must_fail(where, report, "standard output")


def elsewhere(checks: Checks, server: Server, name: str) -> None:
    """Under the environment of this server all goes as elsewhere."""
    with mounted(checks.disk):
        checks.prepare(name, checks.disk)
        for path in [checks.disk, *checks.disk.rglob("*")]:
            path.chmod(0o777)
        where = f"{name}, {server.title}"
        report = checks.run(
            server, where, words_of(name, checks.inputs, "out"), checks.disk, folder=str(checks.disk)
        )
        checks.must_succeed(where, name, report, checks.disk)


def embedded(checks: Checks, server: Server, *, refused: bool) -> None:
    """The recipes on the embedded digits and scenes, which are kept in the cache of the user."""
    for words in (
        ["seit_train", "smoke", "--out", "out"],
        ["segment_ade20k", "smoke", "--steps", "2", "--warmup-steps", "1", "--out", "out"],
        ["tokenize_images", "smoke", "--out", "out"],
        ["predict", "smoke", "--checkpoint", f"{checks.inputs}/seit", "--out", "out"],
        ["seitpp", "pull", "me/tokens"],
    ):
        with mounted(checks.disk):
            where = f"{' '.join(words[:2])} on embedded data, {server.title}"
            report = checks.run(server, where, words, checks.disk, folder=str(checks.disk))
            if refused or words[1] == "pull":
                checks.must_fail(where, report)
                if left := os.listdir(checks.disk):
                    checks.fault("leftovers", where, ", ".join(left))
            elif report["status"]:
                checks.fault("failures", where, report["err"][-300:])


def letters(checks: Checks, server: Server, name: str) -> None:
    """Pictures and a class whose names are no UTF-8, as those of old archives, and hold a newline."""
    if "IN/pictures" not in COMMANDS[name] or name == "evaluate":  # whose model knows other classes
        return
    with mounted(checks.disk):
        where = f"{name}, names that are no UTF-8"
        words = [word.replace("/pictures", "/latin") for word in words_of(name, checks.inputs, "out")]
        report = checks.run(server, where, words, checks.disk, folder=str(checks.disk))
        if report["status"] != 0:
            checks.fault("failures", where, report["line"])


CONDITIONS = {"full": full_disk, "read-only": read_only, "names": names, "output": outputs, "letters": letters}


def home_missing(checks: Checks) -> Iterator[tuple[Server, bool]]:
    yield Server("without HOME", {}, stranger=True), True
    yield Server("a HOME that is not there", {"HOME": "/nowhere/home"}, stranger=True), True


def home_read_only(checks: Checks) -> Iterator[tuple[Server, bool]]:
    with mounted(checks.root / "home", "size=64k,ro"):
        yield Server("a read-only HOME", {"HOME": checks.root / "home"}), True


def ascii_only(checks: Checks) -> Iterator[tuple[Server, bool]]:
    cache = {"HOME": checks.root, "XDG_CACHE_HOME": checks.root / "cache"}
    yield Server("LANG=C", {"LANG": "C", "LC_ALL": "C", **cache}), False
    plain = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    server = Server("LANG=C and no UTF-8", {**plain, **cache})
    for name in COMMANDS:
        with mounted(checks.disk):
            where, words = f"{name}, {server.title}", words_of(name, checks.inputs, "out")
            report = checks.run(server, where, words, checks.disk, folder=str(checks.disk))
            checks.must_fail(where, report, "set PYTHONUTF8=1")
    server.close()


# Each gives servers, and whether the embedded data have no place to be made at.
ENVIRONMENTS = {"home": home_missing, "read-only-home": home_read_only, "ascii": ascii_only}


def under(servers: Iterator[tuple[Server, bool]], checks: Checks, only: list[str]) -> None:
    """Run every command with each server."""
    for server, refused in servers:
        for name in only:
            elsewhere(checks, server, name)
        embedded(checks, server, refused=refused)
        server.close()


# What is read


def draw_pictures(folder: Path, name: str, letter: str) -> None:
    """Write noise of two classes, one with that name, as files whose names begin with that letter."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("validation", 32)):
        for number in range(count):
            path = folder / split / (name, "b")[number % 2] / f"{letter}_{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(256, size=(40, 40, 3), dtype=np.uint8)
            path.write_bytes(encoded(pixels))


def make_inputs(server: Server, inputs: Path) -> None:
    """Make small stores, pictures, scenes, and models of them.

    A class and files have umlauts, and in another set of pictures umlauts that are no UTF-8, and a newline.
    """
    draw_pictures(inputs / "pictures", "Gr\u00f6\u00dfe", "\u00e4")
    draw_pictures(inputs / "latin", os.fsdecode(b"Gr\xf6\xdfe"), os.fsdecode(b"\xe4\n"))
    shutil.copytree(default_scenes(FEW_SCENES).images.parent, inputs / "scenes")
    shutil.copy(digits().tokenizer, inputs / "tokenizer.safetensors")
    made = {
        "store": f"seitpp subset {digits().store} OUT --fraction 0.1",
        "ones": f"seitpp subset {digits().store} OUT --classes 1",
        "release": "seitpp export-release IN/store OUT",
        "seit": COMMANDS["seit_train"],
        "mtm": COMMANDS["mtm_pretrain"],
        "finetuned": COMMANDS["finetune"],
        "segmenter": COMMANDS["segment_ade20k"],
    }
    for name, command in made.items():
        words = [word.replace("IN/", f"{inputs}/").replace("OUT", str(inputs / name)) for word in command.split()]
        report = server.run(words)
        assert report["status"] == 0, f"{name}: {report['err'][-2000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=COMMANDS, metavar="NAME")
    kinds = [*CONDITIONS, *ENVIRONMENTS]
    parser.add_argument("--conditions", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--points", type=int, default=5, help="of the run at which the disk becomes full")
    options = parser.parse_args()
    started = time.perf_counter()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="systems-")))
        root.chmod(0o755)
        checks = Checks(root, options.points)
        stack.enter_context(mounted(checks.inputs))
        server = Server("elsewhere", {"HOME": root, "XDG_CACHE_HOME": root / "cache"})
        stack.callback(server.close)
        make_inputs(server, checks.inputs)
        checks.before = digests(checks.inputs)
        for name in options.only:
            checks.learn(server, name)
            for kind, condition in CONDITIONS.items():
                if kind in options.conditions:
                    condition(checks, server, name)
        for kind, environment in ENVIRONMENTS.items():
            if kind in options.conditions:
                under(environment(checks), checks, options.only)
    figures = checks.figures
    faults = {kind: figures.faults[kind] for kind in ("tracebacks", "half-written files", "inputs changed")}
    faults |= figures.faults
    minutes = (time.perf_counter() - started) / 60
    print(
        f"commands {len(options.only)}, conditions {len(options.conditions)}, runs {figures.runs} in {minutes:.0f} minutes: "
        + ", ".join(f"{kind} {count}" for kind, count in faults.items())
    )
    sys.exit(bool(figures.faults))


if __name__ == "__main__":
    main()
