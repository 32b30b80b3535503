"""The default data set: synthetic scenes of 6 classes, written and tokenized on first use.

    python -m downstream.segmentation.default    # prints the paths, for use with other recipes

All scenes have the same size, so recipes/mtm_pretrain.py can train on the same store.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from downstream.segmentation.data import ANNOTATION
from downstream.segmentation.scenes import write_scenes
from seitpp import files
from seitpp.images.annotated import AnnotatedSource, open_annotated, smallest_png
from seitpp.images.decode import decode_image
from seitpp.images.masks import MaskRules
from seitpp.store import StoreWriter
from seitpp.tokenizers import PatchKMeans

VERSION = 1  # increase it when the code that creates the scenes changes: it is part of the cache key
SPLITS = {"train": "training", "validation": "validation"}  # split of the store: split of the image folder
FIT_IMAGES = 100  # number of training images that the tokenizer is fitted to


@dataclass(frozen=True)
class SceneSettings:
    """The settings that determine the scenes and their tokens; each combination has its own cache folder."""

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
    """Paths of the images, of the store with their tokens, and of the tokenizer."""

    images: Path
    store: Path
    tokenizer: Path


def default_scenes(settings: SceneSettings = SCENES) -> Scenes:
    """Return the paths of the tokenized scenes in the user's cache folder; the first call creates them."""
    key = json.dumps({"version": VERSION, **asdict(settings)}, sort_keys=True)
    name = f"scenes-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = files.make_once(name, partial(_create, settings))
    return Scenes(folder / "images", folder / "store", folder / "tokenizer.safetensors")


def _create(settings: SceneSettings, folder: Path) -> None:
    """Write the images in the layout of ADE20K, fit a tokenizer to them, and write a store with both splits."""
    counts = {"training": settings.training, "validation": settings.validation}
    write_scenes(folder / "images", settings.num_classes, images=counts, size=settings.size)
    rules = MaskRules(ignore_label=(0,))
    sources = {split: open_annotated(folder / "images", source, rules) for split, source in SPLITS.items()}
    indices = range(min(FIT_IMAGES, settings.training))
    tokenizer = PatchKMeans.fit(
        torch.cat([_pixels(sources["train"], index, settings.size) for index in indices]),
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
            columns={ANNOTATION: "binary"},
        )
        with writer:
            for index in range(len(source)):
                sample = source.read(index)
                ids = tokenizer.encode(_pixels(source, index, settings.size))[0]
                writer.add(ids.numpy(), sample.label, {ANNOTATION: smallest_png(sample.annotation)})


def _pixels(source: AnnotatedSource, index: int, size: int) -> torch.Tensor:
    """Return image `index` as (1, 3, size, size) float32 in [0, 1]."""
    return torch.from_numpy(decode_image(source.read(index), (size, size))).unsqueeze(0).float() / 255


if __name__ == "__main__":
    for name, path in default_scenes()._asdict().items():
        print(f"{name:9} {path}")
