"""The handwritten digits of scikit-learn as a token store and as images: 1,797 gray images in 10 classes.

An image of 8 x 8 pixels is resized to 32 x 32 pixels and tokenized in patches of 4 x 4 pixels, which gives a grid
of 8 x 8 tokens, one per original pixel.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from seitpp import files
from seitpp.errors import UserError
from seitpp.images.decode import Sample
from seitpp.images.inventory import LeftOut
from seitpp.images.labels import Labels
from seitpp.store import StoreWriter
from seitpp.tokenizers import PatchKMeans

# SHA-256 of the pixels (1797, 8, 8) uint8 and the labels (1797,) uint8.
CONTENT = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
# The tokens depend only on the images and these values, whose hash is in the name of the cache folder.
SETTINGS = {"version": 2, "image_size": 32, "patch": 4, "num_codes": 64, "code_dim": 32}
VALIDATION_PER_CLASS = 36


class Digits(NamedTuple):
    """The paths of the token store and of its tokenizer."""

    store: Path
    tokenizer: Path


def digits_images(split: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 8, 8) float32 in [0, 1] and labels (N,) int64 of "train" (1,437) or "validation" (360).

    The validation split has the 36 images of each class whose pixels have the smallest SHA-256, so that the split
    depends only on the images. Raises UserError if scikit-learn ships other digits than it did.
    """
    import sklearn  # takes a second, and only runs on the digits need it
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, labels = data.images.astype("uint8"), torch.from_numpy(data.target).long()
    content = hashlib.sha256(pixels.tobytes() + data.target.astype("uint8").tobytes()).hexdigest()
    if content != CONTENT:
        raise UserError(
            f"the digits of scikit-learn {sklearn.__version__} have the SHA-256 {content[:16]}, expected "
            f"{CONTENT[:16]}, on which every figure of the digits was measured: install another scikit-learn"
        )
    keys = [hashlib.sha256(image.tobytes()).digest() for image in pixels]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = sorted((labels == label).nonzero().flatten().tolist(), key=lambda i: (keys[i], i))
        chosen[members[:VALIDATION_PER_CLASS]] = True
    if split == "train":
        chosen = ~chosen
    images = torch.from_numpy(pixels).float().div(16)[chosen]
    return images.unsqueeze(1).expand(-1, 3, -1, -1), labels[chosen]


def digits() -> Digits:
    """Return the tokenized digits in the user's cache folder; they are created on first use, in seconds."""
    name = hashlib.sha256(json.dumps(SETTINGS, sort_keys=True).encode()).hexdigest()[:12]
    folder = files.make_once(f"digits-{name}", _tokenize)
    return Digits(folder / "store", folder / "tokenizer.safetensors")


def _tokenize(folder: Path) -> None:
    train, _ = digits_images("train")
    settings = {key: value for key, value in SETTINGS.items() if key != "version"}
    tokenizer = PatchKMeans.fit(train, **settings)
    tokenizer.save(folder / "tokenizer.safetensors")
    for split in ("train", "validation"):
        images, labels = digits_images(split)
        ids = tokenizer.encode(tokenizer.preprocess(images))
        writer = StoreWriter(
            folder / "store",
            codebook=tokenizer.codebook.numpy(),
            grid=tokenizer.spec.grid,
            split=split,
            class_names=[str(digit) for digit in range(10)],
            tokenizer=tokenizer.description(),
        )
        with writer:
            writer.add_batch(ids.numpy(), labels.numpy())


class DigitsSource:
    """The digits as encoded images, with the interface of `seitpp.images.sources.ImageSource`."""

    class_names: ClassVar[list[str]] = [str(digit) for digit in range(10)]

    def __init__(self, split: str):
        self._images, labels = digits_images(split)
        self.names = [f"digit-{index}.png" for index in range(len(labels))]
        self.labels = Labels(labels.tolist(), self.class_names, "the digits")
        self.left_out = LeftOut()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Sample:
        """Return image `index` as a gray PNG of 8 x 8 pixels."""
        pixels = self._images[index, 0].mul(255).round().byte().numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return Sample(buffer.getvalue(), self.names[index], self.labels.values[index])
