"""Decode 40,000 mutated pictures: each is read, or refused by an ImageError of one line; nothing else happens.

    python tests/long/pictures.py
    python tests/long/pictures.py --pictures 400

Bytes of pictures in every format that is read, and of arrays and TIFFs of several bands, are changed, cut or
repeated, by a fixed seed. Prints a table: format, pictures, read, refused. It fails at the first other outcome.
"""

import argparse
import io
import random
import time
import warnings

import numpy as np
import tifffile
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from seitpp.images.decode import FORMATS, ImageError, Reading, Sample, decode_image, image_size

SIZE = 8, 8


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    """Encode pixels as a file of a kind of FORMATS, or as an array."""
    buffer = io.BytesIO()
    if kind == "NPY":
        np.save(buffer, pixels)
    else:
        Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def originals() -> dict[str, tuple[bytes, Reading]]:
    """The file of a picture in each format, and how it is read."""
    picture = load_sample_images().images[0][:48, :64]
    bands = io.BytesIO()
    tifffile.imwrite(bands, np.dstack([picture, picture[..., :2]]), photometric="minisblack")
    files = {kind: (encoded(picture, kind), Reading()) for kind in (*FORMATS, "NPY")}
    files["16 bits"] = encoded(picture[..., 0].astype(np.uint16) * 257, "PNG"), Reading("pad")
    files["5 bands"] = bands.getvalue(), Reading(channels=5)
    files["scaled JPEG"] = encoded(picture, "JPEG"), Reading("center_crop", scaled=True)
    return files


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change up to 16 bytes, most of them near the beginning, and cut or repeat a part of some files."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 16)):
        place = rng.randrange(min(len(changed), 200)) if rng.random() < 0.7 else rng.randrange(len(changed))
        changed[place] = rng.randrange(256)
    kind, place = rng.random(), rng.randrange(len(changed))
    if kind < 0.2:
        return bytes(changed[:place])
    return bytes(changed[:place] + changed[place // 2 :]) if kind < 0.3 else bytes(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=40_000)
    total = parser.parse_args().pictures
    warnings.simplefilter("ignore")  # of the libraries, about what is damaged
    files, rng, started = originals(), random.Random(0), time.perf_counter()
    counts = {name: [0, 0] for name in files}
    for number in tqdm(range(total), unit="picture"):
        name = list(files)[number % len(files)]
        data, reading = files[name]
        sample = Sample(mutated(data, rng), "picture", None)
        try:
            if reading.channels == 3:
                image_size(sample)
            pixels = decode_image(sample, SIZE, reading=reading)
            assert pixels.shape == (reading.channels, *SIZE) and pixels.dtype == np.uint8
            counts[name][0] += 1
        except ImageError as error:
            assert "\n" not in str(error) and " at 0x" not in str(error), str(error)
            counts[name][1] += 1
    print("| format | pictures | read | refused |\n|---|---|---|---|")
    for name, (read, refused) in counts.items():
        print(f"| {name} | {read + refused:,} | {read:,} | {refused:,} |")
    print(f"{total:,} pictures in {time.perf_counter() - started:.0f} s: no other error")


if __name__ == "__main__":
    main()
