"""How good a classifier or frozen features are: top-1 and top-5, weighted k-NN, a linear probe; exact counts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

from seitpp.tokens.dataset import evaluation_loader

NEIGHBOURS, TEMPERATURE = 20, 0.07  # the usual weighted k-NN (Wu et al. 2018, "Unsupervised feature learning ...")
QUERY_CELLS = 1 << 25  # cells of the query x bank similarity matrix that are held at once


class Features(NamedTuple):
    """`vectors` (N, C) float32 and `labels` (N,) int64, in the order of the split."""

    vectors: Tensor
    labels: Tensor


class Score(NamedTuple):
    """`correct` of `total` images."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.total


class Predictions(NamedTuple):
    """Of a whole split, in its order: `ranked` (N, k) int64, the likeliest classes first; `labels` (N,) int64."""

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
    n-th image; every image counts once on any number of processes.
    """
    model = model.to(accelerator.device).eval()
    ranks, rank = accelerator.num_processes, accelerator.process_index
    ranked, labels = [], []
    for batch in evaluation_loader(dataset, batch_size, rank, ranks, workers):
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            logits = model(inputs(batch))
        ranked.append(logits.float().topk(min(5, logits.shape[1]), dim=1).indices)
        labels.append(batch.labels)
    share = -(-len(dataset) // ranks)
    return Predictions(*(_gather(torch.cat(part), share, len(dataset), accelerator) for part in (ranked, labels)))


@torch.no_grad()
def extract_features(
    encoder: VisionTransformer, dataset: Dataset, view: nn.Module, accelerator: Accelerator, batch_size: int = 256
) -> Features:
    """Features of a whole dataset of tokens, on every process: the cls output and the mean of the patch outputs,
    side by side.

    Each process encodes every n-th image; what it pads to make shares equal is cut off again, so every image
    counts once on any number of processes.
    """
    encoder = encoder.to(accelerator.device).eval()
    ranks, rank = accelerator.num_processes, accelerator.process_index
    vectors, labels = [], []
    for batch in evaluation_loader(dataset, batch_size, rank, ranks, workers=0):
        with accelerator.autocast():
            output = encoder.forward_features(view(batch.ids.to(accelerator.device)))
        prefix = encoder.num_prefix_tokens
        vectors.append(torch.cat([output[:, 0], output[:, prefix:].mean(dim=1)], dim=1).float())
        labels.append(batch.labels.to(accelerator.device))
    share = -(-len(dataset) // ranks)
    return Features(*(_gather(torch.cat(part), share, len(dataset), accelerator) for part in (vectors, labels)))


def _gather(part: Tensor, share: int, total: int, accelerator: Accelerator) -> Tensor:
    padding = part.new_zeros(share - len(part), *part.shape[1:])
    shares = accelerator.gather(torch.cat([part, padding]).unsqueeze(0))
    return shares.transpose(0, 1).reshape(-1, *part.shape[1:])[:total]


def knn(bank: Features, queries: Features, num_classes: int) -> Score:
    """Weighted k-nearest neighbours by cosine similarity: 20 votes, each of weight exp(similarity / 0.07)."""
    keys, values = F.normalize(bank.vectors, dim=1), F.normalize(queries.vectors, dim=1)
    neighbours = min(NEIGHBOURS, len(keys))
    correct = 0
    size = max(1, QUERY_CELLS // len(keys))
    for chunk, labels in zip(values.split(size), queries.labels.split(size), strict=True):
        similarity, index = (chunk @ keys.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        votes.scatter_add_(1, bank.labels[index], (similarity / TEMPERATURE).exp())
        correct += int((votes.argmax(dim=1) == labels).sum())
    return Score(correct, len(queries.labels))


def linear_probe(train: Features, validation: Features, num_classes: int, penalty: float = 1e-3) -> Score:
    """Softmax regression on standardised features: full-batch L-BFGS, L2 `penalty` on the weights."""
    mean, deviation = train.vectors.mean(dim=0), train.vectors.std(dim=0).clamp(min=1e-6)
    inputs, queries = ((part.vectors - mean) / deviation for part in (train, validation))
    weight = torch.zeros(inputs.shape[1], num_classes, device=inputs.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, train.labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    correct = ((queries @ weight + bias).argmax(dim=1) == validation.labels).sum()
    return Score(int(correct), len(validation.labels))


def probe(
    encoder: VisionTransformer,
    train: Dataset,
    validation: Dataset,
    num_classes: int,
    view: nn.Module,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Top-1 accuracies (percent) of a frozen encoder on the validation images: linear probe and weighted k-NN."""
    bank = extract_features(encoder, train, view, accelerator)
    queries = extract_features(encoder, validation, view, accelerator)
    return {
        "linear_probe_top1": linear_probe(bank, queries, num_classes).percent,
        "knn_top1": knn(bank, queries, num_classes).percent,
    }
