"""Image sets that show the classes of ImageNet otherwise, in the folders in which their authors distribute them.

| set               | folders                                  | classes                                        |
|-------------------|------------------------------------------|------------------------------------------------|
| ImageNet-R, -A    | WNID/NAME.jpg                            | 200 of the 1,000, another 200 for each         |
| ImageNet-Sketch   | WNID/NAME.JPEG                           | all                                            |
| ImageNet-V2       | NUMBER/NAME.jpeg, 0 to 999               | all; NUMBER counts the sorted wnids            |
| ImageNet-C        | CORRUPTION/SEVERITY/WNID/NAME.JPEG       | all                                            |

Classes are found by name, never by position: "10" sorts before "2". A model knows its classes by wnids, by the
names that timm has for them, or by names of its own; a model of 1,000 classes without names has those of ImageNet.
"""

import pkgutil
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import ImageNetInfo

from downstream.robustness.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from downstream.robustness.extra import RobustnessError
from seitpp.engine.evaluate import ClassMap
from seitpp.images.sources import ImageSource, open_source

TITLES = {
    "imagenet_r": "ImageNet-R",
    "imagenet_a": "ImageNet-A",
    "imagenet_sketch": "ImageNet-Sketch",
    "imagenet_v2": "ImageNet-V2",
}
NUMBERED = "imagenet_v2"
SUBSETS = ("imagenet_r", "imagenet_a")  # of which timm has the 200 wnids
IMAGENET_CLASSES = 1000


class CorruptedFolder(NamedTuple):
    """Images that are corrupted already: the corruption, its severity and the folder with their classes."""

    corruption: Corruption
    severity: int
    folder: Path


def open_set(name: str, folder: str) -> ImageSource:
    """Open a set of `TITLES`. Raises RobustnessError unless its folders are named as those of this set."""
    source = open_source(folder)
    names = source.class_names
    if not names or None in source.labels.values:
        raise RobustnessError(f"{folder}: images without class folders, expected those of {TITLES[name]}")
    if name == NUMBERED and (wrong := [title for title in names if not title.isdecimal()]):
        raise RobustnessError(
            f"{folder}: got the class folder {wrong[0]!r}, expected numbers, 0 to 999, as {TITLES[name]} has: "
            "check --imagenet-v2"
        )
    if name in SUBSETS:
        subset = _lines_of_timm(f"{name}_synsets.txt")
        if wrong := [title for title in names if title in wnids() and title not in subset]:
            raise RobustnessError(
                f"{folder}: got the class {wrong[0]}, which is none of the 200 of {TITLES[name]}: check "
                f"--{name.replace('_', '-')}"
            )
    return source


def list_corrupted(folder: str) -> list[CorruptedFolder]:
    """List the images of ImageNet-C in a folder: CORRUPTION/SEVERITY, or as unpacked GROUP/CORRUPTION/SEVERITY.

    Raises RobustnessError if there are none.
    """
    top = Path(folder)
    found = []
    for name in CORRUPTIONS:
        places = [place for place in (top / name, *sorted(top.glob(f"*/{name}"))) if place.is_dir()]
        if len(places) > 1:
            raise RobustnessError(f"{folder}: got {places[0]} and {places[1]}, expected one folder {name}")
        found += [
            CorruptedFolder(name, severity, place / str(severity))
            for place in places
            for severity in SEVERITIES
            if (place / str(severity)).is_dir()
        ]
    if not found:
        raise RobustnessError(
            f"{folder}: no folder CORRUPTION/SEVERITY, such as gaussian_noise/1, expected those of ImageNet-C: "
            "check --imagenet-c"
        )
    return found


def map_classes(
    names: Sequence[str],
    model_names: Sequence[str] | None,
    *,
    classes: int,
    numbered: bool,
    where: tuple[str, str],
) -> ClassMap:
    """Find the class `names` of images among those of a model, which has `classes` of them.

    `numbered` images have ImageNet's classes as numbers, as ImageNet-V2. `where` names images and model in the
    RobustnessError that is raised if one of the classes is not the model's.
    """
    known = _of_model(model_names, classes)
    places = {name: place for place, name in enumerate(known)}
    titles = [canonical(name) for name in names]
    if numbered and not places.keys().isdisjoint(wnids()):
        titles = [wnids()[int(name)] if int(name) < IMAGENET_CLASSES else name for name in names]
    elif numbered:
        titles = [str(int(name)) for name in names]
    if unknown := [name for name, title in zip(names, titles, strict=True) if title not in places]:
        raise RobustnessError(
            f"{len(unknown):,} of {len(names):,} classes of {where[0]} are not among the {classes:,} of "
            f"{where[1]}: the first is {unknown[0]!r}; name images of its classes"
        )
    return ClassMap(torch.tensor([places[title] for title in titles]), torch.arange(len(names)), list(names))


def canonical(name: str) -> str:
    """Return the wnid of a class that is named as timm names it, in any case; else the name itself."""
    return _readable().get(_plain(name), name)


def _of_model(names: Sequence[str] | None, classes: int) -> list[str]:
    if names is not None:
        return [canonical(name) for name in names]
    return list(wnids()) if classes == IMAGENET_CLASSES else [str(number) for number in range(classes)]


@cache
def wnids() -> tuple[str, ...]:
    """Return the 1,000 wnids of ImageNet-1k, sorted, as its numbers count them."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def _readable() -> dict[str, str]:
    """Return {name: wnid} for whole names ("tench, Tinca tinca") and first words that mean one class alone."""
    info = ImageNetInfo("imagenet-1k")
    whole = [_plain(info.index_to_description(number)) for number in range(IMAGENET_CLASSES)]
    first = [name.partition(",")[0] for name in whole]
    found: dict[str, str] = {}
    for forms in (first, whole):
        counts = Counter(forms)
        found |= {name: wnid for name, wnid in zip(forms, wnids(), strict=True) if counts[name] == 1}
    return found


def _lines_of_timm(file: str) -> list[str]:
    return (pkgutil.get_data("timm.data", f"_info/{file}") or b"").decode().split()


def _plain(name: str) -> str:
    return name.replace("_", " ").lower()
