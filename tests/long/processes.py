"""Check that training is the same on 1, 2 and 4 CPU processes, with DDP and FSDP, two launchers, and resumes.

    python tests/long/processes.py

About 6 minutes on 2 CPU cores; if DeepSpeed is installed, another 3, and 3 more once to build it. Two launchers on
this machine stand for two machines. Fails unless every loss of 22 steps is within 1e-6 of that of one process, the
numbers of images that the final probes classify correctly differ by at most two of 360, and a run resumed on the
same processes ends with the same bits.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = [ROOT / "recipes/mtm_pretrain.py", "smoke", "--dropout", "0"]
FILES = {
    "one": "one_gpu",
    "ddp": "eight_gpus",
    "fsdp": "fsdp",
    "deepspeed": "deepspeed",
    "machines": "two_machines",
}
ON_CPU = {name: [ROOT / f"tests/support/{name}_on_cpu.py"] for name in ("fsdp", "deepspeed")}
LAST = Path("checkpoints/step-00000022")
LAUNCHES = [("one", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("machines", 4)]
RESUMES = [
    ("ddp 2", "ddp", 2),
    ("fsdp 2", "fsdp", 2),
    ("fsdp 2", "one", 1),
    ("one 1", "fsdp", 4),
    ("fsdp 4", "ddp", 2),
]
if importlib.util.find_spec("deepspeed"):
    LAUNCHES += [("deepspeed", 2)]
    RESUMES += [("deepspeed 2", "deepspeed", 2), ("deepspeed 2", "one", 1), ("one 1", "deepspeed", 2)]


def train(kind: str, processes: int, folder: Path, *arguments: str) -> None:
    """Run the recipe with a file of recipes/accelerate on `processes` CPU processes in total, into `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--main_process_ip", "127.0.0.1", "--main_process_port", free.getsockname()[1]]
    file = ROOT / f"recipes/accelerate/{FILES[kind]}.yaml"
    launcher = ["accelerate", "launch", "--config_file", file, "--num_processes", processes, *where]
    on_cpu = {"DS_ACCELERATOR": "cpu"} if kind == "deepspeed" else {"ACCELERATE_USE_CPU": "1"}
    machines = 2 if kind == "machines" else 1
    running = []
    for rank in range(machines):
        line = [*launcher, "--machine_rank", rank, *ON_CPU.get(kind, []), *RECIPE, "--out", folder, *arguments]
        environment = {**os.environ, **on_cpu, "OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running.append(subprocess.Popen([*map(str, line)], env=environment, **quiet))
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(f"{folder.name}: the launch failed")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def probes(folder: Path) -> list[int]:
    """Return how many of the 360 validation images the linear probe and k-NN classify correctly."""
    result = json.loads((folder / "result.json").read_text())
    return [round(3.6 * result[name]) for name in ("linear_probe_top1", "knn_top1")]


def compare(folder: Path, one: Path, processes: int) -> float:
    """Print a line of the table; return the largest difference of a loss from that of one process.

    Exits if a difference is too large.
    """
    if json.loads((folder / "result.json").read_text())["processes"] != processes:
        sys.exit(f"{folder.name} was not trained on {processes} processes")
    difference = max(abs(a - b) for a, b in zip(losses(folder), losses(one), strict=True))
    print(f"| {folder.name} | {difference:.1e} | {probes(folder)} |", flush=True)
    if difference > 1e-6 or any(abs(a - b) > 2 for a, b in zip(probes(folder), probes(one), strict=True)):
        sys.exit(f"{folder.name} differs from one process: expected at most 1e-6 and probes {probes(one)} +- 2")
    return difference


def check_same_bits(folder: Path, expected: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        if (folder / LAST / name).read_bytes() != (expected / LAST / name).read_bytes():
            sys.exit(f"{folder.name}: {name} has other bits than {expected.name}")


def main() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        print("DeepSpeed is not installed and is skipped")
    print("| launch | largest difference of a loss | linear probe, k-NN of 360 |")
    print("|---|---|---|")
    differences = []
    with tempfile.TemporaryDirectory() as root:
        one = Path(root) / "one 1"
        for kind, processes in LAUNCHES:
            folder = Path(root) / f"{kind} {processes}"
            train(kind, processes, folder)
            differences.append(compare(folder, one, processes))
        for source, kind, processes in RESUMES:
            folder = shutil.copytree(Path(root) / source, Path(root) / f"{source}, resumed as {kind} {processes}")
            shutil.rmtree(folder / LAST)
            train(kind, processes, folder, "--resume")
            differences.append(compare(folder, one, processes))
            if source == f"{kind} {processes}":
                check_same_bits(folder, Path(root) / source)
    print(f"largest difference of a loss between {len(differences)} launches and resumes: {max(differences):.1e}")


if __name__ == "__main__":
    main()
