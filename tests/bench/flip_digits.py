"""Compare mirrored token grids with the tokens of mirrored images in supervised training on the embedded digits.

    python tests/bench/flip_digits.py [--seeds 3] [--processes 1]

Each row is recipes/seit_train.py, preset digits: as it is; with half of the grids mirrored (--flip 0.5), which is
the naive flip of Figure 3 of SeiT++; and on a store that has each training image and its mirror image, both as
tokenized, for half as many epochs. So the last two see mirrored digits equally often and take equally many steps,
and differ only in what a mirrored digit is. A mirrored digit is another digit or none, so both can be worse than
the first. The score is the top-1 of the moving average of the weights on the 360 validation images, not mirrored:
the mean over the seeds, its standard deviation, and the difference to the first row.
"""

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from seit_digits import top1

from seitpp import StoreWriter, TokenStore, tokenizers
from seitpp.data.digits import digits, digits_images


def mirrored_store(path: Path) -> None:
    """Write a store of the digits in which the training split has also the mirror image of each."""
    store, tokenizer = TokenStore(digits().store), tokenizers.load(digits().tokenizer)
    for split in ("train", "validation"):
        images, labels = digits_images(split)
        if split == "train":
            images, labels = torch.cat([images, images.flip(3)]), torch.cat([labels, labels])
        settings = {"codebook": store.codebook, "grid": store.grid, "class_names": store.class_names}
        with StoreWriter(path, split=split, **settings) as writer:
            writer.add_batch(tokenizer.encode(tokenizer.preprocess(images)).numpy(), labels.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(arguments.processes) as pool:
        mirrored_store(Path(root) / "store")
        rows = {
            "not mirrored": [],
            "mirrored grids": ["--flip", "0.5"],
            "mirrored images": ["--store", str(Path(root) / "store"), "--epochs", "60"],
        }
        jobs = [(name, seed) for seed in range(arguments.seeds) for name in rows]

        def score(job: tuple[str, int]) -> float:
            value = top1(rows[job[0]], job[1], Path(root) / f"{job[0]}-{job[1]}".replace(" ", "-"))
            print(*job, f"{value:.2f}", flush=True)
            return value

        scores = np.array(list(pool.map(score, jobs))).reshape(arguments.seeds, len(rows)).T
    print("| flip | top-1, % | minus the first row, points |\n|---|---|---|")
    for name, row in zip(rows, scores, strict=True):
        difference = row - scores[0]
        cells = (f"{values.mean():.2f} +- {values.std(ddof=1):.2f}" for values in (row, difference))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
