"""Draw docs/concepts.png: digits as pixels, as tokens, with half of them hidden, and filled in by a model.

    accelerate launch recipes/mtm_pretrain.py --out runs/mtm_pretrain-digits
    python tests/bench/concepts_picture.py runs/mtm_pretrain-digits

The first command takes about 2 minutes on a CPU, the second seconds.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from seitpp import TokenStore, plots, tokenizers
from seitpp.data.digits import digits, digits_images
from seitpp.models import load_pretrained

SHOWN = (1, 4)  # of eight validation images
TITLES = (
    "image\n32 x 32 pixels",
    "tokens\n8 x 8 ids of codes",
    "mask\nhalf of the patches hidden",
    "prediction\nthe model's likeliest ids",
    "reconstruction\nthe ids, decoded",
)
STEPS = ("tokenizer", "mask", "model", "tokenizer")  # what leads from one picture to the next


def draw(run: Path, path: Path) -> None:
    """Write the picture to `path`; `run` is the folder of a run of mtm_pretrain on the digits."""
    paths = digits()
    store, tokenizer = TokenStore(paths.store, "validation"), tokenizers.load(paths.tokenizer)
    images = tokenizer.preprocess(digits_images("validation")[0])
    rows = partial(
        plots.reconstructions, load_pretrained(run).model.eval(), store, grid=store.grid, seed=0, originals=images
    )
    painted = rows(decode=partial(plots.paint_codes, books=store.books))
    decoded = rows(decode=tokenizer.decode)["reconstruction"]
    names = ("original", "decoded tokens", "masked input", "reconstruction")
    ids = store.ids(torch.linspace(0, len(store) - 1, len(decoded)).round().long().numpy())
    figure, axes = plt.subplots(len(SHOWN), len(TITLES), figsize=(12.4, 4.9))
    for line, number in zip(axes, SHOWN, strict=True):
        pictures = [*(painted[name][number] for name in names), decoded[number]]
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_axis_off()
        for (row, column), code in np.ndenumerate(ids[number]):
            line[1].text(
                (column + 0.5) * plots.PAINTED_PIXELS - 0.5,
                (row + 0.5) * plots.PAINTED_PIXELS - 0.5,
                str(code),
                ha="center",
                va="center",
                fontsize=6.5,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            )
        for axis, step in zip(line[1:], STEPS, strict=True):
            arrow = {"arrowstyle": "-|>", "color": "black"}
            axis.annotate("", (-0.05, 0.5), (-0.31, 0.5), xycoords="axes fraction", arrowprops=arrow)
            axis.text(-0.18, 0.55, step, ha="center", fontsize=8, transform=axis.transAxes)
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=10)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.01, wspace=0.36, hspace=0.05)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(__file__).parents[2] / "docs/concepts.png")
