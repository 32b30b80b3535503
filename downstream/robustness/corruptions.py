"""The corruptions of ImageNet-C, computed on the fly, and the mean corruption error (Hendrycks and Dietterich).

The package imagecorruptions-imaug has the published strengths, which are meant for images of 224 x 224 pixels. At
other sides they are the same numbers: the noises, brightness, contrast and saturation mean the same there; blurs,
glass, motion and zoom have radii in pixels, so they are 224 / side times as strong; frost and fog come in larger
pieces. gaussian_noise adds a standard deviation of .08 .12 .18 .26 .38, gaussian_blur one of 1 2 3 4 6 pixels.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from downstream.robustness.extra import RobustnessError, load_extra
from seitpp.images.batches import ImageDataset, Pixels

Corruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "speckle_noise",
    "spatter",
    "saturate",
]
# The place of a name is part of the key of its random numbers. mCE does not count the last four.
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
# The mean error of AlexNet over the five severities on ImageNet-C, as a fraction: by name, because lists of these
# corruptions are in several orders.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  # pixels along the shorter side
SEEDED = ("glass_blur", "impulse_noise")  # by an argument; the others draw from numpy's global generator


def corrupt(image: np.ndarray, name: Corruption, severity: int, *, seed: int, index: int) -> np.ndarray:
    """Return a corrupted copy of image `index`, (C, height, width) uint8 with 1 or 3 channels.

    The random numbers depend on (seed, name, severity, index) alone; numpy's global generator is left as it was.
    """
    key = [seed, CORRUPTIONS.index(name), severity, index]
    words = np.random.SeedSequence(key).generate_state(4)
    options = {"seed": int(words[0])} if name in SEEDED else {}
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    with _numpy_seeded(words), contextlib.redirect_stdout(io.StringIO()):  # it prints about sizes that it crops
        corrupted = load_extra("imagecorruptions").corrupt(
            pixels, severity=severity, corruption_name=name, **options
        )
    return np.ascontiguousarray(corrupted.transpose(2, 0, 1)[: len(image)])  # it makes gray images RGB


@contextmanager
def _numpy_seeded(words: np.ndarray) -> Iterator[None]:
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(words)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


class CorruptedImages(Dataset):
    """The images of a dataset, corrupted by the process that loads them."""

    def __init__(self, images: ImageDataset, name: Corruption, severity: int, *, seed: int):
        self.images, self.name, self.severity, self.seed = images, name, severity, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Pixels:
        batch = self.images.__getitems__(indices)
        corrupted = [
            corrupt(image, self.name, self.severity, seed=self.seed, index=index)
            for image, index in zip(batch.images.numpy(), indices, strict=True)
        ]
        return batch._replace(images=torch.from_numpy(np.stack(corrupted)))


def check_corruptible(size: tuple[int, int], channels: int) -> None:
    """Raise RobustnessError unless images of this (height, width) and number of channels can be corrupted.

    It also loads the package, so that a missing one is noticed before anything is computed.
    """
    load_extra("imagecorruptions")
    if min(size) < SMALLEST:
        raise RobustnessError(
            f"images of {size[0]} x {size[1]} pixels, expected at least {SMALLEST} x {SMALLEST} for corruptions: "
            "take a model or a tokenizer of larger images, or name other suites with --suite"
        )
    if channels not in (1, 3):
        raise RobustnessError(
            f"images of {channels} channels, expected 1 or 3 for corruptions: name other suites with --suite"
        )


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float | None:
    """Return the mCE in percent, or None unless there are five errors of each of the 15 corruptions.

    `errors` has the top-1 error at each severity as a fraction, by corruption; those that mCE does not count are
    left out. mCE is the mean over the corruptions of 100 times the sum of the errors over that of AlexNet's.
    """
    if not all(len(errors.get(name, ())) == len(SEVERITIES) for name in ALEXNET):
        return None
    ratios = [sum(errors[name]) / (len(SEVERITIES) * mean) for name, mean in ALEXNET.items()]
    return 100 * sum(ratios) / len(ratios)
