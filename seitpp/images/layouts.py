"""Layouts of segmentation sets: where their images, masks, splits and class names are."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from seitpp.images.class_lists import ClassList, read_classes
from seitpp.images.decode import ImageError
from seitpp.images.inventory import LeftOut
from seitpp.images.masks import Layout
from seitpp.images.walk import SUFFIXES, find_split, is_hidden, store_split, walk

# Names of the two folders of a set in pairs, and endings of mask names that its images do not have.
IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "annotations", "labels")
ENDINGS = ("_mask", "-mask", "_label", "_labels", "_seg", "_gt")

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOC_NAME = re.compile(r"\d{4}_\d{6}")  # of the images of Pascal VOC, whose classes are not those of other sets
VOC_MORE = "SegmentationClassAug"  # masks of more images, from SBD, where Pascal VOC itself has none
VOC_NAMES = ("labelmap.txt", "class_names.txt")  # written by CVAT and labelme beside the folders of VOC

CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of these classes
VOID_IDS = tuple(sorted({*range(-1, 34)} - {*LABEL_IDS}))
IMAGE_ENDING, MASK_ENDINGS = "_leftImg8bit", ("_gtFine_labelTrainIds", "_gtFine_labelIds")


class SplitError(ImageError):
    """Raised if a set has splits and none of them is named, or not the one that is."""


class Listing(NamedTuple):
    """The files of a split of a set, by name: a relative path without suffix.

    `classes` are class names that the set has itself. Value `first` of a mask is the first of them where they have
    no numbers (None: the set does not say it), and the values `ignored` are no class. `mask_roots` are the folders
    with the masks of all splits. `left_out` counts the files that are neither image nor mask.
    """

    layout: Layout
    images: dict[str, Path]
    masks: dict[str, Path]
    image_folder: Path
    mask_folder: Path
    classes: ClassList | None
    mask_roots: tuple[Path, ...]
    left_out: LeftOut
    first: int | None = None
    ignored: tuple[int, ...] = ()

    def every_mask(self) -> Iterator[Path]:
        """Yield the masks of all splits, those of this one first."""
        yield from self.masks.values()
        known = set(self.masks.values())
        every = (file for root in self.mask_roots for file in _files(root) if file not in known)
        yield from (file for file in every if file.suffix.lower() in SUFFIXES)

    def expected_image(self, name: str) -> Path:
        """Return where the image of a mask would be."""
        ending = IMAGE_ENDING if self.layout == "cityscapes" else ""
        return self.image_folder / f"{name}{ending}{_usual(self.images, '.jpg')}"

    def expected_mask(self, name: str) -> Path:
        """Return where the mask of an image would be."""
        ending = ""
        if self.layout == "cityscapes":
            ending = next(
                (end for end in MASK_ENDINGS for path in self.masks.values() if path.stem.endswith(end)), ""
            )
        return self.mask_folder / f"{name}{ending}{_usual(self.masks, '.png')}"


def list_files(folder: Path, split: str | None, layout: Layout | None) -> Listing:
    """List the images and masks of `split`, in the named layout or the one that the folder has.

    Raises SplitError for a split that the set does not have, and ImageError for a folder without such a layout and
    for two files of one name.
    """
    found = layout or find_layout(folder)
    if found is None:
        raise ImageError(
            f"{folder}: no images with masks, expected images/ and masks/ (or annotations/, labels/), or the "
            "folders of ADE-20k, Pascal VOC or Cityscapes; check the path"
        )
    return {"voc": _voc, "cityscapes": _cityscapes}.get(found, _pairs)(folder, split)


def find_layout(folder: Path) -> Layout | None:
    """Return the layout of a folder by the names of its folders, None if it has none of them."""
    if (folder / "leftImg8bit").is_dir() and (folder / "gtFine").is_dir():
        return "cityscapes"
    if _voc_root(folder):
        return "voc"
    for images, masks in _pair_folders(folder).values():
        files, others, _ = _paired_names(images, masks)
        if files.keys() & others.keys():
            return "ade20k" if _object_info(folder) else "pairs"
    return None


def choose_split(splits: Mapping[str, object], split: str | None, folder: Path) -> str:
    """Return the key of `splits` that a user means by `split`; the key "" is the whole set.

    Raises SplitError if there is none, or if None is given and there are several.
    """
    names = sorted(name for name in splits if name)
    if split is None:
        several = len(list(filter(store_split, names))) > 1 if "" in splits else len(names) > 1
        if several or not splits:
            raise SplitError(f"{folder}: has the splits {', '.join(names)}, expected one of them; name it")
        return "" if "" in splits else names[0]
    if (name := find_split(names, split)) is not None:
        return name
    raise SplitError(f"{folder}: no split {split!r} of images and masks, it has {', '.join(names) or 'none'}")


def split_names(folder: Path, layout: Layout | None) -> dict[str, str]:
    """Return the splits of a set: {the name in a store: the set's own name}, empty for a set without splits."""
    found = layout or find_layout(folder)
    if found == "voc":
        own = [path.stem for path in _voc_lists(folder)]
    elif found == "cityscapes":
        own = _city_splits(folder)
    else:
        places = _pair_folders(folder)
        own = [name for name in places if store_split(name) or (name and "" not in places)]
    return {store_split(name) or name: name for name in sorted(own)}


def _pairs(folder: Path, split: str | None) -> Listing:
    """List images/[SPLIT/]NAME.* with masks/[SPLIT/]NAME.*, or SPLIT/images and SPLIT/masks; also ADE-20k's."""
    places = _pair_folders(folder)
    images, masks = places[choose_split(places, split, folder)]
    files, others, left_out = _paired_names(images, masks)
    infos = _object_info(folder)
    if len(infos) > 1:
        raise ImageError(f"{folder}: {', '.join(file.name for file in infos)}, expected one objectInfo*.txt")
    roots = {place for name, (_, place) in places.items() if name == "" or "" not in places}
    return Listing(
        layout="ade20k" if infos else "pairs",
        images=files,
        masks=others,
        image_folder=images,
        mask_folder=masks,
        classes=read_classes(infos[0]) if infos else None,
        mask_roots=tuple(sorted(roots)),
        first=1 if infos else None,
        ignored=(0,) if infos else (),
        left_out=left_out,
    )


def _object_info(folder: Path) -> list[Path]:
    return sorted(folder.glob("objectInfo*.txt"))


def _pair_folders(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of images and masks of each split; the split "" is the whole set."""
    whole = _two_folders(folder)
    if whole:
        images, masks = whole
        shared = {path.name for path in _folders(images)} & {path.name for path in _folders(masks)}
        return {"": whole, **{name: (images / name, masks / name) for name in sorted(shared)}}
    pairs = {path.name: _two_folders(path) for path in _folders(folder)}
    return {name: pair for name, pair in pairs.items() if pair}


def _two_folders(folder: Path) -> tuple[Path, Path] | None:
    images = [folder / name for name in IMAGES if (folder / name).is_dir()]
    masks = [
        place
        for place in (folder / name for name in MASKS)
        if place.is_dir() and any(path.suffix.lower() in SUFFIXES for path in _files(place))
    ]
    if len(images) > 1 or (images and len(masks) > 1):
        names = ", ".join(path.name for path in [*images, *masks])
        raise ImageError(
            f"{folder}: {names}, expected one folder of images and one of masks; move the others away"
        )
    return (images[0], masks[0]) if images and masks else None


def _paired_names(images: Path, masks: Path) -> tuple[dict[str, Path], dict[str, Path], LeftOut]:
    """Return the images and the masks by name, and what is neither; an ending such as _mask is no part of it."""
    left_out = LeftOut()
    files, others = _by_name(images, left_out), _by_name(masks, left_out)
    named: dict[str, Path] = {}
    for name, path in others.items():
        stems = [name[: -len(ending)] for ending in ENDINGS if name.endswith(ending)]
        name = next((stem for stem in stems if stem in files and name not in files), name)
        if name in named:
            raise ImageError(
                f"{path}: a second mask of the image {name}, which has {named[name].name}; remove one"
            )
        named[name] = path
    return files, named, left_out


def _voc(folder: Path, split: str | None) -> Listing:
    """List the names in ImageSets/Segmentation/SPLIT.txt, or all masks where there are no such lists."""
    root = _voc_root(folder)
    if root is None:
        raise ImageError(
            f"{folder}: expected the folders JPEGImages and SegmentationClass of Pascal VOC; check it"
        )
    masks = next(path for name in ("SegmentationClassPNG", "SegmentationClass") if (path := root / name).is_dir())
    images, more, left_out = root / "JPEGImages", root / VOC_MORE, LeftOut()
    files, others = _by_name(images, left_out), _by_name(masks, left_out)
    roots = [masks, *([more] if more.is_dir() else [])]
    others = {**_by_name(more, left_out), **others} if more in roots else others
    lists = {path.stem: path for path in _voc_lists(folder)}
    if lists or split:
        lines = lists[choose_split(lists, split, root)].read_text("utf-8", "surrogateescape").splitlines()
        names = [line.split()[0] for line in lines if line.strip()]
    else:
        names = list(others)
    # A name of which there is neither stays in the list, so that it is counted and named.
    there = {name: files.get(name, None if name in others else images / f"{name}.jpg") for name in names}
    own = [root / name for name in VOC_NAMES if (root / name).is_file()]
    classes = read_classes(own[0]) if own else None
    if classes is None and all(VOC_NAME.fullmatch(name) for name in names):
        classes = ClassList(VOC_CLASSES, "Pascal VOC", values=tuple(range(len(VOC_CLASSES))))
    return Listing(
        layout="voc",
        images={name: path for name, path in there.items() if path},
        masks={name: others[name] for name in names if name in others},
        image_folder=images,
        mask_folder=masks,
        classes=classes,
        mask_roots=tuple(roots),
        first=0,
        ignored=(255,),
        left_out=left_out,
    )


def _voc_lists(folder: Path) -> list[Path]:
    return sorted(((_voc_root(folder) or folder) / "ImageSets/Segmentation").glob("*.txt"))


def _voc_root(folder: Path) -> Path | None:
    """Return the folder with JPEGImages and SegmentationClass: `folder`, or the one year that is in it."""
    roots = [
        place.parent
        for pattern in ("JPEGImages", "VOC2*/JPEGImages", "VOCdevkit/VOC2*/JPEGImages")
        for place in sorted(folder.glob(pattern))
        if list(place.parent.glob("SegmentationClass*"))
    ]
    if len(roots) > 1:
        raise ImageError(f"{folder}: has {', '.join(map(str, roots))}, expected one of them; name that folder")
    return roots[0] if roots else None


def _cityscapes(folder: Path, split: str | None) -> Listing:
    """List leftImg8bit/SPLIT/CITY/*_leftImg8bit.* with gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.* or labelIds."""
    tops = folder / "leftImg8bit", folder / "gtFine"
    name = choose_split(dict.fromkeys(_city_splits(folder)), split, folder)
    images, masks = (top / name for top in tops)
    files = _with_ending(images, IMAGE_ENDING)
    train_ids, label_ids = (_with_ending(masks, ending) for ending in MASK_ENDINGS)
    values = tuple(range(len(CITYSCAPES_CLASSES))) if train_ids else LABEL_IDS
    return Listing(
        layout="cityscapes",
        images=files,
        masks=train_ids or label_ids,
        image_folder=images,
        mask_folder=masks,
        classes=ClassList(CITYSCAPES_CLASSES, "Cityscapes", values=values),
        mask_roots=(tops[1],),
        left_out=LeftOut(),
        first=0,
        ignored=(255,) if train_ids else VOID_IDS,
    )


def _city_splits(folder: Path) -> list[str]:
    images, masks = ({path.name for path in _folders(folder / top)} for top in ("leftImg8bit", "gtFine"))
    return sorted(images & masks)


def _with_ending(folder: Path, ending: str) -> dict[str, Path]:
    """Return the files below a folder whose stem has an ending, by relative path without that ending."""
    found = _by_name(folder, LeftOut())
    return {name.removesuffix(ending): path for name, path in found.items() if name.endswith(ending)}


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # it knows the kind of most entries without asking the disk for each
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def _files(folder: Path) -> list[Path]:
    walked = walk(folder)
    return [folder / name for name in (*walked.files, *walked.packed)]


def _by_name(folder: Path, left_out: LeftOut) -> dict[str, Path]:
    """Return {name: path} of the files below a folder; a name is the relative path without suffix."""
    files: dict[str, Path] = {}
    walked = walk(folder)
    left_out.extend(walked.left_out)
    for path in (folder / name for name in (*walked.files, *walked.packed)):
        if path.is_dir():
            raise ImageError(f"{path}: a folder that cannot be read; correct its permissions")
        if path.suffix.lower() not in SUFFIXES:
            left_out.add(f"{path.suffix.lower()} file", str(path.relative_to(folder)))
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise ImageError(f"{path}: has the same name as {files[name].name}; remove one of the two")
        files[name] = path
    return files


def _usual(files: Mapping[str, Path], otherwise: str) -> str:
    return Counter(path.suffix for path in files.values()).most_common(1)[0][0] if files else otherwise
