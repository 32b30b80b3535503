"""What is segmented where no data is named: synthetic scenes of 6 classes, written and tokenized on first use.

    python -m downstream.segmentation.default    # where they lie, for the other recipes

All scenes have one size, so that recipes/mtm_pretrain.py can be trained on the same store.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from downstream.segmentation.data import COLUMN
from downstream.segmentation.scenes import write_scenes
from seitpp import files
from seitpp.images.annotated import AnnotatedSource, smallest_png
from seitpp.images.decode import decode_image
from seitpp.store import StoreWriter
from seitpp.tokenizers import PatchKMeans

VERSION = 1  # of the way they are made
SPLITS = {"train": "training", "validation": "validation"}  # of the store and of the images
FITTED = 100  # training images that the tokenizer is fitted on


@dataclass(frozen=True)
class SceneSettings:
    """Everything that the scenes and their tokens follow from: another value is another folder of the cache."""

    num_classes: int = 6
    training: int = 1000
    validation: int = 100
    size: int = 64
    patch: int = 4
    num_codes: int = 32
    code_dim: int = 32


SCENES = SceneSettings()
FEW_SCENES = SceneSettings(training=48, validation=13)  # for tests


class Scenes(NamedTuple):
    """Where the images, their tokens and their tokenizer lie."""

    images: Path
    store: Path
    tokenizer: Path


def default_scenes(settings: SceneSettings = SCENES) -> Scenes:
    """The tokenized scenes in the user's cache folder; made on first use, reused afterwards."""
    facts = json.dumps({"version": VERSION, **asdict(settings)}, sort_keys=True)
    name = f"scenes-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    folder = files.make_once(name, partial(_make, settings))
    return Scenes(folder / "images", folder / "store", folder / "tokenizer.safetensors")


def _make(settings: SceneSettings, folder: Path) -> None:
    """The layout of ADE-20k, a tokenizer fitted to it, and a store with both splits."""
    counts = {"training": settings.training, "validation": settings.validation}
    write_scenes(folder / "images", settings.num_classes, counts, settings.size)
    sources = {split: AnnotatedSource(folder / "images", source) for split, source in SPLITS.items()}
    fitted = range(min(FITTED, settings.training))
    tokenizer = PatchKMeans.fit(
        torch.cat([_pixels(sources["train"], index, settings.size) for index in fitted]),
        image_size=settings.size,
        patch=settings.patch,
        num_codes=settings.num_codes,
        code_dim=settings.code_dim,
    )
    tokenizer.save(folder / "tokenizer.safetensors")
    for split, source in sources.items():
        writer = StoreWriter(
            folder / "store",
            codebook=tokenizer.codebook.numpy(),
            grid=tokenizer.spec.grid,
            split=split,
            class_names=source.class_names,
            tokenizer=tokenizer.description(),
            columns={COLUMN: "binary"},
        )
        with writer:
            for index in range(len(source)):
                sample = source.read(index)
                ids = tokenizer.encode(_pixels(source, index, settings.size))[0]
                writer.add(ids.numpy(), sample.label, {COLUMN: smallest_png(sample.annotation)})


def _pixels(source: AnnotatedSource, index: int, size: int) -> torch.Tensor:
    """(1, 3, size, size) in [0, 1]."""
    return torch.from_numpy(decode_image(source.read(index), (size, size))).unsqueeze(0).float() / 255


if __name__ == "__main__":
    for name, path in default_scenes()._asdict().items():
        print(f"{name:9} {path}")
