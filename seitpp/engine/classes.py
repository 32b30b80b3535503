"""What a training makes of the frequencies of its classes: the order of its images, and weights of the loss."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seitpp.data.dataset import BalancedOrder, BatchOrder, DrawnImages, indices_within
from seitpp.errors import UserError
from seitpp.store import TokenStore

COUNTED = 4096  # images whose multi-hot labels are in memory at once

# none: as the images are; weights: the loss of rare classes counts more; sampling: all classes are drawn equally.
ClassBalance = Literal["none", "weights", "sampling"]


class OrderedImages(NamedTuple):
    """The images of a training, their order, and the weights of the classes (classes,) float32 in the loss."""

    images: Dataset
    order: BatchOrder
    class_weights: Tensor | None


def balanced(
    images: Dataset,
    store: TokenStore,
    balance: ClassBalance,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> OrderedImages:
    """Order the images of a training by the setting --class-balance; `images` are all of a store's, or a subset.

    Raises UserError for a balanced order of images with several classes, and as BatchOrder does.
    """
    if balance == "sampling":
        if store.multi_label:
            raise UserError(
                f"--class-balance sampling draws one class at a time, but images of {store.path} have several: "
                "pass --class-balance weights"
            )
        order = BalancedOrder(store.labels[indices_within(images)], batch_size, seed)
        return OrderedImages(DrawnImages(images), order, None)
    weights = None
    if balance == "weights":
        weights = class_weights(class_counts(images, store)).to(device)
    return OrderedImages(images, BatchOrder(len(images), batch_size, seed), weights)


def class_counts(images: Dataset, store: TokenStore) -> np.ndarray:
    """Count the images of each class: (classes,) int64; images with several classes count for each of them."""
    indices = indices_within(images)
    if not store.multi_label:
        return np.bincount(store.labels[indices], minlength=store.num_classes)
    parts = np.array_split(indices, -(-len(indices) // COUNTED))
    return sum((store.multi_hot(part) == 1).sum(axis=0) for part in parts)


def class_weights(counts: np.ndarray) -> Tensor:
    """Return a weight (classes,) float32 for each class, proportional to 1 / its number of images.

    The mean over the images is 1, so that the loss keeps its size. A class without images has weight 1.
    """
    occurs = counts > 0
    weights = np.ones(len(counts))
    weights[occurs] = counts.sum() / (occurs.sum() * counts[occurs])
    return torch.from_numpy(weights).float()
