"""Windows of the photographs china.jpg and flower.jpg of scikit-learn, 427 x 640 pixels each."""

from itertools import product

import numpy as np
import torch
from torch.utils.data import Dataset

from seitpp.images.batches import Pixels

STRIDE = 16  # pixels from one window to the next
HELD_OUT = range(256, 368)  # validation columns: they cross the temple and the flower


class PhotographWindows(Dataset):
    """A torch dataset of the windows of `side` x `side` pixels of both photographs, read in whole batches.

    The windows of the split "validation" have only held-out columns, those of "train" have none. The label of a
    window is the index of its photograph.
    """

    def __init__(self, side: int, split: str):
        from sklearn.datasets import load_sample_images  # takes a second, and few runs need it

        self.images = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
        height, width = self.images.shape[-2:]
        bands = [HELD_OUT] if split == "validation" else [range(HELD_OUT.start), range(HELD_OUT.stop, width)]
        tops = range(0, height - side + 1, STRIDE)
        lefts = [left for band in bands for left in range(band.start, band.stop - side + 1, STRIDE)]
        self.side, self.positions = side, list(product(range(len(self.images)), tops, lefts))

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, indices: list[int]) -> Pixels:
        positions = [self.positions[index] for index in indices]
        windows = [self.images[n, :, top : top + self.side, left : left + self.side] for n, top, left in positions]
        return Pixels(torch.tensor(indices), torch.stack(windows), torch.tensor([n for n, _, _ in positions]))
