"""Check that training recipes killed at random moments and restarted with the same command give the same bits.

    python tests/long/kills.py [--kills 200] [--processes 1] [--recipes mtm_pretrain ...]

Each trial runs the smoke preset of a recipe and kills it eight times (SIGKILL, its processes in random order),
each time after a random fraction of the time that an undisturbed run takes, restarts it after each kill, and then
lets it finish. Weights, moving average, optimizer, every logged figure and every evaluation must be those of the
undisturbed run, bit for bit. Processes are forked, so that a start needs no imports.
"""

import argparse
import json
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

SCRIPTS = Path(__file__).parents[2] / "recipes"
RECIPES = ("mtm_pretrain", "seit_train", "finetune", "tokenadapt_train", "tokenizer_train", "continual")
KILLS_A_TRIAL = 8
TIMES = {"images_per_second", "data_wait", "mfu", "memory_gib"}


def launch(function: Callable[[], None], processes: int, log: Path) -> list[int]:
    """Fork children that run `function` as the processes of one launch; return their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            try:
                sys.stdout = sys.stderr = log.open("a", buffering=1)
                if processes > 1:
                    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
                    os.environ |= {name: str(value) for name, value in launched.items()}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "1"}
                function()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        children.append(child)
    return children


def finish(children: list[int], log: Path) -> None:
    """Wait for the children; exit with their log if one failed."""
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit(f"a run failed without being killed:\n{log.read_text()[-3000:]}")


def kill(children: list[int], seconds: float) -> int:
    """Kill the children in random order after `seconds`; return 1 if at least one was still running, else 0."""
    time.sleep(seconds)
    random.shuffle(children)
    for child in children:
        os.kill(child, signal.SIGKILL)
    return int(any(os.waitpid(child, 0)[1] == signal.SIGKILL for child in children))


def learned(run: Path) -> dict:
    """Return everything of a run that must be the same: logged figures, weights, optimizer, evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = run / "checkpoints" / (run / "checkpoints/LATEST").read_text()
    files = [*last.glob("*.safetensors"), *run.glob("model*.safetensors"), run / "evaluations.jsonl"]
    return {
        "metrics": [{name: value for name, value in line.items() if name not in TIMES} for line in lines],
        **{path.name if path.parent == run else f"last/{path.name}": path.read_bytes() for path in files},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    scripts = {name: runpy.run_path(str(SCRIPTS / f"{name}.py")) for name in {*options.recipes, "mtm_pretrain"}}
    modules = {name: SimpleNamespace(**script) for name, script in scripts.items()}
    with tempfile.TemporaryDirectory() as folder:
        root, log = Path(folder), Path(folder) / "log"

        def begin(name: str, out: Path, **settings: object) -> list[int]:
            config = replace(modules[name].PRESETS["smoke"], out=str(out), resume=True, **settings)
            return launch(lambda: modules[name].main(config), options.processes, log)

        finish(begin("mtm_pretrain", root / "pretrained"), log)
        more = {"finetune": {"checkpoint": str(root / "pretrained")}}
        expected, seconds = {}, {}
        for name in options.recipes:
            started = time.perf_counter()
            finish(begin(name, root / name, **more.get(name, {})), log)
            expected[name], seconds[name] = learned(root / name), time.perf_counter() - started
        kills = trials = 0
        while kills < options.kills:
            name = options.recipes[trials % len(options.recipes)]
            out = root / f"{name}-{trials}"
            for _ in range(KILLS_A_TRIAL):
                kills += kill(begin(name, out, **more.get(name, {})), random.uniform(0, seconds[name]))
            finish(begin(name, out, **more.get(name, {})), log)
            result = learned(out)
            different = [key for key in expected[name] if result.get(key) != expected[name][key]]
            if different:
                raise SystemExit(f"{name}, trial {trials}: differs in {', '.join(different)}")
            trials += 1
            print(f"{kills} kills, {trials} trials", end="\r", flush=True)
    runs = f"{trials} runs of {', '.join(options.recipes)}"
    print(f"{kills} kills of {options.processes} process(es) in {runs}: 0 bits differ")


if __name__ == "__main__":
    main()
