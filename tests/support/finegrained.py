"""Tiny copies of fine-grained sets in their authors' layouts."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_sample_images


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def draw(path: Path) -> None:
    """A crop of a photograph; which one follows from the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    top = sum(path.name.encode()) % 300
    Image.fromarray(load_sample_images().images[0][top : top + 40, top : top + 48]).save(path, "JPEG")


# Each writes a folder and gives, for both splits, (path, label) of every image in order, and the class names.
Expected = tuple[list[tuple[str, int]], list[tuple[str, int]], list[str]]


def flowers102(root: Path) -> Expected:
    """Seven images of classes 3 1 2 2 3 1 2; both files in the shapes and types of the real ones."""
    root.mkdir(exist_ok=True)
    savemat(root / "imagelabels.mat", {"labels": np.array([[3, 1, 2, 2, 3, 1, 2]], np.uint8)})
    ids = {"trnid": [5, 2], "valid": [7, 3], "tstid": [1, 6, 4]}
    savemat(root / "setid.mat", {part: np.array([numbers], np.uint16) for part, numbers in ids.items()})
    jpg = "jpg/image_0000{}.jpg".format
    train = [(jpg(5), 2), (jpg(2), 0), (jpg(7), 1), (jpg(3), 1)]
    return train, [(jpg(1), 2), (jpg(6), 0), (jpg(4), 1)], ["1", "2", "3"]


def cars(root: Path, labelled: str = "cars_test_annos_withlabels.mat") -> Expected:
    """Structs of six fields, cells of names."""
    names = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array([names], object)})
    for path, classes in (("devkit/cars_train_annos.mat", [2, 1, 2]), (labelled, [1, 2])):
        annotations = np.empty((1, len(classes)), [(field, object) for field in fields])
        for i, label in enumerate(classes):
            boxes = [np.array([[value]], np.uint16) for value in (39, 116, 569, 375)]
            annotations[0, i] = (*boxes, np.array([[label]], np.uint8), f"{i + 1:05d}.jpg")
        savemat(root / path, {"annotations": annotations})
    train = [("cars_train/00001.jpg", 1), ("cars_train/00002.jpg", 0), ("cars_train/00003.jpg", 1)]
    return train, [("cars_test/00001.jpg", 0), ("cars_test/00002.jpg", 1)], names


def cub200(root: Path) -> Expected:
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    paths = [f"{names[0]}/A_1.jpg", f"{names[0]}/A_2.jpg", f"{names[1]}/L_1.jpg", f"{names[1]}/L_2.jpg"]
    write(root / "classes.txt", "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    write(root / "images.txt", "".join(f"{i} {path}\n" for i, path in enumerate(paths, 1)))
    write(root / "image_class_labels.txt", "1 1\n2 1\n3 2\n4 2\n")
    write(root / "train_test_split.txt", "1 0\n2 1\n3 1\n4 0\n")
    images = [f"images/{path}" for path in paths]
    return [(images[1], 0), (images[2], 1)], [(images[0], 0), (images[3], 1)], names


def inat(root: Path, year: int) -> Expected:
    """Categories and annotations in no order, as nothing promises one."""
    categories = [{"id": 1, "name": "2820", "supercategory": "Aves"}, {"id": 0, "name": "7477"}]
    parts = {"train": [(7, 0), (8, 1), (9, 0)], "val": [(4, 1), (3, 0)]}
    path = f"train_val{year}/Aves/{{}}/{{}}.jpg".format
    for part, rows in parts.items():
        annotations = [{"id": 10 + i, "image_id": i, "category_id": label} for i, label in rows]
        images = [{"id": i, "file_name": path(label, i)} for i, label in sorted(rows, reverse=True)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(root / f"{part}{year}.json", json.dumps(content))
    train, validation = ([(path(label, i), label) for i, label in rows] for rows in parts.values())
    return train, validation, ["7477", "2820"]


def inat18(root: Path) -> Expected:
    return inat(root, 2018)


def inat19(root: Path) -> Expected:
    return inat(root, 2019)


def pets(root: Path) -> Expected:
    """The third line's class has an underscore; the first one's is not the first class."""
    write(root / "annotations/trainval.txt", "beagle_7 2 2 3\nAbyssinian_100 1 1 1\ngreat_pyrenees_12 3 2 11\n")
    write(root / "annotations/test.txt", "Abyssinian_201 1 1 1\nbeagle_1 2 2 3\n")
    train = [("images/beagle_7.jpg", 1), ("images/Abyssinian_100.jpg", 0), ("images/great_pyrenees_12.jpg", 2)]
    validation = [("images/Abyssinian_201.jpg", 0), ("images/beagle_1.jpg", 1)]
    return train, validation, ["Abyssinian", "beagle", "great_pyrenees"]


def food101(root: Path) -> Expected:
    """Classes in the order of classes.txt, whatever the alphabet says."""
    write(root / "meta/classes.txt", "waffles\napple_pie\n")
    write(root / "meta/train.txt", "apple_pie/1005649\nwaffles/1\n")
    write(root / "meta/test.txt", "waffles/22\napple_pie/3\n")
    train = [("images/apple_pie/1005649.jpg", 1), ("images/waffles/1.jpg", 0)]
    return train, [("images/waffles/22.jpg", 0), ("images/apple_pie/3.jpg", 1)], ["waffles", "apple_pie"]


COPIES = {function.__name__: function for function in (flowers102, cars, cub200, inat18, inat19, pets, food101)}


def write_set(name: str, root: Path) -> Expected:
    """The lists of a set and all of its images."""
    expected = COPIES[name](root)
    for path, _ in expected[0] + expected[1]:
        draw(root / path)
    return expected
