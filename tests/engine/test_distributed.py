"""Launches by the files of recipes/accelerate, on CPU processes: FSDP, and two machines.

The launchers themselves start several processes in tests/long/processes.py, which has what needs DeepSpeed, too.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType
from safetensors.torch import load_file
from support.forks import ended, run_forks, start
from support.paths import RECIPES, SUPPORT
from support.running import LAUNCHES, distributed, fsdp, places, run

from seitpp.engine.distributed import supports

SHORT = ["smoke", "--epochs", "1", "--warmup-epochs", "0.5", "--evaluation-epochs", "0.5", "--drop-path", "0"]
SHORT += ["--ema", "0.9"]
WEIGHTS = ("model.safetensors", "model_ema.safetensors")


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def check_same_training(folder: Path, expected: Path) -> None:
    """The same losses, figures of every evaluation, weights, and checkpoint."""
    for found, wanted in zip(lines(folder, "metrics.jsonl"), lines(expected, "metrics.jsonl"), strict=True):
        assert found["lr"] == wanted["lr"] and found["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    assert lines(folder, "evaluations.jsonl") == lines(expected, "evaluations.jsonl")
    last = Path("checkpoints") / (expected / "checkpoints/LATEST").read_text()
    for name in (*WEIGHTS, *(last / f"{part}.safetensors" for part in ("model", "ema", "optimizer"))):
        found, wanted = load_file(folder / name), load_file(expected / name)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=0, msg=f"{name}: {key}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finished = run("seit_train", *SHORT, "--out", folder)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.parametrize(
    ("file", "kind", "processes", "machines"),
    [
        ("one_gpu.yaml", DistributedType.NO, 1, 1),
        ("eight_gpus.yaml", DistributedType.MULTI_GPU, 8, 1),
        ("two_machines.yaml", DistributedType.MULTI_GPU, 16, 2),
        ("fsdp.yaml", DistributedType.FSDP, 8, 1),
        ("deepspeed.yaml", DistributedType.DEEPSPEED, 8, 1),
    ],
)
def test_accelerate_reads_the_files(file: str, kind: DistributedType, processes: int, machines: int) -> None:
    config = load_config_from_file(str(LAUNCHES / file))
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)


def test_fsdp_goes_on_where_one_process_stopped(alone: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / (folder / "checkpoints/LATEST").read_text())
    for name in WEIGHTS:
        (folder / name).unlink()
    finished = fsdp(RECIPES / "seit_train.py", *SHORT, "--out", folder, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert json.loads((folder / "result.json").read_text())["processes"] == 2
    check_same_training(folder, alone)


def test_fsdp_of_version_1_is_refused() -> None:
    with_fsdp = {**places(1)[0], "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    line = [SUPPORT / "fsdp_on_cpu.py", RECIPES / "seit_train.py", *SHORT]
    finished = run_forks(*line, environments=[with_fsdp])
    assert finished.returncode == 2 and "expected DDP, FSDP 2, or" in finished.stderr, finished.stderr


def test_a_model_compiled_inside_ddp_is_cut_where_gradients_are_sent(tmp_path: Path) -> None:
    """In the order of `Training`. In one graph, all gradients would be sent after the last of them is known."""
    code = """
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
accelerator = Accelerator(mixed_precision="bf16", kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=2)])
graphs, inputs = [], torch.ones(2, 512)
def compiler(graph, inputs):
    graphs.append(graph)
    return graph.forward
def model():
    graphs.clear()
    torch.manual_seed(0)
    made = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    made.compile(backend=compiler)
    return made
alone = model()
with accelerator.autocast():
    alone(inputs).sum().backward()
print(len(graphs))
inside = accelerator.prepare(model())
inside(inputs).sum().backward()
print(type(inside).__name__, len(graphs))
print(all(a.grad.equal(b.grad) for a, b in zip(alone.parameters(), inside.parameters())))
"""
    (tmp_path / "compiled.py").write_text(code)
    finished = distributed(1, tmp_path / "compiled.py")
    assert finished.stdout.split() == ["1", "DistributedDataParallel", "5", "True"], finished.stderr


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_is_one_line() -> None:
    with_deepspeed = {**places(1)[0], "ACCELERATE_USE_DEEPSPEED": "true"}
    del with_deepspeed["ACCELERATE_USE_CPU"]
    finished = run_forks(RECIPES / "seit_train.py", *SHORT, environments=[with_deepspeed])
    assert finished.returncode == 2 and 'pip install "seitpp[deepspeed]"' in finished.stderr, finished.stderr


@pytest.mark.parametrize(
    ("stage", "offload", "taken"), [(1, "none", True), (2, "none", True), (3, "none", False), (2, "cpu", False)]
)
def test_stages_of_deepspeed(stage: int, offload: str, taken: bool) -> None:
    assert supports(DeepSpeedPlugin(zero_stage=stage, offload_optimizer_device=offload)) == taken


def test_machines_that_see_different_checkpoints_are_refused(alone: Path, tmp_path: Path) -> None:
    """Each machine is a folder of its own here, with one process, and only the first has the run."""
    shutil.copytree(alone, tmp_path / "0/run")
    (tmp_path / "1").mkdir()
    line, machines = [RECIPES / "seit_train.py", *SHORT, "--out", "run", "--resume"], []
    for rank, place in enumerate(places(2)):
        own, folder = {**place, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, tmp_path / str(rank)
        machines.append(start(*line, logs=folder, environment=own, cwd=folder))
    assert ended(machines) == 2
    texts = [(tmp_path / str(rank) / "stderr").read_text() for rank in range(2)]
    lines = [f"error (rank {rank}): the newest checkpoint in run/checkpoints differs" for rank in range(2)]
    assert any(line in text for line, text in zip(lines, texts, strict=True))
    for line, errors in zip(lines, texts, strict=True):
        assert line in errors or "another process of the launch has failed" in errors
        assert line not in errors or "step-00000011 on rank 0, none on rank 1" in errors
    assert not (tmp_path / "1/run").exists()
