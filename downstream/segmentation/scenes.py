"""Synthetic scenes in the layout of ADE-20k, for tests and for trying things without a download.

On a plain background lie shapes that hide parts of each other. The class of a shape is its form together with its
texture: a disc of stripes and a disc of dots are two classes, and so are a disc and a square of stripes. Place,
size and colors are drawn without regard to the class. Mirrored, a scene keeps its classes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.random import Generator
from PIL import Image

from seitpp.errors import UserError

IMAGES = MappingProxyType({"training": 200, "validation": 50})
PERIODS = {"coarse": 12.0, "fine": 6.0}  # pixels after which a texture repeats
CANDIDATES = 16  # places that are drawn for a shape; that farthest from the other shapes is taken

# A form is a function of u and v, which are -1 to 1 across the shape, to the right and downwards.
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

# A texture is a function of x and y in periods and of a generator: which pixels have the light color.
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
    images: Mapping[str, int] = IMAGES,
    size: int | tuple[int, int] = 128,
    seed: int = 0,
) -> None:
    """Write images/SPLIT/*.jpg, annotations/SPLIT/*.png and objectInfoN.txt into `folder`, as ADE-20k has them.

    images: {split: how many}. size: pixels a side; or (least, most), between which each side of each image is
    drawn. The value of a pixel of an annotation is its class, 1 (background) to num_classes, or 0, which is
    ignored, along the edges of shapes. The same arguments give the same bytes; more images leave the first as
    they are. Raises UserError unless num_classes is 2 to 169.
    """
    names = class_names(num_classes)
    pixels, seen = np.zeros(num_classes + 1, np.int64), {}
    for number, (split, count) in enumerate(images.items()):
        seen[split] = np.zeros(num_classes + 1, np.int64)
        folders = [Path(folder, kind, split) for kind in ("images", "annotations")]
        for path in folders:
            path.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, annotation = scene(np.random.default_rng([seed, number, index]), num_classes, size)
            Image.fromarray(image).save(folders[0] / f"scene_{index:06d}.jpg", quality=95, subsampling=0)
            Image.fromarray(annotation).save(folders[1] / f"scene_{index:06d}.png")
            counts = np.bincount(annotation.ravel(), minlength=num_classes + 1)
            pixels += counts
            seen[split] += counts > 0
    _write_class_names(Path(folder, f"objectInfo{num_classes}.txt"), names, pixels, seen)


def class_names(num_classes: int) -> list[str]:
    """ "background", then forms with textures, ordered such that a few classes share forms and textures already.

    Raises UserError unless num_classes is 2 to 169.
    """
    kinds = _kinds()
    if not 2 <= num_classes <= len(kinds) + 1:
        raise UserError(f"num_classes {num_classes}: expected 2 to {len(kinds) + 1}")
    return ["background", *(f"{form} of {grade} {texture}" for form, texture, grade in kinds[: num_classes - 1])]


def scene(rng: Generator, num_classes: int, size: int | tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image (h, w, 3) uint8 and annotation (h, w) uint8, as write_scenes describes them."""
    least, most = (size, size) if isinstance(size, int) else size
    height, width = rng.integers(least, most, 2, endpoint=True).tolist()
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    image, classes = _background(rng, y / height, x / width), np.ones((height, width), np.uint8)
    for center in _places(rng, rng.integers(3, 7), height, width):
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
    """(form, texture, grade) of every class but the background, the coarse ones first, square by square."""
    pairs = [(f, t) for f in range(len(FORMS)) for t in range(len(TEXTURES))]
    pairs.sort(key=lambda pair: (max(pair), pair))
    forms, textures = list(FORMS), list(TEXTURES)
    return [(forms[f], textures[t], grade) for grade in PERIODS for f, t in pairs]


def _wave(x: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * x)


def _grains(x: np.ndarray, y: np.ndarray, rng: Generator) -> np.ndarray:
    """Random cells, three of them in a period."""
    rows, columns = (3 * y).astype(int), (3 * x).astype(int)
    return rng.random((rows.max() + 1, columns.max() + 1))[rows, columns] > 0.5


def _background(rng: Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(h, w, 3): from one color in a corner to another in the opposite one."""
    first, second = rng.uniform(0.25, 0.75, (2, 3))
    share = (y + x) / 2 if rng.random() < 0.5 else (y + 1 - x) / 2
    return first + share[..., None] * (second - first)


def _places(rng: Generator, count: int, height: int, width: int) -> np.ndarray:
    """(count, 2) centers, each the farthest from the earlier ones of a few that are drawn."""
    places = rng.uniform(0.08, 0.92, (count, CANDIDATES, 2)) * (height, width)
    chosen = [places[0, 0]]
    for candidates in places[1:]:
        distances = np.linalg.norm(candidates[:, None] - np.array(chosen), axis=2).min(axis=1)
        chosen.append(candidates[distances.argmax()])
    return np.array(chosen)


def _edges(classes: np.ndarray) -> np.ndarray:
    """Pixels with another class below or to the right."""
    edges = np.zeros(classes.shape, bool)
    edges[:-1] |= classes[:-1] != classes[1:]
    edges[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    return edges


def _write_class_names(path: Path, names: list[str], pixels: np.ndarray, seen: dict[str, np.ndarray]) -> None:
    """Each class, its share of the pixels, in how many images of each split it is, its name."""
    rows = [("Idx", "Ratio", *seen, "Name")]
    for number, name in enumerate(names, 1):
        ratio = f"{pixels[number] / pixels[1:].sum():.4f}"
        rows.append((str(number), ratio, *(str(counts[number]) for counts in seen.values()), name))
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
