"""Segmentation sets as people have them: every layout, which value of a mask is which class, and every refusal."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenize_images
from PIL import Image

from seitpp.errors import UserError
from seitpp.images.annotated import AnnotatedSource, has_annotations, open_annotated, open_annotated_splits
from seitpp.images.class_lists import read_classes
from seitpp.images.layouts import CITYSCAPES_CLASSES, LABEL_IDS, VOC_CLASSES
from seitpp.images.masks import MaskRules, decode_mask

SIZE = 6, 8
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
BACKGROUND, ZERO_IGNORED = MaskRules(background_class=True), MaskRules(ignore_label=(0,))


def values_of(*values: int, kind: type = np.uint8) -> np.ndarray:
    """A mask with these values in turn, the first the most frequent."""
    mask = np.full(SIZE, values[0], kind)
    mask[0, : len(values)] = values
    return mask


def write(path: Path, values: np.ndarray, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
        return path
    image = Image.fromarray(values)
    if palette:
        image.putpalette(PALETTE if values.max() < 4 else PALETTE + [99] * (768 - len(PALETTE)))
    image.save(path)
    return path


def write_image(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path, **({"exif": exif} if orientation > 1 else {}))


def write_pairs(folder: Path, masks: dict[str, np.ndarray], *, names: str = "", to: str = "masks") -> Path:
    """Write images/NAME.jpg and TO/NAME.png, and classes.txt beside the folder if there are names."""
    for name, mask in masks.items():
        write_image(folder / "images" / f"{name}.jpg")
        write(folder / to / f"{name}.png", mask)
    if names:
        (folder / "classes.txt").write_text(names)
    return folder


def label_maps(source: AnnotatedSource) -> list[np.ndarray]:
    """As anybody's program reads them."""
    return [np.asarray(Image.open(io.BytesIO(source.read(i).annotation))) for i in range(len(source))]


def refuses(words: str, data: Path, split: str | None = None, rules: MaskRules | None = None) -> str:
    with pytest.raises(UserError, match=words) as refused:
        open_annotated(data, split, rules)
    message = str(refused.value)
    assert "\n" not in message
    return message


# The layouts


