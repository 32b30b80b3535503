"""Synthetic scenes in the layout of ADE20K, for tests and experiments without a download.

A scene is a smooth background with shapes that partly cover each other. The class of a shape is the combination of
its form and its texture: a disc of stripes and a disc of dots are two classes, and so are a disc and a square of
stripes. Position, size and colors do not depend on the class. Mirroring a scene does not change its classes.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from seitpp import files
from seitpp.errors import UserError

IMAGES = MappingProxyType({"training": 200, "validation": 50})
PERIODS = {"coarse": 12.0, "fine": 6.0}  # of the textures, in pixels
CANDIDATES = 16  # random positions per shape, of which the one farthest from the other shapes is used

# A form is a function of u (to the right) and v (down), both -1 to 1 across the shape: which pixels are inside.
FORMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: u**2 + v**2 < 1,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.35) & (np.maximum(abs(u), abs(v)) < 1.1),
    "triangle": lambda u, v: (abs(u) < 0.6 * (v + 1)) & (v < 0.9),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.8) < 0.3,
    "bar": lambda u, v: (abs(u) < 1.3) & (abs(v) < 0.4),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.85,
    "hourglass": lambda u, v: (abs(u) < 0.2 + 0.7 * abs(v)) & (abs(v) < 1),
    "frame": lambda u, v: abs(np.maximum(abs(u), abs(v)) - 0.75) < 0.28,
    "diamond": lambda u, v: abs(u) + abs(v) < 1.2,
    "dome": lambda u, v: (u**2 + (v - 0.5) ** 2 < 1.2) & (v < 0.5),
    "star": lambda u, v: np.hypot(u, v) < 0.8 + 0.4 * np.cos(5 * np.arctan2(u, -v)),
    "hexagon": lambda u, v: np.maximum(0.866 * abs(u) + 0.5 * abs(v), abs(v)) < 0.95,
}

# A texture is a function of x and y, in periods, and of a random generator: which pixels have the light color.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, Generator], np.ndarray]] = {
    "lying stripes": lambda x, y, rng: _wave(y + 0 * x) > 0,
    "dots": lambda x, y, rng: _wave(x) + _wave(y) > 0.6,
    "upright stripes": lambda x, y, rng: _wave(x + 0 * y) > 0,
    "checks": lambda x, y, rng: _wave(x) * _wave(y) > 0,
    "slanting stripes": lambda x, y, rng: _wave((x + rng.choice([-1, 1]) * y) / np.sqrt(2)) > 0,
    "grains": lambda x, y, rng: _grains(x, y, rng),
    "lattice": lambda x, y, rng: np.maximum(_wave(x), _wave(y)) > 0.7,
}


def write_scenes(
    folder: str | Path,
    num_classes: int = 6,
    *,
    images: Mapping[str, int] = IMAGES,
    size: int | tuple[int, int] = 128,
    seed: int = 0,
) -> None:
    """Write images/SPLIT/*.jpg, annotations/SPLIT/*.png and objectInfoN.txt into `folder`, as in ADE20K.

    `images` maps each split to its number of images. `size` is the side in pixels, or (min, max), in which case
    each side of each image is drawn from that range. The pixels of an annotation are classes 1 (background) to
    num_classes, and 0 (ignored) along the edges of shapes. The same arguments give the same bytes; with more
    images the first ones do not change. Raises UserError unless num_classes is 2 to 169.
    """
    names = class_names(num_classes)
    pixels, images_with = np.zeros(num_classes + 1, np.int64), {}
    for number, (split, count) in enumerate(images.items()):
        images_with[split] = np.zeros(num_classes + 1, np.int64)
        folders = [Path(folder, kind, split) for kind in ("images", "annotations")]
        for path in folders:
            path.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, annotation = scene(np.random.default_rng([seed, number, index]), num_classes, size)
            jpeg = {"format": "JPEG", "quality": 95, "subsampling": 0}
            _save(folders[0] / f"scene_{index:06d}.jpg", image, **jpeg)
            _save(folders[1] / f"scene_{index:06d}.png", annotation, format="PNG")
            counts = np.bincount(annotation.ravel(), minlength=num_classes + 1)
            pixels += counts
            images_with[split] += counts > 0
    _write_class_names(Path(folder, f"objectInfo{num_classes}.txt"), names, pixels, images_with)


def class_names(num_classes: int) -> list[str]:
    """Return "background" and then forms with textures, ordered so that even the first few share both.

    Raises UserError unless num_classes is 2 to 169.
    """
    kinds = _kinds()
    if not 2 <= num_classes <= len(kinds) + 1:
        raise UserError(f"synthetic scenes: got num_classes {num_classes}, expected 2 to {len(kinds) + 1}")
    return ["background", *(f"{form} of {grade} {texture}" for form, texture, grade in kinds[: num_classes - 1])]


def scene(rng: Generator, num_classes: int, size: int | tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene: image (h, w, 3) uint8 and annotation (h, w) uint8; `size` is as in `write_scenes`."""
    smallest, largest = (size, size) if isinstance(size, int) else size
    height, width = rng.integers(smallest, largest, 2, endpoint=True).tolist()
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    image, classes = _background(rng, y / height, x / width), np.ones((height, width), np.uint8)
    for center in _centers(rng, rng.integers(3, 7), height, width):
        number = int(rng.integers(2, num_classes, endpoint=True))
        form, texture, grade = _kinds()[number - 2]
        radii = rng.uniform(0.15, 0.24) * min(height, width) * rng.uniform(0.85, 1.15, 2)
        inside = FORMS[form]((x - center[1]) / radii[1], (y - center[0]) / radii[0])
        phase = rng.random(2)
        light = TEXTURES[texture](x / PERIODS[grade] + phase[1], y / PERIODS[grade] + phase[0], rng)
        dark_color, light_color = rng.uniform(0.05, 0.4, 3), rng.uniform(0.6, 0.95, 3)
        image = np.where(inside[..., None], np.where(light[..., None], light_color, dark_color), image)
        classes[inside] = number
    noisy = image + rng.normal(0, 0.02, image.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8), np.where(_edges(classes), np.uint8(0), classes)


def _kinds() -> list[tuple[str, str, str]]:
    """Return (form, texture, grade) of every class but the background, coarse before fine, then ordered by
    max(form index, texture index).
    """
    pairs = [(f, t) for f in range(len(FORMS)) for t in range(len(TEXTURES))]
    pairs.sort(key=lambda pair: (max(pair), pair))
    forms, textures = list(FORMS), list(TEXTURES)
    return [(forms[f], textures[t], grade) for grade in PERIODS for f, t in pairs]


def _wave(x: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * x)


def _grains(x: np.ndarray, y: np.ndarray, rng: Generator) -> np.ndarray:
    """Return random light and dark cells, three per period along each axis."""
    rows, columns = (3 * y).astype(int), (3 * x).astype(int)
    return rng.random((rows.max() + 1, columns.max() + 1))[rows, columns] > 0.5


def _background(rng: Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return (h, w, 3): a linear gradient between two colors in opposite corners."""
    first, second = rng.uniform(0.25, 0.75, (2, 3))
    weight = (y + x) / 2 if rng.random() < 0.5 else (y + 1 - x) / 2
    return first + weight[..., None] * (second - first)


def _centers(rng: Generator, count: int, height: int, width: int) -> np.ndarray:
    """Return (count, 2) centers; each is the candidate farthest from the centers before it."""
    drawn = rng.uniform(0.08, 0.92, (count, CANDIDATES, 2)) * (height, width)
    chosen = [drawn[0, 0]]
    for candidates in drawn[1:]:
        distances = np.linalg.norm(candidates[:, None] - np.array(chosen), axis=2).min(axis=1)
        chosen.append(candidates[distances.argmax()])
    return np.array(chosen)


def _edges(classes: np.ndarray) -> np.ndarray:
    """Return the mask of pixels whose lower or right neighbor has another class."""
    edges = np.zeros(classes.shape, bool)
    edges[:-1] |= classes[:-1] != classes[1:]
    edges[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    return edges


def _save(path: Path, pixels: np.ndarray, **options: Any) -> None:
    """Write an image file; Pillow reports a full disk as an error of its own kind where it writes itself."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    with files.naming(path):
        path.write_bytes(buffer.getvalue())


def _write_class_names(
    path: Path, names: list[str], pixels: np.ndarray, images_with: dict[str, np.ndarray]
) -> None:
    """Write for each class its fraction of the pixels, the number of images per split with it, and its name."""
    rows = [("Idx", "Ratio", *images_with, "Name")]
    for number, name in enumerate(names, 1):
        ratio = f"{pixels[number] / pixels[1:].sum():.4f}"
        rows.append((str(number), ratio, *(str(counts[number]) for counts in images_with.values()), name))
    files.write_file(path, "".join("\t".join(row) + "\n" for row in rows).encode())
