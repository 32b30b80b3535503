"""A run: its folder, its launch, what it prints and leaves. What a batch and a loss are stays in the recipe.

    run = Run("recipe", config)                            # Accelerate, the output folder, the seed
    training = run.training(model, optimizer, schedule, data_fingerprint=...)  # restored with --resume
    for step, batch in training.steps(dataset):
        training.update(loss_of(training.wrapped, batch))  # backward, clip, lr of this step, update
    run.finish({...})                                      # result.json

The clock of a training is `seitpp/engine/training.py`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn
from torch.utils.data import Dataset, Subset

from seitpp import __version__, files
from seitpp.engine import checkpoint
from seitpp.engine.config import RunConfig
from seitpp.engine.distributed import ZeroLaunch, find_launch
from seitpp.engine.folder import RunError, choose_folder, enter_folder
from seitpp.engine.metrics import MetricsLog, Progress
from seitpp.engine.optim import Schedule
from seitpp.engine.precision import LossScaler, check_precision
from seitpp.engine.system import check_installed, device_name, git_commit
from seitpp.engine.training import Training
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
        self.accelerator = Accelerator(mixed_precision=config.precision)
        self.launch = find_launch(self.accelerator)
        check_precision(config.precision, self.accelerator.device, isinstance(self.launch, ZeroLaunch))
        self.scaler = LossScaler(self.accelerator) if config.precision == "fp16" else None
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.recipe, self.config, self.settings = recipe, config, asdict(config)
        self.out, self.resumed = self.on_main(self._choose_folder)
        self.checkpoints = self.out / "checkpoints"
        self.log = MetricsLog(self.out / "metrics.jsonl")
        self.evaluations = MetricsLog(self.out / "evaluations.jsonl")
        self.progress = Progress()  # not the training, which knows the run: both would outlive their processes
        set_seed(config.seed)

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run goes on from weights of its own."""
        return self.resumed and bool(checkpoint.steps_in(self.checkpoints))

    def _choose_folder(self) -> tuple[Path, bool]:
        config = self.config
        return choose_folder(
            f"{self.recipe}-{config.preset}", self.settings, config.out, config.resume, config.overwrite
        )

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Call on the main process only and give every process its value, or raise its error on each."""
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

    def check_agreed(self, what: str, value: str) -> None:
        """Raise RunError unless all processes have the same value: several machines may have several disks."""
        values = gather_object([value])
        if len(set(values)) > 1:
            seen = ", ".join(f"{value[:16]} on rank {values.index(value)}" for value in dict.fromkeys(values))
            raise RunError(f"{what} differs between processes ({seen}): expected the same files on all machines")

    def start(self) -> None:
        """Make and lock the output folder. `training` calls it when data and model have proved good; a run that
        trains nothing calls it itself.
        """
        self._lock = self.on_main(
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

    def training(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        data_fingerprint: str,
        **more: Any,
    ) -> Training:
        """Begin the training of a model, or with --resume go on from the newest whole checkpoint.

        `schedule` says which images a batch holds, how long, at which rate, and when checkpoints and evaluations
        are due; `data_fingerprint` identifies the training data. `more` may be `clip`, the largest
        gradient norm; `ema`, a moving average of the weights, which follows every update; `flops_per_image`, for
        the MFU in the log; `sharing`, what a step needs of a GPU's memory, so that the number of images at a time
        can be chosen or checked. Raises RunError if the processes do not divide the batch or it does not fit,
        UserError for an optimizer that this launch would change, CheckpointError for a checkpoint of another model
        or of other data.
        """
        return Training(self, model, optimizer, schedule, data_fingerprint=data_fingerprint, **more)

    def print(self, text: str) -> None:
        """Print once on each machine."""
        self.accelerator.print(text)

    def describe(self, *parts: object, model: nn.Module | None = None) -> None:
        """Print the settings, one a line, `parts` (the data, the view, the training), the model's size, and where
        the run writes.
        """
        lines = [f"{name:22} {value}" for name, value in self.settings.items()]
        lines += [str(part) for part in parts]
        if model is not None:
            trained, frozen = (
                sum(p.numel() for p in model.parameters() if p.requires_grad == kind) / 1e6
                for kind in (True, False)
            )
            lines.append(f"{trained + frozen:.2f} M parameters, {trained:.2f} M of them trained")
        lines.append(f"{self.accelerator.num_processes} process(es); writing to {self.out}")
        self.print("\n".join(lines))

    def eval_subset(self, dataset: Dataset) -> Dataset:
        """What an evaluation looks at: the whole dataset, or its first images in a dry run."""
        return Subset(dataset, range(min(len(dataset), DRY_RUN_IMAGES))) if self.config.dry_run else dataset

    def finish(self, result: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> None:
        """Write result.json: `result`, the throughput of training if there was any, facts of the `data`, and where
        the result came from.
        """
        speed = self.progress.speed
        throughput = {"images_per_second": speed.images / speed.seconds} if speed and speed.images else {}
        origin = {
            "recipe": self.recipe,
            "seconds": round(time.perf_counter() - self.started, 1),
            "steps": self.progress.step,
            "processes": self.accelerator.num_processes,
            "device": device_name(self.device),
            "seitpp": __version__,
            "git_commit": git_commit(),
        }
        complete = {**result, **throughput, **(data or {}), **origin}
        self.on_main(lambda: files.replace_json(self.out / "result.json", complete))
        if self.is_main:
            files.unlock(self._lock)
        self.accelerator.end_training()