def test_voc_has_its_lists_its_classes_and_an_ignored_border(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit/VOC2012"
    for name in ("2007_000032", "2007_000033", "2008_000002"):
        write_image(root / f"JPEGImages/{name}.jpg")
    mask = values_of(0, 1, 20, 255)
    write(root / "SegmentationClass/2007_000032.png", mask, palette=True)
    write(root / "SegmentationClass/2008_000002.png", values_of(15, 0))
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("2008_000002\n")
    for folder in (root, tmp_path / "VOCdevkit", tmp_path):
        assert has_annotations(folder)
        source = open_annotated(folder, "training")
        assert source.class_names == list(VOC_CLASSES) and len(source) == 1
    sample = source.read(0)
    assert (sample.name, sample.label) == ("2007_000032.jpg", 0)
    assert sample.mask_bytes == (root / "SegmentationClass/2007_000032.png").stat().st_size
    assert np.array_equal(label_maps(source)[0], np.where(mask == 255, 0, mask + 1))
    assert open_annotated(root, "validation").read(0).label == VOC_CLASSES.index("person")
    refuses("has the splits train, val, expected one of them", root)
    # The masks of SBD are for images that have none; those of Pascal VOC itself stay.
    write(root / "SegmentationClassAug/2007_000032.png", values_of(1))
    write(root / "SegmentationClassAug/2007_000033.png", values_of(2, 0))
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("2007_000032\n2007_000033\n")
    more = open_annotated(root, "trainaug")
    assert [more.read(index).label for index in range(2)] == [0, 2] and not more.check_pairs()
    ignored = open_annotated(root, "train", MaskRules(ignore_label=(0, 255)))
    assert ignored.class_names == list(VOC_CLASSES[1:])
    assert set(label_maps(ignored)[0].ravel()) == {0, 1, 20}

    config = replace(tokenize_images.PRESETS["voc"], data=str(root))
    assert list(tokenize_images.open_parts(config)) == ["train"]
    parts = tokenize_images.open_parts(replace(config, splits=True, skip_errors=True))
    assert {split: len(part) for split, part in parts.items()} == {"train": 1, "trainaug": 2, "validation": 1}


def test_other_sets_in_the_folders_of_voc_need_their_own_names(tmp_path: Path) -> None:
    write_image(tmp_path / "JPEGImages/street.jpg")
    write(tmp_path / "SegmentationClass/street.png", values_of(0, 1, 2))
    refuses("SegmentationClass: no class names, expected --classes", tmp_path)
    (tmp_path / "class_names.txt").write_text("_background_\ncar\nroad\n")
    assert open_annotated(tmp_path, None).class_names == ["_background_", "car", "road"]
    # CVAT: colors, and their names in labelmap.txt
    (tmp_path / "class_names.txt").unlink()
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:250,50,83:wheel,door:\nroad:1,2,3::\n"
    )
    colored = np.zeros((*SIZE, 3), np.uint8)
    colored[1:3], colored[5] = (250, 50, 83), (1, 2, 3)
    write(tmp_path / "SegmentationClass/street.png", colored)
    source = open_annotated(tmp_path, None)
    assert source.class_names == ["background", "car", "road"]
    assert label_maps(source)[0][:, 0].tolist() == [1, 2, 2, 1, 1, 3]
    colored[0, 0] = 9, 9, 9
    write(tmp_path / "SegmentationClass/street.png", colored)
    with pytest.raises(UserError, match=r"street.png: row 0, column 0 has the color 9 9 9, expected one of the 3"):
        source.read(0)


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes_has_its_official_classes(tmp_path: Path, kind: str) -> None:
    mask = values_of(0, 18, 2, 255) if kind == "labelTrainIds" else values_of(7, 33, 11, 4)
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "ulm")):
        write_image(tmp_path / f"leftImg8bit/{split}/{city}/{city}_000_leftImg8bit.png")
        masks = tmp_path / f"gtFine/{split}/{city}"
        write(masks / f"{city}_000_gtFine_{kind}.png", mask)
        write(masks / f"{city}_000_gtFine_instanceIds.png", mask)
        (masks / f"{city}_000_gtFine_polygons.json").write_text("{}")
    source = open_annotated(tmp_path, "train")
    assert source.class_names == list(CITYSCAPES_CLASSES) and len(CITYSCAPES_CLASSES) == len(LABEL_IDS) == 19
    assert [source.read(index).name for index in (0, 1)] == [
        f"{city}/{city}_000_leftImg8bit.png" for city in ("aachen", "bochum")
    ]
    assert label_maps(source)[0][0, :4].tolist() == [1, 19, 3, 0] and source.read(0).label == 0
    assert len(open_annotated(tmp_path, "validation")) == 1
    parts = tokenize_images.open_parts(replace(tokenize_images.PRESETS["cityscapes"], data=str(tmp_path)))
    assert list(parts) == ["train"] and len(parts["train"]) == 2
    write(tmp_path / f"gtFine/train/aachen/aachen_000_gtFine_{kind}.png", values_of(99))
    with pytest.raises(UserError, match=rf"{kind}.png: row 0, column 0 has the value 99, expected a class"):
        source.read(0)


