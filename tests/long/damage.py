"""Check that damaged stored data is refused, or at worst read correctly, but never silently read wrong.

    python tests/long/damage.py [--flips 10000] [--changes all] [--fuzz 20000000]

1. One flipped bit in any file of a store is refused when the store is opened. One flipped bit in any file of a
   checkpoint is refused, and the previous checkpoint is used.
2. After any one-byte change or truncation of a shard of about 4 kB, opened without verification, reading all
   images is refused or returns the correct tokens.
3. Random and mutated payloads raise no exception but CodecError in any codec, and give no id >= K. Accepted
   payloads are counted: the codec escape has no checksum, the others have one of 16 bits.

Each part prints its figures. The last line adds them up, and the exit status is not 0 after any failure.
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
    """Flip a random bit of a file of a store and open it, `count` times; return how many were not refused."""
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
    """Flip a random bit of the newer of two checkpoints, `count` times; return how often it was still used."""
    rng, silent = np.random.default_rng(2), 0
    model = nn.Linear(16, 16)
    tensors = checkpoint.tensors_of(model, OptimizerState(torch.optim.AdamW(model.parameters())), ema=None)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for step in (1, 2):
            checkpoint.save(Path(folder), step, data_fingerprint="store", tensors=tensors)
        files = sorted(Path(folder, "step-00000002").iterdir())
        for number in tqdm(range(count), desc="checkpoint flips"):
            path = files[number % len(files)]
            data = path.read_bytes()
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            silent += checkpoint.newest(Path(folder)).name != "step-00000001"
            path.write_bytes(data)
    print(f"checkpoint flips: {count:,} bits over {len(files)} files, {silent} not refused")
    return silent


def changes(part: tuple[int, int], limit: int | None) -> tuple[int, int, int]:
    """Try every `num_parts`-th change of one shard; return how many were tried, refused and silently wrong.

    `part` is (number of this part, num_parts).
    """
    number, num_parts = part
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        ids = make_store(path, 4)
        shard = next((path / "train").glob("*.arrow"))
        data = shard.read_bytes()
        variants = [(pos, value) for pos in range(len(data)) for value in range(256) if value != data[pos]]
        variants += [(pos, None) for pos in range(len(data))]  # truncations
        mine = variants[number::num_parts][:limit]
        refused = wrong = 0
        for pos, value in tqdm(mine, desc="changes", disable=number > 0):
            damaged = data[:pos] if value is None else data[:pos] + bytes([value]) + data[pos + 1 :]
            # A new file each time, because the old one may still be memory-mapped.
            shard.unlink()
            shard.write_bytes(damaged)
            try:
                wrong += not np.array_equal(TokenStore(path, verify=False).ids(range(4)), ids)
            except StoreError:
                refused += 1
    return len(mine), refused, wrong


def fuzz(part: int, count: int) -> dict[str, tuple[int, int, int]]:
    """Decode `count` random and mutated payloads; return (tried, accepted, failures) of each codec."""
    rng = np.random.default_rng(100 + part)
    counts = rng.integers(1, 1000, K)
    grids = rng.integers(K, size=(50, 8, 8))
    learned = codec.ContextCodec.learn(grids, rng.standard_normal((K, D)))
    codecs = [codec.build(name, K, counts, grid=(8, 8)) for name in codec.CODECS if name != "context"] + [learned]
    results = {}
    for coder in codecs:
        good = [coder.encode(ids.ravel()) for ids in grids]
        accepted = failures = 0
        for number in tqdm(range(count // len(codecs)), desc=coder.name, disable=part > 0):
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
                failures += len(ids) != 64 or int(ids.max()) >= K
            except codec.CodecError:
                pass
            except Exception as error:
                print(f"{coder.name}: {data.hex()}: {error!r}")
                failures += 1
        results[coder.name] = count // len(codecs), accepted, failures
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--changes", type=int, help="number of changes that each process tries; default: all")
    parser.add_argument("--fuzz", type=int, default=20_000_000)
    options = parser.parse_args()
    started = time.perf_counter()
    silent = flips(options.flips) + checkpoint_flips(options.flips)
    with ProcessPoolExecutor(PROCESSES) as pool:
        parts = pool.map(changes, [(n, PROCESSES) for n in range(PROCESSES)], [options.changes] * PROCESSES)
        tried, refused, wrong = (sum(column) for column in zip(*parts, strict=True))
        print(f"changes: {tried:,} of one shard, {refused:,} refused unverified, {wrong} silently wrong tokens")
        parts = list(pool.map(fuzz, range(PROCESSES), [options.fuzz // PROCESSES] * PROCESSES))
    failed = 0
    for name in parts[0]:
        inputs, accepted, failures = (sum(part[name][column] for part in parts) for column in range(3))
        failed += failures
        print(f"fuzz {name}: {inputs:,} inputs, {accepted:,} accepted, {failures} failures")
    print(
        f"2 x {options.flips:,} flips, {tried:,} changes, {options.fuzz:,} fuzz inputs in "
        f"{time.perf_counter() - started:.0f} s: {silent + wrong + failed} failures"
    )
    sys.exit(silent + wrong + failed > 0)


if __name__ == "__main__":
    main()
