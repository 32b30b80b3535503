"""Evaluation of a classifier on any number of processes: exact accuracies, or mean average precision."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from seitpp.data.dataset import evaluation_loader
from seitpp.engine.waiting import progress
from seitpp.errors import UserError

RANKED = 5
UNKNOWN = 255  # in every place of the multi-hot row of an image without a label
GATHERED = 1 << 24  # scores that are gathered and sorted at once, over all images


class Score(NamedTuple):
    """The number of `correct` images among `total`."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        """The accuracy in percent."""
        return 100 * self.correct / self.total


class ClassMap(NamedTuple):
    """The classes of an evaluation: n outputs of a model, and what the labels of the data are among them.

    `outputs` (n,) int64 are numbers of the model's classes; the others cannot be predicted. `labels` (m,) int64
    has the number in 0 .. n - 1 of each of the data's m classes, -1 for a class that is left out. `names` are the
    n class names.
    """

    outputs: Tensor
    labels: Tensor
    names: list[str]


class Predictions(NamedTuple):
    """The predictions for a dataset, in its order, on the CPU.

    `ranked` (N, 5) int64 are the five most likely classes, the most likely first, filled up with -1 where there
    are fewer classes; `labels` (N,) int64.
    """

    ranked: Tensor
    labels: Tensor

    def top(self, k: int) -> Score:
        """Count the images whose label is among the `k` most likely classes, k <= 5."""
        return Score(int((self.ranked[:, :k] == self.labels.unsqueeze(1)).sum()), len(self.labels))

    def balanced_accuracy(self) -> float:
        """Return the mean over the classes that occur of the percentage of their images that is predicted."""
        images = self.labels.bincount()
        correct = self.labels[self.ranked[:, 0] == self.labels].bincount(minlength=len(images))
        occurs = images > 0
        return 100 * (correct[occurs].double() / images[occurs]).mean().item()

    def accuracies(self) -> dict[str, float]:
        """Return top-1, top-5 and balanced accuracy in percent, as "top1", "top5" and "balanced_accuracy"."""
        return {
            "top1": self.top(1).percent,
            "top5": self.top(5).percent,
            "balanced_accuracy": self.balanced_accuracy(),
        }


def score_classifier(
    model: nn.Module,
    dataset: Dataset,
    *,
    inputs: Callable[[Any], Tensor],
    accelerator: Accelerator,
    workers: int = 0,
    multi_label: bool = False,
) -> dict[str, float]:
    """Return the accuracies of `predict`, or with `multi_label` the mean average precision in percent, "mAP"."""
    where = {"inputs": inputs, "accelerator": accelerator, "workers": workers}
    if multi_label:
        return {"mAP": mean_of_known(class_precisions(model, dataset, **where))}
    return predict(model, dataset, **where).accuracies()


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset: Dataset,
    *,
    inputs: Callable[[Any], Tensor],
    accelerator: Accelerator,
    workers: int = 0,
    batch_size: int = 256,
    classes: ClassMap | None = None,
) -> Predictions:
    """Predict the five most likely classes of every image of a dataset; every process gets all of them.

    `dataset` returns batches with `labels`; `inputs` turns a batch into the input of the model. Of n processes,
    each evaluates every n-th batch, possibly none; each image counts exactly once. With `classes`, only these are
    predicted, and images of classes that are left out are not among the predictions. Raises UserError if an image
    has no label, or if none is left.
    """
    loader, batches = _evaluated(model, dataset, inputs, accelerator, workers=workers, batch_size=batch_size)
    empty = torch.empty(0, dtype=torch.long, device=accelerator.device)
    ranked, labels = [empty.view(0, RANKED)], [empty]
    outputs = classes and classes.outputs.to(accelerator.device)
    for batch, logits in batches:
        logits = logits if outputs is None else logits[:, outputs]
        top = logits.topk(min(RANKED, logits.shape[1]), dim=1).indices
        ranked.append(F.pad(top, (0, RANKED - top.shape[1]), value=-1))
        labels.append(batch.labels)
    indices = indices_of(loader).to(accelerator.device)
    predictions = Predictions(
        *(gather_in_order(torch.cat(part), indices, accelerator).cpu() for part in (ranked, labels))
    )
    _check_labels((predictions.labels < 0).sum().item(), len(predictions.labels))
    return _mapped(predictions, classes) if classes else predictions


@torch.no_grad()
def class_precisions(
    model: nn.Module,
    dataset: Dataset,
    *,
    inputs: Callable[[Any], Tensor],
    accelerator: Accelerator,
    workers: int = 0,
    batch_size: int = 256,
    classes: ClassMap | None = None,
) -> Tensor:
    """Return the average precision of each class on a multi-label dataset: (classes,) float64 in [0, 1].

    It is NaN for a class without images; images without a label are not counted. Arguments are those of `predict`,
    but batches have multi-hot `labels`. Every process gets the same numbers. Each keeps the scores of its own
    images on the CPU, and those of few classes at once for all images.
    """
    loader, batches = _evaluated(model, dataset, inputs, accelerator, workers=workers, batch_size=batch_size)
    scores, labels = [], []
    for batch, logits in batches:
        scores.append((logits if classes is None else logits[:, classes.outputs.to(logits.device)]).cpu())
        labels.append(batch.labels.cpu() if classes is None else _targets(batch.labels.cpu(), classes))
    number = len(classes.outputs) if classes else model.num_classes
    empty = torch.empty(0, number)
    own = torch.cat([empty, *scores]), torch.cat([empty.byte(), *labels])
    indices, found = indices_of(loader).to(accelerator.device), []
    for part in torch.arange(number).split(max(1, GATHERED // len(dataset))):
        whole = [
            gather_in_order(values[:, part].to(accelerator.device), indices, accelerator).cpu() for values in own
        ]
        known = whole[1][:, 0] != UNKNOWN
        found.append(average_precisions(whole[0][known], whole[1][known]))
    return torch.cat(found)


def average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the average precision of each class: (classes,) float64 in [0, 1], NaN for a class without images.

    It is the sum over the thresholds of precision times the gain in recall, where images with equal scores share a
    threshold. `scores` are (N, classes) float32, `targets` (N, classes) uint8: 1 for the classes of an image.
    """
    scores, order = scores.sort(dim=0, descending=True)
    hits = targets.gather(0, order).double()
    places = torch.arange(1, len(scores) + 1, dtype=torch.double).unsqueeze(1).expand_as(hits)
    # The last place of the images with an equal score: the next place from below at which the score changes.
    changes = torch.ones_like(hits, dtype=torch.bool)
    changes[:-1] = scores[:-1] != scores[1:]
    last = torch.where(changes, places, len(scores)).flip(0).cummin(dim=0).values.flip(0)
    precision = hits.cumsum(dim=0).gather(0, last.long() - 1) / last
    return (precision * hits).sum(dim=0) / hits.sum(dim=0)