def test_pairs_of_folders_in_any_arrangement(tmp_path: Path) -> None:
    masks = {"a": values_of(0, 1), "sub/b": values_of(1, 0, 2)}
    for number, name in enumerate(("masks", "labels", "annotations")):
        folder = write_pairs(tmp_path / str(number), masks, names="ground\ncat\ndog\n", to=name)
        rules = MaskRules(classes=str(folder / "classes.txt"), background_class=True)
        assert has_annotations(folder)
        source = open_annotated(folder, None, rules)
        assert [source.read(index).name for index in (0, 1)] == ["a.jpg", "sub/b.jpg"]
        config = replace(tokenize_images.PRESETS["pairs"], data=str(folder), classes=rules.classes, hold_out=2)
        parts = tokenize_images.open_parts(replace(config, background_class=True))
        assert {split: part.names for split, part in parts.items()} == {"train": ["a"], "validation": ["sub/b"]}
        assert all(
            np.array_equal(*pair)
            for pair in zip(label_maps(source), (mask + 1 for mask in masks.values()), strict=True)
        )
    for arrangement in ("images/{}", "{}/images"):
        folder = tmp_path / arrangement.replace("/", "").replace("{}", "X")
        for split in ("train", "val"):
            place = folder / arrangement.format(split)
            write_image(place / "a.png")
            masked = folder / arrangement.replace("images", "masks").format(split)
            write(masked / "a_mask.png", values_of(0, 1, 2))
        assert has_annotations(folder)
        assert open_annotated(folder, "validation", rules).read(0).name == "a.png"
        refuses("has the splits train, val, expected one of them", folder, None, rules)
        refuses("no split 'test' of images and masks, it has train, val", folder, "test", rules)


def test_folders_without_masks_are_no_segmentation_set(tmp_path: Path) -> None:
    write_image(tmp_path / "flat/a.jpg")
    write_image(tmp_path / "classes/cat/a.jpg")
    write_image(tmp_path / "yolo/images/train/a.jpg")
    (tmp_path / "yolo/labels/train").mkdir(parents=True)
    (tmp_path / "yolo/labels/train/a.txt").write_text("0 0.5 0.5 1 1\n")
    for name in ("flat", "classes", "yolo", "gone"):
        assert not has_annotations(tmp_path / name), name
    refuses("classes: no images with masks, expected images/ and masks/", tmp_path / "classes")
    refuses("expected the folders JPEGImages and SegmentationClass", tmp_path / "classes", None, MaskRules("voc"))


# Which value is which class


def test_a_background_of_zeros_is_never_guessed(tmp_path: Path) -> None:
    """0 and 1 with two names: the background is a class, or ignored; with --classes alone nothing says it."""
    folder = write_pairs(tmp_path / "set", {"a": values_of(0, 1), "b": values_of(0, 1)}, names="ground\ncrack\n")
    names = str(folder / "classes.txt")
    message = refuses("2 names without numbers do not say what value 0", folder, None, MaskRules(classes=names))
    assert "--background-class" in message and "--ignore-label 0" in message
    source = open_annotated(folder, None, MaskRules(classes=names, background_class=True))
    assert source.class_names == ["ground", "crack"] and set(label_maps(source)[0].ravel()) == {1, 2}
    assert "0 ground, 1 crack; ignored: none" in str(source)
    # Ignored, and 2 names: either the first of them is that of the ignored 0, or a class never occurs.
    refuses("2 names, but no value 2 in 2 masks", folder, None, MaskRules(classes=names, ignore_label=(0,)))
    (folder / "one.txt").write_text("crack\n")
    one = MaskRules(classes=str(folder / "one.txt"), ignore_label=(0,))
    refuses("one.txt: 1 classes, expected at least 2 .* --background-class", folder, None, one)
    both = MaskRules(classes=names, ignore_label=(0,), background_class=True)
    refuses("value 0 is a class or ignored, not both", folder, None, both)


