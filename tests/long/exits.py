"""Check that every command ends soon, with one line, after a signal at any moment and after an error.

    PYTHONPATH=tests python tests/long/exits.py [--only NAME ..] [--moments 6]

Each command of systems.py runs to its end once. Then it gets SIGINT and SIGTERM (recipes that train also as two
processes) after fractions of the time that it took; reads a store with a flipped byte, or a picture that is cut,
with two data loading processes; and gets a number out of its range. A run that has not ended after LIMIT seconds
is a hang, one that ends more than SOON seconds after a signal is late. A signal must end it with 128 + its number
or, where nothing is to be saved, by that signal itself; at its very end it may also succeed. An error must end it
with exit status 2, on all processes. Neither prints a traceback.

Each command and each fault is printed. The last line adds them up, and the exit status is not 0 after any.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from long.systems import COMMANDS, OFFLINE, READS_ONLY, Server, make_inputs, words_of
from support.running import TRAINING_RECIPES

LIMIT = 60  # seconds from the signal to the end, or of a run that must fail; then it hangs
SOON = 10  # seconds from a signal after which an end is late
SIGNALS = {number: (128 + number, -number, 0) for number in (signal.SIGINT, signal.SIGTERM)}
OUT_OF_RANGE = {"tokenize_images": "--batch-size-per-process"}  # of the others: --seed


class Watch:
    """Runs commands, and counts what is wrong with how they end."""

    def __init__(self, server: Server, root: Path):
        self.server, self.root, self.runs, self.longest, self.faults = server, root, 0, 0.0, Counter()

    def run(self, words: list[str], **more: object) -> dict:
        """Run a command in a new folder and return the report of tests/support/forked_recipes.py."""
        folder = self.root / "work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copytree(self.root / "inputs/ones", folder / "out") if words[:2] == ["seitpp", "append"] else None
        self.runs += 1
        return self.server.run(words, folder=str(folder), **{"limit": LIMIT, **more})

    def check(self, where: str, report: dict, statuses: tuple[int, ...]) -> None:
        """Count a hang, a traceback or another status than one of `statuses`, and print it."""
        kind = None
        if None in report["statuses"]:
            kind = "hangs"
        elif "Traceback" in report["err"]:
            kind = "tracebacks"
        elif not {*report["statuses"]} <= {*statuses}:
            kind = "other exit statuses"
        if kind:
            self.fault(kind, where, report)

    def fault(self, kind: str, where: str, report: dict) -> None:
        """Count a fault and print it."""
        self.faults[kind] += 1
        took = f"{report['seconds']:.1f} s, {report['statuses']}"
        print(f"{kind}: {where}: {took} {report['err'][-2000:]}", flush=True)


def signals(watch: Watch, name: str, words: list[str], *, moments: int) -> None:
    """Send each signal after fractions of the time that a run of one process takes."""
    whole = watch.run(words, limit=10 * LIMIT)
    watch.check(name, whole, (0,))
    for processes in (1, 2) if name in TRAINING_RECIPES else (1,):
        for number, statuses in SIGNALS.items():
            for moment in range(moments):
                after = whole["seconds"] * processes * (moment + 0.5) / moments
                report = watch.run(words, signal=number, after=after, processes=processes)
                where = f"{name}, {processes} processes, {signal.Signals(number).name} after {after:.1f} s"
                watch.check(where, report, statuses)
                if report["signalled"]:
                    watch.longest = max(watch.longest, report["seconds"])
                    if report["seconds"] > SOON:
                        watch.fault("late ends", where, report)


def errors(watch: Watch, name: str, inputs: Path, broken: Path) -> None:
    """Read what is broken, and get a number that is out of range."""
    words = words_of(COMMANDS[name], broken, "out")
    if words[0] != "seitpp" and any(
        str(broken / kind) in word for word in words for kind in ("pictures", "scenes")
    ):
        watch.check(f"{name}, a picture that is cut", watch.run([*words, "--workers", "2"]), (2,))
    elif any(word == str(broken / "store") for word in words):
        watch.check(f"{name}, a flipped byte", watch.run(words), (2,))
    if words[0] != "seitpp":
        number = [*words_of(COMMANDS[name], inputs, "out"), OUT_OF_RANGE.get(name, "--seed"), "-1"]
        watch.check(f"{name}, a number out of range", watch.run(number), (2,))


def break_inputs(inputs: Path, broken: Path) -> None:
    """Copy the inputs, cut pictures of each split, and flip a byte of each shard."""
    shutil.copytree(inputs, broken)
    for folder in (*broken.glob("pictures/*/b"), *broken.glob("scenes/images/images/*")):
        first = min(folder.iterdir())
        first.write_bytes(first.read_bytes()[:500])
    for shard in broken.glob("store/*/*.arrow"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)


def main() -> None:
    names = [name for name in COMMANDS if name not in (*READS_ONLY, *OFFLINE)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--moments", type=int, default=6, help="of a run at which it gets a signal")
    options = parser.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="exits-")))
        inputs, broken = root / "inputs", root / "broken"
        inputs.mkdir()
        server = Server("exits", {"HOME": root, "XDG_CACHE_HOME": root / "cache"})
        stack.callback(server.close)
        make_inputs(server, inputs)
        break_inputs(inputs, broken)
        watch = Watch(server, root)
        for name in options.only:
            errors(watch, name, inputs, broken)
            signals(watch, name, words_of(COMMANDS[name], inputs, "out"), moments=options.moments)
            print(f"{name:22} {watch.runs} runs so far, at most {watch.longest:.1f} s after a signal", flush=True)
    kinds = ("hangs", "late ends", "tracebacks", "other exit statuses")
    figures = ", ".join(f"{kind} {watch.faults[kind]}" for kind in kinds)
    print(f"runs {watch.runs}: {figures}; at most {watch.longest:.1f} s from a signal to the end")
    sys.exit(bool(watch.faults))


if __name__ == "__main__":
    main()
