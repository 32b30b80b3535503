"""The stored training sets of a comparison: each is a folder that is written once, and a row of the table."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from downstream.storage.packs import Pack, write_pack
from downstream.storage.pictures import Change, Format, best_quality, changed, fitted, framing, in_kind
from downstream.storage.sizes import Sizes, store_sizes
from downstream.storage.tokens import tokenize
from seitpp.augment import Crops, RandomBoxes
from seitpp.data.dataset import fraction_of
from seitpp.files import remove_folder
from seitpp.images.decode import Sample
from seitpp.images.sources import ImageSource, SourceSubset
from seitpp.store import TokenStore
from seitpp.store.grow import subset
from seitpp.tokenizers import Tokenizer

SEARCHED = 256  # evenly spaced images on which a quality is searched
FRAMED = 1024  # evenly spaced images on which the framing of a format is measured

# What a network learns from: pictures, maps of code vectors, or ids, after masked modeling of the same ids.
Kind = Literal["pixels", "maps", "ids"]


class Row(NamedTuple):
    """A stored training set: the way it is kept, its setting, its folder and sizes, and its number of images.

    `matched` has the test images kept the same way, if that changes pictures.
    """

    family: str
    setting: str
    kind: Kind
    folder: Path
    sizes: Sizes
    images: int
    matched: Path | None = None

    @property
    def name(self) -> str:
        """The name of the row, which is also that of its files."""
        return f"{self.family} {self.setting}".replace(" ", "-")


class Shelf:
    """Writes the training sets below a folder; a set that is there already is taken as it is.

    `train` and `test` are the images, in the tokenizer's split of them; `seed` chooses images and crops.
    """

    def __init__(
        self,
        folder: Path,
        *,
        train: ImageSource,
        test: ImageSource,
        tokenizer: Tokenizer,
        device: torch.device,
        seed: int,
    ):
        self.folder, self.train, self.test, self.seed = folder, train, test, seed
        self.tokenizer, self.device = tokenizer, device

    def pictures(
        self, family: str, setting: str, *, chosen: np.ndarray | None = None, change: Change | None = None
    ) -> Row:
        """Keep pictures: those at the indices `chosen` (n,) int64, or all, as they are or changed."""
        source = self.train if chosen is None else SourceSubset(self.train, chosen.tolist())
        folder = self._pack(f"{family}-{setting}", source, change)
        matched = None if change is None else self._pack(f"{family}-{setting}-test", self.test, change)
        samples = _spaced(source, FRAMED)
        gray = framing(samples, change or in_kind) * len(source) // len(samples)
        sizes = Pack(folder).sizes()._replace(framing=gray)
        return Row(family, setting, "pixels", folder, sizes, len(source), matched)

    def within(self, family: str, file_format: Format, budget: float) -> Row | None:
        """Keep all pictures in a format, with at most the pixels that the tokenizer sees, at the best quality.

        That is the largest at which the set has at most `budget` bytes for each image; None if there is none.
        """
        change = partial(fitted, file_format=file_format, size=self.tokenizer.spec.image_size)
        samples, most = _spaced(self.train, SEARCHED), budget
        while (quality := best_quality(samples, change, most)) is not None:
            row = self.pictures(family, f"q{quality}", change=partial(change, quality=quality))
            over = row.sizes.total / len(self.train) - budget
            if over <= 0:
                return row
            for folder in (row.folder, row.matched):
                remove_folder(folder)
            most -= over
        return None

    def tokens(self, family: str, setting: str, *, kind: Kind = "maps", fraction: float = 1.0) -> Row:
        """Keep the tokens of all images, or of a fraction of them that the seed chooses."""
        folder = self._tokens("tokens", self.train)
        if fraction < 1:
            whole, folder = folder, self._path(f"{family}-{setting}")
            if not folder.exists():
                subset(whole, folder, positions={"train": fraction_of(len(self.train), fraction, self.seed)})
        return self._token_row(family, setting, folder, kind=kind)

    def crops(self, family: str, setting: str, *, number: int, scale: tuple[float, float]) -> Row:
        """Keep the tokens of several random crops of each image, with an area in `scale`."""
        crops = Crops(self.train, number, RandomBoxes(self.seed, self.tokenizer.spec.image_size, scale))
        return self._token_row(family, setting, self._tokens(f"{family}-{setting}", crops))

    def test_tokens(self) -> TokenStore:
        """Return the store of the test images, which counts for no row."""
        return TokenStore(self._tokens("tokens-test", self.test))

    def _token_row(self, family: str, setting: str, folder: Path, *, kind: Kind = "maps") -> Row:
        return Row(family, setting, kind, folder, store_sizes(folder), len(TokenStore(folder)))

    def _path(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")

    def _tokens(self, name: str, source: ImageSource) -> Path:
        folder = self._path(name)
        if not folder.exists():
            tokenize(folder, source, tokenizer=self.tokenizer, device=self.device)
        return folder

    def _pack(self, name: str, source: ImageSource, change: Change | None) -> Path:
        folder = self._path(name)
        if not folder.exists():
            samples = map(source.read, range(len(source)))
            made: Callable[[Sample], Sample] = partial(changed, change=change) if change else lambda sample: sample
            write_pack(folder, map(made, samples), source.class_names)
        return folder


def _spaced(source: ImageSource, most: int) -> list[Sample]:
    return [source.read(index) for index in range(0, len(source), -(-len(source) // most))]
