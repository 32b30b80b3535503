"""How good frozen features are: a linear probe and weighted k-NN, in blocks, on any number of processes.

Features stay on the process that made them. A block of images belongs to one process and is encoded and multiplied
as a whole, and what is summed over blocks or compared is whole numbers, which come out the same in every order. So
the counts of right images do not depend on the number of processes.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

from seitpp.codebook import full_precision
from seitpp.data.dataset import evaluation_loader
from seitpp.engine.evaluate import Score, gather_in_order, indices_of

BLOCK, ENCODED = 1024, 256  # images that are multiplied and summed together; that are encoded together
NEIGHBORS, TEMPERATURE = 20, 0.07  # the usual weighted k-NN (Wu et al. 2018, "Unsupervised feature learning ...")
SIMILARITIES = 1 << 24  # cells of the query x bank matrix that are held at once
INDICES = 1 << 38  # a key holds a similarity of at most 25 bits and an index below this
NOBODY = torch.iinfo(torch.int64).min  # the key of no neighbor
HISTORY = 20  # pairs of vectors that L-BFGS keeps; 100 give the same accuracy for 5 times the memory
UNIT = 2.0**31  # sums of gradients are whole numbers of 1 / UNIT; they are at most as large as the images are many


class Features(NamedTuple):
    """This process's share of a dataset: `vectors` (n, C) float16, `labels` (n,) and `indices` (n,) int64.

    `indices` are the places in the dataset. A share is whole blocks of BLOCK images, but for the dataset's last,
    and may be empty.
    """

    vectors: Tensor
    labels: Tensor
    indices: Tensor

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Vectors and labels of one block after the other; of one empty block where the share is empty."""
        return zip(self.vectors.split(BLOCK), self.labels.split(BLOCK), strict=True)


class SoftmaxRegression(NamedTuple):
    """Classes from features: `mean`, `deviation` (C,) standardize them; `weight` (C, K), `bias` (K,); float32."""

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    def standardized(self, vectors: Tensor) -> Tensor:
        """Features (n, C) of any float dtype -> (n, C) float32."""
        return (vectors.float() - self.mean).div_(self.deviation)

    def logits(self, standardized: Tensor) -> Tensor:
        """(n, C) -> (n, K) float32."""
        return torch.addmm(self.bias, standardized, self.weight)


@torch.no_grad()
def extract_features(
    encoder: VisionTransformer, dataset: Dataset, view: nn.Module, accelerator: Accelerator, workers: int = 0
) -> Features:
    """The features of this process's blocks of a dataset of tokens: the cls output and the mean of the patch
    outputs, side by side.

    Outputs of a LayerNorm are far from the limits of float16, which has 8 times the resolution of bfloat16.
    """
    device = accelerator.device
    encoder = encoder.to(device).eval()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    loader = evaluation_loader(dataset, BLOCK, rank=rank, ranks=ranks, workers=workers)
    indices = indices_of(loader).to(device)
    vectors = torch.empty(len(indices), 2 * encoder.num_features, dtype=torch.float16, device=device)
    labels = torch.empty_like(indices)
    rows = zip(vectors.split(BLOCK), labels.split(BLOCK), strict=True)
    for block, (block_vectors, block_labels) in zip(loader, rows, strict=False):
        block = block.to(device)
        block_labels.copy_(block.labels)
        for ids, out in zip(block.ids.split(ENCODED), block_vectors.split(ENCODED), strict=True):
            with accelerator.autocast():
                output = encoder.forward_features(view(ids))
            patches = output[:, encoder.num_prefix_tokens :].mean(dim=1)
            out.copy_(torch.cat([output[:, 0], patches], dim=1))
    return Features(vectors, labels, indices)


