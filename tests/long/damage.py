"""What damage to stored data does: refused, or at worst read right; never silently wrong.

    python tests/long/damage.py [--flips 10000] [--changes all] [--fuzz 20000000]

1. One flipped bit in any file of a store: refused when the store is opened; in any file of a checkpoint: refused,
   and the checkpoint before it taken.
2. Every one-byte change and every truncation of a shard of about 4 kB, opened without verification, every image
   read: refused, or the tokens are right.
3. Random and mutated payloads to every codec: no exception but CodecError, no id >= K. Payloads that are accepted
   are counted: escape has no check; the others one of 16 bits.

Each part prints its figures; the last line sums them up and the exit status is not 0 if a promise is broken.
"""

import argparse
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from seitpp import TokenStore, codec
from seitpp.engine import checkpoint
from seitpp.engine.distributed import OptimizerState
from seitpp.store import StoreError, StoreWriter

K, D, GRID = 391, 4, (32, 32)
PROCESSES = 2


def make_store(path: Path, images: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    ids = rng.zipf(1.3, size=(images, *GRID)) % K
    codebook = rng.standard_normal((K, D)).astype(np.float32)
    with StoreWriter(path, codebook=codebook, grid=GRID, class_names=["a", "b"]) as writer:
        writer.add_batch(ids, np.arange(images) % 2)
    return ids


def flips(count: int) -> int:
    """Flip one bit of any file, open; how many were not refused."""
    rng, silent = np.random.default_rng(1), 0
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        make_store(store, 20)
        files = sorted(path for path in store.rglob("*") if path.is_file())
        sizes = np.array([path.stat().st_size for path in files])
        for _ in tqdm(range(count), desc="flips"):
            path = files[
                rng.choice(len(files), p=sizes / sizes.sum()) if rng.random() < 0.5 else rng.integers(len(files))
            ]
            data = path.read_bytes()
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            try:
                TokenStore(store)
                silent += 1
            except StoreError:
                pass
            path.write_bytes(data)
    print(f"flips: {count:,} bits over {len(files)} files, {silent} not refused")
    return silent


def checkpoint_flips(count: int) -> int:
    """Flip one bit of any file of the newer of two checkpoints; how often it was taken all the same."""
    rng, silent = np.random.default_rng(2), 0
    model = nn.Linear(16, 16)
    tensors = checkpoint.tensors_of(model, OptimizerState(torch.optim.AdamW(model.parameters())), ema=None)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for step in (1, 2):
            checkpoint.save(Path(folder), step, "store", tensors)
        files = sorted(Path(folder, "step-00000002").iterdir())
        for trial in tqdm(range(count), desc="checkpoint flips"):
            path = files[trial % len(files)]
            data = path.read_bytes()
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            silent += checkpoint.newest(Path(folder)).name != "step-00000001"
            path.write_bytes(data)
    print(f"checkpoint flips: {count:,} bits over {len(files)} files, {silent} not refused")
    return silent


def changes(share: tuple[int, int], limit: int | None) -> tuple[int, int, int]:
    """(tried, refused, silently wrong) for this process's share of the changes of one shard."""
    number, of = share
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        ids = make_store(path, 4)
        shard = next((path / "train").glob("*.arrow"))
        data = shard.read_bytes()
        variants = [(at, value) for at in range(len(data)) for value in range(256) if value != data[at]]
        variants += [(at, None) for at in range(len(data))]
        mine = variants[number::of][:limit]
        refused = wrong = 0
        for at, value in tqdm(mine, desc="changes", disable=number > 0):
            damaged = data[:at] if value is None else data[:at] + bytes([value]) + data[at + 1 :]
            # A new file each time: the old one may still be mapped.
            shard.unlink()
            shard.write_bytes(damaged)
            try:
                wrong += not np.array_equal(TokenStore(path, verify=False).ids(range(4)), ids)
            except StoreError:
                refused += 1
    return len(mine), refused, wrong


def fuzz(share: int, count: int) -> dict[str, tuple[int, int, int]]:
    """(tried, accepted, broken promises) of each codec."""
    rng = np.random.default_rng(100 + share)
    counts = rng.integers(1, 1000, K)
    grids = rng.integers(K, size=(50, 8, 8))
    learned = codec.ContextCodec.learn(grids, rng.standard_normal((K, D)))
    made = [codec.build(name, K, counts, grid=(8, 8)) for name in codec.CODECS if name != "context"] + [learned]
    results = {}
    for coder in made:
        good = [coder.encode(ids.ravel()) for ids in grids]
        accepted = broken = 0
        for number in tqdm(range(count // len(made)), desc=coder.name, disable=share > 0):
            if number % 2:
                data = rng.bytes(rng.integers(100))
            else:
                mutated = bytearray(good[number % len(good)])
                for _ in range(rng.integers(1, 5)):
                    mutated[rng.integers(len(mutated))] = rng.integers(256)
                data = bytes(mutated[: rng.integers(1, len(mutated) + 1)] if number % 4 else mutated)
            try:
                ids = coder.decode(data, 64)
                accepted += data not in good
                broken += len(ids) != 64 or int(ids.max()) >= K
            except codec.CodecError:
                pass
            except Exception as error:
                print(f"{coder.name}: {data.hex()}: {error!r}")
                broken += 1
        results[coder.name] = count // len(made), accepted, broken
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--changes", type=int, help="how many changes a process tries; all without it")
    parser.add_argument("--fuzz", type=int, default=20_000_000)
    options = parser.parse_args()
    started = time.perf_counter()
    silent = flips(options.flips) + checkpoint_flips(options.flips)
    with ProcessPoolExecutor(PROCESSES) as pool:
        parts = pool.map(changes, [(n, PROCESSES) for n in range(PROCESSES)], [options.changes] * PROCESSES)
        tried, refused, wrong = (sum(column) for column in zip(*parts, strict=True))
        print(f"changes: {tried:,} of one shard, {refused:,} refused unverified, {wrong} silently wrong tokens")
        parts = list(pool.map(fuzz, range(PROCESSES), [options.fuzz // PROCESSES] * PROCESSES))
    broken = 0
    for name in parts[0]:
        inputs, accepted, failures = (sum(part[name][column] for part in parts) for column in range(3))
        broken += failures
        print(f"fuzz {name}: {inputs:,} inputs, {accepted:,} accepted, {failures} promises broken")
    print(
        f"2 x {options.flips:,} flips, {tried:,} changes, {options.fuzz:,} fuzz inputs in "
        f"{time.perf_counter() - started:.0f} s: {silent + wrong + broken} failures"
    )
    sys.exit(silent + wrong + broken > 0)


if __name__ == "__main__":
    main()
