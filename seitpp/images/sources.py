"""Sources of encoded images: folders, WebDataset tars, Parquet, Arrow on disk, and data sets of the hub.

A source reads image i, with its name and label, in a fixed order. It does not keep all images in memory, and it
does not unpack or convert files on disk.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from seitpp.errors import escaped
from seitpp.images.decode import ImageError, Sample
from seitpp.images.inventory import LeftOut
from seitpp.images.labels import (
    ANNOTATION_FILES,
    NO_LABELS,
    LabelRules,
    Labels,
    by_name,
    read_label_file,
    resolve,
    unlabeled,
)
from seitpp.images.layouts import IMAGES, MASKS
from seitpp.images.objects import ObjectFolder, ObjectPath
from seitpp.images.tars import TarSource
from seitpp.images.walk import Walked, find_split, is_hidden, looks_like_splits, store_split, walk
from seitpp.store.bucket import Bucket, is_bucket

if TYPE_CHECKING:
    import datasets

HUB = "hf://"
FILES = (".parquet", ".tar")
ANY_LABELS = LabelRules()  # those that the data have themselves


class ImageSource(Protocol):
    """Encoded images in a fixed order: their `names`, their `labels` with class names, and what was `left_out`."""

    names: Sequence[str]
    labels: Labels
    class_names: list[str] | None
    left_out: LeftOut

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Read image `index` as it is stored."""
        ...


class FolderSource:
    """Image files below a folder, sorted by path; if some lie in subfolders, the first level names the classes."""

    def __init__(self, folder: Path | ObjectFolder, walked: Walked, rules: LabelRules | None):
        self.folder, self.names, self.left_out = folder, walked.files, walked.left_out
        for name in walked.packed:
            self.left_out.add("packed file beside images", name)
        if not self.names:
            raise ImageError(f"{folder}: no images below it (left out: {self.left_out}); check the path")
        self.labels = unlabeled(self.names) if rules is None else self._labels(walked, rules)
        self.class_names = self.labels.class_names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Sample:
        """Read image `index`. Raises ImageError if its file cannot be read."""
        name = self.names[index]
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror})") from error
        return Sample(data, name, self.labels.values[index])

    def _labels(self, walked: Walked, rules: LabelRules) -> Labels:
        titles = {name: escaped(name) for name in walked.folders}
        folders = [titles[name.partition("/")[0]] if "/" in name else None for name in self.names]
        if not any(folders):
            local = isinstance(self.folder, Path)
            hint = next((name for name in ANNOTATION_FILES if local and (self.folder / name).is_file()), None)
            note = f" ({hint} may have some: --labels {self.folder / hint})" if hint else ""
            labels = resolve([None] * len(self.names), self.names, rules, origin=NO_LABELS)
            return labels._replace(origin=f"{NO_LABELS}: they lie in no class folders{note}")
        origin = "classes by folder names"
        classes = None if rules.classes else sorted(titles.values())  # empty folders count
        places = {name: number for number, name in enumerate(classes or ())}
        raw = folders if rules.classes else [None if name is None else places[name] for name in folders]
        return resolve(raw, self.names, rules, origin=origin, class_names=classes)


class SourceSubset:
    """A subset of a source, by image indices."""

    def __init__(self, source: ImageSource, indices: Sequence[int]):
        self.source, self.indices, self.left_out = source, indices, source.left_out
        self.names = [source.names[index] for index in indices]
        self.labels = source.labels._replace(values=[source.labels.values[index] for index in indices])
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Sample:
        """Read image `index` of the subset."""
        return self.source.read(self.indices[index])


class Relabeled:
    """A source with other labels."""

    def __init__(self, source: ImageSource, labels: Labels):
        self.source, self.names, self.left_out = source, source.names, source.left_out
        self.labels, self.class_names = labels, labels.class_names

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Sample:
        """Read image `index` with its label here."""
        return self.source.read(index)._replace(label=self.labels.values[index])