def mean_of_known(precisions: Tensor) -> float:
    """Return the mean average precision in percent, over the classes with images (not NaN)."""
    return 100 * precisions.nanmean().item()


def class_map(
    model_names: Sequence[str], data_names: Sequence[str], chosen: Sequence[str] | None, *, model: str
) -> ClassMap:
    """Return the classes of an evaluation: those of the data, or the `chosen` ones, found by name.

    Raises UserError if one of them is not a class of `model`, or if no class of the data is among them.
    """
    names = list(data_names if chosen is None else chosen)
    numbers = {name: number for number, name in enumerate(model_names)}
    if unknown := [name for name in names if name not in numbers]:
        more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
        raise UserError(
            f"class {unknown[0]!r}{more} is not among the {len(numbers):,} classes of {model}: name images, or "
            "with --classes, classes that it knows"
        )
    places = {name: place for place, name in enumerate(names)}
    labels = [places.get(name, -1) for name in data_names]
    if max(labels, default=-1) < 0:
        raise UserError(
            f"no class of the images is one of the {len(names):,} of --classes, expected some: the images have "
            f"{data_names[0]!r}, .., --classes {names[0]!r}, .."
        )
    return ClassMap(torch.tensor([numbers[name] for name in names]), torch.tensor(labels), names)


def indices_of(loader: DataLoader) -> Tensor:
    """Return the indices (n,) int64 of the images that an evaluation loader of this process loads, in order."""
    return torch.tensor(list(chain.from_iterable(loader.batch_sampler)), dtype=torch.long)


def gather_in_order(rows: Tensor, indices: Tensor, accelerator: Accelerator) -> Tensor:
    """Gather the rows of a dataset (N, ...) on every process, in the order of the dataset.

    Each process has `rows` (n, ...), n >= 0, and `indices` (n,) int64, their positions in the dataset.
    """
    rows, indices = (
        accelerator.gather(accelerator.pad_across_processes(part, pad_index=pad))
        for part, pad in ((rows, 0), (indices, -1))
    )
    real = indices >= 0
    ordered = rows.new_empty(int(real.sum()), *rows.shape[1:])
    ordered[indices[real]] = rows[real]
    return ordered


def _evaluated(
    model: nn.Module,
    dataset: Dataset,
    inputs: Callable[[Any], Tensor],
    accelerator: Accelerator,
    *,
    workers: int,
    batch_size: int,
) -> tuple[DataLoader, Iterator[tuple[Any, Tensor]]]:
    """Return this process's loader, and an iterator over its batches and their logits in float32."""
    model = model.to(accelerator.device).eval()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    loader = evaluation_loader(dataset, batch_size, rank=rank, ranks=ranks, workers=workers)

    def batches() -> Iterator[tuple[Any, Tensor]]:
        for batch in progress(loader, "evaluating"):
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                logits = model(inputs(batch))
            yield batch, logits.float()

    return loader, batches()


def _check_labels(missing: int, images: int) -> None:
    if missing:
        raise UserError(
            f"{missing:,} of {images:,} images have no label, expected one for each: evaluate images with labels"
        )


def _mapped(predictions: Predictions, classes: ClassMap) -> Predictions:
    labels = classes.labels[predictions.labels]
    kept = labels >= 0
    if not kept.any():
        raise UserError(f"none of {len(labels):,} images is of the {len(classes.names):,} evaluated classes")
    return Predictions(predictions.ranked[kept], labels[kept])


def _targets(labels: Tensor, classes: ClassMap) -> Tensor:
    """Map multi-hot labels (B, m) of the data to the evaluated classes: (B, n)."""
    known, there = labels[:, 0] != UNKNOWN, classes.labels >= 0
    targets = torch.zeros(len(labels), len(classes.outputs), dtype=torch.uint8)
    targets[:, classes.labels[there]] = labels[:, there]
    return targets.masked_fill(~known.unsqueeze(1), UNKNOWN)
