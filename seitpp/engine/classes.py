"""What a training makes of the frequencies of its classes: the order of its images, and weights of the loss."""

from itertools import chain
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seitpp.data.dataset import DrawnImages, indices_within, order_of
from seitpp.data.order import BalancedOrder, BatchOrder
from seitpp.errors import UserError
from seitpp.images.sources import ImageSource
from seitpp.store import TokenStore

COUNTED = 4096  # images whose multi-hot labels are in memory at once

# none: as the images are; weights: the loss of rare classes counts more; sampling: all classes are drawn equally.
ClassBalance = Literal["none", "weights", "sampling"]


class Settings(Protocol):
    """The settings of a training that say how its images are ordered."""

    batch_size: int
    seed: int
    class_balance: ClassBalance
    window_shards: int | None


class OrderedImages(NamedTuple):
    """The images of a training, their order, and the weights of the classes (classes,) float32 in the loss."""

    images: Dataset
    order: BatchOrder
    class_weights: Tensor | None


def balanced(
    images: Dataset, data: TokenStore | ImageSource, config: Settings, *, device: torch.device
) -> OrderedImages:
    """Order the images of a training, all of `data` or some, by its settings --class-balance and --window-shards.

    Raises UserError for a balanced order of images with several classes, and as BatchOrder does.
    """
    balance, batch_size, seed = config.class_balance, config.batch_size, config.seed
    if balance == "sampling":
        if has_several(data):
            raise UserError(
                "--class-balance sampling draws one class at a time, but each image has several: pass "
                "--class-balance weights"
            )
        if config.window_shards:
            raise UserError("--class-balance sampling draws from all shards: leave out --window-shards")
        labels = data.labels if isinstance(data, TokenStore) else np.array(data.labels.values)
        order = BalancedOrder(labels[indices_within(images)], batch_size, seed)
        return OrderedImages(DrawnImages(images), order, None)
    weights = None
    if balance == "weights":
        weights = class_weights(class_counts(images, data)).to(device)
    if isinstance(data, TokenStore):
        order = order_of(images, batch_size=batch_size, seed=seed, window=config.window_shards)
        return OrderedImages(images, order, weights)
    return OrderedImages(images, BatchOrder(len(images), batch_size, seed), weights)


def has_several(data: TokenStore | ImageSource) -> bool:
    """Return whether images have several classes each."""
    return data.multi_label if isinstance(data, TokenStore) else data.labels.multi_label


def class_counts(images: Dataset, data: TokenStore | ImageSource) -> np.ndarray:
    """Count the images of each class: (classes,) int64; images with several classes count for each of them."""
    indices = indices_within(images)
    if not isinstance(data, TokenStore):
        labels = [data.labels.values[index] for index in indices]
        classes = chain.from_iterable(labels) if data.labels.multi_label else labels
        return np.bincount(list(classes), minlength=len(data.class_names))
    if not data.multi_label:
        return np.bincount(data.labels[indices], minlength=data.num_classes)
    parts = np.array_split(indices, -(-len(indices) // COUNTED))
    return sum((data.multi_hot(part) == 1).sum(axis=0) for part in parts)


def class_weights(counts: np.ndarray) -> Tensor:
    """Return a weight (classes,) float32 for each class, proportional to 1 / its number of images.

    The mean over the images is 1, so that the loss keeps its size. A class without images has weight 1.
    """
    occurs = counts > 0
    weights = np.ones(len(counts))
    weights[occurs] = counts.sum() / (occurs.sum() * counts[occurs])
    return torch.from_numpy(weights).float()
