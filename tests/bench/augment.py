"""Compare the augmentation of SeiT on whole batches (SeitView) with the plain method on one-hot vectors.

    python tests/bench/augment.py [--images 2048] [--batch 128]

Both go from stored bytes to augmented maps; CPU time of one core. Grids of 32 x 32 uniform ids, K = 391, D = 32,
maps of 28 x 28 x 32, Token-EDA at the rates of the release. The plain method decodes the escape code and resizes
one-hot channels image by image, as the workers of a loader would, with random numbers of Python, torch and numpy.
Ours uses the codec ans. Goals: EDA and crop on the CPU 15 times faster; the work that remains on the host when
maps are computed on a device (ours: reading and decoding, plain: everything) 100 times faster.

The figures are in docs/results.md. On a busy machine the first ratio dropped to 8 and the last to 81.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from seitpp import StoreWriter, TokenStore, codec
from seitpp.augment import Keys, SeitView
from seitpp.codebook import synonyms
from seitpp.data.dataset import Batch, TokenDataset

GRID, K, D, SIZE, CLASSES = 32, 391, 32, 28, 1000


class OneHots:
    """The plain method: every augmentation of SeiT, image by image, in the order of the paper."""

    def __init__(self, payloads: list[bytes], codebook: Tensor):
        self.payloads, self.codebook = payloads, codebook
        self.synonyms = synonyms(codebook).tolist()

    def decode(self, data: bytes) -> list[int]:
        ids, position = [], 0
        while position < len(data):
            if data[position] == 255:
                position += 1
                ids.append(255 + data[position])
            else:
                ids.append(data[position])
            position += 1
        return ids

    def eda(self, ids: list[int]) -> Tensor:
        choice = random.random()
        if choice < 0.25:
            ids = [random.choice(self.synonyms[i]) if random.random() < 0.25 else i for i in ids]
        grid = torch.tensor(ids).view(GRID, GRID)
        return swap(grid) if 0.25 <= choice < 0.5 else grid

    def crop(self, grid: Tensor) -> Tensor:
        one_hot = torch.zeros(K, GRID, GRID).scatter_(0, grid.unsqueeze(0), 1.0)
        top, left, height, width = RandomResizedCrop.get_params(one_hot, [0.08, 1.0], [3 / 4, 4 / 3])
        part = one_hot[None, :, top : top + height, left : left + width]
        resized = F.interpolate(part, (SIZE, SIZE), mode="bicubic")[0]
        return torch.einsum("khw,kd->dhw", resized, self.codebook)

    def vectors(self, indices: range) -> Tensor:
        return torch.stack([self.crop(self.eda(self.decode(self.payloads[i]))) for i in indices])

    def everything(self, indices: range) -> Tensor:
        maps = torch.stack([self.noise(vectors) for vectors in self.vectors(indices)])
        side = int(SIZE * (1 - np.random.default_rng().beta(1.0, 1.0)) ** 0.5)
        (top, bottom), (left, right) = (
            (max(0, center - side // 2), min(SIZE, center + side // 2))
            for center in random.choices(range(SIZE), k=2)
        )
        maps[:, :, top:bottom, left:right] = maps.flip(0)[:, :, top:bottom, left:right]
        return maps

    def noise(self, vectors: Tensor) -> Tensor:
        if random.random() < 0.5:
            return vectors
        return vectors + torch.randn(D, 1, 1) + torch.randn(D, SIZE, SIZE)


def swap(grid: Tensor) -> Tensor:
    side = int(GRID * random.uniform(0, 0.25))
    (top, left), (row, column) = (random.choices(range(GRID - side + 1), k=2) for _ in range(2))
    swapped = grid.clone()
    swapped[top : top + side, left : left + side] = grid[row : row + side, column : column + side]
    swapped[row : row + side, column : column + side] = grid[top : top + side, left : left + side]
    return swapped


class Ours:
    """The same with this project's store and view, on whole batches."""

    def __init__(self, store: TokenStore):
        self.dataset = TokenDataset(store)
        self.codebook = torch.from_numpy(store.codebook)
        self.crop = SeitView(self.codebook, size=SIZE, color=None, cutmix=0.0)
        self.view = SeitView(self.codebook, size=SIZE)

    def read(self, indices: range) -> Batch:
        return self.dataset.__getitems__(list(indices))

    def vectors(self, indices: range) -> Tensor:
        return self._apply(self.crop, indices)

    def everything(self, indices: range) -> Tensor:
        return self._apply(self.view, indices)

    def _apply(self, view: SeitView, indices: range) -> Tensor:
        batch = self.read(indices)
        return view(batch.ids, batch.labels, Keys(0, 0, batch.indices))[0]


def microseconds(make: Callable[[range], object], images: int, batch: int) -> float:
    """Return the CPU time per image: the median over the batches without the first one."""
    times = []
    for start in range(0, images - batch + 1, batch):
        begin = time.process_time()
        make(range(start, start + batch))
        times.append(time.process_time() - begin)
    return float(np.median(times[1:])) / batch * 1e6


def write_store(path: Path, ids: np.ndarray) -> TokenStore:
    rng = np.random.default_rng(1)
    codebook = rng.standard_normal((K, D)).astype(np.float32)
    with StoreWriter(path, codebook=codebook, grid=(GRID, GRID), codec="ans") as writer:
        writer.add_batch(ids, rng.integers(CLASSES, size=len(ids)))
    return TokenStore(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = np.random.default_rng(0).integers(K, size=(options.images, GRID, GRID)).astype(np.uint16)
    escape = codec.build("escape", K)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(write_store(Path(folder) / "tokens", ids))
        plain = OneHots([escape.encode(grid.ravel()) for grid in ids], ours.codebook)
        times = [
            [microseconds(make, options.images, options.batch) for make in makes]
            for makes in (
                (plain.vectors, ours.vectors),
                (plain.everything, ours.everything),
                (plain.everything, ours.read),
            )
        ]
    names = "EDA and crop", "and Emb-Noise, CutMix", "host, maps on a device", "moved to the device"
    units = "us", "us", "us", "bytes"
    print(f"batches of {options.batch}, per image:")
    print(f"{'':24}{'one-hots':>12}{'ours':>12}{'ratio':>9}")
    for name, (plain_value, our_value), unit in zip(
        names, [*times, (K * GRID * GRID * 4, ids[0].nbytes)], units, strict=True
    ):
        print(f"{name:24}{plain_value:12,.0f}{our_value:12,.0f}{plain_value / our_value:9.1f}  {unit}")


if __name__ == "__main__":
    main()
