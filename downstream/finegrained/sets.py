"""The usual fine-grained transfer data sets, read from the folders that their authors distribute.

`read_set(name, folder)` returns the splits `train` and `validation` as a `datasets.DatasetDict`. Its columns are
`image`, the path of a file that is opened only when the image is read, and `label`, 0-based in the data set's own
order of classes. Nothing is copied, unpacked or cached.
"""

from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import datasets

from downstream.finegrained.matlab import read_variables
from seitpp.errors import UserError, refusing
from seitpp.files import parse_json

SetName = Literal["flowers102", "cars", "cub200", "inat18", "inat19", "pets", "food101"]
Content = TypeVar("Content")
Images = list[tuple[str, int]]  # (path relative to the folder of the data set, label) of each image


class SetError(UserError):
    """Raised for an unknown data set, and for a folder that differs from what its authors distribute."""


class Listing(NamedTuple):
    """The images and class names listed by the files of a data set."""

    train: Images
    validation: Images
    class_names: list[str]


class FineGrained(NamedTuple):
    """A data set: the function that reads its folder, and its published size."""

    title: str
    read: Callable[[Path], Listing]
    classes: int
    train: int
    validation: int
    page: str  # where to download the data set, or where that is explained


def read_set(name: str, folder: str | PathLike[str]) -> datasets.DatasetDict:
    """Read the splits `train` and `validation` of the data set `name`, one of SETS, from `folder`.

    Raises SetError if the name is unknown, if a list file or the first image of a split is missing, if a list is
    damaged or of another form, and if it names an image outside the folder or a class that is none.
    """
    if name not in SETS:
        raise SetError(f"unknown set {name!r}: expected one of {', '.join(SETS)}")
    expected = f"{SETS[name].title} as its authors distribute it, see {SETS[name].page}"
    with refusing(SetError, f"{folder}: its lists do not go together", expected):
        try:
            listing = SETS[name].read(Path(folder))
            _check_listing(listing)
            for path, _ in listing.train[:1] + listing.validation[:1]:
                (Path(folder) / path).stat()  # fail now, not in an hour, if only the lists are there
        except OSError as error:
            raise SetError(f"{error.filename}: {error.strerror}; expected {expected}") from error
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=listing.class_names)}
    )
    splits = {"train": listing.train, "validation": listing.validation}
    return datasets.DatasetDict({split: _paths(folder, splits[split], features) for split in splits})


def _check_listing(listing: Listing) -> None:
    """Raise ValueError unless all names are different texts, all labels are theirs, and all images lie inside."""
    names = listing.class_names
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{len(names)} names of classes, of which some are empty or occur twice, or none at all")
    for path, label in listing.train + listing.validation:
        if type(label) is not int or not 0 <= label < len(names):
            raise ValueError(f"class {label!r} of {path}, counted from 0, of {len(names)} classes")
        parts = path.replace("\\", "/").split("/")
        if not parts[0] or parts[0].endswith(":") or ".." in parts or not path.isprintable():
            raise ValueError(f"an image {path!r}, outside the folder")


def differences(name: str, splits: datasets.DatasetDict) -> list[str]:
    """Return one line for each number of classes or images that differs from the published one."""
    published = SETS[name]
    counts = {
        "classes": (splits["train"].features["label"].num_classes, published.classes),
        "train images": (len(splits["train"]), published.train),
        "validation images": (len(splits["validation"]), published.validation),
    }
    return [
        f"{name}: {count:,} {what}, published are {expected:,}"
        for what, (count, expected) in counts.items()
        if count != expected
    ]


def flowers102(folder: Path) -> Listing:
    """Read jpg/, imagelabels.mat and setid.mat. As usual, the published train and validation parts are joined for
    training, and the test part is the validation split.

    The files have no class names, so the names are the class numbers.
    """
    labels, parts = (_read(folder / name, read_variables) for name in ("imagelabels.mat", "setid.mat"))
    classes = dict(enumerate(labels["labels"], 1))  # from 1, as the images are

    def images(part: str) -> Images:
        return [(f"jpg/image_{number:05d}.jpg", classes[number] - 1) for number in parts[part]]

    if (last := max(classes.values())) > len(classes):
        raise ValueError(f"class {last} of {len(classes):,} images")
    names = [str(number) for number in range(1, last + 1)]
    return Listing(images("trnid") + images("valid"), images("tstid"), names)


def cars(folder: Path) -> Listing:
    """Read cars_train/, cars_test/, devkit/ and the file with the labels of the test images beside the devkit."""
    names = _read(folder / "devkit/cars_meta.mat", read_variables)["class_names"]

    def images(annotations: str, subfolder: str) -> Images:
        rows = _read(folder / annotations, read_variables)["annotations"]
        return [(f"{subfolder}/{image['fname']}", _only(image["class"]) - 1) for image in rows]

    # Some copies of the data set have this file inside the devkit.
    test = "cars_test_annos_withlabels.mat"
    test = f"devkit/{test}" if (folder / "devkit" / test).exists() else test
    return Listing(images("devkit/cars_train_annos.mat", "cars_train"), images(test, "cars_test"), names)


