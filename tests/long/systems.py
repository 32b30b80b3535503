"""Check what every command does where the system refuses: full disk, read-only folder, no HOME, odd names, LANG=C.

    PYTHONPATH=tests python tests/long/systems.py [--only NAME ..] [--conditions NAME ..] [--points 3]

Needs Linux and root, since it mounts small file systems. Every command of docs/cli.md and every recipe, its preset
smoke, runs under each of `CONDITIONS` and `ENVIRONMENTS`. It must do what it does elsewhere, or end with exit
status 2 and one line "error: .." that names the file and what to do. There must be no traceback, no file or folder
with half of its content, no change of what was read, and nothing left that hinders or outlives a second start:
once there is room, the same command succeeds and leaves the same files.

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
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from safetensors import safe_open
from support.paths import RECIPES, ROOT, SUPPORT

from downstream.segmentation.default import FEW_SCENES, default_scenes
from seitpp.data.digits import digits

TESTS, FORKS = ROOT / "tests", SUPPORT / "forked_recipes.py"
PAGE, MANY = 4096, 1 << 22  # bytes; pages or files that are more than enough
LIMIT = 300  # seconds of a run
FAULTS = ("tracebacks", "half-written files", "inputs changed")  # those that the last line always names
# A user without an entry in the list of users, as in many containers, who reads what root reads, as Python is.
AS_STRANGER = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
AS_STRANGER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
# What differs between two equal runs.
TIMES = ("seconds", "images_per_second", "git_commit")

TRAIN = "--epochs 1 --warmup-epochs 0 --resume --out OUT"
PICTURES = "--data IN/pictures --split train --validation-split validation --batch-size 16"
SCENES = "--data IN/scenes/images --tokenizer IN/scenes/tokenizer.safetensors"
APPLY = "--overwrite --out OUT"
# The commands: IN is the folder of what is read, OUT is what is written.
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
    "seit_train": f"seit_train smoke --store IN/store {TRAIN}",
    "mtm_pretrain": f"mtm_pretrain smoke --store IN/store --tokenizer IN/tokenizer.safetensors {TRAIN}",
    "finetune": f"finetune smoke --data IN/pictures --batch-size 16 --size 32 --checkpoint IN/mtm {TRAIN}",
    "tokenadapt_train": f"tokenadapt_train smoke {PICTURES} --tokenizer IN/tokenizer.safetensors {TRAIN}",
    "tokenizer_train": f"tokenizer_train smoke {PICTURES} {TRAIN}",
    "segment_ade20k": f"segment_ade20k smoke {SCENES} --short-side 64 --steps 2 --warmup-steps 1 --resume"
    " --out OUT",
    "continual": "continual smoke --input pixels --data IN/pictures --tasks 2 --batch-size 4 --fraction 1 --resume"
    " --out OUT",
    "tokenize_images": "tokenize_images smoke --data IN/pictures/train --keep-source --out OUT",
    "evaluate": f"evaluate smoke --data IN/pictures --checkpoint IN/finetuned {APPLY}",
    "robustness": f"robustness smoke --data IN/pictures --checkpoint IN/finetuned {APPLY}",
    "predict": f"predict smoke --data IN/pictures/train --checkpoint IN/finetuned {APPLY}",
    "predict-maps": "predict smoke --data IN/scenes/images/images/validation --checkpoint IN/segmenter"
    f" --tokenizer IN/scenes/tokenizer.safetensors {APPLY}",
    "embed": "embed smoke --data IN/pictures/train --tokenizer IN/tokenizer.safetensors --checkpoint IN/mtm"
    f" {APPLY}",
    "probe": f"probe smoke --store IN/store --checkpoint IN/mtm {APPLY}",
    "inpaint": f"inpaint smoke --store IN/store --checkpoint IN/mtm {APPLY}",
    "storage_tradeoff": "storage_tradeoff smoke --data IN/pictures --batch-size 8 --seeds 1 --budgets 1kB"
    " --uniform --by-score --resolution --jpeg-quality 1 --token-fractions --crops 2 --resume --out OUT",
    "evaluate_segmentation": f"evaluate_segmentation smoke {SCENES} --checkpoint IN/segmenter {APPLY}",
}
READS_ONLY = ("info", "verify", "push")  # of those nothing is written
OFFLINE = ("push", "pull")  # they end in one line wherever they are, without a network
# On the embedded digits and scenes, which are made in the cache of the user.
EMBEDDED = {
    "seit_train": "seit_train smoke --epochs 1 --warmup-epochs 0 --out OUT",
    "segment_ade20k": "segment_ade20k smoke --steps 2 --warmup-steps 1 --out OUT",
    "tokenize_images": "tokenize_images smoke --out OUT",
    "pull": "seitpp pull me/tokens",
}


class Server:
    """A process that runs one command after the other in forks of itself, under an environment of its own."""

    def __init__(self, title: str, environment: dict[str, object], *, stranger: bool = False):
        fixed = {"HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": 1}
        paths = os.pathsep.join(map(str, (ROOT, TESTS, RECIPES)))
        every = {"PATH": os.environ["PATH"], "PYTHONPATH": paths, **fixed, **environment}
        self.title = title
        self.process = subprocess.Popen(
            [*(AS_STRANGER if stranger else ()), sys.executable, "-B", FORKS],
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


def words_of(command: str, inputs: Path, out: str) -> list[str]:
    """The words of a command line; `out` may begin with a dash."""
    parts = command.replace("--out OUT", "--out=OUT").replace(" OUT", " ./OUT").split()
    return [part.replace("IN/", f"{inputs}/").replace("OUT", out) for part in parts]


# Disks, and what is on them


@contextmanager
def mounted(path: Path, options: str = f"nr_blocks={MANY},nr_inodes={MANY}") -> Iterator[Path]:
    """Mount a small file system at a path for the time of the block."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=777,{options}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@contextmanager
