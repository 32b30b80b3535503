"""Small pictures of which a tokenizer makes so many tokens that few of them fill a staged shard."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from seitpp.tokenizers import PatchKMeans

IN_A_SHARD = 4  # pictures of 2^20 tokens


def make_pictures(root: Path, number: int) -> None:
    """Write the folder `images` with pictures, and the file `tokenizer`."""
    rng, shape = np.random.default_rng(0), {"image_size": 1024, "patch": 1, "num_codes": 4, "code_dim": 2}
    PatchKMeans.fit(torch.from_numpy(rng.random((1, 3, 8, 8), np.float32)), **shape).save(root / "tokenizer")
    (root / "images").mkdir()
    for picture in range(number):
        pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{picture}.png")


def tokenize_line(root: Path, out: Path) -> list[str]:
    """The words of tokenize_images for the pictures in `images` of the current folder."""
    line = ["published", "--data", "images", "--tokenizer", str(root / "tokenizer"), "--out", str(out)]
    return [*line, "--batch-size-per-process", "1", "--workers", "0"]


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
