"""Evaluation of a classifier: predictions, and exact top-1 and top-5 counts, on any number of processes."""

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from seitpp.data.dataset import evaluation_loader

RANKED = 5


class Score(NamedTuple):
    """The number of `correct` images among `total`."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        """The accuracy in percent."""
        return 100 * self.correct / self.total


class Predictions(NamedTuple):
    """The predictions for a dataset, in its order.

    `ranked` (N, 5) int64 are the five most likely classes, the most likely first, filled up with -1 where there
    are fewer classes; `labels` (N,) int64.
    """

    ranked: Tensor
    labels: Tensor

    def top(self, k: int) -> Score:
        """Count the images whose label is among the `k` most likely classes, k <= 5."""
        return Score(int((self.ranked[:, :k] == self.labels.unsqueeze(1)).sum()), len(self.labels))

    def accuracies(self) -> dict[str, float]:
        """Return top-1 and top-5 accuracy in percent, as "top1" and "top5"."""
        return {"top1": self.top(1).percent, "top5": self.top(5).percent}

    def confusion(self, num_classes: int) -> Tensor:
        """Return the confusion matrix (num_classes, num_classes) int64: row = label, column = prediction."""
        cells = self.labels * num_classes + self.ranked[:, 0]
        return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset: Dataset,
    *,
    inputs: Callable[[Any], Tensor],
    accelerator: Accelerator,
    workers: int = 0,
    batch_size: int = 256,
) -> Predictions:
    """Predict the five most likely classes of every image of a dataset; every process gets all of them.

    `dataset` returns batches with `labels`; `inputs` turns a batch into the input of the model. Of n processes,
    each evaluates every n-th batch, possibly none; each image counts exactly once.
    """
    device = accelerator.device
    model = model.to(device).eval()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    loader = evaluation_loader(dataset, batch_size, rank=rank, ranks=ranks, workers=workers)
    empty = torch.empty(0, dtype=torch.long, device=device)
    ranked, labels = [empty.view(0, RANKED)], [empty]
    for batch in loader:
        batch = batch.to(device)
        with accelerator.autocast():
            logits = model(inputs(batch))
        top = logits.float().topk(min(RANKED, logits.shape[1]), dim=1).indices
        ranked.append(F.pad(top, (0, RANKED - top.shape[1]), value=-1))
        labels.append(batch.labels)
    indices = indices_of(loader).to(device)
    return Predictions(*(gather_in_order(torch.cat(part), indices, accelerator) for part in (ranked, labels)))


def indices_of(loader: DataLoader) -> Tensor:
    """Return the indices (n,) int64 of the images that an evaluation loader of this process loads, in order."""
    return torch.tensor(list(chain.from_iterable(loader.batch_sampler)), dtype=torch.long)


def gather_in_order(rows: Tensor, indices: Tensor, accelerator: Accelerator) -> Tensor:
    """Gather the rows of a dataset (N, ...) on every process, in the order of the dataset.

    Each process has `rows` (n, ...), n >= 0, and `indices` (n,) int64, their positions in the dataset.
    """
    rows, indices = (
        accelerator.gather(accelerator.pad_across_processes(part, pad_index=-1)) for part in (rows, indices)
    )
    real = indices >= 0
    ordered = rows.new_empty(int(real.sum()), *rows.shape[1:])
    ordered[indices[real]] = rows[real]
    return ordered
