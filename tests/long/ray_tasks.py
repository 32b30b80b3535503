"""Check that tasks of Ray write the bytes of one process, skip what has ended, and repeat what failed.

    pip install "seitpp[test]" ray
    PYTHONPATH=tests python tests/long/ray_tasks.py

Ray runs 4 tasks on this machine, of which one meets a picture that is cut. Fails unless the 3 others are complete
and, after the picture is repaired, the same two executors run that task alone, and the end, and the store has the
bytes that one process writes. Takes 2 minutes on 2 CPU cores.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
from datatrove.executor import RayPipelineExecutor
from support.large_grids import IN_A_SHARD, contents, make_pictures, tokenize_line
from support.paths import RECIPES

from seitpp.distributed import FinishStore, TokenizeImages

RECIPE, TASKS = RECIPES / "tokenize_images.py", 4
PICTURES = 2 * IN_A_SHARD + 1  # in three staged shards, so that the last task has none


def executors(line: list[str], out: Path) -> tuple[RayPipelineExecutor, RayPipelineExecutor]:
    """The tasks, and what runs when all have ended."""
    where = {"cpus_per_task": 1, "mem_per_cpu_gb": 1}
    step, logs = TokenizeImages(line, recipe=RECIPE), str(out.parent / "logs")
    tasks = RayPipelineExecutor([step], tasks=TASKS, logging_dir=logs, **where)
    end = RayPipelineExecutor([FinishStore(out)], depends=tasks, logging_dir=f"{logs}-finish", **where)
    return tasks, end


def complete(tasks: RayPipelineExecutor) -> list[int]:
    return sorted(set(range(TASKS)) - set(tasks.get_incomplete_ranks()))


def main() -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        make_pictures(root, PICTURES)
        os.chdir(root)
        whole, out = root / "whole/tokens", root / "tasks/tokens"
        subprocess.run([sys.executable, RECIPE, *tokenize_line(root, whole)], check=True)
        cut, kept = root / f"images/{PICTURES - 1}.png", root / "kept.png"
        shutil.copy(cut, kept)
        cut.write_bytes(kept.read_bytes()[:60])
        ray.init(num_cpus=2, include_dashboard=False)
        tasks, _ = executors(tokenize_line(root, out), out)
        tasks.run()
        log = (out.parent / "logs/logs/task_00002.log").read_text()
        assert complete(tasks) == [0, 1, 3] and f"{cut.name}" in log and not out.exists(), log
        shutil.copy(kept, cut)
        tasks, end = executors(tokenize_line(root, out), out)
        end.run()
        assert complete(tasks) == list(range(TASKS)) and contents(out) == contents(whole)
        ray.shutdown()
    seconds = time.perf_counter() - started
    print(f"Ray {ray.__version__}: {TASKS} tasks, one failed and repeated, bytes of one process; {seconds:.0f} s")


if __name__ == "__main__":
    main()
