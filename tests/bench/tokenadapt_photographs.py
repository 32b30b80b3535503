"""Evaluate TokenAdapt on an unseen photograph, scikit-image's astronaut, after training on seven others.

    pip install scikit-image; OMP_NUM_THREADS=1 python tests/bench/tokenadapt_photographs.py

Each photograph is resized to sides of 128, 176 and 256 pixels, so that a patch of 8 pixels holds texture and not
one color, and cut into windows of 96 pixels; the held-out one only at 176. A tokenizer (patch_kmeans, K = 391) is
fitted to windows of the seven, then recipes/tokenadapt_train.py, preset photos, trains for 1,276 steps at batch
size 32. Prints the table of the recipe. About 6 minutes on one core.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

RECIPES = Path(__file__).parents[2] / "recipes"
SIDES, HELD_OUT_SIDE, WINDOW = (128, 176, 256), 176, 96


def photographs() -> dict[str, np.ndarray]:
    china, flower = load_sample_images().images
    motorcycle = Image.open(Path(skimage.data.__file__).parent / "motorcycle_left.png").convert("RGB")
    named = ("astronaut", "chelsea", "rocket", "hubble_deep_field", "coffee")
    return {name: getattr(skimage.data, name)() for name in named} | {
        "china": china,
        "flower": flower,
        "motorcycle": np.asarray(motorcycle),
    }


def cut(folder: Path) -> None:
    for name, pixels in photographs().items():
        split = "held-out" if name == "astronaut" else "train"
        (folder / split).mkdir(parents=True, exist_ok=True)
        for side in (HELD_OUT_SIDE,) if split == "held-out" else SIDES:
            image = Image.fromarray(pixels[..., :3]).resize((side, side), Image.Resampling.BICUBIC)
            starts = range(0, side - WINDOW + 1, 8 if side < 256 else 16)
            for top in starts:
                for left in starts:
                    window = image.crop((left, top, left + WINDOW, top + WINDOW))
                    window.save(folder / split / f"{name}-{side}-{top:04}-{left:04}.png")


def run(recipe: str, out: Path, *flags: object) -> str:
    command = [sys.executable, RECIPES / f"{recipe}.py", "photos", "--out", out, *flags]
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        cut(folder / "images")
        data = ("--data", folder / "images", "--split", "train", "--validation-split", "held-out")
        run("tokenizer_train", folder / "tokenizer", *data, "--image-size", WINDOW, "--fit-images", 600)
        tokenizer = folder / "tokenizer" / "tokenizer.safetensors"
        print(run("tokenadapt_train", folder / "adapt", *data, "--tokenizer", tokenizer, "--epochs", 22))


if __name__ == "__main__":
    main()
