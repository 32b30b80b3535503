"""Measure the linear probe and k-NN on synthetic features, and compute what ImageNet-1k needs.

    python tests/bench/probe.py [--images 100000] [--queries 5000] [--iterations 10]

Features are noisy centers of 1,000 classes, as wide as ViT-B's (2 x 768); one process, on a GPU if there is one.
The table gives seconds. Then come the peak of the resident set (or of the GPU's memory), its size before, and the
bound computed by `peak_bytes`. The last line gives the computed memory and operations for ImageNet-1k with all
iterations.
"""

import argparse
import time

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from seitpp.engine import probe
from seitpp.engine.probe import Features
from seitpp.engine.system import device_name, peak_memory

WIDTH, CLASSES = 2 * 768, 1000
IMAGENET = 1_281_167, 50_000
ITERATIONS = 200


def peak_bytes(images: int, queries: int, *, width: int, classes: int, ranks: int = 1) -> int:
    """Return an upper bound of the bytes of all tensors that a process holds at once, including the features."""
    features = (images + queries) // ranks * (2 * width + 16)
    parameters, block = (width + 1) * classes, probe.BLOCK * ranks
    step = probe.BLOCK * max(12 * width + 4 * classes, 4 * width + 12 * classes)  # a block, or its gradient
    fit = 4 * parameters * (2 * probe.HISTORY + 14) + 8 * parameters + max(step, 16 * parameters)
    rows = min(images, probe.SIMILARITIES // block + 1)
    neighbors = 16 * block * rows + 12 * width * (rows + block) + 32 * images + 16 * block * classes
    return features + max(fit, neighbors)


def evaluation_flops(images: int, width: int, classes: int) -> int:
    """Return the floating-point operations of a loss and its gradient: two matrix products."""
    return 4 * images * width * classes


def knn_flops(images: int, queries: int, width: int) -> int:
    """Return the floating-point operations of all similarities."""
    return 2 * images * queries * width


def synthetic(images: int, queries: int, device: torch.device) -> tuple[Features, Features]:
    """Create the features of two splits, block by block, because all of them in float32 would be the peak."""
    random = torch.Generator(device).manual_seed(0)
    centers = torch.randn(CLASSES, WIDTH, generator=random, device=device)
    splits = []
    for count in (images, queries):
        labels = torch.randint(CLASSES, (count,), generator=random, device=device)
        vectors = torch.empty(count, WIDTH, dtype=torch.float16, device=device)
        for out, block in zip(vectors.split(probe.BLOCK), labels.split(probe.BLOCK), strict=True):
            out.copy_(0.3 * centers[block] + torch.randn(len(block), WIDTH, generator=random, device=device))
        splits.append(Features(vectors, labels, torch.arange(count, device=device)))
    return splits[0], splits[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--iterations", type=int, default=10)
    options = parser.parse_args()
    accelerator = Accelerator()
    device = accelerator.device
    before = peak_memory(device)
    train, validation = synthetic(options.images, options.queries, device)
    print(f"{options.images:,} images, {options.queries:,} queries, {WIDTH} x {CLASSES}; {device_name(device)}")
    print(f"{'':12} {'seconds':>9} {'CPU time':>9} {'GFLOP':>8} {'top-1, %':>9}")
    settings = {"num_classes": CLASSES, "accelerator": accelerator}
    fitted = {**settings, "max_iterations": options.iterations}
    for name, evaluate in (
        ("k-NN", lambda: probe.knn(train, validation, **settings)),
        ("linear probe", lambda: probe.linear_probe(train, validation, **fitted)),
    ):
        start = time.perf_counter(), time.process_time()
        with FlopCounterMode(display=False) as counter:
            score = evaluate()
        seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        flops = counter.get_total_flops() / 1e9
        print(f"{name:12} {seconds:9.1f} {cpu:9.1f} {flops:8.0f} {score.percent:9.2f}", flush=True)
    count = peak_bytes(options.images, options.queries, width=WIDTH, classes=CLASSES)
    print(
        f"memory: {peak_memory(device) / 2**30:.2f} GiB at its peak, {before / 2**30:.2f} before; "
        f"computed {count / 2**30:.2f}"
    )
    evaluations = ITERATIONS * 5 // 4
    flops = evaluations * evaluation_flops(IMAGENET[0], WIDTH, CLASSES)
    one, eight = (peak_bytes(*IMAGENET, width=WIDTH, classes=CLASSES, ranks=ranks) / 2**30 for ranks in (1, 8))
    print(
        f"ImageNet-1k, computed: {one:.2f} GiB on 1 process, {eight:.2f} on each of 8; "
        f"at most {flops / 1e12:.0f} TFLOP "
        f"in {evaluations} evaluations, {knn_flops(*IMAGENET, WIDTH) / 1e12:.0f} in k-NN"
    )


if __name__ == "__main__":
    main()