def open_source(data: str, split: str | None = None, rules: LabelRules | None = ANY_LABELS) -> ImageSource:
    """Detect the kind of `data` and open it, or only its split `split`.

    `rules` say where its labels are; without them (None) no labels are read. `data` is a folder of images,
    DATA/CLASS/NAME.jpg or flat; of Parquet or tar files; what `save_to_disk` of `datasets` wrote; one Parquet
    or tar file; a data set of the hub, "hf://owner/name"; or images, Parquet or tar files in a bucket, as
    "s3://bucket/photos". A split is a subfolder, or the packed files whose names begin with it. Raises ImageError
    otherwise, and for data with several splits if none is named; LabelError for labels that are missing or
    unclear; StoreError for what a bucket refuses.
    """
    if rules is None or rules.file is None:
        return _opened(data, split, rules)
    source = _opened(data, split, None)
    raw, unused = by_name(source.names, read_label_file(rules.file), rules.file)
    if unused:
        source.left_out.add(f"label in {Path(rules.file).name} of no image here", rules.file, unused)
    return Relabeled(source, resolve(raw, source.names, rules, origin=f"labels of {Path(rules.file).name}"))


def split_names(data: str) -> list[str]:
    """List the splits that `data` has: subfolders called train, val, .., packed files, or splits of a table.

    The list is empty if it is one set of images.
    """
    import datasets  # takes a second, as does the module tables, and runs on a store need neither

    from seitpp.images.tables import is_arrow, open_arrow

    if data.startswith(HUB):
        return list(datasets.get_dataset_split_names(data.removeprefix(HUB)))
    path = _root(data)
    if isinstance(path, str):
        if path.endswith(FILES):
            return []
    elif not path.is_dir():
        return []
    elif is_arrow(path):
        opened = open_arrow(path)
        return list(opened) if isinstance(opened, datasets.DatasetDict) else []
    below, folders = _below(path)
    if found := looks_like_splits(folders):
        return found
    packed = [name for name in below if name.endswith(FILES)]
    words = list(dict.fromkeys(filter(store_split, map(_leading_word, packed))))
    return words if len(words) > 1 and looks_like_splits(words) else []


def _root(data: str) -> Path | str:
    """Return the path of local data, or the URL of those in a bucket without a slash at its end."""
    return data.rstrip("/") if is_bucket(data) else Path(data)


def _below(path: Path | str) -> tuple[list[str], list[str]]:
    """Return the names right below a folder, and those of them that are folders."""
    if isinstance(path, str):
        names, folders = Bucket(path).below()
        return [name for name in names if not is_hidden(name)], [name for name in folders if not is_hidden(name)]
    try:
        names = sorted(name for entry in path.iterdir() if not is_hidden(name := entry.name))
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error
    return names, [name for name in names if (path / name).is_dir()]


def open_every_split(data: str, rules: LabelRules) -> dict[str, ImageSource]:
    """Open all splits of `data`, the one for training first, under the names that a store gives them.

    The classes of the others are those of the first. Raises ImageError if it has no splits, or two for one name.
    """
    names: dict[str, str] = {}
    for name in split_names(data):
        split = store_split(name) or name
        if split in names:
            raise ImageError(
                f"{data}: {names[split]} and {name} are both the split {split}; name one with --source-split"
            )
        names[split] = name
    if not names:
        raise ImageError(
            f"{data}: --splits, but it has none; name the folder above train/ and val/, or leave it out"
        )
    sources: dict[str, ImageSource] = {}
    for split in sorted(names, key=lambda split: (split != "train", split)):
        sources[split] = source = open_source(data, names[split], rules)
        if source.class_names and not rules.classes:
            rules = replace(rules, classes=tuple(source.class_names))
    return sources


def _leading_word(file: str) -> str:
    letters = next((index for index, letter in enumerate(file) if not letter.isalpha()), len(file))
    return file[:letters].lower()


def _opened(data: str, split: str | None, rules: LabelRules | None) -> ImageSource:
    from seitpp.images.tables import DatasetSource, ParquetSource, load_hub

    if data.startswith(HUB):
        return DatasetSource(load_hub(data.removeprefix(HUB), split or "train"), data, rules)
    path = _root(data)
    if isinstance(path, str):
        if not path.endswith(FILES):
            return _opened_folder(path, split, rules)
        url, _, name = path.rpartition("/")
        path = ObjectFolder(url, name) / name
    elif path.is_dir():
        return _opened_folder(path, split, rules)
    if isinstance(path, ObjectPath) or (path.is_file() and path.suffix in FILES):
        return ParquetSource([path], rules) if path.suffix == ".parquet" else TarSource([path], rules)
    if path.exists():
        raise ImageError(f"{data}: expected a folder, a .parquet or an uncompressed .tar file; unpack it")
    raise ImageError(
        f"{data}: no such file or folder; check the path (a data set of the hub is named {HUB}owner/name)"
    )


