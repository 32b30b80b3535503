"""Evaluation of frozen features: a linear probe and weighted k-NN, on any number of processes.

Features stay on the process that computed them. The numbers of correct images do not depend on the number of
processes: a block of images is always encoded and multiplied as a whole, on one process, and only integers are
summed over blocks or compared, which gives the same result in every order.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

from seitpp.codebook import full_precision
from seitpp.data.dataset import Chosen, evaluation_loader
from seitpp.engine.evaluate import Score, gather_in_order, indices_of
from seitpp.engine.waiting import progress
from seitpp.errors import UserError
from seitpp.store import TokenStore

BLOCK, ENCODED = 1024, 256  # images per matrix product, images per forward pass
NEIGHBORS, TEMPERATURE = 20, 0.07  # the usual weighted k-NN (Wu et al. 2018, "Unsupervised feature learning ...")
SIMILARITIES = 1 << 24  # entries of the query x bank matrix in memory at once
INDICES = 1 << 38  # a key combines a similarity of at most 25 bits with an index below this
NOBODY = torch.iinfo(torch.int64).min  # the key of no neighbor
HISTORY = 20  # pairs of vectors that L-BFGS keeps; 100 give the same accuracy with 5 times the memory
UNIT = 2.0**31  # sums of gradients are integer multiples of 1 / UNIT, at most as large as the number of images


class ProbeError(UserError):
    """Raised for images whose labels say nothing about an encoder: none, lists, or all the same."""


class Features(NamedTuple):
    """The features of this process's part of a dataset: `vectors` (n, C) float16, `labels` (n,) int64.

    `indices` (n,) int64 are positions in the dataset. A part consists of whole blocks of BLOCK images, except for
    the last block of the dataset, and may be empty.
    """

    vectors: Tensor
    labels: Tensor
    indices: Tensor

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the blocks as (vectors, labels); an empty part yields one empty block."""
        return zip(self.vectors.split(BLOCK), self.labels.split(BLOCK), strict=True)


