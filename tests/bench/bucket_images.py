"""Measure the way from the bytes of a bucket to ids beside Pillow alone, in tokens a second and core.

    OMP_NUM_THREADS=1 python tests/bench/bucket_images.py
    OMP_NUM_THREADS=1 python tests/bench/bucket_images.py --images 8 --repeats 1

Crops of two photographs, enlarged to 400 x 300 pixels and saved as JPEG (quality 90), lie in a tar and as single
objects in a bucket whose requests are answered from memory, so that the network takes no time. They are read,
decoded to 256 x 256 pixels and encoded to 32 x 32 ids by an encoder that costs next to nothing: one value of each
patch. Pillow alone decodes and resizes the same files. One thread, all ways in turns, the best of several.
Prints a table for docs/scale.md.
"""

import argparse
import io
import tarfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from decode_images import photographs, pillow

from seitpp.images.batches import DecodedImages
from seitpp.images.sources import open_source
from seitpp.store.bucket import Bucket, Entry

SIDE, GRID, BATCH = 256, 32, 64


def tar_of(files: list[bytes]) -> bytes:
    """Return the bytes of a tar of these images with labels beside them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, data in enumerate(files):
            for suffix, content in (("jpg", data), ("cls", b"0")):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Memory:
    """What a bucket answers, from memory."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def part(self, name: str, places: range, tag: str | None = None) -> bytes:
        return self.objects[name][places.start : places.stop]

    def entries(self) -> dict[str, Entry]:
        return {name: Entry(len(data), None) for name, data in self.objects.items()}

    def below(self) -> tuple[list[str], list[str]]:
        return sorted(self.objects), []


def ids_of(pixels: torch.Tensor, sizes: list[tuple[int, int]]) -> np.ndarray:
    """Encode images to ids by one value of each patch."""
    step = SIDE // GRID
    return pixels.view(len(sizes), 3, SIDE, SIDE)[:, 1, ::step, ::step].numpy().astype(np.uint16)


def to_ids(objects: dict[str, bytes], images: int) -> None:
    """Open what the bucket has, and make the ids of all images."""
    memory = Memory(objects)

    def part(bucket: Bucket, *request: Any) -> bytes:
        return memory.part(*request)

    with mock.patch.multiple(
        Bucket, part=part, entries=lambda bucket: memory.entries(), below=lambda bucket: memory.below()
    ):
        source = open_source("s3://memory/images", None, None)
        decoded = DecodedImages(source, (SIDE, SIDE))
        done = 0
        for start in range(0, images, BATCH):
            batch = decoded.__getitems__(list(range(start, min(start + BATCH, images))))
            done += len(ids_of(batch.pixels, batch.sizes))
    if done != images:
        raise SystemExit(f"got ids of {done} images, expected {images}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = photographs((300, 400), arguments.images)
    tar, single = {"images.tar": tar_of(files)}, {f"{number:06d}.jpg": data for number, data in enumerate(files)}
    ways: dict[str, Callable[[], object]] = {
        "Pillow alone": lambda: [pillow(data) for data in files],
        "a tar in a bucket to ids": lambda: to_ids(tar, len(files)),
        "single objects to ids": lambda: to_ids(single, len(files)),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - started)
    size = sum(map(len, files)) / len(files)
    print(
        f"{len(files)} JPEGs of 400 x 300 pixels, {size:,.0f} bytes each, to {SIDE} x {SIDE} pixels, one thread\n"
    )
    print("| | ms an image | images/s | tokens/s | of Pillow's speed |\n|---|---|---|---|---|")
    for name, seconds in best.items():
        rate, share = len(files) / seconds, best["Pillow alone"] / seconds
        print(f"| {name} | {1000 / rate:.2f} | {rate:,.0f} | {rate * GRID**2:,.0f} | {share:.2f} |")


if __name__ == "__main__":
    main()
