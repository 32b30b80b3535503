"""Encoded images from a folder, Parquet files, webdataset tars, or a named data set.

Every source gives the bytes of image i, its name and its label, in a fixed order, without holding images in memory
and without unpacking or converting anything on disk.
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
    """Images in a fixed order. `class_names` is None where classes have no names."""

    class_names: list[str] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Image `index` as it is stored."""
        ...


def open_source(source: str, split: str | None) -> ImageSource:
    """Find out what `source` is and open it, or only the part of it that is named `split`.

    A folder of Parquet files or webdataset tars (a split is the files whose names begin with it); one such file; a
    folder of images, SOURCE/CLASS/NAME.jpg or flat (a split is a folder in it); or, if nothing has this path, the
    name of a data set on the hub. Raises ImageError if there is nothing of the kind.
    """
    path = Path(source)
    if path.is_dir():
        for suffix, kind in ((".parquet", ParquetSource), (".tar", TarSource)):
            if found := sorted(path.rglob(f"*{suffix}")):
                return kind(_of_split(found, source, split))
        return FolderSource(path / (split or ""))
    if path.is_file() and path.suffix in (".parquet", ".tar"):
        return ParquetSource([path]) if path.suffix == ".parquet" else TarSource([path])
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/")):
        raise ImageError(
            f"{source}: expected a folder of images, .parquet or .tar files, or the name of a data set"
        )
    return DatasetSource(datasets.load_dataset(source, split=split or "train"), source)


def _of_split(files: list[Path], source: str, split: str | None) -> list[Path]:
    chosen = [file for file in files if file.name.startswith(split or "")]
    if not chosen:
        raise ImageError(f"{source}: no file whose name begins with {split!r}, it has {files[0].name}, ...")
    return chosen


class FolderSource:
    """Image files below a folder, sorted by path; the first folder level names the class, if there is one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.files:
            raise ImageError(f"{folder}: no images below it ({', '.join(sorted(SUFFIXES))})")
        classes = sorted({self._class(path) for path in self.files} - {None})
        self.class_names = classes or None
        self._labels = {name: label for label, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Sample:
        path = self.files[index]
        label = self._class(path)
        if self.class_names and label is None:
            raise ImageError(f"{path}: lies in no class folder, but other images do")
        return Sample(path.read_bytes(), str(path.relative_to(self.folder)), self._labels.get(label, 0))

    def _class(self, path: Path) -> str | None:
        parts = path.relative_to(self.folder).parts
        return parts[0] if len(parts) > 1 else None


class ParquetSource:
    """Parquet files as `datasets` writes them: an image column (binary, or {bytes, path}), maybe a `label`."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        schema = _open_parquet(paths[0]).schema_arrow
        names = [name for name in ("image", "jpg", "png", "img") if name in schema.names]
        if not names:
            raise ImageError(f"{paths[0]}: columns {', '.join(schema.names)}, expected one called image")
        self._columns = [names[0], *(["label"] if "label" in schema.names else [])]
        self.class_names = _class_names(schema.metadata or {})
        self._groups: list[tuple[Path, int]] = []
        rows = []
        for path in paths:
            metadata = _open_parquet(path).metadata
            self._groups += [(path, group) for group in range(metadata.num_row_groups)]
            rows += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(rows).tolist()
        self._held: tuple[int, list[dict]] = (-1, [])  # the row group read last: images are mostly read in turn

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Sample:
        number = bisect_right(self._ends, index)
        path, group = self._groups[number]
        if self._held[0] != number:
            # Opened anew and without threads: neither survives the fork of a loader's workers.
            table = _open_parquet(path).read_row_group(group, columns=self._columns, use_threads=False)
            self._held = number, table.to_pylist()
        rows = self._held[1]
        at = index - (self._ends[number] - len(rows))
        image = rows[at][self._columns[0]]
        data, name = (image["bytes"], image.get("path")) if isinstance(image, dict) else (image, None)
        return Sample(data, name or f"{path.name}#{index}", rows[at].get("label") or 0)


class TarSource:
    """Webdataset tars: files of one key (the name up to its first dot) are one sample; KEY.cls holds the label."""

    def __init__(self, paths: list[Path]):
        self.class_names = None
        self._images: list[tuple[Path, int, int, str, tuple[int, int] | None]] = []
        for path in paths:
            self._images += _tar_images(path)
        if not self._images:
            raise ImageError(f"{paths[0]}: no images in this tar ({', '.join(sorted(SUFFIXES))})")

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
    """A split of the `datasets` library with an image column, bytes or paths to files, and maybe a class label.

    Raises ImageError if the data set, called `name`, has no image column.
    """

    def __init__(self, data: datasets.Dataset, name: str):
        images = [column for column, feature in data.features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise ImageError(f"{name}: columns {', '.join(data.column_names)}, none of them an image")
        labels = [column for column, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)]
        self._image, self._label = images[0], labels[0] if labels else None
        self.class_names = data.features[labels[0]].names if labels else None
        self._data = data.cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> Sample:
        """Image `index`. Raises ImageError if its file cannot be read."""
        row = self._data[index]
        image = row[self._image]
        try:
            data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        except OSError as error:
            raise ImageError(f"{image['path']}: cannot be read ({error.strerror})") from error
        return Sample(data, image["path"] or f"#{index}", row[self._label] if self._label else 0)


class SourceSubset:
    """Some images of a source, by their numbers."""

    def __init__(self, source: ImageSource, indices: list[int]):
        self.source, self.indices, self.class_names = source, indices, source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Sample:
        """Image `index` of this part."""
        return self.source.read(self.indices[index])


def hold_out(source: ImageSource, every: int, name: str) -> tuple[SourceSubset, SourceSubset]:
    """(the other images, every n-th one): a sorted folder's last images would all be of one class.

    Raises ImageError if the source, called `name`, has fewer than `every` images.
    """
    if len(source) < every:
        raise ImageError(
            f"{len(source)} images in {name}: expected at least {every}, of which every {every}th is held out"
        )
    chosen = range(every - 1, len(source), every)
    return SourceSubset(source, sorted(set(range(len(source))) - set(chosen))), SourceSubset(source, list(chosen))


def _tar_images(path: Path) -> list[tuple[Path, int, int, str, tuple[int, int] | None]]:
    """(tar, offset, bytes, name, where its label is) of every image, from the headers alone."""
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
    """The names of `label` in the schema that `datasets` leaves in a Parquet file."""
    info = json.loads(metadata.get(b"huggingface", b"{}"))
    return info.get("info", {}).get("features", {}).get("label", {}).get("names")