class SoftmaxRegression(NamedTuple):
    """A linear classifier on standardized features: `weight` (C, K) and `bias` (K,), float32.

    `mean` and `deviation` (C,) float32 standardize the features.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    def standardized(self, vectors: Tensor) -> Tensor:
        """Standardize features (n, C) of any float dtype -> (n, C) float32."""
        return (vectors.float() - self.mean).div_(self.deviation)

    def logits(self, standardized: Tensor) -> Tensor:
        """Compute the logits of standardized features: (n, C) -> (n, K) float32."""
        return torch.addmm(self.bias, standardized, self.weight)


def labeled_sets(train: Dataset, validation: Dataset) -> tuple[Dataset, Dataset]:
    """Return the training and validation images that have a label, which a probe learns from and is measured on.

    They are those of TokenDatasets, perhaps `Chosen`. Raises ProbeError unless both have at least two classes.
    """
    return _labeled("training", train), _labeled("validation", validation)


def _labeled(name: str, dataset: Dataset) -> Dataset:
    need = "linear probe and k-NN need one label for each image, of at least two classes"
    if _store_of(dataset).multi_label:
        raise ProbeError(f"{need}: the {name} images have several each")
    labels = _labels_of(dataset)
    known = np.flatnonzero(labels >= 0)
    classes = len(np.unique(labels[known]))
    if classes < 2:
        have = "are all of one class" if classes else "have none"
        raise ProbeError(f"{need}: the {len(labels):,} {name} images {have}")
    return dataset if len(known) == len(labels) else Chosen(dataset, known)


def _store_of(dataset: Dataset) -> TokenStore:
    return _store_of(dataset.dataset) if isinstance(dataset, Chosen) else dataset.store


def _labels_of(dataset: Dataset) -> np.ndarray:
    return _labels_of(dataset.dataset)[dataset.indices] if isinstance(dataset, Chosen) else dataset.store.labels


def pooled(encoder: nn.Module, inputs: Tensor) -> Tensor:
    """Return a vector for each input: cls output and mean patch output of a ViT, the pooled output of a ResNet."""
    output = encoder.forward_features(inputs)
    if output.ndim == 4:
        return output.mean(dim=(2, 3))
    return torch.cat([output[:, 0], output[:, encoder.num_prefix_tokens :].mean(dim=1)], dim=1)


@torch.no_grad()
def extract_features(
    encoder: VisionTransformer, dataset: Dataset, *, view: nn.Module, accelerator: Accelerator, workers: int = 0
) -> Features:
    """Compute the features of this process's part of a dataset of tokens.

    A feature vector is the cls output concatenated with the mean of the patch outputs. Outputs of a LayerNorm are
    far below the limit of float16, which is 8 times as precise as bfloat16.
    """
    device = accelerator.device
    encoder = encoder.to(device).eval()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    loader = evaluation_loader(dataset, BLOCK, rank=rank, ranks=ranks, workers=workers)
    indices = indices_of(loader).to(device)
    vectors = torch.empty(len(indices), 2 * encoder.num_features, dtype=torch.float16, device=device)
    labels = torch.empty_like(indices)
    rows = zip(vectors.split(BLOCK), labels.split(BLOCK), strict=True)
    shown = progress(loader, "features of the encoder")
    for block, (block_vectors, block_labels) in zip(shown, rows, strict=False):
        block = block.to(device)
        block_labels.copy_(block.labels)
        for ids, out in zip(block.ids.split(ENCODED), block_vectors.split(ENCODED), strict=True):
            with accelerator.autocast():
                out.copy_(pooled(encoder, view(ids)))
    return Features(vectors, labels, indices)


@torch.no_grad()
def knn(bank: Features, queries: Features, *, num_classes: int, accelerator: Accelerator) -> Score:
    """Classify `queries` by their 20 nearest neighbors in `bank`, weighted by exp(cosine similarity / 0.07).

    Ties between images go to the earlier one in the dataset, ties between classes to the lower class. In each
    round, every process searches its part of the bank for one block of queries from each process.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    labels = gather_in_order(bank.labels, bank.indices, accelerator)
    rounds = accelerator.gather(torch.tensor([-(-len(queries.labels) // BLOCK)], device=labels.device)).max()
    correct = torch.zeros((), dtype=torch.long, device=labels.device)
    for start in progress(range(0, int(rounds) * BLOCK, BLOCK), "nearest neighbors"):
        own, expected = queries.vectors[start : start + BLOCK], queries.labels[start : start + BLOCK]
        gathered = accelerator.gather(accelerator.pad_across_processes(own))
        nearest = accelerator.gather(_nearest(gathered, bank).unsqueeze(0))  # (ranks, Q, 20)
        first = rank * len(gathered) // ranks
        keys = nearest[:, first : first + len(own)].transpose(0, 1).flatten(1).topk(NEIGHBORS).values
        correct += (_votes(keys, labels, num_classes, own.shape[1]).argmax(dim=1) == expected).sum()
    return _score(correct, queries, accelerator)


def _nearest(queries: Tensor, bank: Features) -> Tensor:
    """Return keys (Q, 20) int64 of the nearest neighbors in this process's part of the bank, the nearest first.

    A key is similarity * INDICES - index.
    """
    values = _integers(queries)
    best = torch.full((len(queries), NEIGHBORS), NOBODY, device=queries.device)
    size = max(1, SIMILARITIES // len(queries))
    with full_precision(queries.device):
        for vectors, indices in zip(bank.vectors.split(size), bank.indices.split(size), strict=True):
            keys = (values @ _integers(vectors).T).long().mul_(INDICES).sub_(indices)
            best = torch.cat([best, keys], dim=1).topk(NEIGHBORS).values
    return best


def _length(width: int) -> float:
    """Return the length of vectors before they are rounded, which adds at most sqrt(width) / 2, up to 2^12 - 1."""
    return 2**12 - 1 - math.sqrt(width) / 2


def _integers(vectors: Tensor) -> Tensor:
    """Scale vectors (n, C) to equal length below 2^12 and round them to integers, in float32.

    By Cauchy-Schwarz, no partial sum of a dot product of two of them exceeds 2^24, and float32 represents all
    integers up to there: dot products are exact in any order of summation. The rounding changes cosine
    similarities by about 1e-4.
    """
    return F.normalize(vectors.float(), dim=1).mul_(_length(vectors.shape[1])).round_()


def _votes(keys: Tensor, labels: Tensor, num_classes: int, width: int) -> Tensor:
    """Return votes (Q, num_classes) int64, proportional to the sums of weights; the nearest neighbor has 2^40."""
    similarity = (keys + (INDICES - 1)) // INDICES
    indices = similarity * INDICES - keys
    weight = ((similarity - similarity[:, :1]) / (_length(width) ** 2 * TEMPERATURE)).exp()
    weight = (weight * 2**40).long() * (keys != NOBODY)
    votes = torch.zeros(len(keys), num_classes, dtype=torch.long, device=keys.device)
    return votes.scatter_add_(1, labels[indices], weight)


def linear_probe(
    train: Features, validation: Features, *, num_classes: int, accelerator: Accelerator, max_iterations: int = 200
) -> Score:
    """Fit a softmax regression to the features of the training images; count its correct validation images."""
    model = fit(train, num_classes=num_classes, accelerator=accelerator, max_iterations=max_iterations)
    correct = torch.zeros((), dtype=torch.long, device=accelerator.device)
    with full_precision(accelerator.device):
        for vectors, labels in validation.blocks():
            correct += (model.logits(model.standardized(vectors)).argmax(dim=1) == labels).sum()
    return _score(correct, validation, accelerator)


@torch.no_grad()
def fit(
    features: Features,
    *,
    num_classes: int,
    accelerator: Accelerator,
    penalty: float = 1e-3,
    max_iterations: int = 200,
) -> SoftmaxRegression:
    """Fit a softmax regression by full-batch L-BFGS with an L2 `penalty` on the weights.

    The result is the same on every process. Each sums loss and gradient over its own blocks, in float32 without
    TF32. The sums over all processes are equal bit by bit, so all take the same steps: at most `max_iterations`,
    with at most 1.25 times as many evaluations.
    """
    count = _count(features, accelerator)
    mean, deviation = _moments(features, count, accelerator)
    weight, bias = mean.new_zeros(len(mean), num_classes), mean.new_zeros(num_classes)
    model = SoftmaxRegression(mean, deviation, weight, bias)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, history_size=HISTORY, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        with full_precision(weight.device):
            loss, weight_sum, bias_sum = _loss_and_gradient(model, features, accelerator)
        weight.grad = (weight_sum.float() / (UNIT * count)).add_(weight, alpha=2 * penalty)
        bias.grad = bias_sum.float() / (UNIT * count)
        return loss / count + penalty * float(weight.square().sum())

    optimizer.step(closure)
    return model


@torch.no_grad()
def _loss_and_gradient(
    model: SoftmaxRegression, features: Features, accelerator: Accelerator
) -> tuple[float, Tensor, Tensor]:
    """Return sums over all images: the cross-entropy, and its gradients (C, K) and (K,) int64 in 1 / UNIT."""
    weight_sum, bias_sum = (torch.zeros_like(part, dtype=torch.long) for part in (model.weight, model.bias))
    losses = []
    for vectors, labels in features.blocks():
        inputs = model.standardized(vectors)
        residual = model.logits(inputs).log_softmax(dim=1)
        target = labels.unsqueeze(1)
        losses.append(-residual.gather(1, target).sum())
        residual.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=residual.dtype))
        # The variance of a standardized channel is 1, so the sum is at most the number of images: no overflow.
        weight_sum += (inputs.T @ residual).mul_(UNIT).long()
        bias_sum += residual.sum(dim=0).mul_(UNIT).long()
    weight_sum, bias_sum = accelerator.reduce([weight_sum, bias_sum], "sum")
    return float(_sum(torch.stack(losses), accelerator)), weight_sum, bias_sum


def _moments(features: Features, count: int, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) float32 of every channel over all images."""
    device = features.vectors.device
    sums = torch.stack([vectors.float().sum(dim=0) for vectors, _ in features.blocks()])
    mean = (_sum(sums, accelerator) / count).float().to(device)
    squares = [(vectors.float() - mean).square_().sum(dim=0) for vectors, _ in features.blocks()]
    variance = _sum(torch.stack(squares), accelerator) / max(1, count - 1)
    return mean, variance.sqrt().clamp(min=1e-6).float().to(device)


def _sum(parts: Tensor, accelerator: Accelerator) -> Tensor:
    """Sum float32 parts (n, ...) of all processes, at most 2^20 in total -> (...) float64, on the CPU.

    They are summed as integer multiples of 2^-42 of the largest part, so the order does not matter.
    """
    largest = accelerator.gather(parts.abs().amax().view(1)).max()
    unit = 2.0 ** min(42 - math.frexp(float(largest))[1], 100)
    return accelerator.reduce((parts * unit).long().sum(dim=0), "sum").cpu().double() / unit


def _count(features: Features, accelerator: Accelerator) -> int:
    own = torch.tensor(len(features.labels), device=features.labels.device)
    return int(accelerator.reduce(own, "sum"))


def _score(correct: Tensor, features: Features, accelerator: Accelerator) -> Score:
    return Score(int(accelerator.reduce(correct, "sum")), _count(features, accelerator))


def probe(
    encoder: VisionTransformer,
    *,
    train: Dataset,
    validation: Dataset,
    num_classes: int,
    view: nn.Module,
    accelerator: Accelerator,
    workers: int = 0,
) -> dict[str, float]:
    """Return the top-1 accuracies of a frozen encoder on the validation images, in percent.

    They are "linear_probe_top1", of a linear probe, and "knn_top1", of weighted k-NN. On each process, `workers`
    processes load the tokens.
    """
    bank, queries = (
        extract_features(encoder, part, view=view, accelerator=accelerator, workers=workers)
        for part in (train, validation)
    )
    settings = {"num_classes": num_classes, "accelerator": accelerator}
    return {
        "linear_probe_top1": linear_probe(bank, queries, **settings).percent,
        "knn_top1": knn(bank, queries, **settings).percent,
    }
