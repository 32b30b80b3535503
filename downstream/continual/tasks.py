"""The tasks of class-incremental learning, and the figures by which it is judged.

A[t, u] is the accuracy on task u after task t in percent, both counted from 0, where a model chooses among the
classes of the tasks 0 .. t. With T tasks:

| figure            | formula                                                             | from       |
|-------------------|---------------------------------------------------------------------|------------|
| average accuracy  | mean over u of A[T-1, u]                                            | 1706.08840 |
| forgetting        | mean over u < T-1 of (max over u <= t < T-1 of A[t, u]) - A[T-1, u] | 1801.10112 |
| backward transfer | mean over u < T-1 of A[T-1, u] - A[u, u]                            | 1706.08840 |

The last column has arXiv's numbers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from seitpp.engine.evaluate import ClassMap, Predictions
from seitpp.errors import UserError

CLASS_ORDER = 2 << 40  # with the seed the key of the order; larger than any epoch, the other numbers used with it


def divide_classes(classes: int, tasks: int, seed: int | None) -> list[np.ndarray]:
    """Divide the classes 0, 1, .. among tasks: a list of arrays (n,) int64.

    They are in the order of the list, or without None for `seed` in a random one. Where the tasks do not divide
    the classes, the first tasks have one class more. Raises UserError for more tasks than classes.
    """
    if tasks > classes:
        raise UserError(f"--tasks {tasks}: expected 1 to {classes}, the number of classes")
    order = np.arange(classes)
    if seed is not None:
        order = np.random.Generator(np.random.Philox(key=[seed, CLASS_ORDER])).permutation(classes)
    return np.array_split(order, tasks)


def images_of(labels: np.ndarray, tasks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the positions (n,) int64 of the images of each task; `labels` (N,) int64 are those of all images."""
    return [np.flatnonzero(np.isin(labels, classes)) for classes in tasks]


def classes_seen(tasks: Sequence[np.ndarray], classes: int) -> ClassMap:
    """Return the evaluation that chooses among the classes of the `tasks` seen so far, of all `classes`.

    The predicted numbers are places: first those of the classes of the first task, and so on.
    """
    seen = torch.from_numpy(np.concatenate(tasks))
    labels = torch.full((classes,), -1)
    labels[seen] = torch.arange(len(seen))
    return ClassMap(seen, labels, [str(number) for number in seen.tolist()])


def task_accuracies(predictions: Predictions, tasks: Sequence[np.ndarray]) -> list[float]:
    """Return the accuracy on each of the `tasks` of `classes_seen` in percent, nan for one without images."""
    task_of_place = torch.arange(len(tasks)).repeat_interleave(torch.tensor([len(classes) for classes in tasks]))
    correct: Tensor = (predictions.ranked[:, 0] == predictions.labels).double()
    of_image = task_of_place[predictions.labels]
    return [100 * correct[of_image == task].mean().item() for task in range(len(tasks))]


def figures(accuracies: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Return the figures of the table at the top of this file.

    Row t of `accuracies` has A[t, 0] .. A[t, t]. With one task, nothing can be forgotten, and the last two figures
    are None.
    """
    last, before = np.array(accuracies[-1]), accuracies[:-1]
    learned = np.array([row[-1] for row in before])
    best = np.array([max(row[task] for row in before[task:]) for task in range(len(before))])
    return {
        "average_accuracy": last.mean().item(),
        "forgetting": (best - last[:-1]).mean().item() if before else None,
        "backward_transfer": (last[:-1] - learned).mean().item() if before else None,
    }