def _opened_folder(root: Path | str, split: str | None, rules: LabelRules | None) -> ImageSource:
    """Open a folder, or the URL of one in a bucket."""
    from seitpp.images.tables import DatasetSource, ParquetSource, is_arrow

    if isinstance(root, Path) and is_arrow(root):
        return DatasetSource(_arrow_split(root, split), str(root), rules)
    if split is None and (splits := split_names(str(root))):
        raise ImageError(
            f"{root}: has the splits {', '.join(splits)}, which are no classes: name the one to read "
            "(tokenize_images takes all of them with --splits)"
        )
    below = find_split(_below(root)[1], split) if split else None
    folder, walked = _walked(root, below)
    if walked.files and split and not below:
        raise ImageError(f"{root}: no folder {split!r} below it; check the split")
    if walked.files or not walked.packed:
        return FolderSource(folder, walked, rules)
    for suffix, kind in ((".parquet", ParquetSource), (".tar", TarSource)):
        if names := [name for name in walked.packed if name.endswith(suffix)]:
            chosen = names if below else _of_split(names, root, split)
            source = kind([folder / name for name in chosen], rules)
            source.left_out.extend(walked.left_out)
            for name in walked.packed:
                if not name.endswith(suffix):
                    source.left_out.add(f"packed file beside {suffix} files", name)
            return source
    raise ImageError(f"{root}: Arrow files, expected the whole local folder that save_to_disk wrote")


def _walked(root: Path | str, below: str | None) -> tuple[Path | ObjectFolder, Walked]:
    """List the folder `below` another one, or that itself."""
    if isinstance(root, Path):
        path = root / (below or "")
        with tqdm(desc=f"listing {path}", unit="image", delay=2.0) as bar:
            return path, walk(path, bar.update)
    folder = ObjectFolder(f"{root}/{below}" if below else root)
    walked = folder.walk()
    if not {*IMAGES}.isdisjoint(walked.folders) and not {*MASKS}.isdisjoint(walked.folders):
        raise ImageError(f"{folder}: images with masks are not read from buckets; copy them to a local folder")
    return folder, walked


def _arrow_split(path: Path, split: str | None) -> "datasets.Dataset":
    import datasets

    from seitpp.images.tables import open_arrow

    opened = open_arrow(path)
    if isinstance(opened, datasets.Dataset):
        return opened
    if split is None and len(opened) > 1:
        raise ImageError(
            f"{path}: has the splits {', '.join(opened)}: name the one to read (tokenize_images takes all "
            "of them with --splits)"
        )
    name = find_split(list(opened), split) if split else next(iter(opened))
    if name is None:
        raise ImageError(f"{path}: no split {split!r}, it has {', '.join(opened)}; check the split")
    return opened[name]


def _of_split(files: list[str], folder: Path | str, split: str | None) -> list[str]:
    own = {file: file.rpartition("/")[2] for file in files}
    chosen = [file for file in files if own[file].startswith(split or "")]
    if not chosen and (word := find_split(set(map(_leading_word, own.values())), split or "")):
        chosen = [file for file in files if _leading_word(own[file]) == word]
    if not chosen:
        raise ImageError(
            f"{folder}: no file whose name begins with {split!r}, it has {own[files[0]]}, ...; check the split"
        )
    return chosen


def hold_out(source: ImageSource, every: int, name: str) -> tuple[SourceSubset, SourceSubset]:
    """Split a source into (the other images, every `every`-th image).

    The last images of a sorted source could all be of one class. Raises ImageError if the source, called `name` in
    the message, has fewer than `every` images.
    """
    if len(source) < every:
        raise ImageError(
            f"{len(source)} images in {name}: expected at least {every}, of which every {every}th is held out; "
            "pass a smaller number, or 0 for none"
        )
    chosen = range(every - 1, len(source), every)
    others = [index for index in range(len(source)) if index % every != every - 1]
    return SourceSubset(source, others), SourceSubset(source, chosen)
