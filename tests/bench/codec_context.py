"""All codecs on tokens of photographs and digits that no table has seen: bits a token, and images a second.

    pip install scikit-image; OMP_NUM_THREADS=1 python tests/bench/codec_context.py

Photographs: tokenizer (patch_kmeans, 391 codes, 32 x 32 tokens) and tables are learned from square crops of five;
coded are crops of three others, and these three whole. Digits: learned from "train", coded is "validation".
The size of the context tables is spread over 100,000 images. One core; the best of five runs.
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
    """(number, 3, 256, 256) in [0, 1]: squares of half to all of the shorter side, half of them mirrored."""
    image = torch.tensor(photograph).permute(2, 0, 1).float() / 255
    found = []
    for _ in range(number):
        side = int(rng.uniform(0.5, 1) * min(image.shape[1:]))
        top, left = (rng.integers(length - side + 1) for length in image.shape[1:])
        square = resized(image[:, top : top + side, left : left + side])
        found.append(square.flip(3) if rng.random() < 0.5 else square)
    return torch.cat(found)


def resized(image: Tensor) -> Tensor:
    return F.interpolate(image[None], (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)


def photographs() -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Grids to learn from, grids to code by name, codebook."""
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
    """The same of the digits."""
    train, validation = (TokenStore(digits().store, split) for split in ("train", "validation"))
    grids = [store.ids(range(len(store))).astype(np.int64) for store in (train, validation)]
    return grids[0], {"360 unseen digits": grids[1]}, train.codebook


def seconds(work) -> float:
    """Processor time of the fastest of five runs."""
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
            row(name, codec, images, len(context.table) if codec is context else 0)


def row(name: str, codec: codecs.Codec, images: list[np.ndarray], table: int) -> None:
    payloads = [codec.encode(ids) for ids in images]
    assert all((codec.decode(data, ids.size) == ids).all() for data, ids in zip(payloads, images, strict=True))
    size = sum(map(len, payloads)) / len(images) + table / IMAGES
    encode = len(images) / seconds(lambda: [codec.encode(ids) for ids in images])
    decode = len(images) / seconds(lambda: [codec.decode(data, images[0].size) for data in payloads])
    bits = size * 8 / images[0].size
    print(f"| {name} | {codec.name} | {bits:.2f} | {size:.1f} | {table:,} | {encode:,.0f} | {decode:,.0f} |")


if __name__ == "__main__":
    print("| tokens | codec | bits a token | bytes an image | table, bytes | encode images/s | decode images/s |")
    print("|---|---|---|---|---|---|---|")
    compare(*photographs())
    compare(*handwriting())
