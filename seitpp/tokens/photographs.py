"""The embedded photographs: china.jpg and flower.jpg of scikit-learn, 427 x 640 pixels each."""

from itertools import product

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch.utils.data import Dataset

from seitpp.tokenizers.images import Pixels

STRIDE = 16  # pixels from one window to the next
HELD_OUT_COLUMN = 480  # windows to the right of it are for validation, none lies across


class PhotographWindows(Dataset):
    """Windows of `side` x `side` pixels of both photographs as a dataset that makes whole batches.

    `split` is "train" (the left three quarters) or "validation"; a window's label is its photograph.
    """

    def __init__(self, side: int, split: str):
        self.images = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
        height, width = self.images.shape[-2:]
        start, end = (0, HELD_OUT_COLUMN) if split == "train" else (HELD_OUT_COLUMN, width)
        tops, lefts = range(0, height - side + 1, STRIDE), range(start, end - side + 1, STRIDE)
        self.side, self.places = side, list(product(range(len(self.images)), tops, lefts))

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, indices: list[int]) -> Pixels:
        places = [self.places[index] for index in indices]
        windows = [self.images[n, :, top : top + self.side, left : left + self.side] for n, top, left in places]
        return Pixels(torch.tensor(indices), torch.stack(windows), torch.tensor([n for n, _, _ in places]))
