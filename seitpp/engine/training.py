"""The training loop: batches, updates, checkpoints, evaluations, and the stop after a signal.

`step` is the number of updates so far; the checkpoint "step-00000120" is the state after 120 updates.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import safetensors.torch
import torch
from accelerate.utils import tqdm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset

from seitpp import files
from seitpp.data.dataset import MicroBatch, training_loader
from seitpp.engine import checkpoint, distributed
from seitpp.engine.accumulation import Sharing, share_out
from seitpp.engine.config import Choice
from seitpp.engine.distributed import UpdateSettings
from seitpp.engine.folder import RunError
from seitpp.engine.metrics import NotFinite, Recorder, Speed, matmul_rate
from seitpp.engine.optim import Schedule
from seitpp.engine.precision import COMPUTE_DTYPE
from seitpp.engine.signals import Stopped, StopRequest

if TYPE_CHECKING:
    from seitpp.engine.run import Run


class Training:
    """The training of a model in a run; see `Run.training`, which creates it."""

    def __init__(
        self,
        run: "Run",
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Schedule,
        data_fingerprint: str,
        clip: float | None = None,
        ema: ModelEmaV3 | None = None,
        flops_per_image: int | None = None,
        sharing: Sharing | None = None,
    ):
        self.run, self.config, self.accelerator = run, run.config, run.accelerator
        order = schedule.order
        self._check_batch(order.batch_size)
        run.check_agreed("the training data", data_fingerprint)
        run.launch.check_optimizer(optimizer)
        self.accumulation = share_out(
            self.accelerator, config=self.config, model=model, batch_size=order.batch_size, sharing=sharing
        )
        self.accelerator.gradient_accumulation_steps = self.accumulation
        if self.config.accumulation is None:
            images = order.batch_size // (self.accelerator.num_processes * self.accumulation)
            fit = ", as many as fit into the memory of the GPU" if run.device.type == "cuda" else ""
            run.chosen["accumulation"] = Choice(self.accumulation, f"{images} images at a time{fit}")
        run.start()
        self.model, self.ema, self.order, self.schedule = model, ema, order, schedule
        self._fingerprint, self._clip, self._flops_per_image = data_fingerprint, clip, flops_per_image
        self._stop_signal = StopRequest(self.accelerator.num_processes)
        if self.config.compile:
            # Compile inside DDP, not around it: torch's DDPOptimizer looks only for a running DDP. It splits the
            # graph where DDP sends gradients, so that sending overlaps with the backward pass.
            model.compile()
        update = UpdateSettings(order.batch_size, self.accumulation, clip)
        self.wrapped, self.optimizer = run.launch.prepare(model, optimizer, ema=ema, settings=update)
        self._optimizer_state = run.launch.optimizer_state(optimizer)
        run.progress.step = self._restore()
        self._check_plan()
        self._recorder = Recorder(run.accelerator, log=run.log, evaluations=run.evaluations, on_main=run.on_main)
        self._recorder.drop_lines_after(self.step)
        self._end = schedule.steps
        self._checkpoint_every = schedule.checkpoint_steps
        if self.config.dry_run:  # one step, and one more after it is resumed
            self._end, self._checkpoint_every = min(self._end, self.step + 1), 1

    def unsharded(self, module: nn.Module) -> nn.Module:
        """Return the model or its moving average with all of its weights, for evaluation and saving.

        Where the launch splits the weights (FSDP) this is a copy. Every process must call this.
        """
        return self.run.launch.unsharded(module)

    @property
    def step(self) -> int:
        """The number of updates so far."""
        return self.run.progress.step

    def __str__(self) -> str:
        return f"{self.schedule}, from step {self.step}"

    def steps(
        self, dataset: Dataset, evaluate: Callable[[], Mapping[str, float]] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Iterate over (step, this process's part of a micro-batch), from the current step to the end.

        For each item, the caller must call `update` once. `dataset.__getitems__` turns a list of indices into a
        batch with a method `to(device)`. Checkpoints are saved when the schedule says, before each evaluation, and
        at the end. When an evaluation is due, `evaluate` is called on every process, with the model in eval mode;
        its scores are printed and written to evaluations.jsonl. Raises Stopped at once after SIGTERM or SIGINT in
        an evaluation.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        accumulation, self._dataset, self._evaluates = self.accumulation, dataset, evaluate is not None
        loader = training_loader(
            dataset,
            self.order,
            range(self.step, self._end),
            rank=rank,
            ranks=ranks,
            accumulation=accumulation,
            workers=self.run.workers,
        )
        self.run.progress.speed = self._measured_speed()
        self._recorder.start(self.run.progress.speed, self._bar(), self.step)
        self.model.train()
        batches = iter(loader)  # starts the workers, which must not inherit the signal handlers
        self._stop_signal.listen()
        try:
            while self.step < self._end:
                step = self.step
                if evaluate and step and self._evaluation_is_due():
                    self._evaluate(evaluate)
                self._micro_batches = []
                for micro in range(accumulation):
                    before = time.perf_counter()
                    batch = next(batches)
                    self._recorder.speed.waited += time.perf_counter() - before
                    torch.manual_seed(_dropout_seed(self.config.seed, rank, step, micro))
                    with self.accelerator.accumulate(self.wrapped):
                        yield step, batch.to(self.run.device)
        finally:
            self._stop_signal.release()
            self._recorder.bar.close()

    def update(self, loss: Tensor, **metrics: Tensor | float) -> None:
        """Run the backward pass; on the last micro-batch also clip, set the learning rate, update and log.

        `loss` () is the mean over this process's part of the micro-batch. `metrics` are logged with it: tensors
        are averaged over the processes, numbers are logged unchanged. Raises RunError, when records are written,
        if a loss or gradient was not finite: the message names step and rank, the batch of that rank is saved,
        but no checkpoint. Raises Stopped after SIGTERM or SIGINT, when the step is saved.
        """
        rate = self.schedule.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.accelerator.backward(loss)  # DeepSpeed clips and updates in it
        self._micro_batches.append({"loss": loss.detach(), **metrics})
        if not self.accelerator.sync_gradients:
            return
        norm = self.run.launch.grad_norm(self.wrapped, self._clip)
        scaling = {}
        if self.run.scaler:
            scaling = self.run.scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.run.progress.step += 1
        if self.ema:
            self.ema.update(self.model, step=self.step)
        parts = self._micro_batches
        means = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        self._recorder.add({"step": self.step, "lr": rate, **means, "grad_norm": norm, **scaling})
        self._after_update()

    def _after_update(self) -> None:
        stop_signal = self._stop_signal.agreed()
        # Saved before an evaluation, too, which thus can be stopped at once on any number of processes.
        checkpoint_due = (
            stop_signal
            or self.step % self._checkpoint_every == 0
            or self.step == self._end
            or (self._evaluates and self._evaluation_is_due())
        )
        if checkpoint_due or self.step % self.config.log_steps == 0:
            self._flush()
        if checkpoint_due:
            self.save()
        if stop_signal:
            self._stop_signal.release()
            raise Stopped(self._stopped("stopped"), stop_signal)

    def _stopped(self, how: str) -> str:
        return f"{how} after step {self.step}, which is saved: go on with --resume --out {self.run.out}"

    def _evaluation_is_due(self) -> bool:
        return self.config.dry_run or self.schedule.is_evaluated(self.step)

    def save(self) -> None:
        """Save a checkpoint of the current step. Raises RunError if writing fails."""
        groups = checkpoint.tensors_of(self.model, self._optimizer_state, ema=self.ema, scaler=self.run.scaler)
        keep = self.run.is_main
        tensors = {name: distributed.gather(group, keep=keep) for name, group in groups.items()}
        self.run.on_main(
            lambda: checkpoint.save(
                self.run.checkpoints, self.step, data_fingerprint=self._fingerprint, tensors=tensors
            )
        )
        self._recorder.speed.start(self.step)  # time spent on a checkpoint is not training time

    def _check_batch(self, batch_size: int) -> None:
        ranks, accumulation = self.accelerator.num_processes, self.config.accumulation or 1
        if batch_size % (ranks * accumulation):
            raise RunError(
                f"global batch {batch_size} on {ranks} processes x {accumulation} accumulation steps: "
                f"expected a multiple of {ranks * accumulation}"
            )

    def _restore(self) -> int:
        """Load the newest intact checkpoint and return its step, or 0 if there is none."""
        newest = checkpoint.newest(self.run.checkpoints)
        self.run.check_agreed(
            f"the newest checkpoint in {self.run.checkpoints}", newest.name if newest else "none"
        )
        if newest is None:
            return 0
        loaded = checkpoint.load(newest)
        checkpoint.restore(
            loaded,
            data_fingerprint=self._fingerprint,
            model=self.model,
            optimizer=self._optimizer_state,
            ema=self.ema,
            scaler=self.run.scaler,
        )
        return loaded.step

    def _check_plan(self) -> None:
        """Say what changes with another length of a resumed run, and store it.

        Raises RunError if more updates are done than planned now.
        """
        schedule, planned = self.schedule, self.run.planned
        if self.step > schedule.steps:
            done = f"{self.step} steps, {self.step / self.order.steps_per_epoch:g} epochs"
            raise RunError(
                f"the run in {self.run.out} has done {done}, expected at most the {schedule.steps} steps of this "
                f"schedule: pass a larger --{next(iter(planned), 'epochs')}"
            )
        if not planned:
            return
        (name, length), *_ = planned.items()
        before = replace(schedule, steps=self.order.steps(length) if name == "epochs" else int(length))
        self.run.change_lengths()
        self.run.print(
            f"{name} {length:g} -> {self.run.settings[name]:g}: {schedule.steps} steps instead of {before.steps}, "
            f"{self.step} of them done; {_change_of_rate(self.step, before, schedule)}"
        )

    def _measured_speed(self) -> Speed:
        dtype, processes = COMPUTE_DTYPE[self.config.precision], self.accelerator.num_processes
        rate = matmul_rate(self.run.device, dtype) * processes if self._flops_per_image else None
        return Speed(
            self.run.device,
            batch_size=self.order.batch_size,
            flops_per_image=self._flops_per_image,
            matmul_rate=rate,
        )

    def _bar(self) -> tqdm:
        return tqdm(total=self._end, initial=self.step, unit="step", mininterval=1.0, smoothing=0.05)

    def _evaluate(self, evaluate: Callable[[], Mapping[str, float]]) -> None:
        if self._recorder.pending:
            self._flush()
        self.model.eval()
        with self._stop_signal.at_once(self._stopped("stopped in the evaluation")):
            scores = dict(evaluate())
        self.model.train()
        self._recorder.write_evaluation(self.step, scores)

    def _flush(self) -> None:
        if not_finite := self._recorder.flush(self.step):
            self._stop_at(not_finite)

    def _stop_at(self, value: NotFinite) -> NoReturn:
        batch = self.run.on_main(lambda: self._save_batch(value.step - 1, value.rank))
        raise RunError(
            f"{value.name} is {value.value} at step {value.step} on rank {value.rank}: stopped; its images "
            f"are in {batch}; {checkpoint.latest(self.run.checkpoints)}: lower the learning rate"
        )

    def _save_batch(self, step: int, rank: int) -> Path:
        """Write the batch of `rank` in update `step`, counted from 0, so that the update can be repeated from an
        earlier checkpoint: its random numbers follow from seed, epoch and indices.
        """
        accumulation, ranks = self.accumulation, self.accelerator.num_processes
        steps = range(step, step + 1)
        micro_batches = self.order.micro_batches(steps, rank=rank, ranks=ranks, accumulation=accumulation)
        indices = np.concatenate(list(micro_batches))
        epoch = step // self.order.steps_per_epoch
        batch = self._dataset.__getitems__(MicroBatch(indices.tolist(), epoch))._asdict()
        origin = {"step": step, "epoch": epoch, "seed": self.config.seed, "rank": rank}
        path = self.run.out / f"broken-step-{step + 1:08d}-rank-{rank}.safetensors"
        metadata = {name: str(value) for name, value in origin.items()}
        files.replace_bytes(path, safetensors.torch.save(batch, metadata))
        return path


def _change_of_rate(step: int, before: Schedule, now: Schedule) -> str:
    if step == now.steps:
        return "no update is left"
    shape = {"cosine": "by half a cosine", "linear": "linearly"}[now.decay]
    old = f"{before.lr(step):.3e} by the old plan" if step < before.steps else "the old plan ended here"
    return f"the learning rate falls {shape} over all of them: {now.lr(step):.3e} in the next one, {old}"


def _dropout_seed(seed: int, rank: int, step: int, micro: int) -> int:
    digest = hashlib.sha256(f"dropout {seed} {rank} {step} {micro}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