def remounted(path: Path, options: str, after: str) -> Iterator[None]:
    """Give a file system other options for the time of the block."""
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", f"remount,{after}", path], check=True)


def taken(path: Path) -> tuple[int, int]:
    """The pages and the files that are taken on a disk."""
    status = os.statvfs(path)
    return status.f_blocks - status.f_bfree, status.f_files - status.f_ffree


def digests(root: Path) -> dict[str, str]:
    """The SHA-256 of every file under a folder, by its relative path."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def facts(disk: Path) -> dict[str, object]:
    """What a command has left on a disk, to be compared with that of another run: content, without times."""
    found: dict[str, object] = {}
    for path in sorted(disk.rglob("*")):
        name = str(path.relative_to(disk))
        if path.name == "result.json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in TIMES}
        elif path.suffix in (".safetensors", ".arrow", ".csv", ".parquet", ".gz") or path.name == "tokens.json":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = None
    return found


def read_tensors(path: Path) -> None:
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)


def ends_with(end: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        if not path.read_text().endswith(end):
            raise ValueError("it has no end")

    return read


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".png": lambda path: Image.open(path).load(),
    ".parquet": pq.read_table,
    ".safetensors": read_tensors,
    ".html": ends_with("</html>\n"),
    ".csv": ends_with("\n"),
    ".txt": ends_with("\n"),
}


def half_written(disk: Path) -> list[str]:
    """The files under their final names that cannot be read to their end; names with a dot are not final."""
    broken = []
    for path in sorted(disk.rglob("*")):
        final = not any(part.startswith(".") for part in path.relative_to(disk).parts)
        if final and path.is_file() and path.suffix in READERS:
            try:
                READERS[path.suffix](path)
            except Exception as error:
                broken.append(f"{path.relative_to(disk)} ({type(error).__name__})")
    return broken


def leftovers(disk: Path) -> list[str]:
    """Temporary files and folders, but the lock of a run, which stays in its folder."""
    paths = (path for path in disk.rglob(".*") if path.name != ".lock")
    return sorted(str(path.relative_to(disk)) for path in paths)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Checks:
    """What is read, what each command makes of it elsewhere, and the faults so far."""

    def __init__(self, root: Path, points: int):
        self.root, self.points, self.runs, self.faults = root, points, 0, Counter()
        self.inputs, self.disk = root / "inputs", root / "disk"
        self.before: dict[str, str] = {}
        self.expected: dict[str, dict] = {}
        self.used: dict[str, tuple[int, int]] = {}

    def fault(self, kind: str, where: str, text: object) -> None:
        self.faults[kind] += 1
        print(f"{kind}: {where}: {str(text)[:300]}", flush=True)

    @contextmanager
    def new_disk(self, name: str, out: str = "out") -> Iterator[None]:
        """A new disk for the time of the block, with the store that the command changes."""
        with mounted(self.disk):
            if name == "append":
                shutil.copytree(self.inputs / "store", self.disk / out)
            yield

    def run(self, server: Server, where: str, words: list[str], **more: object) -> dict:
        """Run a command in the folder of the disk, and check all that must hold however it ended."""
        report = server.run(words, folder=str(self.disk), **more)
        self.runs += 1
        told = report["err"].splitlines()
        errors = [line for line in told if line.startswith("error")]
        if "Traceback" in report["err"] or "Exception ignored" in report["err"]:
            self.fault("tracebacks", where, " | ".join(told[-3:]))
        elif report["statuses"][0] not in (0, 2, 141):
            self.fault("exit statuses", where, f"{report['statuses'][0]}: {report['err'][-300:]}")
        elif report["statuses"][0] == 2 and (len(errors) != 1 or told[-1:] != errors):
            self.fault("lines", where, report["err"][-500:])
        if broken := half_written(self.disk):
            self.fault("half-written files", where, broken)
        if (now := digests(self.inputs)) != self.before:
            self.fault("inputs changed", where, sorted(dict(now.items() ^ self.before.items())))
            self.before = now
        return report | {"line": errors[-1] if errors else ""}

    def must_fail(self, where: str, report: dict, *words: str) -> None:
        """Check that a command was refused, in a line with these words."""
        missing = [word for word in words if word not in report["line"]]
        if report["statuses"][0] != 2 or missing:
            told = report["line"] or report["err"][-300:]
            self.fault("wrong refusals", where, f"{report['statuses'][0]}, without {missing}: {told}")

    def must_succeed(self, where: str, name: str, report: dict) -> None:
        """Check that a command did what it does elsewhere."""
        if name in OFFLINE:
            self.must_fail(where, report, "me/tokens on the hub")
        elif report["statuses"][0] != 0:
            self.fault("failures", where, f"{report['statuses'][0]}: {report['line'] or report['err'][-300:]}")
        else:
            if left := leftovers(self.disk):
                self.fault("leftovers", where, left)
            found, expected = facts(self.disk), self.expected[name]
            if found != expected:
                paths = found.keys() | expected
                other = [path for path in paths if found.get(path, "none") != expected.get(path, "none")]
                self.fault("other results", where, sorted(other)[:5])

    def learn(self, server: Server, name: str) -> None:
        """Run a command where nothing is wrong, to know what it leaves and how much room it takes."""
        with self.new_disk(name):
            where = f"{name}, elsewhere"
            report = self.run(server, where, words_of(COMMANDS[name], self.inputs, "out"))
            self.expected[name], self.used[name] = facts(self.disk), taken(self.disk)
            self.must_succeed(where, name, report)
        pages, files = self.used[name]
        print(f"{name:22} {report['seconds']:5.1f} s, {pages} pages, {files} files", flush=True)


# Conditions


def full_disk(checks: Checks, server: Server, name: str) -> None:
    """A disk that is full of bytes or of files, at once or at points of the run; then it gets room."""
    if name in READS_ONLY:
        return
    words, (pages, files) = words_of(COMMANDS[name], checks.inputs, "out"), checks.used[name]
    parts = [number / checks.points for number in range(checks.points)]
    sizes = [(round(part * pages), MANY) for part in parts] + [(pages - 1, MANY)]
    sizes += [(MANY, round(part * files)) for part in parts]
    for most_pages, most_files in sizes:
        where = f"{name}, disk of {most_pages} of {pages} pages and {most_files} of {files} files"
        with checks.new_disk(name):
            filler = checks.disk / "filler"
            filler.write_bytes(bytes(PAGE))
            now_pages, now_files = taken(checks.disk)
            limits = f"nr_blocks={max(most_pages, now_pages)},nr_inodes={max(most_files, now_files)}"
            with remounted(checks.disk, limits, f"nr_blocks={MANY},nr_inodes={MANY}"):
                report = checks.run(server, where, words)
            filler.unlink()
            if report["statuses"][0] and name not in OFFLINE:
                checks.must_fail(where, report, "make room", "out")
                if name == "append":
                    verified = checks.run(server, where, ["seitpp", "verify", "out"])
                    if verified["statuses"][0]:
                        checks.fault("half-written files", where, verified["line"])
                where += ", then with room"
                report = checks.run(server, where, words)
            checks.must_succeed(where, name, report)


def read_only(checks: Checks, server: Server, name: str) -> None:
    """The output is to be where nothing can be written; and what is read lies where nothing can be written."""
    words = words_of(COMMANDS[name], checks.inputs, "out")
    if name not in READS_ONLY:
        with checks.new_disk(name), remounted(checks.disk, "ro", "rw"):
            report = checks.run(server, f"{name}, read-only folder", words)
            if name not in OFFLINE:
                checks.must_fail(f"{name}, read-only folder", report, "folder that can be written to", "out")
    with checks.new_disk(name), remounted(checks.inputs, "ro", "rw"):
        where = f"{name}, read-only inputs"
        checks.must_succeed(where, name, checks.run(server, where, words))


def names(checks: Checks, server: Server, name: str) -> None:
    """Names that are too long, alone or with what a temporary file adds, and one of letters that need care."""
    if name in READS_ONLY:
        return
    for odd in ("n" * 300, "n" * 250, "-dash and space\nGr\u00f6\u00dfe \u540d {n}$x%s"):
        where = f"{name}, named {len(odd)} letters"
        with checks.new_disk(name, odd if len(odd) < 255 else "out"):
            there = names_in(checks.disk)
            report = checks.run(server, where, words_of(COMMANDS[name], checks.inputs, odd))
            if name in OFFLINE:  # the name or the network comes first
                checks.must_fail(where, report)
                continue
            if len(odd) == 300 or (len(odd) == 250 and report["statuses"][0]):
                checks.must_fail(where, report, "nnn", *(() if name == "append" else ("shorter name",)))
                if (left := names_in(checks.disk)) != there:
                    checks.fault("leftovers", where, left)
                continue
            for path in sorted(checks.disk.iterdir()):
                path.rename(path.with_name(path.name.replace(odd, "out")))
            checks.must_succeed(where, name, report)


def outputs(checks: Checks, server: Server, name: str) -> None:
    """Standard output is closed, is a pipe that nobody reads any more, or is a file on a full disk."""
    words = words_of(COMMANDS[name], checks.inputs, "out")
    for kind in ("closed", "unread", "/dev/full"):
        where = f"{name}, output {kind}"
        with checks.new_disk(name):
            report = checks.run(server, where, words, stdout=kind)
            if kind == "closed" or name in OFFLINE:
                checks.must_succeed(where, name, report)
            elif report["statuses"][0] != 141:
                checks.must_fail(where, report, "standard output: ")


def letters(checks: Checks, server: Server, name: str) -> None:
    """Pictures and a class whose names are no UTF-8, as those of old archives, and hold a newline."""
    if "IN/pictures" in COMMANDS[name] and name not in ("evaluate", "robustness"):  # of other classes
        with checks.new_disk(name):
            words = words_of(COMMANDS[name].replace("/pictures", "/latin"), checks.inputs, "out")
            report = checks.run(server, f"{name}, names that are no UTF-8", words)
            if report["statuses"][0] != 0:
                checks.fault("failures", f"{name}, names that are no UTF-8", report["line"])


CONDITIONS = {"full": full_disk, "read-only": read_only, "names": names, "output": outputs, "letters": letters}


# Environments


def without_home(checks: Checks, only: list[str]) -> None:
    """HOME is not set, or a folder that is not there, or one that is read-only; inputs are named, or embedded."""
    read_only_home = mounted(checks.root / "home", f"size={PAGE},ro")
    fonts = checks.root / "fonts"  # else every fork removes the folder that matplotlib has made for all of them
    fonts.mkdir()
    fonts.chmod(0o777)
    for title, home, folder in (
        ("no HOME", {}, nullcontext()),
        ("a HOME that is not there", {"HOME": "/nowhere/home"}, nullcontext()),
        ("a read-only HOME", {"HOME": checks.root / "home"}, read_only_home),
    ):
        with folder:
            server = Server(title, {**home, "MPLCONFIGDIR": fonts}, stranger=True)
            under(server, checks, only)
            for name, command in EMBEDDED.items():
                where = f"{name} on embedded data, {title}"
                with checks.new_disk("embedded"):
                    checks.must_fail(where, checks.run(server, where, words_of(command, checks.inputs, "out")))
                    if left := names_in(checks.disk):
                        checks.fault("leftovers", where, left)
            server.close()


def ascii_only(checks: Checks, only: list[str]) -> None:
    """The locale is C, where Python takes UTF-8 nevertheless, or is told not to and is refused."""
    locale = {"LANG": "C", "LC_ALL": "C", "HOME": checks.root, "XDG_CACHE_HOME": checks.root / "cache"}
    server = Server("LANG=C", locale)
    under(server, checks, only)
    server.close()
    server = Server("LANG=C without UTF-8", {**locale, "PYTHONUTF8": 0, "PYTHONCOERCECLOCALE": 0})
    for name in only:
        where = f"{name}, {server.title}"
        with checks.new_disk(name):
            report = checks.run(server, where, words_of(COMMANDS[name], checks.inputs, "out"))
            checks.must_fail(where, report, "set PYTHONUTF8=1")
    server.close()


def under(server: Server, checks: Checks, only: list[str]) -> None:
    """Run every command with a server, which must succeed; its user may be another one."""
    for name in only:
        where = f"{name}, {server.title}"
        with checks.new_disk(name):
            for path in checks.disk.rglob("*"):
                path.chmod(0o777)
            checks.must_succeed(
                where, name, checks.run(server, where, words_of(COMMANDS[name], checks.inputs, "out"))
            )


ENVIRONMENTS = {"home": without_home, "ascii": ascii_only}


# What is read


def draw_pictures(folder: Path, name: str, letter: str) -> None:
    """Write noise of two classes, one with that name, as files whose names begin with that letter."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("validation", 32)):
        for number in range(count):
            path = folder / split / (name, "b")[number % 2] / f"{letter}_{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(path)


