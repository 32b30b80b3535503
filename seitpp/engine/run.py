"""A run: its folder, its launch, its printed output and its result. The recipe defines batches and the loss.

    run = Run("recipe", config)                            # Accelerate, the output folder, the seed
    training = run.training(model, optimizer, schedule, data_fingerprint=...)  # restored with --resume
    for step, batch in training.steps(dataset):
        training.update(loss_of(training.wrapped, batch))  # backward, clip, lr of this step, update
    run.finish({...})                                      # result.json

The loop behind `training.steps` and `training.update` is in `seitpp/engine/training.py`.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn
from torch.utils.data import Dataset, Subset

from seitpp import __version__, files
from seitpp.engine import checkpoint, peers, repeat, report
from seitpp.engine.config import Choice, RunConfig, settings_table
from seitpp.engine.distributed import ZeroLaunch, find_launch
from seitpp.engine.folder import RESULT, RunError, change_lengths, choose_folder, enter_folder, planned_lengths
from seitpp.engine.metrics import MetricsLog, Progress
from seitpp.engine.next_steps import block, next_steps
from seitpp.engine.optim import Schedule
from seitpp.engine.precision import LossScaler, check_precision
from seitpp.engine.system import check_installed, device_name, git_commit, loader_workers
from seitpp.engine.training import Training
from seitpp.errors import UserError, escaped, os_message

DRY_RUN_IMAGES = 64
SPEED = "images_per_second"
REPORT = "report.html"
SKIPPED = "skipped.txt"  # in the run's folder: a line for each image that was left out


class Run:
    """A run of a recipe under Accelerate, on any number of processes.

    `recipe` and the preset name the default folder, runs/RECIPE-PRESET. `start` locks the folder and stores the
    whole config there, and a resumed run must have the same settings. Raises RunError for a folder that is not
    empty (see `choose_folder`), a resumed run with other settings, a precision that the device does not support, a
    tracker that is not installed, or a launch other than one process, DDP, FSDP 2 or DeepSpeed's ZeRO 1 or 2.
    """

    def __init__(self, recipe: str, config: RunConfig):
        check_installed(config.trackers)
        self.started = time.perf_counter()
        self.accelerator = Accelerator(mixed_precision=config.precision)
        peers.watch()
        self.launch = find_launch(self.accelerator)
        check_precision(config.precision, self.accelerator.device, isinstance(self.launch, ZeroLaunch))
        self.scaler = LossScaler(self.accelerator) if config.precision == "fp16" else None
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.recipe, self.config, self.settings = recipe, config, asdict(config)
        self.workers = loader_workers(config.workers)
        self.out, self.resumed, self.planned = self.on_main(self._choose_folder)
        self.checkpoints = self.out / "checkpoints"
        self.log = MetricsLog(self.out / "metrics.jsonl")
        self.evaluations = MetricsLog(self.out / "evaluations.jsonl")
        self.skipped: list[str] = []
        self.chosen: dict[str, Choice] = {}  # settings that were chosen for the user, or by the run
        if config.workers is None:
            self.chosen["workers"] = Choice(self.workers, "by the CPU cores")
        if config.out is None:
            self.chosen["out"] = Choice(self.out, "no --out was named")
        self.progress = Progress()  # no reference to the Training: the cycle would keep its process groups alive
        set_seed(config.seed)

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run resumes from a checkpoint."""
        return self.resumed and bool(checkpoint.steps_in(self.checkpoints))

    def _choose_folder(self) -> tuple[Path, bool, dict[str, float]]:
        """Return the folder, whether a run is resumed, and its planned lengths that differ from those of now."""
        config = self.config
        defaults = {field.name: field.default for field in fields(config) if field.default is not MISSING}
        folder, resumed = choose_folder(
            f"{self.recipe}-{config.preset}",
            self.settings,
            out=config.out,
            resume=config.resume,
            overwrite=config.overwrite,
            defaults=defaults,
        )
        return folder, resumed, planned_lengths(folder, self.settings, defaults) if resumed else {}

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Call a function on the main process and return its value on every process.

        A UserError or OSError of the function is raised on every process as RunError.
        """
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (UserError, OSError) as error:
                outcome[1] = (os_message(error) if isinstance(error, OSError) else None) or str(error)
        value, error = broadcast_object_list(outcome)
        if error is not None:
            raise RunError(error)
        return value

    def check_agreed(self, what: str, value: str) -> None:
        """Raise RunError unless `value` is the same on all processes; machines may have different files."""
        values = gather_object([value])
        if len(set(values)) > 1:
            seen = ", ".join(f"{value[:16]} on rank {values.index(value)}" for value in dict.fromkeys(values))
            raise RunError(f"{what} differs between processes ({seen}): expected the same files on all machines")

    def start(self) -> None:
        """Create and lock the output folder, and store the settings there.

        `training` calls this after it has checked data and model; a recipe without training calls it directly.
        Raises RunError as `enter_folder` does.
        """
        self.on_main(self._enter_folder)
        if self.config.resume and not self.resumed:
            self.print(f"nothing to resume in {self.out}: the run starts from the beginning")
        if self.config.trackers:
            self.accelerator.project_configuration.logging_dir = str(self.out)
            self.accelerator.log_with = filter_trackers(list(self.config.trackers), self.out)
            # TensorBoard accepts neither None nor lists.
            self.accelerator.init_trackers(
                "seitpp", config={name: str(value) for name, value in self.settings.items()}
            )

    def _enter_folder(self) -> None:
        config = self.config
        self._lock = enter_folder(self.out, self.settings, resumed=self.resumed, overwrite=config.overwrite)
        if self.skipped:
            files.replace_text(self.out / SKIPPED, "".join(f"{line}\n" for line in self.skipped))

    def skip(self, errors: Iterable[str]) -> None:
        """Record images that are left out, a line for each; `start` writes them to skipped.txt."""
        self.skipped += map(escaped, errors)

    def change_lengths(self) -> None:
        """Store the other length of a resumed run, and remove its result if it had finished."""
        self.on_main(lambda: change_lengths(self.out, self.settings))

    def training(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        data_fingerprint: str,
        **more: Any,
    ) -> Training:
        """Start the training of a model, or with --resume continue from the newest intact checkpoint.

        `schedule` defines batches, duration, learning rate, and when checkpoints and evaluations are due;
        `data_fingerprint` identifies the training data. `more` may hold `clip`, the gradient norm to clip to;
        `ema`, a moving average of the weights, updated after every update; `flops_per_image`, for the MFU in the
        log; `sharing`, from which the size of micro-batches is chosen or checked. Raises RunError if the batch
        cannot be divided among the processes or does not fit into memory, UserError for an optimizer that this
        launch does not support, CheckpointError for a checkpoint of another model or of other data, and RunError
        for one that has more updates than the schedule.
        """
        return Training(self, model, optimizer, schedule=schedule, data_fingerprint=data_fingerprint, **more)

    def print(self, text: str) -> None:
        """Print once on each machine."""
        self.accelerator.print(text)

    def describe(
        self, *parts: object, model: nn.Module | None = None, chosen: Mapping[str, Choice] | None = None
    ) -> None:
        """Print the settings, one per line, then `parts` (data, view, training), model size and output folder.

        Settings at their default are left out, unless they were `chosen` for the user or are chosen by the run.
        """
        self.chosen |= chosen or {}
        lines = [settings_table(self.config, self.chosen)]
        lines += [str(part) for part in parts]
        if model is not None:
            trainable, frozen = (
                sum(p.numel() for p in model.parameters() if p.requires_grad == requires_grad) / 1e6
                for requires_grad in (True, False)
            )
            lines.append(f"{trainable + frozen:.2f} M parameters, {trainable:.2f} M of them trainable")
        processes = self.accelerator.num_processes
        lines.append(f"{processes} process(es), {self.workers} data loading ones each; writing to {self.out}")
        self.print("\n".join(lines))

    def eval_subset(self, dataset: Dataset) -> Dataset:
        """Return the images to evaluate on: the whole dataset, or in a dry run its first 64 images."""
        return Subset(dataset, range(min(len(dataset), DRY_RUN_IMAGES))) if self.config.dry_run else dataset

    def _recorded_speed(self) -> dict[str, float]:
        """Return the speed in result.json of a finished run that is resumed, which has nothing left to train."""
        path = self.out / RESULT
        stored = files.read_json(path, RunError, "the result of a run") if self.resumed and path.is_file() else {}
        return {SPEED: stored[SPEED]} if SPEED in stored else {}

    def finish(self, result: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> None:
        """Write result.json and release the folder. `report` follows, on the main process.

        The file holds `result`, the training speed if there was training, facts about the `data`, and the origin
        of the result: recipe, time, steps, processes, device, version and commit.
        """
        speed = self.progress.speed
        throughput = {SPEED: speed.images / speed.seconds} if speed and speed.images else self._recorded_speed()
        origin = {
            "recipe": self.recipe,
            "seconds": round(time.perf_counter() - self.started, 1),
            "steps": self.progress.step,
            "processes": self.accelerator.num_processes,
            "device": device_name(self.device),
            "seitpp": __version__,
            "git_commit": git_commit(),
        }
        skipped = {"skipped": len(self.skipped)} if self.skipped else {}
        figures, facts = {**skipped, **result, **throughput}, dict(data or {})
        self._finished = figures, facts, origin
        self.on_main(lambda: files.replace_json(self.out / RESULT, {**figures, **facts, **origin}))
        if self.is_main:
            files.unlock(self._lock)
        self.accelerator.end_training()

    def report(self, said: report.Report) -> None:
        """Write report.html, and print where the figures are and what makes sense next.

        The page has what the recipe has `said`, the result of `finish`, the settings, and how to repeat the run.
        Only the main process may call this, after `finish`, so that no picture is in the way of the result.
        """
        figures, data, origin = self._finished
        config, processes = self.config, self.accelerator.num_processes
        found = self.chosen.get("accumulation") if self.device.type == "cuda" else None
        written = report.Written(
            f"{self.recipe}, preset {config.preset}, seed {config.seed}",
            figures,
            data,
            origin,
            repeat.origins(config, self.chosen),
            repeat.command(
                self.recipe,
                config,
                processes=processes,
                chosen=self.chosen,
                accumulation=found and found.value,
            ),
        )
        files.replace_text(self.out / REPORT, report.page(said, written))
        if not config.dry_run:  # which keeps no files
            print(
                f"figures in {self.out / RESULT}, a page in {self.out / REPORT}, after {origin['seconds']:,.0f} s"
            )
            if steps := next_steps(self.recipe, config, self.out, result=figures | data):
                print(block(steps))
