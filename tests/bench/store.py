"""Measure sizes and speeds of the token store and print them as tables.

    python tests/bench/store.py [FOLDER]

Needs 2 GB in FOLDER (default: the system's temporary folder), about a minute, and no network. The exit status is 1
if a requirement is not met. Tokens are independent samples with 8.54 bits each, as the 391 codes have on ImageNet,
but neighbors are not similar. So the codec "context" has nothing to gain; what it seems to gain comes from
learning its table from the same images.
"""

import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from seitpp import StoreWriter, TokenStore
from seitpp import codec as codecs
from seitpp.store import layout
from seitpp.store.shards import read_shard, write_shard

NUM_CODES, GRID, BITS = 391, (32, 32), 8.54
TOKENS = GRID[0] * GRID[1]
DISTINCT, TOTAL = 4096, 1_281_167
BATCH = 512
CODEBOOK = np.random.default_rng(1).normal(size=(NUM_CODES, 32)).astype(np.float32)


def draw() -> np.ndarray:
    """Sample ids (DISTINCT, 32, 32); code frequencies decrease exponentially such that the entropy is BITS."""
    low, high = 0.0, 20.0
    while high - low > 1e-9:
        slope = (low + high) / 2
        frequencies = np.exp(-slope * np.arange(NUM_CODES) / NUM_CODES)
        frequencies /= frequencies.sum()
        low, high = (slope, high) if -(frequencies * np.log2(frequencies)).sum() > BITS else (low, slope)
    return np.random.default_rng(0).choice(NUM_CODES, (DISTINCT, *GRID), p=frequencies)


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Return the best of several runs, because other processes use the machine too."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def codec_row(name: str, ids: np.ndarray, folder: Path) -> str:
    """Write a store, measure encoding and decoding, and return the row of the table."""
    path = folder / name
    with StoreWriter(path, codebook=CODEBOOK, grid=GRID, codec=name) as out:
        out.add_batch(ids, np.arange(len(ids)) % 1000)
    store = TokenStore(path)
    images = ids[: 512 if name == "context" else 2048].reshape(-1, TOKENS)
    payloads = [store.codec.encode(image) for image in images]
    encoding = seconds(lambda: [store.codec.encode(image) for image in images]) / len(images)
    decoding = seconds(lambda: [store.codec.decode(payload, TOKENS) for payload in payloads]) / len(images)
    size = store.payload_bytes / len(store)
    table = path / layout.TABLE
    label = f"{name}, without its table of {table.stat().st_size:,} bytes" if table.exists() else name
    return f"| {label} | {size:.1f} | {1 / encoding:,.0f} | {1 / decoding:,.0f} |"


def parquet_bytes(ids: np.ndarray, folder: Path) -> int:
    rows = pa.FixedSizeListArray.from_arrays(pa.array(ids.astype(np.uint16).ravel()), TOKENS)
    path = folder / "ids.parquet"
    pa.parquet.write_table(pa.table({"ids": rows}), path, compression="zstd")
    return path.stat().st_size


