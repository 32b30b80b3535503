"""How good a classifier is: top-1 and top-5 as exact counts, on any number of processes."""

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
    """`correct` of `total` images."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.total


class Predictions(NamedTuple):
    """Of a whole split, in its order: `ranked` (N, 5) int64, the likeliest classes first, then -1 where there are
    fewer; `labels` (N,) int64.
    """

    ranked: Tensor
    labels: Tensor

    def top(self, k: int) -> Score:
        """How many images have their label among the first `k` classes."""
        return Score(int((self.ranked[:, :k] == self.labels.unsqueeze(1)).sum()), len(self.labels))

    def accuracies(self) -> dict[str, float]:
        """Top-1 and top-5 in percent."""
        return {"top1": self.top(1).percent, "top5": self.top(5).percent}

    def confusion(self, num_classes: int) -> Tensor:
        """(num_classes, num_classes) int64 counts: row = label, column = the most likely class."""
        cells = self.labels * num_classes + self.ranked[:, 0]
        return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset: Dataset,
    inputs: Callable[[Any], Tensor],
    accelerator: Accelerator,
    workers: int = 0,
    batch_size: int = 256,
) -> Predictions:
    """The five likeliest classes of every image of a dataset, on every process.

    `dataset` gives batches with `labels`, of which `inputs` makes what the model takes. Each process takes every
    n-th batch, which may be none; every image counts once on any number of processes.
    """
    device = accelerator.device
    model = model.to(device).eval()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    loader = evaluation_loader(dataset, batch_size, rank=rank, ranks=ranks, workers=workers)
    nothing = torch.empty(0, dtype=torch.long, device=device)
    ranked, labels = [nothing.view(0, RANKED)], [nothing]
    for batch in loader:
        batch = batch.to(device)
        with accelerator.autocast():
            logits = model(inputs(batch))
        likely = logits.float().topk(min(RANKED, logits.shape[1]), dim=1).indices
        ranked.append(F.pad(likely, (0, RANKED - likely.shape[1]), value=-1))
        labels.append(batch.labels)
    indices = indices_of(loader).to(device)
    return Predictions(*(gather_in_order(torch.cat(part), indices, accelerator) for part in (ranked, labels)))


def indices_of(loader: DataLoader) -> Tensor:
    """(n,) int64: the images that an evaluation loader gives this process, in its order."""
    return torch.tensor(list(chain.from_iterable(loader.batch_sampler)), dtype=torch.long)


def gather_in_order(rows: Tensor, indices: Tensor, accelerator: Accelerator) -> Tensor:
    """Each process's `rows` (n, ...) of a dataset, n >= 0, become all of its rows (N, ...), on every process.

    `indices` (n,) int64 are their places in the dataset.
    """
    rows, indices = (
        accelerator.gather(accelerator.pad_across_processes(part, pad_index=-1)) for part in (rows, indices)
    )
    real = indices >= 0
    whole = rows.new_empty(int(real.sum()), *rows.shape[1:])
    whole[indices[real]] = rows[real]
    return whole
