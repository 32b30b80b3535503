"""The usual fine-grained transfer sets, read from the folders that their authors distribute.

`read_set(name, folder)` gives the splits `train` and `validation` as the `datasets` library has them. Their
columns are `image`, the path of a file that is opened when the image is read, and `label`, 0-based in the set's
own order of classes. Nothing is copied, unpacked or cached.
"""

import json
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
from scipy.io import loadmat

from seitpp.errors import UserError

SetName = Literal["flowers102", "cars", "cub200", "inat18", "inat19", "pets", "food101"]
Images = list[tuple[str, int]]  # (path below the folder of the set, label) of each image


class SetError(UserError):
    """A set that is not known, or a folder that is not as its authors distribute it."""


class Listing(NamedTuple):
    """What the files of a set say about its images."""

    train: Images
    validation: Images
    class_names: list[str]


class FineGrained(NamedTuple):
    """A set: how its folder is read, and what was published about it."""

    title: str
    read: Callable[[Path], Listing]
    classes: int
    train: int
    validation: int
    page: str  # where the set is to be had, or where it is said


def read_set(name: str, folder: str | PathLike[str]) -> datasets.DatasetDict:
    """The splits `train` and `validation` of the set `name`, one of SETS, in `folder`.

    Raises SetError if there is no such set, or if a file of it, or the first image of a split, is not there.
    """
    if name not in SETS:
        raise SetError(f"unknown set {name!r}: expected one of {', '.join(SETS)}")
    try:
        listing = SETS[name].read(Path(folder))
        for path, _ in listing.train[:1] + listing.validation[:1]:
            (Path(folder) / path).stat()  # lists without images are found now, not in an hour
    except OSError as error:
        raise SetError(
            f"{error.filename}: {error.strerror}; expected {SETS[name].title} as its authors distribute it, "
            f"see {SETS[name].page}"
        ) from error
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=listing.class_names)}
    )
    splits = {"train": listing.train, "validation": listing.validation}
    return datasets.DatasetDict({split: _paths(folder, splits[split], features) for split in splits})


def differences(name: str, splits: datasets.DatasetDict) -> list[str]:
    """How the numbers of classes and images differ from the published ones, a line each."""
    published = SETS[name]
    counts = {
        "classes": (splits["train"].features["label"].num_classes, published.classes),
        "train images": (len(splits["train"]), published.train),
        "validation images": (len(splits["validation"]), published.validation),
    }
    return [
        f"{name}: {found:,} {what}, published are {expected:,}"
        for what, (found, expected) in counts.items()
        if found != expected
    ]


def flowers102(folder: Path) -> Listing:
    """jpg/, imagelabels.mat, setid.mat; trains on the published train and validation parts, as is usual.

    The classes have no names in these files, only numbers.
    """
    labels = _mat(folder / "imagelabels.mat")["labels"].tolist()
    parts = _mat(folder / "setid.mat")

    def images(part: str) -> Images:
        return [(f"jpg/image_{number:05d}.jpg", labels[number - 1] - 1) for number in parts[part].tolist()]

    names = [str(number) for number in range(1, max(labels) + 1)]
    return Listing(images("trnid") + images("valid"), images("tstid"), names)


def cars(folder: Path) -> Listing:
    """cars_train/, cars_test/, devkit/, and the labels of the test images, which came beside the devkit."""
    names = _mat(folder / "devkit/cars_meta.mat")["class_names"].tolist()

    def images(annotations: str, subfolder: str) -> Images:
        found = _mat(folder / annotations)["annotations"]
        return [(f"{subfolder}/{image['fname']}", image["class"] - 1) for image in found]

    # Some copies have it in the devkit.
    labelled = "cars_test_annos_withlabels.mat"
    labelled = f"devkit/{labelled}" if (folder / "devkit" / labelled).exists() else labelled
    return Listing(images("devkit/cars_train_annos.mat", "cars_train"), images(labelled, "cars_test"), names)


def cub200(folder: Path) -> Listing:
    """images/, images.txt, image_class_labels.txt, train_test_split.txt (1 is train), classes.txt."""
    paths, labels, in_train, names = (
        dict(line.split() for line in _lines(folder / f"{name}.txt"))
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
    """train_valYEAR/, trainYEAR.json, valYEAR.json; labels in the order of the category ids."""
    train, validation = (json.loads((folder / f"{part}{year}.json").read_bytes()) for part in ("train", "val"))
    categories = sorted(train["categories"], key=lambda category: category["id"])
    labels = {category["id"]: label for label, category in enumerate(categories)}

    def images(part: dict[str, Any]) -> Images:
        paths = {image["id"]: image["file_name"] for image in part["images"]}
        return [(paths[each["image_id"]], labels[each["category_id"]]) for each in part["annotations"]]

    return Listing(images(train), images(validation), [category["name"] for category in categories])


def pets(folder: Path) -> Listing:
    """images/CLASS_NUMBER.jpg, annotations/trainval.txt and test.txt: CLASS_NUMBER LABEL SPECIES BREED."""

    def images(part: str) -> Images:
        rows = (line.split() for line in _lines(folder / f"annotations/{part}.txt"))
        return [(f"images/{row[0]}.jpg", int(row[1]) - 1) for row in rows]

    train, validation = images("trainval"), images("test")
    names = {label: Path(path).stem.rpartition("_")[0] for path, label in train}
    return Listing(train, validation, [names[label] for label in sorted(names)])


def food101(folder: Path) -> Listing:
    """images/CLASS/NUMBER.jpg, meta/classes.txt, meta/train.txt and test.txt: CLASS/NUMBER."""
    names = _lines(folder / "meta/classes.txt")
    labels = {name: label for label, name in enumerate(names)}

    def images(part: str) -> Images:
        lines = _lines(folder / f"meta/{part}.txt")
        return [(f"images/{line}.jpg", labels[line.partition("/")[0]]) for line in lines]

    return Listing(images("train"), images("test"), names)


def _paths(folder: str | PathLike[str], images: Images, features: datasets.Features) -> datasets.Dataset:
    columns = {"image": [str(Path(folder) / path) for path, _ in images], "label": [label for _, label in images]}
    return datasets.Dataset.from_dict(columns, features=features)


def _mat(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB file: arrays without axes of length 1, structs as dicts."""
    with path.open("rb") as file:
        return loadmat(file, simplify_cells=True)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
INAT = "https://github.com/visipedia/inat_comp/tree/master"
SETS = {
    "flowers102": FineGrained("Oxford Flowers-102", flowers102, 102, 2_040, 6_149, f"{OXFORD}/flowers/102/"),
    # The authors' page and its files are gone; this tells what they were and where copies are.
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
