"""Measure all codecs on tokens of unseen photographs and digits: bits per token and images per second.

    pip install scikit-image; OMP_NUM_THREADS=1 python tests/bench/codec_context.py

Photographs: the tokenizer (patch_kmeans, 391 codes, 32 x 32 tokens) and the tables are learned from square crops
of five photographs. The codecs then encode crops of three others, and these three whole. Digits: the tables are
learned from "train", the codecs encode "validation". The size of the context table is divided by 100,000 images.
One core; the best of five runs.
"""

import time

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

from seitpp import TokenStore
from seitpp import codec as codecs
from seitpp.codec import ContextCodec
from seitpp.data.digits import digits
from seitpp.tokenizers import PatchKMeans

IMAGES = 100_000
SIZE = 256


def crops(photograph: np.ndarray, number: int, rng: np.random.Generator) -> Tensor:
    """Cut random squares -> (number, 3, 256, 256) float32 in [0, 1].

    Sides are half to all of the shorter side; a square is flipped horizontally with probability 0.5.
    """
    image = torch.tensor(photograph).permute(2, 0, 1).float() / 255
    squares = []
    for _ in range(number):
        side = int(rng.uniform(0.5, 1) * min(image.shape[1:]))
        top, left = (rng.integers(length - side + 1) for length in image.shape[1:])
        square = resized(image[:, top : top + side, left : left + side])
        squares.append(square.flip(3) if rng.random() < 0.5 else square)
    return torch.cat(squares)


def resized(image: Tensor) -> Tensor:
    return F.interpolate(image[None], (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)


def photographs() -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Return the grids to learn from, the grids to encode by name, and the codebook, for the photographs."""
    china, flower = load_sample_images().images
    data, rng = skimage.data, np.random.default_rng(0)
    seen = [data.astronaut(), data.rocket(), data.stereo_motorcycle()[0], data.hubble_deep_field(), china]
    unseen = [data.chelsea(), data.coffee(), flower]
    learn = torch.cat([crops(photograph, 40, rng) for photograph in seen])
    tokenizer = PatchKMeans.fit(learn[::5], image_size=SIZE, patch=8, num_codes=391, code_dim=32)
    whole = [resized(torch.tensor(photograph).permute(2, 0, 1).float() / 255) for photograph in unseen]
    coded = {
        "60 crops of 3 unseen photographs": torch.cat([crops(photograph, 20, rng) for photograph in unseen]),
        "3 unseen photographs": torch.cat(whole),
    }
    grids = {name: tokenizer.encode(images).numpy() for name, images in coded.items()}
    return tokenizer.encode(learn).numpy(), grids, tokenizer.codebook.numpy()


def handwriting() -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Return the same for the digits."""
    train, validation = (TokenStore(digits().store, split) for split in ("train", "validation"))
    grids = [store.ids(range(len(store))).astype(np.int64) for store in (train, validation)]
    return grids[0], {"360 unseen digits": grids[1]}, train.codebook


def seconds(work) -> float:
    """Return the CPU time of the fastest of five runs."""
    times = []
    for _ in range(5):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def compare(learn: np.ndarray, coded: dict[str, np.ndarray], codebook: np.ndarray) -> None:
    num_codes = len(codebook)
    counts = np.bincount(learn.ravel(), minlength=num_codes)
    context = ContextCodec.learn(learn, codebook)
    built = [codecs.build(name, num_codes, counts) for name in ("escape", "packed", "huffman", "ans")]
    for name, grids in coded.items():
        images = list(grids.reshape(len(grids), -1))
        for codec in [*built, context]:
            row(name, codec=codec, images=images, table=len(context.table) if codec is context else 0)


def row(name: str, *, codec: codecs.Codec, images: list[np.ndarray], table: int) -> None:
    """Print a row; `table` is the size of the context table in bytes."""
    payloads = [codec.encode(ids) for ids in images]
    assert all((codec.decode(data, ids.size) == ids).all() for data, ids in zip(payloads, images, strict=True))
    size = sum(map(len, payloads)) / len(images) + table / IMAGES
    encode = len(images) / seconds(lambda: [codec.encode(ids) for ids in images])
    decode = len(images) / seconds(lambda: [codec.decode(data, images[0].size) for data in payloads])
    bits = size * 8 / images[0].size
    print(f"| {name} | {codec.name} | {bits:.2f} | {size:.1f} | {table:,} | {encode:,.0f} | {decode:,.0f} |")


if __name__ == "__main__":
    print(
        "| tokens | codec | bits per token | bytes per image | table, bytes | encode images/s | decode images/s |"
    )
    print("|---|---|---|---|---|---|---|")
    compare(*photographs())
    compare(*handwriting())
