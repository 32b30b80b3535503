"""Made-up pictures, and the same set of them in every packing that people have."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ["china", "flower"]


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """Encode pixels (h, w) or (h, w, channels) as a file."""
    buffer = io.BytesIO()
    if kind == "NPY":
        np.save(buffer, pixels)
    else:
        Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def photograph_crops(count: int = 6, size: tuple[int, int] = (50, 70)) -> list[tuple[bytes, int]]:
    """Crops of two photographs as PNG, with their classes: those of the first photograph first."""
    rng, crops = np.random.default_rng(0), []
    for label, photograph in enumerate(load_sample_images().images):
        for _ in range(count // 2):
            top, left = rng.integers(400 - size[0]), rng.integers(600 - size[1])
            crops.append((encoded(photograph[top : top + size[0], left : left + size[1]]), label))
    return crops


def write(path: Path, data: bytes | str) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def make_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    """Write a tar of {name: content}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def as_folder(root: Path, samples: list[tuple[bytes, int]]) -> Path:
    for number, (data, label) in enumerate(samples):
        write(root / CLASSES[label] / f"{number:03d}.png", data)
    return root


def as_flat(root: Path, samples: list[tuple[bytes, int]]) -> Path:
    """Return a flat folder; the labels are in labels.csv beside it."""
    rows = [f"{number:03d}.png,{CLASSES[label]}" for number, (_, label) in enumerate(samples)]
    for number, (data, _) in enumerate(samples):
        write(root / f"{number:03d}.png", data)
    write(root.parent / "labels.csv", "\n".join(["file_name,label", *rows]))
    return root


def as_tar(root: Path, samples: list[tuple[bytes, int]]) -> Path:
    members: dict[str, bytes | str] = {}
    for number, (data, label) in enumerate(samples):
        members[f"./{number:03d}.png"], members[f"./{number:03d}.cls"] = data, CLASSES[label]
    make_tar(root / "pictures-0.tar", members)
    return root


def as_json_tar(root: Path, samples: list[tuple[bytes, int]]) -> Path:
    members: dict[str, bytes | str] = {}
    for number, (data, label) in enumerate(samples):
        members[f"{number:03d}.input.png"] = data
        members[f"{number:03d}.meta.json"] = json.dumps({"width": 70, "label": CLASSES[label]})
    make_tar(root / "pictures.tar", members)
    return root


def as_dataset(samples: list[tuple[bytes, int]], label: str = "label") -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(names=CLASSES)})
    rows = [{"image": {"bytes": data, "path": None}, label: number} for data, number in samples]
    return datasets.Dataset.from_list(rows, features=features)


def as_parquet(root: Path, samples: list[tuple[bytes, int]]) -> Path:
    root.mkdir(parents=True)
    half = len(samples) // 2
    for part, rows in enumerate((samples[:half], samples[half:])):
        as_dataset(rows).to_parquet(root / f"pictures-{part}.parquet", batch_size=2)
    return root


def as_arrow(root: Path, samples: list[tuple[bytes, int]]) -> Path:
    as_dataset(samples).save_to_disk(str(root))
    return root


PACKINGS = {
    "folder": as_folder,
    "flat": as_flat,
    "tar": as_tar,
    "json_tar": as_json_tar,
    "parquet": as_parquet,
    "arrow": as_arrow,
}