def test_the_layout_of_ade20k_ignores_0_only_where_its_classes_count_from_1(tmp_path: Path) -> None:
    info = "Idx\tRatio\tName\n1\t0\tsky\n2\t0\ttree\n3\t0\troad\n"
    shifted = {"training/a": values_of(0, 1, 2), "validation/b": values_of(2, 0)}
    folder = write_pairs(tmp_path / "shifted", shifted, to="annotations")
    (folder / "objectInfo3.txt").write_text(info)
    message = refuses("3 names, but no value 3 in 2 masks that have 0", folder, "training")
    assert "--background-class" in message and "--ignore-label 0" in message
    assert label_maps(open_annotated(folder, "train", BACKGROUND))[0][0, :3].tolist() == [1, 2, 3]
    assert label_maps(open_annotated(folder, "train", ZERO_IGNORED))[0][0, :3].tolist() == [0, 1, 2]
    # The last class is in the other split: the set counts from 1.
    write(folder / "annotations/validation/b.png", values_of(3, 0))
    source = open_annotated(folder, "train")
    assert source.class_names == ["sky", "tree", "road"] and source.read(0).label == 0
    assert label_maps(source)[0][0, :3].tolist() == [0, 1, 2]
    assert source.read(0).annotation == (folder / "annotations/training/a.png").read_bytes()


