"""Learn classes task by task with a replay memory that is counted in bytes, on tokens or on pixels (SeiT).

    accelerate launch recipes/continual.py                  # the embedded digits, as tokens
    accelerate launch recipes/continual.py --input pixels   # the same images in the same order
    accelerate launch recipes/continual.py published --tasks 10 --memory 574MB --store imagenet100-tokens
    accelerate launch recipes/continual.py published --tasks 10 --memory 574MB --input pixels --data imagenet100
    accelerate launch recipes/continual.py --figure runs/tokens-1 runs/tokens-2 runs/pixels-1 --out runs/figure

Experience Replay: one pass over each task, each step a batch of the task and as many images of a reservoir memory
(downstream/continual/order.py), one cross-entropy, no augmentation. After each task the reduced ResNet-18 of GEM
chooses among all classes seen so far (figures: downstream/continual/tasks.py). The baselines are --memory 0, and
--tasks 1 --memory 0, which is all classes at once ("joint").

--count says how many bytes an image takes: `paper`, float32 values of pixels and 4-byte ids; `uint8`, a byte a
value (pixels); `jpeg`, the image files (pixels); `stored`, the encoded ids and the label (tokens). `published` is
the paper's ImageNet-100 in 10 tasks, where a memory of 1,000 pixel images holds all token images. Batch size and
class order are not published; neither the result nor the time on a GPU is measured. `digits` (the default) takes
20 s as tokens and 65.1 +- 7.8 % average accuracy, 90 s and 20.2 +- 1.5 % as pixels, on one CPU core (three seeds,
tests/bench/continual_digits.py).
The recipe reads a token store, or labeled images. It writes config.json, metrics.jsonl, evaluations.jsonl,
checkpoints/, matrix.png and result.json into --out, but no model file. With --figure it trains nothing: it draws
the accuracies of earlier runs over their memory into memory.png, a line for tokens and one for pixels.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import seitpp.models  # noqa: F401 (registers our models in timm)
from downstream.continual.norm import GlobalBatchNorm
from downstream.continual.order import ReplayOrder, TaskSchedule
from downstream.continual.sizes import COUNTS, Count, images_held, pixel_bytes, token_bytes
from downstream.continual.tasks import classes_seen, divide_classes, figures, images_of, task_accuracies
from seitpp import files, plots
from seitpp.augment import EvalPixelView, EvalView
from seitpp.augment.maps import both_sides
from seitpp.codebook import Codebook
from seitpp.data.dataset import Batch, Chosen, TokenDataset, indices_within
from seitpp.engine.config import TrainConfig
from seitpp.engine.evaluate import predict
from seitpp.engine.findings import learned
from seitpp.engine.folder import RESULT
from seitpp.engine.inputs import (
    image_facts,
    open_classified,
    open_stores,
    store_facts,
    train_subset,
)
from seitpp.engine.ranges import parse_bytes
from seitpp.engine.report import Report, plot
from seitpp.engine.run import Run
from seitpp.errors import UserError, refusing
from seitpp.images.batches import ImageDataset, Pixels
from seitpp.recipe import run_recipe

MODEL = "seit_resnet18_reduced"


@dataclass(frozen=True)
class Config(TrainConfig):
    """Settings of class-incremental learning. The defaults are ImageNet-100 in 10 tasks, with the memory of 1,000
    images of float32 pixels (SeiT).
    """

    accumulation: ClassVar[int] = 1  # batch norm needs the whole batch
    input: Literal["tokens", "pixels"] = "tokens"  # What the network sees and the memory holds.
    store: str | None = None  # Folder of a token store. None: the embedded digits.
    data: str | None = None  # Labeled images, as for recipes/tokenize_images.py. None: the embedded digits.
    split: str | None = "train"  # Split of --data to train on. None: all of it.
    validation_split: str | None = "validation"  # Split of --data to evaluate on. None: every twentieth image.
    skip_errors: bool = False  # Leave out images of --data that cannot be read, and list them in OUT/skipped.txt.
    size: int | tuple[int, int] = 224  # Pixels only: side of the images, or height and width.
    # Number of tasks, among which the classes are divided; if it does not divide them, the first have one more.
    tasks: int = 10
    class_order: Literal["list", "seed"] = "list"  # Order of the classes: that of the list, or a random one.
    memory: str = "602.112MB"  # Size of the memory: 574MB, 574.2MiB, 24.6kB, .., or 0 for none.
    count: Count = "paper"  # How the bytes of an image are counted, see above.
    # --count jpeg only: bytes of an image, as 109kB, the mean of ImageNet. None: the mean of the image files.
    file_bytes: str | None = None
    batch_size: int = 10  # Number of images of the task per update; as many come from the memory.
    lr: float = 0.1  # Learning rate of SGD.
    checkpoint_epochs: float = 0.05  # Part of the pass between two checkpoints; each task ends with one, too.
    figure: tuple[str, ...] = ()  # Folders of earlier runs, whose results are drawn.


PRESETS = {"published": Config()}
PRESETS["digits"] = replace(
    PRESETS["published"],
    preset="digits",
    tasks=5,
    memory="24.6kB",  # 96 images of 8 x 8 tokens, 2 of 32 x 32 pixels
    size=32,
    precision="no",
    workers=0,
)
PRESETS["smoke"] = replace(PRESETS["digits"], preset="smoke", fraction=0.15, log_steps=1, checkpoint_epochs=0.1)


def main(config: Config) -> None:
    # 1. Run: the output folder, the processes, the seed.
    check_settings(config)
    run = Run("continual", config)
    if config.figure:
        draw(config, run)
        return
    if run.launch.splits_training:
        raise UserError(
            "tasks are not learned under FSDP or DeepSpeed: launch with recipes/accelerate/one_gpu.yaml"
        )

    # 2. Data, as tokens or as pixels, and its tasks.
    data = (open_tokens if config.input == "tokens" else open_pixels)(config, run)
    images = train_subset(config, data.train)
    seed = config.seed if config.class_order == "seed" else None
    tasks = divide_classes(len(data.class_names), config.tasks, seed)
    check_validation(images_of(data.validation_labels, tasks))

    # 3. Memory: so many images of so many bytes; which ones follows from seed and step.
    size = parse_bytes(config.memory, "--memory")
    capacity = images_held(size, data.image_bytes, config.count)
    labels = data.labels[indices_within(images)]
    order = ReplayOrder(images_of(labels, tasks), config.batch_size, config.seed, capacity=capacity)

    # 4. Model and optimization.
    channels, classes = data.shape[0], len(data.class_names)
    model = timm.create_model(MODEL, in_chans=channels, num_classes=classes, norm_layer=GlobalBatchNorm)
    schedule = TaskSchedule.one_pass(order, lr=config.lr, checkpoint_epochs=config.checkpoint_epochs)
    optimizer = torch.optim.SGD(model.to(run.device).parameters(), lr=0.0)
    training = run.training(model, optimizer, schedule, data_fingerprint=data.fingerprint)
    run.describe(
        f"{len(images):,} images of {data.shape} in {len(tasks)} tasks; {data.image_bytes:,.1f} bytes each by "
        f"--count {config.count}: the memory holds {capacity:,}",
        training,
        model=model,
    )

    # 5. Training: one pass, and after each task an evaluation among the classes seen so far.
    view, get_inputs = data.view.to(run.device), attrgetter(data.field)

    def inputs(batch: Batch | Pixels) -> Tensor:
        return view(get_inputs(batch))

    def evaluate() -> dict[str, float]:
        seen = tasks[: order.tasks_seen(training.step)]
        shown = np.sort(np.concatenate(images_of(data.validation_labels, seen)))
        predictions = predict(
            training.unsharded(model),
            run.eval_subset(Chosen(data.validation, shown)),
            inputs=inputs,
            accelerator=run.accelerator,
            workers=run.workers,
            classes=classes_seen(seen, classes),
        )
        return {f"task_{number}": value for number, value in enumerate(task_accuracies(predictions, seen), 1)}

    for _, batch in training.steps(images, evaluate):
        logits = training.wrapped(inputs(batch))
        accuracy = (logits.argmax(dim=1) == batch.labels).float().mean()
        training.update(F.cross_entropy(logits, batch.labels), accuracy=accuracy)

    # 6. Results: accuracies, figures, and a picture.
    last = {"step": training.step, **evaluate()}
    accuracies = run.on_main(lambda: accuracies_by_task([*run.evaluations.read(), last], order))
    result = figures(accuracies)
    run.print("\n".join(f"{name:18} {value:6.2f} %" for name, value in result.items() if value is not None))
    held = labels[order.memory(training.step)]
    memory = {"memory_bytes": size, "bytes_per_image": data.image_bytes, "memory_images": capacity}
    by_task = {
        "tasks": [[data.class_names[number] for number in part] for part in tasks],
        "held_by_task": [int(np.isin(held, part).sum()) for part in tasks],
        "accuracies": accuracies,
    }
    run.finish({"input": config.input, "count": config.count, **memory, **result, **by_task}, data.facts)
    if run.is_main:
        plots.accuracy_matrix(accuracies, run.out / "matrix.png")
        text = "Accuracy on each task, in percent, after each task."
        shown = [plot(run.out / "matrix.png", "Accuracies", text)]
        run.report(Report("Classes learned task by task", learned(result, len(tasks), capacity), shown))


class Data(NamedTuple):
    """The images of a run, and what they are for the network and for the memory."""

    train: Dataset
    validation: Dataset
    labels: np.ndarray  # (N,) int64, of all training images
    validation_labels: np.ndarray
    class_names: list[str]
    field: str  # the field of a batch that holds the inputs: "ids" or "images"
    view: nn.Module  # inputs -> input of the network
    shape: tuple[int, int, int]  # channels, height and width of such an input
    image_bytes: float  # of an image in the memory
    fingerprint: str  # of the training data
    facts: dict[str, Any]  # for result.json


def open_tokens(config: Config, run: Run) -> Data:
    """Open the token store, whose images are whole grids of vectors. Raises UserError if it has no classes."""
    train, validation = open_stores(run, config.store)
    for store in (train, validation):
        store.require_classes("continual")
    codebook = Codebook.of(train.books)
    return Data(
        TokenDataset(train),
        TokenDataset(validation),
        train.labels,
        validation.labels,
        train.class_names or [str(number) for number in range(train.num_classes)],
        "ids",
        EvalView(train.grid, codebook),
        (codebook.dim, *train.grid),
        token_bytes(train, config.count),
        train.fingerprint,
        store_facts(train, validation, config),
    )


def open_pixels(config: Config, run: Run) -> Data:
    """Open the images, each squashed to --size. Raises UserError if they do not have one class each."""
    train, validation = open_classified(run, config.validation_split, "continual")
    if train.labels.multi_label:
        raise UserError(f"{config.data}: its images have several classes each, expected one; name other images")
    size = both_sides(config.size)
    images = ImageDataset(train, size)
    shape = (3, *size)
    if config.file_bytes:
        image_bytes = float(parse_bytes(config.file_bytes, "--file-bytes"))
    else:
        image_bytes = run.on_main(lambda: pixel_bytes(shape, train, config.count))
    return Data(
        images,
        ImageDataset(validation, size),
        *(np.array(source.labels.values, np.int64) for source in (train, validation)),
        train.class_names,
        "images",
        EvalPixelView(),
        shape,
        image_bytes,
        f"{len(train)} images of {len(train.class_names)} classes",
        image_facts(images, train, validation),
    )


def check_settings(config: Config) -> None:
    """Raise UserError for settings that contradict each other."""
    other = {"tokens": "data", "pixels": "store"}[config.input]
    if getattr(config, other):
        raise UserError(f"--input {config.input} with --{other} {getattr(config, other)}: leave one of them out")
    if config.count not in COUNTS[config.input]:
        expected = " or ".join(COUNTS[config.input])
        raise UserError(f"--count {config.count} with --input {config.input}: expected {expected}")
    if config.file_bytes and (config.count != "jpeg" or parse_bytes(config.file_bytes, "--file-bytes") < 1):
        raise UserError(f"--file-bytes {config.file_bytes} is the size of a file for --count jpeg: leave it out")


def check_validation(images: list[np.ndarray]) -> None:
    """Raise UserError if a task has no images to evaluate on."""
    empty = [number for number, found in enumerate(images, 1) if not len(found)]
    if empty:
        raise UserError(f"task {empty[0]} of {len(images)} has no validation images: pass fewer --tasks")


def accuracies_by_task(evaluations: list[dict[str, Any]], order: ReplayOrder) -> list[list[float]]:
    """Return a row for each task that was learned: the accuracies after it on this task and on those before."""
    rows = {}
    for record in evaluations:
        seen = order.tasks_seen(record["step"])
        rows[seen] = [record[f"task_{number}"] for number in range(1, seen + 1)]
    return list(rows.values())


def draw(config: Config, run: Run) -> None:
    """Draw the accuracies of the runs --figure over the bytes of their memories."""
    lines, levels = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    lengths = {}
    for folder in config.figure:
        path = Path(folder) / RESULT
        result = files.read_json(path, UserError, "the result of a run of continual")
        with refusing(UserError, f"{path} cannot be drawn", "the result of a run of continual"):
            name = f"{result['input']}, count {result['count']}"
            size, tasks, value = result["memory_bytes"], len(result["tasks"]), result["average_accuracy"]
            if tasks == 1:
                levels[f"{result['input']}, all at once"].append(value)
            elif size == 0:
                levels[f"{result['input']}, no memory"].append(value)
            else:
                lines[name][size].append(value)
            lengths.setdefault(tasks, folder)
    if len(lengths.keys() - {1}) > 1:
        (one, first), (other, second) = [item for item in lengths.items() if item[0] > 1][:2]
        raise UserError(f"{first} has {one} tasks, {second} {other}: expected equal numbers; name other runs")
    run.start()
    path = run.out / "memory.png"
    if run.is_main:
        plots.accuracy_over_memory(lines, levels, path)
    run.print(f"{len(config.figure)} runs in {path}")
    run.finish({"lines": lines, "levels": levels})
    if run.is_main:
        shown = [plot(path, "Accuracies", "Average accuracy over the bytes of the memory, in percent.")]
        run.report(Report(f"Continual learning, {len(config.figure)} runs compared", shown=shown))


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