def make_inputs(server: Server, inputs: Path) -> None:
    """Make small stores, pictures, scenes, and models of them.

    A class and files have umlauts, and in another set of pictures umlauts that are no UTF-8, and a newline.
    """
    draw_pictures(inputs / "pictures", "Gr\u00f6\u00dfe", "\u00e4")
    draw_pictures(inputs / "latin", os.fsdecode(b"Gr\xf6\xdfe"), os.fsdecode(b"\xe4\n"))
    shutil.copytree(default_scenes(FEW_SCENES).images.parent, inputs / "scenes")
    shutil.copy(digits().tokenizer, inputs / "tokenizer.safetensors")
    for name, command in {
        "store": f"seitpp subset {digits().store} OUT --fraction 0.1",
        "ones": f"seitpp subset {digits().store} OUT --classes 1",
        "release": "seitpp export-release IN/store OUT",
        "seit": COMMANDS["seit_train"],
        "mtm": COMMANDS["mtm_pretrain"],
        "finetuned": COMMANDS["finetune"],
        "segmenter": COMMANDS["segment_ade20k"],
    }.items():
        report = server.run(words_of(command, inputs, name), folder=str(inputs))
        if report["statuses"][0]:
            raise SystemExit(f"{name}: {report['err']}")


def main() -> None:
    kinds = [*CONDITIONS, *ENVIRONMENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=COMMANDS, metavar="NAME")
    parser.add_argument("--conditions", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--points", type=int, default=3, help="of a run at which the disk becomes full")
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
                environment(checks, options.only)
    faults = {kind: checks.faults[kind] for kind in FAULTS} | checks.faults
    figures = ", ".join(f"{kind} {count}" for kind, count in faults.items())
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes")
    print(f"commands {len(options.only)}, conditions {len(options.conditions)}, runs {checks.runs}: {figures}")
    sys.exit(bool(checks.faults))


if __name__ == "__main__":
    main()