def cub200(folder: Path) -> Listing:
    """Read images/, images.txt, image_class_labels.txt, train_test_split.txt (1 is train) and classes.txt."""
    paths, labels, in_train, names = (
        _read(folder / f"{name}.txt", _pairs)
        for name in ("images", "image_class_labels", "train_test_split", "classes")
    )

    def images(flag: str) -> Images:
        return [
            (f"images/{path}", int(labels[number]) - 1)
            for number, path in paths.items()
            if in_train[number] == flag
        ]

    return Listing(images("1"), images("0"), list(names.values()))


def inat(folder: Path, year: int) -> Listing:
    """Read train_valYEAR/, trainYEAR.json and valYEAR.json; labels follow the order of the category ids."""
    train, validation = (_read(folder / f"{part}{year}.json", _object) for part in ("train", "val"))
    categories = sorted(train["categories"], key=lambda category: category["id"])
    labels = {category["id"]: label for label, category in enumerate(categories)}

    def images(part: dict[str, Any]) -> Images:
        paths = {image["id"]: image["file_name"] for image in part["images"]}
        return [(paths[each["image_id"]], labels[each["category_id"]]) for each in part["annotations"]]

    return Listing(images(train), images(validation), [category["name"] for category in categories])


def pets(folder: Path) -> Listing:
    """Read images/CLASS_NUMBER.jpg, annotations/trainval.txt and test.txt (CLASS_NUMBER LABEL SPECIES BREED)."""

    def images(part: str) -> Images:
        rows = (line.split() for line in _lines(folder / f"annotations/{part}.txt"))
        return [(f"images/{row[0]}.jpg", int(row[1]) - 1) for row in rows]

    train, validation = images("trainval"), images("test")
    names = {label: Path(path).stem.rpartition("_")[0] for path, label in train}
    return Listing(train, validation, [names[label] for label in sorted(names)])


def food101(folder: Path) -> Listing:
    """Read images/CLASS/NUMBER.jpg, meta/classes.txt, meta/train.txt and test.txt (CLASS/NUMBER)."""
    names = _lines(folder / "meta/classes.txt")
    labels = {name: label for label, name in enumerate(names)}

    def images(part: str) -> Images:
        lines = _lines(folder / f"meta/{part}.txt")
        return [(f"images/{line}.jpg", labels[line.partition("/")[0]]) for line in lines]

    return Listing(images("train"), images("test"), names)


def _paths(folder: str | PathLike[str], images: Images, features: datasets.Features) -> datasets.Dataset:
    columns = {"image": [str(Path(folder) / path) for path, _ in images], "label": [label for _, label in images]}
    return datasets.Dataset.from_dict(columns, features=features)


def _only(values: list[int]) -> int:
    (value,) = values
    return value


def _read(path: Path, read: Callable[[Path], Content]) -> Content:
    """Read a list file by `read`. Raises SetError naming it if it is damaged, and OSError if there is none."""
    path.stat()
    with refusing(SetError, f"{path}: cannot be read", "a list as its authors distribute it; download it again"):
        return read(path)


def _lines(path: Path) -> list[str]:
    return _read(path, lambda path: path.read_text(encoding="utf-8").splitlines())


def _pairs(path: Path) -> dict[str, str]:
    return dict(line.split() for line in path.read_text(encoding="utf-8").splitlines())


def _object(path: Path) -> dict[str, Any]:
    return dict(parse_json(path.read_bytes()))


OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
INAT = "https://github.com/visipedia/inat_comp/tree/master"
SETS = {
    "flowers102": FineGrained("Oxford Flowers-102", flowers102, 102, 2_040, 6_149, f"{OXFORD}/flowers/102/"),
    # The authors' page and files are offline; this issue lists the files and where copies are.
    "cars": FineGrained("Stanford Cars", cars, 196, 8_144, 8_041, "https://github.com/pytorch/vision/issues/7545"),
    "cub200": FineGrained(
        "CUB-200-2011", cub200, 200, 5_994, 5_794, "https://www.vision.caltech.edu/datasets/cub_200_2011/"
    ),
    "inat18": FineGrained("iNaturalist 2018", partial(inat, year=2018), 8_142, 437_513, 24_426, f"{INAT}/2018"),
    "inat19": FineGrained("iNaturalist 2019", partial(inat, year=2019), 1_010, 265_213, 3_030, f"{INAT}/2019"),
    "pets": FineGrained("Oxford-IIIT Pets", pets, 37, 3_680, 3_669, f"{OXFORD}/pets/"),
    "food101": FineGrained(
        "Food-101", food101, 101, 75_750, 25_250, "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"
    ),
}