def make_large(small: Path, large: Path) -> None:
    """Create a store of TOTAL images by repeating the only shard of `small` with other labels."""
    batch = read_shard(small / layout.shard_name("train", 0, 1))
    document = layout.read_document(small)
    (large / "train").mkdir(parents=True)
    for name in (layout.CODEBOOK, layout.CARD, layout.DATASET_DICT, f"train/{layout.DATASET_INFO}"):
        (large / name).write_bytes((small / name).read_bytes())
    total, size = -(-TOTAL // DISTINCT), 0
    for shard in range(total):
        numbers = np.arange(shard * DISTINCT, min((shard + 1) * DISTINCT, TOTAL))
        tokens = batch.column("tokens")[: len(numbers)]
        size += pc.sum(pc.binary_length(tokens)).as_py()
        with (large / layout.shard_name("train", shard, total)).open("wb") as file:
            write_shard(file, pa.record_batch([tokens, pa.array(numbers % 1000)], batch.schema))
    document["splits"]["train"] = {"rows": TOTAL, "payload_bytes": size, "num_classes": 1000}
    files = sorted(path for path in large.rglob("*") if path.is_file())
    document["files"] = {path.relative_to(large).as_posix(): layout.file_entry(path) for path in files}
    layout.write_document(large, document)


OPEN = """
import json, os, sys, time
from pathlib import Path
from seitpp import TokenStore

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

path, verify, cold = Path(sys.argv[1]), sys.argv[2] == "1", sys.argv[3] == "1"
for file in path.rglob("*.*") if cold else ():
    with file.open() as open_file:
        os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
before, start = resident(), time.perf_counter()
store = TokenStore(path, verify=verify)
seconds = time.perf_counter() - start
opened = resident() - before
store.labels
print(json.dumps([seconds, opened / 1e6, (resident() - before) / 1e6]))
"""


def opening(path: Path, verify: bool, cold: bool) -> tuple[float, float, float]:
    """Open a store in a new process: seconds, MB of memory added, and MB added with the labels loaded."""
    command = [sys.executable, "-c", OPEN, str(path), str(int(verify)), str(int(cold))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def read_ratio(path: Path) -> tuple[float, float]:
    """Read random batches of the large store: images per second, and time relative to the decode calls alone."""
    store, rng = TokenStore(path, verify=False), np.random.default_rng(0)
    ratios, rates = [], []
    for _ in range(15):
        batch = rng.integers(0, TOTAL, BATCH)
        start = time.perf_counter()
        ids = store.ids(batch)
        middle = time.perf_counter()
        payloads = [store.codec.encode(image.ravel()) for image in ids]
        bare = time.perf_counter()
        for payload in payloads:
            store.codec.decode(payload, TOKENS)
        ratios.append((middle - start) / (time.perf_counter() - bare))
        rates.append(BATCH / (middle - start))
    return float(np.median(rates)), float(np.median(ratios))


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}"


def bound(value: float, limit: float) -> str:
    return f"{value:.3f} | at most {limit} | {'yes' if value <= limit else 'NO'} |"


def main() -> int:
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}, `python tests/bench/store.py`\n")
    ids = draw()
    bits = layout.entropy(np.bincount(ids.ravel()))
    optimum = bits * TOKENS / 8
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as temporary:
        folder = Path(temporary)
        print(f"{DISTINCT} images of 32 x 32 tokens, K = {NUM_CODES}, {bits:.4f} bits per token; one core\n")
        print("| format | bytes per image | encode images/s | decode images/s |\n|---|---|---|---|")
        print(f"| entropy bound | {optimum:.1f} | | |")
        for name in codecs.CODECS:
            print(codec_row(name, ids, folder), flush=True)
        raw = ids.astype("<u2").tobytes()
        print(f"| gzip -9 of uint16, all images in one stream | {len(gzip.compress(raw)) / DISTINCT:.1f} | | |")
        print(f"| Parquet, zstd, all images in one file | {parquet_bytes(ids, folder) / DISTINCT:.1f} | | |")
        print(f"| uint16 | {2 * TOKENS:.1f} | | |\n", flush=True)
        make_large(folder / "ans", folder / "large")
        rows = large_rows(folder / "large", optimum)
    print(f"\nA store of {TOTAL:,} images, codec ans\n\n| | measured | required | met |\n|---|---|---|---|")
    print("\n".join(rows))
    return int(any("NO" in row for row in rows))


def large_rows(path: Path, optimum: float) -> list[str]:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    rate, ratio = read_ratio(path)
    warm, opened, labels = opening(path, verify=False, cold=False)
    cold, *_ = opening(path, verify=False, cold=True)
    verified, verified_opened, _ = opening(path, verify=True, cold=False)
    return [
        f"| all files / entropy ({size / TOTAL:.1f} bytes per image) | {bound(size / TOTAL / optimum, 1.02)}",
        f"| random batch of {BATCH} / decode calls alone ({rate:,.0f} images/s) | {bound(ratio, 1.3)}",
        f"| open without verification, s | {bound(warm, 2)}",
        f"| the same, files not in memory, s | {bound(cold, 2)}",
        f"| open with verification, s | {bound(verified, 5)}",
        f"| resident memory added, without verification, MB | {bound(opened, 100)}",
        f"| the same with verification, MB | {bound(verified_opened, 100)}",
        f"| the same without verification and with all labels, MB | {bound(labels, 100)}",
    ]


if __name__ == "__main__":
    sys.exit(main())
