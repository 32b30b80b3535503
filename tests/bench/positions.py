"""Compare position embeddings of a ViT-VQGAN for smaller images than in training: interpolated or cropped.

    OMP_NUM_THREADS=1 python tests/bench/positions.py

Trains two small tokenizers with recipes/tokenizer_train.py: on the embedded digits (8 x 8 tokens), and on windows
of scikit-learn's two photographs, evaluated on windows of their right side (16 x 16 tokens). Held-out images are
then cropped to 7/8 of their side (as 224 of 256 pixels) along token borders, at nine positions (digits: four).
They are tokenized with the position embedding that `set_image_size` interpolates, with its central part, and with
its part at the position of the crop, which does not exist for an image that was also rotated or resized. Prints
the percentage of ids equal to those of the whole image, and the PSNR. About 4 minutes on a free core.
"""

import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from seitpp import tokenizers
from seitpp.data.digits import DigitsSource
from seitpp.engine.reconstruction import quality
from seitpp.images.batches import ImageDataset
from seitpp.images.sources import ImageSource, open_source
from seitpp.tokenizers import ViTVQGAN

RECIPE = Path(__file__).parents[2] / "recipes" / "tokenizer_train.py"
COMMON = ["smoke", "--code-dim", 32, "--depth", 2, "--checkpoint-epochs", 10, "--log-steps", 100]  # K = 64
PHOTOGRAPHS = ["--image-size", 64, "--load-size", 72, "--batch-size", 8, "--epochs", 20]
WINDOW, WIDTH, RIGHT = 72, 320, 220  # pixels


def train(out: Path, *flags: object) -> ViTVQGAN:
    command = [sys.executable, RECIPE, *COMMON, *flags, "--out", out]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return tokenizers.load(out / "tokenizer.safetensors")


def cut_photographs(folder: Path) -> None:
    for number, photograph in enumerate(load_sample_images().images):
        image = Image.fromarray(photograph).resize((WIDTH, 213), Image.Resampling.BICUBIC)
        for split, lefts in (
            ("train", range(0, RIGHT - WINDOW, 6)),
            ("held-out", range(RIGHT, WIDTH - WINDOW, 6)),
        ):
            (folder / split).mkdir(parents=True, exist_ok=True)
            for left, top in product(lefts, range(0, image.height - WINDOW, 12)):
                window = image.crop((left, top, left + WINDOW, top + WINDOW))
                window.save(folder / split / f"{number}-{left:03}-{top:03}.png")


def judge(title: str, tokenizer: ViTVQGAN, source: ImageSource) -> None:
    """Print a line for each kind of position embedding."""
    images = ImageDataset(source, tokenizer.spec.image_size).__getitems__(list(range(len(source)))).images / 255
    side, patch = tokenizer.spec.grid[0], tokenizer.spec.patch
    whole, crop = tokenizer.encode(images), side * 7 // 8
    trained = tokenizer.encoder.en_pos_embedding.view(side, side, -1)  # equal to the decoder's
    tokenizer.set_image_size(crop * patch)
    middle = (side - crop) // 2
    corners = list(product(sorted({0, middle, side - crop}), repeat=2))
    for kind in ("interpolated", "central", "of the crop"):
        total = torch.zeros(2)
        for top, left in corners:
            if kind != "interpolated":
                from_top, from_left = (middle, middle) if kind == "central" else (top, left)
                positions = trained[from_top : from_top + crop, from_left : from_left + crop].reshape(
                    1, crop**2, -1
                )
                tokenizer.encoder.en_pos_embedding = tokenizer.decoder.de_pos_embedding = positions
            box = {"top": top, "left": left, "side": crop}
            total += compare(tokenizer, window(images, cells=patch, **box), window(whole, cells=1, **box))
        equal, psnr = (total / len(corners)).tolist()
        print(f"{title}, {side} -> {crop} tokens per side, {kind:12}  ids {equal:5.1f} %  PSNR {psnr:.2f} dB")


def window(grids: Tensor, *, cells: int, top: int, left: int, side: int) -> Tensor:
    """Crop a square of `side` tokens at token (top, left), where a token is `cells` x `cells` elements."""
    return grids[..., top * cells : (top + side) * cells, left * cells : (left + side) * cells]


def compare(tokenizer: ViTVQGAN, images: Tensor, expected: Tensor) -> Tensor:
    """Return (2,) float32: the percentage of ids equal to `expected`, and the mean PSNR in dB."""
    ids = tokenizer.encode(images)
    same, psnr = (ids == expected).float().mean(), quality(tokenizer.decode(ids), images)[:, 0].mean()
    return torch.stack([100 * same, psnr])


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        judge("digits", train(folder / "digits", "--epochs", 12), DigitsSource("validation"))
        cut_photographs(folder / "images")
        data = ["--data", folder / "images", "--split", "train", "--validation-split", "held-out"]
        tokenizer = train(folder / "photographs", *data, *PHOTOGRAPHS)
        judge("photographs", tokenizer, open_source(str(folder / "images"), "held-out"))


if __name__ == "__main__":
    main()
