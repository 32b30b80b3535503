"""A run of milliseconds through the real engine, to be killed, signalled and broken at a chosen place.

    python tests/support/tiny_run.py OUT [--accumulation N] [--precision P] [--die STEP MICRO] [--term STEP RANK]
        [--nan STEP RANK] [--overflow STEP RANK]

It always passes --resume, as one command that begins and goes on. It trains a small classifier with dropout and a
moving average on the embedded digits, STEPS updates over more than one epoch, with a checkpoint every third and
an evaluation every fifth.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn

from seitpp import TokenStore
from seitpp.data.dataset import TokenDataset
from seitpp.data.digits import digits
from seitpp.data.order import BatchOrder
from seitpp.engine.config import TrainConfig
from seitpp.engine.optim import Schedule, adamw
from seitpp.engine.run import Run
from seitpp.recipe import run_recipe

STEPS, CHECKPOINT_STEPS, EVALUATION_STEPS, BATCH = 17, 3, 5, 128  # 11 steps an epoch

TINY_RUN = Path(__file__)

# What happens in an update before its loss is known: (step, micro-batch, rank, loss) -> loss.
Accident = Callable[[int, int, int, torch.Tensor], torch.Tensor]


def no_accident(step: int, micro: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
    return loss


def overflow(loss: torch.Tensor, factor: float = 1e6) -> torch.Tensor:
    """The same loss with gradients that are too large for fp16."""
    return loss.detach() + (loss - loss.detach()) * factor


def train(
    out: Path,
    accident: Accident = no_accident,
    dropout: float = 0.1,
    steps: int = STEPS,
    checkpoint_steps: int = CHECKPOINT_STEPS,
    evaluation_steps: int = EVALUATION_STEPS,
    **settings,
) -> None:
    """The run, from the beginning or from where it was stopped; its weights are then in OUT/model.safetensors."""
    defaults = {"preset": "tiny", "precision": "no", "workers": 0, "log_steps": 2, "resume": True}
    config = TrainConfig(out=str(out), **{**defaults, **settings})
    run = Run("tiny", config)
    store = TokenStore(digits().store, "train", verify=False)
    order = BatchOrder(len(store), BATCH, config.seed)
    model = nn.Sequential(nn.Embedding(64, 4), nn.Flatten(), nn.Dropout(dropout), nn.Linear(256, 10))
    ema = ModelEmaV3(model, decay=0.9)
    # The rate of update number `step` is 1e-3 * (step + 1), whatever `steps` is.
    schedule = Schedule(
        order, steps, STEPS, checkpoint_steps, evaluation_steps, peak_lr=1e-3 * (STEPS + 1), warmup_lr=1e-3
    )
    optimizer = adamw(model, 0.05)
    training = run.training(model, optimizer, schedule, data_fingerprint=store.fingerprint, ema=ema)

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            return {"weight": float(training.unsharded(model)[3].weight.abs().sum())}

    seen = {}
    for step, batch in training.steps(TokenDataset(store), evaluate):
        micro = seen[step] = seen.get(step, -1) + 1
        loss = F.cross_entropy(training.wrapped(batch.ids.long()), batch.labels)
        training.update(accident(step, micro, run.accelerator.process_index, loss))
    weights, average = training.unsharded(model).state_dict(), training.unsharded(ema.module).state_dict()
    if run.is_main:
        averages = {f"ema.{name}": value for name, value in average.items()}
        save_file(weights | averages, out / "model.safetensors")
    run.finish(evaluate())


def same_run(one: Path, two: Path) -> None:
    """Weights, moving average, optimizer and every figure that does not measure time are equal to the bit."""
    last = f"checkpoints/step-{STEPS:08d}"
    names = [f"{last}/{name}.safetensors" for name in ("model", "optimizer", "ema")]
    for name in ("model.safetensors", *names, "evaluations.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    learned = [[(line["step"], line["loss"], line["grad_norm"]) for line in run] for run in lines]
    assert learned[0] == learned[1] and [line[0] for line in learned[0]] == list(range(1, STEPS + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", default="no")
    for name in ("die", "term", "nan", "overflow"):
        parser.add_argument(f"--{name}", type=int, nargs=2)
    given = parser.parse_args()

    def accident(step: int, micro: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
        if given.die == [step, micro]:
            os.kill(os.getpid(), signal.SIGKILL)
        if given.term == [step, rank]:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = overflow(loss) if given.overflow == [step, rank] else loss
        return loss * float("nan") if given.nan == [step, rank] else loss

    def start(_: TrainConfig) -> None:
        settings = {"accumulation": given.accumulation, "precision": given.precision}
        train(given.out, accident, given.dropout, **settings)

    del sys.argv[1:]
    run_recipe(start, {"tiny": TrainConfig()}, default="tiny")


if __name__ == "__main__":
    main()
