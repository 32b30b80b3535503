"""Sources of encoded images: folders, Parquet files, WebDataset tar files, and data sets of the hub.

A source reads image i, with its name and label, in a fixed order. It does not keep all images in memory, and it
does not unpack or convert files on disk.
"""

import json
import tarfile
from bisect import bisect_right
from pathlib import Path
from typing import Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from seitpp.images.decode import ImageError, Sample

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}


class ImageSource(Protocol):
    """Encoded images in a fixed order. `class_names` is None if the classes have no names."""

    class_names: list[str] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Read image `index` as it is stored."""
        ...


def open_source(source: str, split: str | None) -> ImageSource:
    """Detect the kind of `source` and open it, or only its split `split`.

    A source is a folder of Parquet or WebDataset tar files (a split is the files whose names begin with it); one
    such file, whatever the split; a folder of images, SOURCE/CLASS/NAME.jpg or flat (a split is a subfolder);
    or, if no such path exists, a data set of the hub (split "train" by default). Raises ImageError otherwise.
    """
    path = Path(source)
    if path.is_dir():
        for suffix, kind in ((".parquet", ParquetSource), (".tar", TarSource)):
            if files := sorted(path.rglob(f"*{suffix}")):
                return kind(_of_split(files, source, split))
        return FolderSource(path / (split or ""))
    if path.is_file() and path.suffix in (".parquet", ".tar"):
        return ParquetSource([path]) if path.suffix == ".parquet" else TarSource([path])
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/")):
        raise ImageError(
            f"{source}: expected a folder of images, .parquet or .tar files, or the name of a data set; check it"
        )
    return DatasetSource(datasets.load_dataset(source, split=split or "train"), source)


def _of_split(files: list[Path], source: str, split: str | None) -> list[Path]:
    chosen = [file for file in files if file.name.startswith(split or "")]
    if not chosen:
        raise ImageError(
            f"{source}: no file whose name begins with {split!r}, it has {files[0].name}, ...; check the split"
        )
    return chosen


class FolderSource:
    """Image files below a folder, sorted by path; the first level of subfolders, if any, names the classes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.files:
            raise ImageError(
                f"{folder}: no images below it, expected {', '.join(sorted(SUFFIXES))}; check the path"
            )
        classes = sorted({self._class(path) for path in self.files} - {None})
        self.class_names = classes or None
        self._labels = {name: label for label, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Sample:
        path = self.files[index]
        label = self._class(path)
        if self.class_names and label is None:
            raise ImageError(f"{path}: not in a class folder, but other images are; move it into one")
        return Sample(path.read_bytes(), str(path.relative_to(self.folder)), self._labels.get(label, 0))

    def _class(self, path: Path) -> str | None:
        parts = path.relative_to(self.folder).parts
        return parts[0] if len(parts) > 1 else None


class ParquetSource:
    """Parquet files as written by `datasets`: an image column (binary, or {bytes, path}) and perhaps `label`."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        schema = _open_parquet(paths[0]).schema_arrow
        names = [name for name in ("image", "jpg", "png", "img") if name in schema.names]
        if not names:
            raise ImageError(
                f"{paths[0]}: columns {', '.join(schema.names)}, expected one called image; rename it"
            )
        self._columns = [names[0], *(["label"] if "label" in schema.names else [])]
        self.class_names = _class_names(schema.metadata or {})
        self._groups: list[tuple[Path, int]] = []
        rows = []
        for path in paths:
            metadata = _open_parquet(path).metadata
            self._groups += [(path, group) for group in range(metadata.num_row_groups)]
            rows += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(rows).tolist()
        self._held: tuple[int, list[dict]] = (-1, [])  # the last row group, since images are mostly read in order

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Sample:
        number = bisect_right(self._ends, index)
        path, group = self._groups[number]
        if self._held[0] != number:
            # Reopened, and read without threads: neither survives the fork of data loader workers.
            table = _open_parquet(path).read_row_group(group, columns=self._columns, use_threads=False)
            self._held = number, table.to_pylist()
        rows = self._held[1]
        row = rows[index - (self._ends[number] - len(rows))]
        image = row[self._columns[0]]
        data, name = (image["bytes"], image.get("path")) if isinstance(image, dict) else (image, None)
        return Sample(data, name or f"{path.name}#{index}", row.get("label") or 0)


class TarSource:
    """WebDataset tar files: files of one key (the name up to its first dot) are a sample; KEY.cls is its label."""

    def __init__(self, paths: list[Path]):
        self.class_names = None
        self._images: list[tuple[Path, int, int, str, tuple[int, int] | None]] = []
        for path in paths:
            self._images += _tar_images(path)
        if not self._images:
            raise ImageError(
                f"{paths[0]}: no images in this tar, expected {', '.join(sorted(SUFFIXES))}; check the path"
            )

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Sample:
        path, start, size, name, label = self._images[index]
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
            file.seek(label[0] if label else 0)
            number = int(file.read(label[1])) if label else 0
        return Sample(data, f"{path.name}/{name}", number)


class DatasetSource:
    """A split of a data set of the `datasets` library, with an image column and perhaps a class label.

    Raises ImageError if the data set, called `name` in messages, has no image column.
    """

    def __init__(self, data: datasets.Dataset, name: str):
        images = [column for column, feature in data.features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise ImageError(
                f"{name}: columns {', '.join(data.column_names)}, expected an image column; cast it to Image"
            )
        labels = [column for column, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)]
        self._image, self._label = images[0], labels[0] if labels else None
        self.class_names = data.features[labels[0]].names if labels else None
        self._data = data.cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> Sample:
        """Read image `index`. Raises ImageError if its file cannot be read."""
        row = self._data[index]
        image = row[self._image]
        try:
            data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        except OSError as error:
            raise ImageError(f"{image['path']}: cannot be read ({error.strerror})") from error
        return Sample(data, image["path"] or f"#{index}", row[self._label] if self._label else 0)


class SourceSubset:
    """A subset of a source, by image indices."""

    def __init__(self, source: ImageSource, indices: list[int]):
        self.source, self.indices, self.class_names = source, indices, source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Sample:
        """Read image `index` of the subset."""
        return self.source.read(self.indices[index])


def hold_out(source: ImageSource, every: int, name: str) -> tuple[SourceSubset, SourceSubset]:
    """Split a source into (the other images, every `every`-th image).

    The last images of a sorted source could all be of one class. Raises ImageError if the source, called `name` in
    the message, has fewer than `every` images.
    """
    if len(source) < every:
        raise ImageError(
            f"{len(source)} images in {name}: expected at least {every}, of which every {every}th is held out"
        )
    chosen = range(every - 1, len(source), every)
    return SourceSubset(source, sorted(set(range(len(source))) - set(chosen))), SourceSubset(source, list(chosen))


def _tar_images(path: Path) -> list[tuple[Path, int, int, str, tuple[int, int] | None]]:
    """List (tar, offset, size, name, (offset, size) of its label) of every image, from the tar headers only."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, suffix = base.partition(".")
                if not member.isfile():
                    continue
                if f".{suffix.lower()}" in SUFFIXES:
                    images[f"{folder}/{key}"] = member
                elif suffix == "cls":
                    labels[f"{folder}/{key}"] = member.offset_data, member.size
    except tarfile.TarError as error:
        raise ImageError(f"{path}: cannot be read as an uncompressed tar ({error})") from error
    return [(path, m.offset_data, m.size, m.name, labels.get(key)) for key, m in images.items()]


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ImageError(f"{path}: cannot be read as Parquet ({error})") from error


def _class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """Return the class names of `label` from the schema metadata of `datasets` in a Parquet file."""
    info = json.loads(metadata.get(b"huggingface", b"{}"))
    return info.get("info", {}).get("features", {}).get("label", {}).get("names")
