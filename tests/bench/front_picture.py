"""Make docs/picture.png: an image, its tokens, what is hidden, what the model fills in, and the bytes of formats.

    OMP_NUM_THREADS=1 python tests/bench/front_picture.py
    OMP_NUM_THREADS=1 python tests/bench/front_picture.py --epochs 1 --out picture.png

The images are windows of 64 x 64 pixels of the two photographs of scikit-learn. Tokenizer and masked token model
see the 1,242 that have no column of the held-out ones.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor

from seitpp import StoreWriter, TokenStore
from seitpp.data.photographs import PhotographWindows
from seitpp.models import load_pretrained
from seitpp.plots import paint_codes, reconstructions
from seitpp.tokenizers import PatchKMeans

ROOT = Path(__file__).parents[2]
SIDE, PATCH, CODES = 64, 4, 512
SHOWN = 1  # of the evenly spread images that `reconstructions` takes


def windows(split: str) -> tuple[Tensor, Tensor]:
    """Return the windows of a split, (N, 3, SIDE, SIDE) uint8, and of which photograph they are."""
    data = PhotographWindows(SIDE, split)
    _, images, labels = data.__getitems__(list(range(len(data))))
    return images, labels


def bytes_of(images: Tensor, store: Path) -> dict[str, float]:
    """Return the mean bytes of a window in each format; those of tokens without codebook and container."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    def encoded(kind: str, **options: int) -> float:
        sizes = []
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, kind, **options)
            sizes.append(buffer.tell())
        return float(np.mean(sizes))

    tokens = TokenStore(store, "validation")
    recoded = store.with_name("context")
    subprocess.run(seitpp("recode", store, recoded, "--codec", "context"), check=True, stdout=subprocess.DEVNULL)
    return {
        "PNG": encoded("PNG"),
        "JPEG, quality 90": encoded("JPEG", quality=90),
        "WebP, quality 80": encoded("WEBP", quality=80),
        "ids as uint16": 2.0 * (SIDE // PATCH) ** 2,
        "tokens, ans": tokens.payload_bytes / len(tokens),
        "tokens, context": TokenStore(recoded, "validation").payload_bytes / len(tokens),
    }


def seitpp(*words: object) -> list[str]:
    return [sys.executable, "-c", "from seitpp.cli import main; main()", *map(str, words)]


def draw(rows: dict[str, Tensor], sizes: dict[str, float], out: Path) -> None:
    """Draw the pictures of one image side by side, and the sizes as bars."""
    figure = plt.figure(figsize=(12, 2.7), dpi=100)
    for number, (title, picture) in enumerate(rows.items()):
        axis = figure.add_axes((0.005 + 0.17 * number, 0.02, 0.16, 0.86))
        axis.imshow(picture.permute(1, 2, 0), interpolation="nearest")
        axis.set_title(title, fontsize=12)
        axis.set_axis_off()
    axis = figure.add_axes((0.81, 0.02, 0.185, 0.86))
    bars = axis.barh(list(sizes), list(sizes.values()), color=["#8a8f98"] * 3 + ["#c9a227"] + ["#2a7f62"] * 2)
    axis.bar_label(bars, [f"{size:,.0f}" for size in sizes.values()], padding=3, fontsize=11)
    axis.set_title("bytes an image", fontsize=12)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * max(sizes.values()))
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=11)
    figure.savefig(out, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/picture.png")
    arguments = parser.parse_args()
    train, validation = windows("train"), windows("validation")
    tokenizer = PatchKMeans.fit_to_images([train[0]], image_size=SIDE, patch=PATCH, num_codes=CODES)
    with tempfile.TemporaryDirectory() as folder:
        store, run = Path(folder) / "tokens", Path(folder) / "run"
        tokenizer.save(f"{store}-tokenizer.safetensors")
        for split, (images, labels) in {"train": train, "validation": validation}.items():
            common = {"codebook": tokenizer.codebook.numpy(), "grid": tokenizer.spec.grid}
            with StoreWriter(store, **common, split=split, tokenizer=tokenizer.description()) as writer:
                writer.add_batch(tokenizer.encode(images.float() / 255).numpy(), labels.numpy())
        sizes = bytes_of(validation[0], store)
        words = ["digits", "--store", store, "--epochs", arguments.epochs, "--batch-size", 32, "--base-lr", 1.2e-2]
        recipe = [sys.executable, ROOT / "recipes/mtm_pretrain.py", *words, "--warmup-epochs", 1, "--out", run]
        subprocess.run(list(map(str, recipe)), check=True, stdout=subprocess.DEVNULL)
        tokens, model = TokenStore(store, "validation"), load_pretrained(run).model.eval()
        found = reconstructions(
            model, tokens, grid=tokenizer.spec.grid, seed=0, decode=tokenizer.decode, originals=validation[0] / 255
        )
        indices = torch.linspace(0, len(tokens) - 1, 8).round().long().numpy()
        rows = {
            "image": found["original"],
            f"{SIDE // PATCH} x {SIDE // PATCH} tokens": paint_codes(
                torch.from_numpy(tokens.ids(indices)), tokens.books
            ),
            "half is hidden": found["masked input"],
            "filled by the model": found["reconstruction"],
        }
        draw({name: row[SHOWN] for name, row in rows.items()}, sizes, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
