"""Compare mirrored token grids with the tokens of mirrored images in supervised training on the embedded digits.

    python tests/bench/flip_digits.py [--seeds 3] [--epochs 120]

Each row is recipes/seit_train.py, preset digits: as it is; with half of the grids mirrored (--flip 0.5), which is
the naive flip of Figure 3 of SeiT++; and on a store that has each training image and its mirror image, both as
tokenized, for half as many epochs. So the last two see mirrored digits equally often and take equally many steps,
and differ only in what a mirrored digit is. A mirrored digit is another digit or none, so both can be worse than
the first. The score is the top-1 of the last weights (their moving average lags behind in a short run) on the 360
validation images, not mirrored: the mean over the seeds and its standard deviation, and the same of the difference
to the first row, by seed.
"""

import argparse
import importlib.util
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from seitpp import StoreWriter, TokenStore, tokenizers
from seitpp.data.digits import digits, digits_images

RECIPE = Path(__file__).parents[2] / "recipes/seit_train.py"


def mirrored_store(path: Path) -> str:
    """Write a store of the digits in which the training split has also the mirror image of each."""
    store, tokenizer = TokenStore(digits().store), tokenizers.load(digits().tokenizer)
    for split in ("train", "validation"):
        images, labels = digits_images(split)
        if split == "train":
            images, labels = torch.cat([images, images.flip(3)]), torch.cat([labels, labels])
        settings = {"codebook": store.codebook, "grid": store.grid, "class_names": store.class_names}
        with StoreWriter(path, split=split, **settings) as writer:
            writer.add_batch(tokenizer.encode(tokenizer.preprocess(images)).numpy(), labels.numpy())
    return str(path)


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seit_train", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=120)
    arguments = parser.parse_args()
    recipe, scores = load_recipe(), []
    with tempfile.TemporaryDirectory() as root:
        store = mirrored_store(Path(root) / "store")
        rows = {"not mirrored": {}, "mirrored grids": {"flip": 0.5}, "mirrored images": {"store": store}}
        for seed in range(arguments.seeds):
            scores.append([])
            for name, changes in rows.items():
                epochs, out = arguments.epochs / (2 if "store" in changes else 1), Path(root) / f"{name} {seed}"
                lengths = dict.fromkeys(("evaluation_epochs", "checkpoint_epochs", "epochs"), epochs)
                lengths["warmup_epochs"] = epochs / 24  # as in the preset
                recipe.main(replace(recipe.PRESETS["digits"], seed=seed, out=str(out), **lengths, **changes))
                scores[-1].append(json.loads((out / "result.json").read_text())["top1"])
                print(name, seed, scores[-1][-1], flush=True)
    print("| flip | top-1, % | minus the first row, points |\n|---|---|---|")
    for name, row in zip(rows, np.array(scores).T, strict=True):
        cells = (
            f"{values.mean():.2f} +- {values.std(ddof=1):.2f}" for values in (row, row - np.array(scores).T[0])
        )
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
