"""Open a store of a billion images, and find, read and resume the steps of a training on it.

    PYTHONPATH=tests python tests/long/billion.py [--images 1000000000]

One real shard of 65,536 images is linked as often as needed, so that the folder has 15,259 shards and little else.
A new process opens it without verifying, and another goes on from a step in mid-epoch. Each prints its
figures: the time to open, its memory before and after, the time of a step's order (4,096 images) by windows of 64
shards and by the global order, and that of reading a batch of 256 images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from seitpp.data.order import WindowOrder, image_order
from seitpp.store import StoreWriter, TokenStore, layout, spec
from seitpp.store.fingerprint import joined_fingerprint

SHARD, BATCH, READ, WINDOW = 2**16, 4096, 256, 64


def make(folder: Path, images: int) -> Path:
    """Write one shard, link it, and write the files that list it."""
    spec.FEW_SHARDS = 1  # so that 16 staged shards are one, as in a large store
    store, codebook = folder / "store", np.random.default_rng(0).standard_normal((391, 32)).astype(np.float32)
    ids = np.random.default_rng(1).integers(391, size=(SHARD, 8, 8))
    with StoreWriter(store, codebook=codebook, grid=(8, 8), class_names=[str(n) for n in range(1000)]) as writer:
        for start in range(0, SHARD, 4096):
            writer.add_batch(ids[start : start + 4096], np.arange(4096) % 1000)
    document, shards = layout.read_document(store), -(-images // SHARD)
    (first,) = layout.shard_names(document, "train")
    entry, split = document["files"].pop(first), document["splits"]["train"]
    for number in range(shards):
        name = layout.shard_name("train", number, shards)
        (store / name).hardlink_to(store / first)
        document["files"][name] = entry
    (store / first).unlink()
    state = json.loads((store / "train" / layout.STATE).read_text())
    fingerprint = joined_fingerprint([state["_fingerprint"]] * shards)
    state |= {"_fingerprint": fingerprint, layout.SHARD_ROWS: [SHARD] * shards}
    (store / "train" / layout.STATE).write_text(json.dumps(state))
    split |= {"rows": SHARD * shards, "payload_bytes": split["payload_bytes"] * shards}
    for name in (f"train/{layout.STATE}",):
        document["files"][name] = layout.file_entry(store / name)
    layout.write_document(store, document)
    return store


def memory() -> str:
    """Say how much memory this process has: its own, and with the pages of files that the system can take back."""
    status = Path("/proc/self/status").read_text()
    own, files = (int(status.split(f"{name}:")[1].split()[0]) / 1000 for name in ("RssAnon", "RssFile"))
    return f"{own:.0f} MB and {files:.0f} MB of files"


def measure(store: Path, step: int) -> None:
    """Open the store, and make and read steps from `step` on."""
    before, started = memory(), time.perf_counter()
    opened = TokenStore(store, verify=False)
    took, after = time.perf_counter() - started, memory()
    print(f"{len(opened):,} images in {len(opened.shard_rows):,} shards: opened in {took:.2f} s")
    orders = {"windows": WindowOrder(opened.shard_rows, BATCH, 0, window=WINDOW)}
    orders["global"] = image_order(len(opened), BATCH, 0)
    for name, order in orders.items():
        times, images = [], np.empty(0, np.int64)
        for place in range(step, step + 20):
            started = time.perf_counter()
            epoch, at = divmod(place, order.steps_per_epoch)
            images = order.part(epoch, at * BATCH, (at + 1) * BATCH)
            times.append(1000 * (time.perf_counter() - started))
        assert len(np.unique(images)) == BATCH and images.max() < len(opened)
        shards = len(np.unique(images // SHARD))
        print(
            f"{name}: step {step:,} of {order.steps_per_epoch:,} in an epoch: the first in {times[0]:.1f} ms, the "
            f"others {np.median(times[1:]):.1f} ms; images of {shards} shards"
        )
    started = time.perf_counter()
    images = orders["windows"].part(0, step * BATCH, step * BATCH + READ)
    ids, labels = opened.ids(images), opened.labels_of(images)
    assert ids.shape == (READ, 8, 8) and (labels == images % SHARD % 4096 % 1000).all()
    print(f"{READ} images read in {1000 * (time.perf_counter() - started):.0f} ms, shards opened among them")
    print(f"memory after imports {before}; after opening {after}; after reading {memory()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10**9)
    parser.add_argument("--measure", metavar="STORE", help="only measure, from --step on")
    parser.add_argument("--step", type=int, default=0)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure), options.step)
        return
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        store = make(Path(folder), options.images)
        print(f"written in {time.perf_counter() - started:.0f} s")
        for step in (0, 123_456):
            words = [sys.executable, __file__, "--measure", str(store), "--step", str(step)]
            subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
