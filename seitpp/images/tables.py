"""Images in tables: Parquet files, Arrow on disk (`save_to_disk` of `datasets`), and data sets of the hub."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from seitpp.errors import reason, refusing
from seitpp.images.decode import ImageError, Sample
from seitpp.images.inventory import LeftOut
from seitpp.images.labels import LabelRules, Labels, RawLabel, resolve, unlabeled
from seitpp.images.objects import ObjectPath, size_of

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "class", "cls", "class_name", "category", "target")


class Columns(NamedTuple):
    """The image column of a table, its label column if there is one, and the names of its classes if known."""

    image: str
    label: str | None
    class_names: list[str] | None


def choose_columns(features: datasets.Features, rules: LabelRules | None, where: str) -> Columns:
    """Choose the columns of images and labels from the features of a table.

    The image column is the only one that can be one, or the one with a usual name. The label column is
    `rules.column`, else "label", else the only one that can be one: a class label, or numbers or words under a
    usual name. Raises ImageError, which names the candidates, if there is no such column or several.
    """
    images = [name for name, feature in features.items() if _can_be_image(feature)]
    named = [name for name in IMAGE_NAMES if name in images]
    if len(images) != 1 and not named:
        raise ImageError(
            f"{where}: columns {', '.join(features)}: expected one of images, {len(images)} can be; call it image"
        )
    label = rules and _label_column(features, rules, where)  # without rules, the table's own labels are not read
    kind = None if label is None else _inner(features[label])
    names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    return Columns(named[0] if named else images[0], label, list(names) if names else None)


def _can_be_image(feature: Any) -> bool:
    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"} and _is_binary(feature["bytes"])
    return _is_binary(feature)


def _is_binary(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _inner(feature: Any) -> Any:
    """Return the feature of a label, or of the labels of a list."""
    return getattr(feature, "feature", feature)


def _label_column(features: datasets.Features, rules: LabelRules, where: str) -> str | None:
    if rules.column is not None:
        if rules.column not in features:
            raise ImageError(
                f"{where}: no column {rules.column!r}, it has {', '.join(features)}; check --label-column"
            )
        return rules.column
    if "label" in features:
        return "label"
    classes = [name for name, feature in features.items() if isinstance(_inner(feature), datasets.ClassLabel)]
    usual = [name for name, feature in features.items() if _is_usual(name) and _is_word_or_number(_inner(feature))]
    candidates = list(dict.fromkeys([*classes, *usual]))
    if len(candidates) > 1:
        raise ImageError(
            f"{where}: several columns can have the labels, {', '.join(candidates)}: name one with --label-column"
        )
    return candidates[0] if candidates else None


def _is_usual(name: str) -> bool:
    return name.lower() in LABEL_NAMES or name.lower().endswith(("_label", "_class", "_category"))


def _is_word_or_number(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and (
        feature.dtype.startswith(("int", "uint")) or "string" in feature.dtype
    )


class ParquetSource:
    """Parquet files with a column of images (binary, or {bytes, path}) and perhaps one of labels.

    One row group is held in memory, since images are mostly read in order. Raises ImageError for a file that is no
    Parquet or lacks the columns of the first.
    """

    def __init__(self, paths: Sequence[Path] | Sequence[ObjectPath], rules: LabelRules | None):
        self.left_out = LeftOut()
        schema = _open_parquet(paths[0]).schema_arrow
        with refusing(ImageError, f"{paths[0]}: cannot be read", "a table with columns that `datasets` knows"):
            features = datasets.Features.from_arrow_schema(schema)
        self.columns = choose_columns(features, rules, str(paths[0]))
        self._groups: list[tuple[Path | ObjectPath, int]] = []
        rows, raw, paths_inside, self.names = [], [], [], []
        for path in paths:
            file = _open_parquet(path)
            wanted = [name for name in (self.columns.image, self.columns.label) if name]
            if missing := [name for name in wanted if name not in file.schema_arrow.names]:
                raise ImageError(
                    f"{path}: no column {missing[0]!r}, but {paths[0].name} has one; remove one of them"
                )
            for group in range(file.metadata.num_row_groups):
                self._groups.append((path, group))
                rows.append(file.metadata.row_group(group).num_rows)
            with refusing(ImageError, f"{path}: cannot be read as Parquet", "a whole file; copy it again"):
                if self.columns.label:
                    read = file.read(columns=[self.columns.label], use_threads=False)
                    raw += read[self.columns.label].to_pylist()
                paths_inside += _paths_in(file, self.columns.image)
            self.names += [f"{path.name}#{index}" for index in range(len(self.names), sum(rows))]
        self._ends = np.cumsum(rows).tolist()
        if not self.names:
            raise ImageError(f"{paths[0]}: no rows in {len(paths)} Parquet file(s); check the path")
        self.names = _names(paths_inside, self.names)
        self.labels = _labels_of(raw, self.names, rules, self.columns)
        self.class_names = self.labels.class_names
        self._held: tuple[int, list[Any]] = (-1, [])

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": (-1, [])}  # not sent to other processes

    def read(self, index: int) -> Sample:
        """Read image `index`. Raises ImageError if its row is damaged or has no image."""
        number = bisect_right(self._ends, index)
        path, group = self._groups[number]
        if self._held[0] != number:
            # Reopened, and read without threads: neither survives the fork of data loader workers.
            with refusing(ImageError, f"{path}: row group {group} cannot be read", "a whole file; copy it again"):
                table = _open_parquet(path).read_row_group(group, columns=[self.columns.image], use_threads=False)
                if len(table) != self._ends[number] - (self._ends[number - 1] if number else 0):
                    raise ValueError(f"{len(table):,} rows, others by its head")
                self._held = number, table[self.columns.image].to_pylist()
        rows = self._held[1]
        image = rows[index - (self._ends[number] - len(rows))]
        data = _data(image, self.names[index], beside=path)
        return Sample(data, self.names[index], self.labels.values[index])


class DatasetSource:
    """A split of a data set of the `datasets` library, called `name` in messages.

    Raises ImageError if it has no column of images, or if it is not clear which column has the labels.
    """

    def __init__(self, data: datasets.Dataset, name: str, rules: LabelRules | None):
        self.left_out = LeftOut()
        self.columns = choose_columns(data.features, rules, name)
        with refusing(ImageError, f"{name}: cannot be read", "a whole data set"):
            table = data.select_columns([name for name in self.columns[:2] if name]).with_format("arrow")[:]
            for part in table.columns:
                part.validate(full=True)  # else wrong offsets read memory that is not theirs
            column = table[self.columns.image]
            paths = pc.struct_field(column, "path").to_pylist() if pa.types.is_struct(column.type) else []
            raw = list(data.with_format(None)[self.columns.label][:]) if self.columns.label else []
        self.names = _names(paths, [f"{name}#{index}" for index in range(len(data))])
        self.labels = _labels_of(raw, self.names, rules, self.columns)
        self.class_names = self.labels.class_names
        image = data.features[self.columns.image]
        undecoded = data.select_columns([self.columns.image])
        if isinstance(image, datasets.Image):
            undecoded = undecoded.cast_column(self.columns.image, datasets.Image(decode=False))
        self._data = undecoded

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> Sample:
        """Read image `index`. Raises ImageError if its file cannot be read."""
        with refusing(ImageError, f"{self.names[index]}: cannot be read", "a whole data set"):
            image = self._data[index][self.columns.image]
        return Sample(_data(image, self.names[index]), self.names[index], self.labels.values[index])


def _paths_in(file: pq.ParquetFile, image: str) -> list[str | None]:
    """Return the paths that an image column of {bytes, path} has, without reading the bytes."""
    if not pa.types.is_struct(file.schema_arrow.field(image).type):
        return [None] * file.metadata.num_rows
    column = file.read(columns=[f"{image}.path"], use_threads=False)[image]
    return pc.struct_field(column, "path").to_pylist()


def _names(paths: list[str | None], numbered: list[str]) -> list[str]:
    """Return the names of images: their paths if all have one and none repeats, else numbers of rows."""
    whole = all(isinstance(path, str) and path for path in paths) and len(set(paths)) == len(numbered)
    return paths if whole else numbered


def _labels_of(raw: list[RawLabel], names: Sequence[str], rules: LabelRules | None, columns: Columns) -> Labels:
    if rules is None:
        return unlabeled(names)
    origin = f"labels of the column {columns.label!r}"
    return resolve(raw or [None] * len(names), names, rules, origin=origin, class_names=columns.class_names)


def _data(image: Any, name: str, *, beside: Path | ObjectPath | None = None) -> bytes:
    """Return the bytes of an image cell: bytes, or {bytes, path} of which one is given.

    If it is in a file, the path is relative to its folder, and a file outside is not read, or none in a bucket.
    """
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if data is None and not path:
        raise ImageError(f"{name}: no image in this row; remove the row")
    if isinstance(data, bytes):
        return data
    if data is not None or not isinstance(path, str):
        raise ImageError(f"{name}: got a {type(data or path).__name__}, expected the bytes of an image, or a path")
    if isinstance(beside, ObjectPath):
        raise ImageError(f"{name}: got the path {path!r}, expected the bytes of an image; a bucket has no paths")
    folder = beside and beside.parent
    file = Path(path) if folder is None else folder / path
    with refusing(ImageError, f"{path}: cannot be read", "the file of an image"):
        outside = folder is not None and not file.resolve().is_relative_to(folder.resolve())
        if outside or (file.exists() and not file.is_file()):
            raise ImageError(f"{path}: expected the file of an image{f' below {folder}' if outside else ''}")
        return file.read_bytes()


def _open_parquet(path: Path | ObjectPath) -> pq.ParquetFile:
    with refusing(ImageError, f"{path}: cannot be read as Parquet", "a whole file; copy it again"):
        file, size = pq.ParquetFile(path.open() if isinstance(path, ObjectPath) else path), size_of(path)
        groups = range(file.metadata.num_row_groups)
        if not 0 <= sum(file.metadata.row_group(group).num_rows for group in groups) <= size:
            raise ValueError(f"more rows than its {size:,} bytes")
        return file


def open_arrow(folder: Path) -> datasets.Dataset | datasets.DatasetDict:
    """Open what `save_to_disk` wrote. Raises ImageError if it is damaged."""
    with refusing(ImageError, f"{folder}: cannot be read as a data set on disk", "a whole one; copy it again"):
        return datasets.load_from_disk(str(folder))


def is_arrow(folder: Path) -> bool:
    """Return whether a folder is what `save_to_disk` of `datasets` wrote, with one split or several."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def load_hub(name: str, split: str | None) -> datasets.DatasetDict | datasets.Dataset:
    """Load a data set of the hub, or one split of it. Raises ImageError if that fails."""
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub, the network and scripts of data sets raise many kinds
        said = reason(error).split(". ")[0]
        raise ImageError(
            f"hf://{name}: cannot be loaded ({type(error).__name__}: {said}); check the name"
        ) from error
