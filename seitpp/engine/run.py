"""A training run: its folder, its clock, its checkpoints. What a batch and a loss are stays in the recipe.

    run = Run("recipe", config)                      # Accelerate, the output folder, the seed
    model = run.prepare(model, optimizer, ...)       # wrapped, and restored with --resume
    for step, batch in run.train(dataset, ...):
        run.update(loss_of(batch))                   # backward, clip, lr of this step, update
    run.finish({...})                                # result.json

`step` counts updates from 0; a checkpoint "step-120" is the state after 120 of them.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, set_seed, tqdm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from seitpp import __version__, files
from seitpp.data.dataset import BatchOrder, Share, training_loader
from seitpp.engine import checkpoint, sharded, zero
from seitpp.engine.accumulation import Sharing, share_out
from seitpp.engine.config import RunConfig
from seitpp.engine.folder import RunError, choose_folder, enter_folder
from seitpp.engine.machine import check_installed, check_launch, device_name, git_commit
from seitpp.engine.metrics import MetricsLog, NotFinite, Speed, gather_records, matmul_rate
from seitpp.engine.precision import COMPUTE_DTYPE, LossScaler, check_precision, check_scale
from seitpp.engine.stopping import Stopped, StopRequest
from seitpp.errors import UserError

DRY_RUN_IMAGES = 64


class Run:
    """One run under Accelerate, on any number of processes.

    `recipe` and the preset name the default folder, runs/RECIPE-PRESET. The whole config is stored in the folder
    and compared on resume; the folder is locked while the process lives. Raises RunError for a folder that is in
    use or not empty (unless `resume` or `overwrite`), a run with other settings (with `resume`), a tracker that is
    not installed, or a launch that is not one process, DDP, FSDP 2 or DeepSpeed's ZeRO 1 or 2.
    """

    def __init__(self, recipe: str, config: RunConfig):
        check_installed(config.trackers)
        self.started = time.perf_counter()
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
        )
        check_launch(self.accelerator)
        check_precision(config.precision, self.accelerator.device, self.zero)
        self.scaler = LossScaler(self.accelerator) if config.precision == "fp16" else None
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.recipe, self.config, self.settings = recipe, config, asdict(config)
        self.facts = {}  # what `open_splits` found, for result.json
        self.out, self.resumed = self._on_main(self._choose_folder)
        self.log = MetricsLog(self.out / "metrics.jsonl")
        self.evaluations = MetricsLog(self.out / "evaluations.jsonl")
        self.step, self.flops_per_image, self._pending, self._speed = 0, None, [], None
        self._stop = StopRequest(self.accelerator.num_processes)
        set_seed(config.seed)

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the weights (FSDP)."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def zero(self) -> bool:
        """Whether each process updates only a part of the weights, from a copy of its own (DeepSpeed)."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run goes on from weights of its own."""
        return self.resumed and bool(checkpoint.steps_in(self.out / "checkpoints"))

    def _choose_folder(self) -> tuple[Path, bool]:
        config = self.config
        return choose_folder(
            f"{self.recipe}-{config.preset}", self.settings, config.out, config.resume, config.overwrite
        )

    def _on_main(self, function: Callable[[], object]) -> object:
        """Call on the main process only and give every process its value, or its error."""
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (UserError, OSError) as error:
                outcome[1] = str(error)
        value, error = broadcast_object_list(outcome)
        if error is not None:
            raise RunError(error)
        return value

    def start(self) -> None:
        """Make and lock the output folder. Called by `prepare`, when data and model have proved good; a run that
        trains nothing calls it itself.
        """
        self._lock = self._on_main(
            lambda: enter_folder(self.out, self.settings, self.resumed, self.config.overwrite)
        )
        if self.config.resume and not self.resumed:
            self.print(f"nothing to resume in {self.out}: the run begins")
        if self.config.trackers:
            self.accelerator.project_configuration.logging_dir = str(self.out)
            self.accelerator.log_with = filter_trackers(list(self.config.trackers), self.out)
            # TensorBoard takes no None and no lists.
            self.accelerator.init_trackers(
                "seitpp", config={name: str(value) for name, value in self.settings.items()}
            )

    def print(self, text: str) -> None:
        """Print once on each machine."""
        self.accelerator.print(text)

    # ------------------------------------------------------------------------------------------ training

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        order: BatchOrder,
        store: str,
        lr: Callable[[int], float],
        clip: float | None = None,
        ema: ModelEmaV3 | None = None,
        sharing: Sharing | None = None,
    ) -> nn.Module:
        """Wrap the model for this launch and, with --resume, restore the newest whole checkpoint.

        `order` says which images a batch holds; `store` is the fingerprint of the training data; `lr` gives the
        learning rate of each update; `clip` is the largest gradient norm; `ema` a moving average of the weights,
        which follows every update; `sharing` says what a step needs of a GPU's memory, so that the number of
        images at a time can be chosen or checked. Raises RunError if the processes do not divide the batch or it
        does not fit, UserError for an optimizer that this launch would change, CheckpointError for a checkpoint of
        another model or store.
        """
        self._check_shares(order.batch_size)
        self._check_agreed("the training data", store)
        if self.zero:
            zero.check_optimizer(optimizer)
        self.accumulation = share_out(self.accelerator, self.config, model, order.batch_size, sharing)
        self.accelerator.gradient_accumulation_steps = self.accumulation
        self.start()
        self.plain_model, self.plain_optimizer, self.ema, self.lr, self.clip = model, optimizer, ema, lr, clip
        self.order, self.store_fingerprint = order, store
        self._template = copy.deepcopy(model).cpu() if self.sharded else None
        if self.config.compile:
            # Inside DDP, not around it: torch then cuts the graph where DDP sends gradients, so that the backward
            # pass hides the sending (its DDPOptimizer asks which DDP is running, not what was compiled).
            model.compile()
        if self.zero:
            zero.configure(self.accelerator, model, order.batch_size, self.accumulation, clip)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.zero:
            self.plain_optimizer = zero.ZeroOptimizer(optimizer)
        if ema:
            sharded.split_module_as(ema.module, model)
        self._restore()
        self._on_main(self._drop_later_lines)
        return self.model

    def whole(self, module: nn.Module) -> nn.Module:
        """The plain model, or its moving average, with all its weights: what is evaluated and saved.

        It is a copy where the launch splits the weights (FSDP). Every process must call this.
        """
        if self._template is None:
            return module
        found = copy.deepcopy(self._template)
        found.load_state_dict(sharded.gather(module.state_dict()))
        return found.to(self.device)

    def train(
        self,
        dataset: Dataset,
        steps: int,
        checkpoint_steps: int,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        evaluation_steps: int = 0,
    ) -> Iterator[tuple[int, Any]]:
        """(step, this process's share of a micro-batch), from where the run stands up to `steps` updates.

        `dataset` makes a batch, a thing with `to(device)`, of a list of indices (`__getitems__`). A checkpoint is
        published every `checkpoint_steps` updates and at the end. `evaluate` is called on every process before the
        updates `evaluation_steps`, 2 x `evaluation_steps`, ..., with the model in eval mode; its figures are
        printed and written to evaluations.jsonl. An interval of less than one update is one. Between two items,
        the caller must call `update` once.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        accumulation, workers = self.accumulation, self.config.workers
        checkpoint_steps, evaluation_steps = max(1, checkpoint_steps), max(1, evaluation_steps)
        if self.config.dry_run:  # one step, and once resumed another one
            steps, checkpoint_steps, evaluation_steps = min(steps, self.step + 1), 1, 1
        loader = training_loader(dataset, self.order, range(self.step, steps), rank, ranks, accumulation, workers)
        self.dataset, self.checkpoint_steps, self.steps = dataset, checkpoint_steps, steps
        dtype = COMPUTE_DTYPE[self.config.precision]
        rate = matmul_rate(self.device, dtype) * ranks if self.flops_per_image else None
        self._speed = Speed(self.device, self.order.batch_size, self.flops_per_image, rate)
        self.bar = tqdm(total=steps, initial=self.step, unit="step", mininterval=1.0, smoothing=0.05)
        self._speed.start(self.step)
        batches = iter(loader)  # starts the workers, which must not inherit what follows
        self._stop.listen()
        try:
            while self.step < steps:
                step = self.step
                if evaluate and step and step % evaluation_steps == 0:
                    self._evaluate(evaluate)
                self._micro = []
                for micro in range(accumulation):
                    asked = time.perf_counter()
                    batch = next(batches)
                    self._speed.waited += time.perf_counter() - asked
                    torch.manual_seed(_dropout_seed(self.config.seed, rank, step, micro))
                    with self.accelerator.accumulate(self.model):
                        yield step, batch.to(self.device)
        finally:
            self._stop.release()
            self.bar.close()

    def update(self, loss: Tensor, **metrics: Tensor | float) -> None:
        """Backward; on the last micro-batch also clip, set the rate of this step, update, and log.

        `loss` () is the mean over this process's share; `metrics` are logged beside it: tensors are averaged
        over the processes, numbers are taken as they are. Raises RunError at the first loss or gradient that is
        not finite: it names step and rank, saves what that rank saw, and makes no checkpoint of it. Raises Stopped
        after SIGTERM or SIGINT, when the step is saved.
        """
        rate = self.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.accelerator.backward(loss)  # DeepSpeed clips and updates in it
        self._micro.append({"loss": loss.detach(), **metrics})
        if not self.accelerator.sync_gradients:
            return
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip or math.inf)
        scaling = {}
        if self.scaler:
            scaling = self.scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema:
            self.ema.update(self.plain_model, step=self.step)
        parts = self._micro
        record = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        norm = torch.tensor(norm, device=self.device) if self.zero else sharded.whole(norm.detach())
        self._pending.append({"step": self.step, "lr": rate, **record, "grad_norm": norm, **scaling})
        self.bar.update()
        asked = self._stop.agreed()
        due = asked or self.step % self.checkpoint_steps == 0 or self.step == self.steps
        if due or self.step % self.config.log_steps == 0:
            self._flush()
        if due:
            self.save()
        if asked:
            self._stop.release()
            raise Stopped(
                f"stopped after step {self.step}, which is saved: go on with --resume --out {self.out}", asked
            )

    def save(self) -> None:
        """Publish a checkpoint of the present step. Raises RunError if the disk does not take it."""
        groups = checkpoint.tensors_of(self.plain_model, self.plain_optimizer, self.ema, self.scaler)
        tensors = {name: sharded.gather(group, keep=self.is_main) for name, group in groups.items()}
        folder = self.out / "checkpoints"
        self._on_main(lambda: checkpoint.save(folder, self.step, self.store_fingerprint, tensors))
        # Time spent on a checkpoint is not training time.
        self._speed.start(self.step)

    def judged(self, dataset: Dataset) -> Dataset:
        """What an evaluation looks at: the whole dataset, or its first images in a dry run."""
        return Subset(dataset, range(min(len(dataset), DRY_RUN_IMAGES))) if self.config.dry_run else dataset

    def finish(self, result: dict) -> None:
        """Write result.json: `result`, the throughput of training if there was any, the data, and where it came
        from.
        """
        trained = {}
        if self._speed and self._speed.images:
            trained = {"images_per_second": self._speed.images / self._speed.seconds}
        origin = {
            "recipe": self.recipe,
            "seconds": round(time.perf_counter() - self.started, 1),
            "steps": self.step,
            "processes": self.accelerator.num_processes,
            "device": device_name(self.device),
            "seitpp": __version__,
            "git_commit": git_commit(),
        }
        whole = {**result, **trained, **self.facts, **origin}
        self._on_main(lambda: files.replace_json(self.out / "result.json", whole))
        if self.is_main:
            files.unlock(self._lock)
        self.accelerator.end_training()

    # ------------------------------------------------------------------------------------------ inside

    def _check_agreed(self, what: str, value: str) -> None:
        """Several machines may have several disks: raise RunError unless all processes see the same value."""
        values = gather_object([value])
        if len(set(values)) > 1:
            seen = ", ".join(f"{value[:16]} on rank {values.index(value)}" for value in dict.fromkeys(values))
            raise RunError(f"{what} differs between processes ({seen}): expected the same files on all machines")

    def _restore(self) -> None:
        folder = self.out / "checkpoints"
        newest = checkpoint.newest(folder)
        self._check_agreed(f"the newest checkpoint in {folder}", newest.name if newest else "none")
        if newest:
            found = checkpoint.load(newest)
            restored = self.plain_model, self.plain_optimizer, self.ema, self.scaler
            checkpoint.restore(found, self.store_fingerprint, *restored)
            self.step = found.step

    def _check_shares(self, batch_size: int) -> None:
        ranks, accumulation = self.accelerator.num_processes, self.config.accumulation or 1
        if batch_size % (ranks * accumulation):
            raise RunError(
                f"global batch {batch_size} on {ranks} processes x {accumulation} accumulation steps: "
                "expected a batch that they divide"
            )

    def _evaluate(self, evaluate: Callable[[], Mapping[str, float]]) -> None:
        if self._pending:
            self._flush()
        self.plain_model.eval()
        scores = dict(evaluate())
        self.plain_model.train()
        self._on_main(lambda: self.evaluations.write([{"step": self.step, **scores}]))
        self.accelerator.log(scores, step=self.step)
        self.print(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        # Time spent on an evaluation is not training time.
        self._speed.start(self.step)

    def _flush(self) -> None:
        """Fetch what was recorded since the last call, stop if it is not finite, write it down."""
        records, broken = gather_records(self.accelerator, self._pending)
        if broken:
            self._stop_at(broken)
        check_scale(records)
        self._pending = []
        speed = self._speed.read(self.step)
        records[-1] |= speed
        self._on_main(lambda: self.log.write(records))
        self.accelerator.log({k: v for k, v in records[-1].items() if k != "step"}, step=self.step)
        self.bar.set_postfix(
            loss=f"{records[-1]['loss']:.4f}",
            lr=f"{records[-1]['lr']:.2e}",
            images=f"{speed['images_per_second']:.0f}/s",
        )

    def _stop_at(self, broken: NotFinite) -> NoReturn:
        batch = self._on_main(lambda: self._save_batch(broken.step - 1, broken.rank))
        raise RunError(
            f"{broken.name} is {broken.value} at step {broken.step} on rank {broken.rank}: stopped; its images "
            f"are in {batch}; {checkpoint.latest(self.out / 'checkpoints')}; lower the learning rate"
        )

    def _save_batch(self, step: int, rank: int) -> Path:
        """Write what `rank` saw in the update number `step`. All that is random in it follows from seed, epoch and
        indices, so that from a checkpoint before it the update can be repeated.
        """
        accumulation, ranks = self.accumulation, self.accelerator.num_processes
        indices = np.concatenate(list(self.order.shares(range(step, step + 1), rank, ranks, accumulation)))
        epoch = step // self.order.steps_per_epoch
        batch = self.dataset.__getitems__(Share(indices.tolist(), epoch))._asdict()
        known = {"step": step, "epoch": epoch, "seed": self.config.seed, "rank": rank}
        path = self.out / f"broken-step-{step + 1:08d}-rank-{rank}.safetensors"
        metadata = {name: str(value) for name, value in known.items()}
        files.replace_bytes(path, safetensors.torch.save(batch, metadata))
        return path

    def _drop_later_lines(self) -> None:
        self.log.keep_until(self.step)
        self.evaluations.keep_until(self.step - 1)  # that of this step is made once more


def _dropout_seed(seed: int, rank: int, step: int, micro: int) -> int:
    digest = hashlib.sha256(f"dropout {seed} {rank} {step} {micro}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