@torch.no_grad()
def knn(bank: Features, queries: Features, num_classes: int, accelerator: Accelerator) -> Score:
    """Weighted k-nearest neighbors by cosine similarity: 20 votes, each of weight exp(similarity / 0.07).

    Of equally similar images the earlier one of the dataset is nearer, of equally many votes the lower class wins.
    Every process looks in its own share of the bank for the neighbors of a block of queries of each process.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    labels = gather_in_order(bank.labels, bank.indices, accelerator)
    rounds = accelerator.gather(torch.tensor([-(-len(queries.labels) // BLOCK)], device=labels.device)).max()
    correct = torch.zeros((), dtype=torch.long, device=labels.device)
    for start in range(0, int(rounds) * BLOCK, BLOCK):
        own, expected = queries.vectors[start : start + BLOCK], queries.labels[start : start + BLOCK]
        asked = accelerator.gather(accelerator.pad_across_processes(own))
        found = accelerator.gather(_nearest(asked, bank).unsqueeze(0))  # (ranks, Q, 20)
        first = rank * len(asked) // ranks
        keys = found[:, first : first + len(own)].transpose(0, 1).flatten(1).topk(NEIGHBORS).values
        correct += (_votes(keys, labels, num_classes, own.shape[1]).argmax(dim=1) == expected).sum()
    return _score(correct, queries, accelerator)


def _nearest(queries: Tensor, bank: Features) -> Tensor:
    """(Q, 20) int64 keys of the neighbors in this process's bank, the nearest first.

    A key is similarity * INDICES - index.
    """
    values = _whole_numbers(queries)
    best = torch.full((len(queries), NEIGHBORS), NOBODY, device=queries.device)
    size = max(1, SIMILARITIES // len(queries))
    with full_precision(queries.device):
        for vectors, indices in zip(bank.vectors.split(size), bank.indices.split(size), strict=True):
            keys = (values @ _whole_numbers(vectors).T).long().mul_(INDICES).sub_(indices)
            best = torch.cat([best, keys], dim=1).topk(NEIGHBORS).values
    return best


def _length(width: int) -> float:
    """How long vectors may be before they are rounded: that adds at most sqrt(width) / 2, up to 2^12 - 1."""
    return 2**12 - 1 - math.sqrt(width) / 2


def _whole_numbers(vectors: Tensor) -> Tensor:
    """(n, C) -> (n, C) float32, vectors of equal length below 2^12, rounded to whole numbers.

    By Cauchy and Schwarz no part of a dot product of two of them exceeds 2^24, up to which float32 has every whole
    number: similarities are exact, whatever the order of the sum. They are off by about 1e-4.
    """
    return F.normalize(vectors.float(), dim=1).mul_(_length(vectors.shape[1])).round_()


def _votes(keys: Tensor, labels: Tensor, num_classes: int, width: int) -> Tensor:
    """(Q, num_classes) int64, proportional to the sums of weights; the nearest neighbor has 2^40 votes."""
    similarity = (keys + (INDICES - 1)) // INDICES
    indices = similarity * INDICES - keys
    weight = ((similarity - similarity[:, :1]) / (_length(width) ** 2 * TEMPERATURE)).exp()
    weight = (weight * 2**40).long() * (keys != NOBODY)
    votes = torch.zeros(len(keys), num_classes, dtype=torch.long, device=keys.device)
    return votes.scatter_add_(1, labels[indices], weight)


def linear_probe(
    train: Features, validation: Features, num_classes: int, accelerator: Accelerator, max_iterations: int = 200
) -> Score:
    """Softmax regression on standardized features of the training images, judged on the validation images."""
    model = fit(train, num_classes, accelerator, max_iterations=max_iterations)
    correct = torch.zeros((), dtype=torch.long, device=accelerator.device)
    with full_precision(accelerator.device):
        for vectors, labels in validation.blocks():
            correct += (model.logits(model.standardized(vectors)).argmax(dim=1) == labels).sum()
    return _score(correct, validation, accelerator)


@torch.no_grad()
def fit(
    features: Features,
    num_classes: int,
    accelerator: Accelerator,
    penalty: float = 1e-3,
    max_iterations: int = 200,
) -> SoftmaxRegression:
    """Softmax regression by full-batch L-BFGS with an L2 `penalty` on the weights; the same on every process.

    Each process adds up loss and gradient over its own blocks, in float32 without TF32. The sums over all are the
    same bits everywhere, so that every process takes the same steps: at most `max_iterations`, and a quarter more
    evaluations.
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
    """Sums over all images: of the cross-entropy, and of its gradients, (C, K) and (K,) int64 in 1 / UNIT."""
    weight_sum, bias_sum = (torch.zeros_like(part, dtype=torch.long) for part in (model.weight, model.bias))
    losses = []
    for vectors, labels in features.blocks():
        inputs = model.standardized(vectors)
        residual = model.logits(inputs).log_softmax(dim=1)
        target = labels.unsqueeze(1)
        losses.append(-residual.gather(1, target).sum())
        residual.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=residual.dtype))
        # An entry is at most the number of images: the standardized features of a channel have a variance of 1.
        weight_sum += (inputs.T @ residual).mul_(UNIT).long()
        bias_sum += residual.sum(dim=0).mul_(UNIT).long()
    weight_sum, bias_sum = accelerator.reduce([weight_sum, bias_sum], "sum")
    return float(_sum(torch.stack(losses), accelerator)), weight_sum, bias_sum


def _moments(features: Features, count: int, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float32 of every channel over all images."""
    device = features.vectors.device
    sums = torch.stack([vectors.float().sum(dim=0) for vectors, _ in features.blocks()])
    mean = (_sum(sums, accelerator) / count).float().to(device)
    squares = [(vectors.float() - mean).square_().sum(dim=0) for vectors, _ in features.blocks()]
    variance = _sum(torch.stack(squares), accelerator) / max(1, count - 1)
    return mean, variance.sqrt().clamp(min=1e-6).float().to(device)


def _sum(parts: Tensor, accelerator: Accelerator) -> Tensor:
    """Float32 parts (n, ...) of all processes, up to 2^20 together -> their sum (...), float64, on the CPU.

    As whole numbers of 2^-42 of the largest part they add up to the same in every order.
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
    train: Dataset,
    validation: Dataset,
    num_classes: int,
    view: nn.Module,
    accelerator: Accelerator,
    workers: int = 0,
) -> dict[str, float]:
    """Top-1 accuracies (percent) of a frozen encoder on the validation images: linear probe and weighted k-NN.

    `workers` processes of each process read the tokens.
    """
    bank, queries = (extract_features(encoder, part, view, accelerator, workers) for part in (train, validation))
    return {
        "linear_probe_top1": linear_probe(bank, queries, num_classes, accelerator).percent,
        "knn_top1": knn(bank, queries, num_classes, accelerator).percent,
    }