def test_files_of_classes_say_values_and_colors(tmp_path: Path) -> None:
    values, colors = (0, 2, 255), ((0, 0, 0), (4, 5, 6), (250, 50, 83))
    names = ("ground", "cat, tame", "dog 2")
    for file, text, expected in (
        ("a.txt", "ground\ncat, tame\ndog 2\n", (None, None)),
        ("b.json", json.dumps(names), (None, None)),
        ("c.txt", "# a comment\n0 ground\n2 cat, tame\n255: dog 2\n", (values, None)),
        ("d.json", json.dumps(dict(zip(values, names, strict=True))), (values, None)),
        ("e.json", json.dumps(dict(zip(names, values, strict=True))), (values, None)),
        (
            "f.json",
            json.dumps({"categories": [{"id": v, "name": n} for v, n in zip(values, names, strict=True)]}),
            (values, None),
        ),
        ("g.csv", "name,r,g,b\nground,0,0,0\ncat, tame,4,5,6\ndog 2,250,50,83\n", (None, colors)),
        ("h.txt", "0 0 0\tground\r\n4 5 6\tcat, tame\r\n250 50 83\tdog 2\r\n", (None, colors)),
    ):
        (tmp_path / file).write_text(text, newline="")
        listed = read_classes(tmp_path / file)
        assert (listed.names, listed.values, listed.colors) == (names, *expected), file


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "", "expected names of classes"),
        ("a.txt", "cat\ndog\ncat\n", "the name cat occurs twice"),
        ("a.txt", "1 cat\n1 dog\n", "the value 1 occurs twice"),
        ("a.txt", "cat 1 2 3\ndog 1 2 3\n", r"the color \(1, 2, 3\) occurs twice"),
        ("a.txt", "cat 1 2 3\ndog 1 2 300\n", "a color above 255"),
        ("a.json", "[1, 2]", "expected JSON with a list of names"),
        ("a.json", '{"cat": "dog"}', "expected JSON with a list of names"),
        ("a.json", "{", "expected JSON with a list of names"),
        ("a.json", '{"99999999": "cat"}', "values below 16,777,216"),
    ],
)
def test_files_of_classes_that_say_nothing_clear_are_refused(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        read_classes(tmp_path / name)
    with pytest.raises(UserError, match=r"gone.txt: cannot be read as a file of class names"):
        read_classes(tmp_path / "gone.txt")


def test_masks_of_0_and_255_get_their_names_by_value(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "set", {"a": values_of(0, 255)})
    (folder / "classes.json").write_text('{"0": "ground", "255": "crack"}')
    rules = MaskRules(classes=str(folder / "classes.json"))
    assert label_maps(open_annotated(folder, None, rules))[0][0, :2].tolist() == [1, 2]
    (folder / "classes.txt").write_text("ground\ncrack\n")
    source = open_annotated(folder, None, MaskRules(classes=str(folder / "classes.txt"), background_class=True))
    with pytest.raises(
        UserError, match=r"a.png: row 0, column 1 has the value 255, expected a class, 0 to 1; name"
    ):
        source.read(0)
    missing = MaskRules(classes=str(folder / "three.txt"), background_class=True)
    (folder / "three.txt").write_text("1 crack\n2 hole\n")
    refuses("no class of .*three.txt has the value 0", folder, None, missing)


def test_255_classes_are_kept_apart(tmp_path: Path) -> None:
    mask = np.arange(1, 257, dtype=np.uint16).reshape(16, 16)
    write_image(tmp_path / "images/a.png", (16, 16))
    write(tmp_path / "masks/a.png", mask)
    (tmp_path / "classes.txt").write_text("".join(f"class {number}\n" for number in range(255)))
    source = open_annotated(
        tmp_path, None, MaskRules(classes=str(tmp_path / "classes.txt"), ignore_label=(0, 256))
    )
    assert np.array_equal(label_maps(source)[0], mask % 256) and len(source.class_names) == 255


# What masks are made of


def test_masks_of_every_kind_have_their_values(tmp_path: Path) -> None:
    small, many = values_of(0, 1), values_of(0, 1, 3, 2)
    for name, mask, palette in (
        ("gray.png", many, False),
        ("palette.png", many, True),
        ("palette.gif", many, True),
        ("16.png", many.astype(np.uint16) * 300, False),
        ("1.png", small.astype(bool), False),
        ("1.tif", small.astype(bool), False),
        ("gray.tif", many, False),
        ("16.tif", many.astype(np.uint16) * 300, False),
        ("32.tif", many.astype(np.int32) * 70_000, False),
        ("gray.bmp", many, False),
        ("gray.pgm", many, False),
        ("bytes.npy", many, False),
        ("long.npy", many.astype(np.int64) - 1, False),
        ("layer.npy", small[..., None].astype(bool), False),
    ):
        path = write(tmp_path / name, mask, palette)
        assert np.array_equal(decode_mask(path.read_bytes(), name), mask.reshape(SIZE)), name
    colored = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    codes = colored.astype(np.int64) @ [65536, 256, 1]
    data = write(tmp_path / "colors.png", colored).read_bytes()
    assert np.array_equal(decode_mask(data, "colors.png", colored=True), codes)
    data = write(tmp_path / "palette.png", many, palette=True).read_bytes()
    assert decode_mask(data, "palette.png", colored=True)[0, :4].tolist() == [
        0,
        128 << 16,
        128 << 16 | 128 << 8,
        128 << 8,
    ]


def test_masks_whose_values_nobody_drew_are_refused(tmp_path: Path) -> None:
    see_through = np.full((*SIZE, 4), 100, np.uint8)
    for name, mask, words in (
        ("lossy.jpg", values_of(1), "JPEG, expected a mask without loss"),
        ("colors.png", np.ones((*SIZE, 3), np.uint8), r"3 channels \(RGB\).* or name the colors .* in --classes"),
        ("alpha.png", see_through, r"4 channels \(RGBA\)"),
        ("float.tif", values_of(1, kind=np.float32), r"\(F\), expected one channel of integers"),
        (
            "float.npy",
            values_of(1, kind=np.float32),
            r"\(6, 8\) of float32, expected \(height, width\) of integers",
        ),
        ("three.npy", np.ones((*SIZE, 3), np.uint8), r"\(6, 8, 3\) of uint8"),
        ("pickle.npy", np.array([[None]]), "cannot be read as an array"),
    ):
        path = write(tmp_path / name, mask)
        with pytest.raises(UserError, match=words):
            decode_mask(path.read_bytes(), name)
    with pytest.raises(UserError, match=r"4 channels \(RGBA\), expected colors"):
        decode_mask((tmp_path / "alpha.png").read_bytes(), "alpha.png", colored=True)


# Files that do not belong together


def test_files_without_partner_are_counted_and_named(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "set", {"a": values_of(0, 1)}, names="ground\ncrack\n")
    rules = MaskRules(classes=str(folder / "classes.txt"), background_class=True)
    open_annotated(folder, None, rules).check_pairs()
    for number in range(4):
        write_image(folder / f"images/x{number}.jpg")
    write(folder / "masks/y.png", values_of(0))
    (folder / "images/Thumbs.db").write_text("")
    write_image(folder / "images/.ipynb_checkpoints/a-checkpoint.jpg")
    source = open_annotated(folder, None, rules)
    with pytest.raises(
        UserError,
        match=r"images without mask: 4 \(.*x0.jpg, .*x1.jpg, .*x2.jpg, ..\), masks without "
        r"image: 1 \(.*y.png\), beside 1 pairs",
    ) as refused:
        source.check_pairs()
    assert "\n" not in str(refused.value)
    assert len(source) == 6 and "left out: 2 hidden" in str(source)
    with pytest.raises(UserError, match=r"x0.jpg: an image without mask, expected .*masks/x0.png"):
        source.read(1)
    for path in (folder / "masks").iterdir():
        path.rename(path.with_stem(f"{path.stem}_other"))
    refuses(
        r"no image has a mask of its name: images .*a.jpg, .*; masks .*a_other.png",
        folder,
        None,
        MaskRules("pairs", *(rules.classes,), (), True),
    )


def test_a_list_of_voc_names_files_that_are_gone(tmp_path: Path) -> None:
    for name in ("2007_000001", "2007_000002"):
        write_image(tmp_path / f"JPEGImages/{name}.jpg")
        write(tmp_path / f"SegmentationClass/{name}.png", values_of(0))
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_000001\n2007_000009\n")
    with pytest.raises(UserError, match=r"images without mask: 1 \(.*2007_000009.jpg\), beside 1 pairs"):
        open_annotated(tmp_path, "train").check_pairs()


def test_a_turned_image_has_a_turned_mask(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path, {"a": values_of(0, 1).T}, names="ground\ncrack\n")
    rules = MaskRules(classes=str(folder / "classes.txt"), background_class=True)
    write_image(folder / "images/a.jpg", orientation=6)
    assert label_maps(open_annotated(folder, None, rules))[0].shape == SIZE[::-1]
    write(folder / "masks/a.png", values_of(0, 1))
    with pytest.raises(UserError, match=r"6 x 8 pixels, but its image has 8 x 6 .*turn the mask"):
        open_annotated(folder, None, rules).read(0)


def test_splits_and_parts_hold_every_image_once(tmp_path: Path) -> None:
    masks = {f"{split}/{number}": values_of(0, 1) for split in ("training", "val") for number in range(7)}
    folder = write_pairs(tmp_path / "set", masks, names="ground\ncrack\n")
    rules = MaskRules(classes=str(folder / "classes.txt"), background_class=True)
    splits = open_annotated_splits(folder, rules)
    assert list(splits) == ["train", "validation"]
    source = pickle.loads(pickle.dumps(splits["train"]))  # other processes get it so
    train, validation = source.hold_out(3)
    names = [[part.read(index).name for index in range(len(part))] for part in (train, validation)]
    assert names == [["0.jpg", "1.jpg", "3.jpg", "4.jpg", "6.jpg"], ["2.jpg", "5.jpg"]]
    with pytest.raises(UserError, match=r"7 images in .*images/training: expected at least 8"):
        source.hold_out(8)
    flat = write_pairs(tmp_path / "flat", {"a": values_of(0, 1)})
    with pytest.raises(UserError, match="flat: images with masks without splits"):
        open_annotated_splits(flat, rules)


def test_links_are_followed_and_loops_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "set", {"a": values_of(0, 1)}, names="ground\ncrack\n")
    write_pairs(tmp_path / "more", {"b": values_of(1, 0)})
    rules = MaskRules(classes=str(folder / "classes.txt"), background_class=True)
    for kind in ("images", "masks"):
        (folder / kind / "more").symlink_to(tmp_path / "more" / kind)
    assert [open_annotated(folder, None, rules).read(index).name for index in (0, 1)] == ["a.jpg", "more/b.jpg"]
    (folder / "images/loop").symlink_to(folder)
    refuses("loop: a link to a folder that it lies in", folder, None, rules)
