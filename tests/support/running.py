"""Recipes as a user runs them, in a process of their own or in this one, and what they leave in their folders."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import ModuleType

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from support.forks import ended, run_forks, start
from support.models import tiny_mtm
from support.paths import RECIPES, ROOT, SUPPORT

from seitpp import StoreWriter, TokenStore
from seitpp.codebook import codebook_fingerprint
from seitpp.data.digits import digits
from seitpp.engine.config import parse
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.recipe import run_recipe

TRAINING_RECIPES = (
    "mtm_pretrain",
    "seit_train",
    "finetune",
    "tokenadapt_train",
    "tokenizer_train",
    "segment_ade20k",
    "continual",
)

LAUNCHES = RECIPES / "accelerate"
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of programs that import from this folder
CPU = {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
ON_CPU = {**os.environ, **CPU, "PYTHONPATH": PATHS}


def recipe(name: str) -> ModuleType:
    return importlib.import_module(name)


def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """The command line of a recipe, in a fork of this process."""
    return run_forks(RECIPES / f"{name}.py", *arguments)


def forked(*jobs: tuple, limit: float = 60, options: Sequence[dict] = ()) -> list[dict]:
    """The reports of jobs (recipe, argument, ..), one after the other; see tests/support/forked_recipes.py.

    `options` has more for each job: `processes`, or `signal` and `after`.
    """
    lines = [
        {"recipe": name, "arguments": list(map(str, words)), "limit": limit, **more}
        for (name, *words), more in zip_longest(jobs, options, fillvalue={})
    ]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "forked_recipes.py")],
        input="\n".join(map(json.dumps, lines)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([PATHS, str(RECIPES)])},
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == len(jobs), done.stderr[-3000:]
    return reports


def places(ranks: int) -> list[dict[str, str]]:
    """The environments of the CPU processes of a launch, one for each rank, as torchrun makes them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), **CPU}
    shared["LOCAL_WORLD_SIZE"] = str(ranks)
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def distributed(ranks: int, script: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Several CPU processes, forks of this one, in the environments that torchrun gives its processes."""
    return run_forks(script, *arguments, environments=places(ranks))


def torchrun(ranks: int, script: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Several CPU processes, as docs/running.md says."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    line = [*launcher, f"--master_port={places(ranks)[0]['MASTER_PORT']}", str(script), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=ON_CPU)


def fsdp(*arguments: object, layer: str = "Block") -> subprocess.CompletedProcess:
    """Run a script as recipes/accelerate/fsdp.yaml says, but on 2 CPU processes, forks of this one.

    They have the environment that `accelerate launch` gives its processes; `layer` names what is split.
    """
    line = ["--config_file", LAUNCHES / "fsdp.yaml", "--num_processes", 2, SUPPORT / "fsdp_on_cpu.py"]
    given = launch_command_parser().parse_args(["--fsdp_transformer_layer_cls_to_wrap", layer, *map(str, line)])
    environment = prepare_multi_gpu_env(_validate_launch_command(given)[0])
    both = [{**environment, **place} for place in places(2)]
    return run_forks(SUPPORT / "fsdp_on_cpu.py", *arguments, environments=both)


def call(module: ModuleType, *arguments: object) -> None:
    """What the command line does, in this process."""
    module.main(parse(module.PRESETS, "digits", [str(argument) for argument in arguments]))


def refused(capfd, monkeypatch, module: ModuleType, arguments: list, *words: object) -> None:
    """Exit status 2 and one line on stderr that holds the words."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_recipe(module.main, module.PRESETS, "digits")
    lines = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert str(word) in lines[0], lines[0]


def smoke_config(name: str, folder: Path):
    """The smoke preset of a recipe, to run in FOLDER/run."""
    config = replace(recipe(name).PRESETS["smoke"], out=str(folder / "run"))
    if name == "finetune":
        save_pretrained(folder / "model.safetensors", tiny_mtm(), digits_codebook())
        config = replace(config, checkpoint=str(folder / "model.safetensors"))
    return config


def unlabeled_digits(path: Path, images: int) -> str:
    """A store of digits without labels, on which a run spends no time on probes."""
    store = TokenStore(digits().store, "train")
    with StoreWriter(path, codebook=store.codebook, grid=store.grid) as writer:
        writer.add_batch(store.ids(range(images)), [None] * images)
    return str(path)


def digits_codebook() -> str:
    """The fingerprint of the codebook of the embedded digits."""
    return codebook_fingerprint(TokenStore(digits().store, "train").codebook)


def lines_of(path: Path) -> list[dict]:
    """The objects of a JSON lines file, none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def metrics(folder: Path) -> list[dict]:
    return lines_of(folder / "metrics.jsonl")


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def accuracies(folder: Path, suffix: str = "") -> list[float]:
    return [result_of(folder)[f"{name}{suffix}"] for name in ("top1", "top5")]


def kill_when(come: Callable[[], object], name: str, *arguments: object, logs: Path) -> None:
    """Begin a recipe and kill it and its workers as soon as something has come."""
    process, deadline = start(RECIPES / f"{name}.py", *arguments, logs=logs), time.monotonic() + 240
    while not come():
        assert process.is_alive() and time.monotonic() < deadline, (logs / "stderr").read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert ended([process]) == -signal.SIGKILL


def kill_after_an_evaluation(name: str, folder: Path, steps: int) -> None:
    """Begin the smoke preset and kill it right after its first evaluation, before the last of its `steps`."""
    evaluations, line = folder / "evaluations.jsonl", ("smoke", "--out", folder)
    kill_when(lambda: evaluations.exists() and evaluations.read_text(), name, *line, logs=folder.parent)
    whole_lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    assert len(whole_lines) < steps and not (folder / "result.json").exists()
