"""ADE-20k's layout to a token store: annotations kept exactly, a grid for each image, every bad file named."""

import io
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import tokenize_images
import torch
from PIL import Image
from scipy.stats import ks_2samp
from support.running import run

from downstream.segmentation.scenes import class_names, scene, write_scenes
from seitpp import TokenStore, tokenizers
from seitpp.errors import UserError
from seitpp.images.annotated import decode_annotation, open_annotated, smallest_png
from seitpp.images.decode import ImageError, decode_image, fit_short_side
from seitpp.images.masks import MaskRules
from seitpp.store import StoreError, spec
from seitpp.tokenizers import PatchKMeans, TokenizerSpec, ViTVQGAN
from seitpp.tokenizers.refined import refine
from seitpp.tokenizers.transformer import TransformerShape

IMAGES = {"training": 20, "validation": 5}
SHARD = 8


@pytest.fixture(autouse=True, scope="module")
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "SHARD_IMAGES", SHARD)
        yield


@pytest.fixture(scope="module")
def ade(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ade")
    write_scenes(folder, num_classes=6, images=IMAGES, size=(32, 72))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    images = np.stack([scene(np.random.default_rng(seed), 6, 48)[0] for seed in range(8)])
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    PatchKMeans.fit(images, image_size=48, patch=8, num_codes=32, code_dim=8).save(path)
    return path


def tokenize(data: Path, tokenizer: Path, out: Path, **settings) -> None:
    given = {"short_side": 40, "batch_size_per_process": 4, "workers": 0, **settings}
    config = tokenize_images.Config(data=str(data), tokenizer=str(tokenizer), out=str(out), **given)
    tokenize_images.main(config)


@pytest.fixture(scope="module")
def store(ade, tokenizer, tmp_path_factory) -> Path:
    """Both splits, uninterrupted."""
    out = tmp_path_factory.mktemp("store") / "tokens"
    tokenize(ade, tokenizer, out, source_split="training", split="train", keep_source=True)
    tokenize(ade, tokenizer, out, source_split="validation", split="validation", keep_source=True)
    return out


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def png(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", **options)
    return file.getvalue()


def read_png(data: bytes) -> np.ndarray:
    """Without anything of ours."""
    return np.asarray(Image.open(io.BytesIO(data)))


# What the store holds


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_store_holds_tokens_annotations_and_labels_of_every_image(split, store, ade, tokenizer) -> None:
    tokens, model = TokenStore(store, split), tokenizers.load(tokenizer)
    folder = {"train": "training", "validation": "validation"}[split]
    files = sorted((ade / "annotations" / folder).iterdir())
    assert len(tokens) == len(files) == IMAGES[folder]
    assert tokens.grid is None and tokens.class_names == class_names(6)
    assert tokens.tokenizer["fingerprint"] == model.fingerprint and tokens.tokenizer["short_side"] == 40
    for index, file in enumerate(files):
        stored, truth = tokens.column("annotation")[index], np.asarray(Image.open(file))
        assert np.array_equal(read_png(stored), truth) and len(stored) <= file.stat().st_size
        covered = [(truth == value).sum() for value in range(1, 7)]
        image = ade / "images" / folder / tokens.column("file_name")[index]
        assert image.stem == file.stem
        ids, label = tokens[index]
        assert label == np.argmax(covered)
        height, width = truth.shape
        assert min(ids.shape) == 5 and max(ids.shape) == int(5 * max(height, width) / min(height, width) + 0.5)
        model.set_image_size((8 * ids.shape[0], 8 * ids.shape[1]))
        resized = Image.open(image).resize((8 * ids.shape[1], 8 * ids.shape[0]), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255
        assert np.array_equal(ids, model.encode(pixels)[0].numpy())
    assert len(np.unique(tokens.grids, axis=0)) > 2 and set(tokens.grids.min(axis=1)) == {5}


def test_interrupted_and_started_again_gives_the_same_bytes(store, ade, tokenizer, tmp_path, capsys) -> None:
    data, out = tmp_path / "ade", tmp_path / "tokens"
    shutil.copytree(ade, data)
    broken = sorted((data / "images/training").iterdir())[SHARD * 2 + 1]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    settings = {"source_split": "training", "split": "train", "keep_source": True}
    with pytest.raises(UserError, match=rf"{broken.name}: cannot be read .* finished shards are kept"):
        tokenize(data, tokenizer, out, **settings)
    assert not out.exists()
    broken.write_bytes(whole)
    with pytest.raises(StoreError, match="begun with tokenizer"):
        tokenize(data, tokenizer, out, **{**settings, "short_side": 48})
    tokenize(data, tokenizer, out, **settings)
    assert "20 images in 3 shards, 2 of them finished" in capsys.readouterr().out
    tokenize(data, tokenizer, out, source_split="validation", split="validation", keep_source=True)
    assert content(out) == content(store)


def test_started_as_a_user_does_it_prints_what_the_files_take(ade, tokenizer, tmp_path) -> None:
    line = ["ade20k", "--data", ade, "--tokenizer", tokenizer, "--out", tmp_path / "t", "--short-side", 40]
    finished = run("tokenize_images", *line, "--workers", 1)
    assert finished.returncode == 0, finished.stderr
    printed = finished.stdout
    tokens = TokenStore(tmp_path / "t")

    def mean(kind: str) -> str:
        return f"{sum(path.stat().st_size for path in (ade / kind / 'training').iterdir()) / 20:,.1f}"

    stored = sum(map(len, tokens.column("annotation")[range(20)])) / 20
    assert re.search(rf"source +{mean('images')} bytes per image \(JPEG\)\n", printed), printed
    assert re.search(rf"labels +{mean('annotations')} bytes per image \(PNG\), {stored:,.1f} as", printed), printed
    assert re.search(rf"tokens +{tokens.payload_bytes / 20:,.1f} bytes per image, 20 images", printed), printed


def test_the_short_side_of_annotated_images_is_512_where_nothing_is_said(ade, tokenizer, tmp_path) -> None:
    write_scenes(tmp_path / "ade", images={"training": 1}, size=(24, 40))
    tokenize(tmp_path / "ade", tokenizer, tmp_path / "tokens", source_split="training", short_side=None)
    assert min(TokenStore(tmp_path / "tokens").grids[0]) == 64


def test_a_folder_without_annotations_takes_a_short_side_too(ade, tokenizer, tmp_path) -> None:
    tokenize(ade / "images/validation", tokenizer, tmp_path / "tokens", short_side=32)
    tokens = TokenStore(tmp_path / "tokens")
    assert tokens.columns == {} and set(tokens.grids.min(axis=1)) == {4} and tokens.grids.max() > 4
    with pytest.raises(StoreError, match="its tokenizer is"):  # one store, one short side
        tokenize(ade / "images/validation", tokenizer, tmp_path / "tokens", short_side=40, split="other")


def test_the_long_side_keeps_the_aspect_ratio_to_half_a_patch() -> None:
    assert fit_short_side((480, 640), 512, 8) == (512, 680)  # 682.67
    assert fit_short_side((683, 512), 512, 8) == (680, 512)
    assert fit_short_side((256, 260), 512, 8) == (512, 520) and fit_short_side((100, 100), 64, 8) == (64, 64)
    assert fit_short_side((128, 132), 128, 8) == (128, 136)  # 132 is in the middle: the larger


def test_a_pair_of_folders_becomes_two_splits_of_a_store(tokenizer, tmp_path) -> None:
    """Masks of 0 and 1 with 0 a class; one image is turned by its EXIF, and its mask as it is looked at."""
    for index in range(6):
        image, _ = scene(np.random.default_rng(index), 6, (40, 40))
        exif, mask = Image.Exif(), np.zeros((40, 32), np.uint8)
        mask[:10] = 1
        exif[274] = 6
        turned = Image.fromarray(image[:32]) if index == 2 else Image.fromarray(image[:, :32])
        for kind in ("images", "masks"):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
        turned.save(tmp_path / f"set/images/{index}.jpg", **({"exif": exif} if index == 2 else {}))
        Image.fromarray(mask).save(tmp_path / f"set/masks/{index}.png")
    (tmp_path / "names.txt").write_text("ground\ncrack\n")
    flags = {"classes": str(tmp_path / "names.txt"), "background_class": True, "short_side": 32}
    with pytest.raises(UserError, match=r"--background-class .* or --ignore-label 0"):
        tokenize(tmp_path / "set", tokenizer, tmp_path / "tokens", **{**flags, "background_class": False})
    tokenize(tmp_path / "set", tokenizer, tmp_path / "tokens", **flags, hold_out=3)
    train, validation = (TokenStore(tmp_path / "tokens", split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (4, 2) and train.class_names == ["ground", "crack"]
    assert set(map(tuple, validation.grids.tolist())) == {(5, 4)} and validation.labels.tolist() == [0, 0]
    for store in (train, validation):
        for index in range(len(store)):
            assert np.array_equal(read_png(store.column("annotation")[index])[:, 0], [2] * 10 + [1] * 30)
    with pytest.raises(UserError, match="expected images with masks"):
        tokenize(tmp_path / "set/images", tokenizer, tmp_path / "no", background_class=True)


# Annotations


def test_an_annotation_keeps_its_values_in_the_fewest_bytes() -> None:
    values = np.kron(np.random.default_rng(0).integers(0, 12, (16, 16)), np.ones((4, 4))).astype(np.uint8)
    colored = Image.fromarray(values)
    colored.putpalette(np.random.default_rng(1).integers(0, 256, (12, 3)).astype(np.uint8).tobytes())
    file = io.BytesIO()
    colored.save(file, "PNG")
    sources = [png(values), png(values, compress_level=0), png(values.astype(np.uint16)), file.getvalue()]
    assert [read_png(data).dtype for data in sources] == [np.uint8, np.uint8, np.uint16, np.uint8]
    for source in sources:
        assert np.array_equal(decode_annotation(source, "a.png"), values)
        stored = smallest_png(source)
        assert read_png(stored).dtype == np.uint8 and np.array_equal(read_png(stored), values)
        assert len(stored) <= len(source) and smallest_png(stored) == stored
    assert len(smallest_png(sources[1])) < len(sources[1]) / 4


def test_values_up_to_the_largest_survive_too() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30)).astype(np.uint8)
    for values in (noise, np.zeros((5, 7), np.uint8), np.full((3, 3), 255, np.uint8), np.ones((1, 1), np.uint8)):
        assert np.array_equal(read_png(smallest_png(png(values, compress_level=0))), values)


def test_an_image_that_is_ignored_altogether_has_no_label(tmp_path) -> None:
    write_scenes(tmp_path, images={"training": 1}, size=32)
    (path,) = (tmp_path / "annotations/training").iterdir()
    path.write_bytes(png(np.zeros((32, 32), np.uint8)))
    assert open_annotated(tmp_path, "training", MaskRules(ignore_label=(0,))).read(0).label is None


# Bad input: what is done to scene_000001 of four, and how the one line about it goes


def write_values(values: np.ndarray):
    return lambda image, annotation: annotation.write_bytes(png(values))


def cut(image: Path, annotation: Path) -> None:
    annotation.write_bytes(annotation.read_bytes()[:100])


def packed_gray(image: Path, annotation: Path) -> None:
    """Gray of four bits, which Pillow does not write: a palette PNG that lost its palette."""
    file = Image.fromarray(np.ones((32, 32), np.uint8))
    file.putpalette([0, 0, 0] * 16)
    file.save(annotation)
    data = bytearray(annotation.read_bytes())
    start = data.index(b"PLTE") - 4
    del data[start : start + 12 + 48]
    data[25] = 0
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    annotation.write_bytes(data)


too_large = np.ones((32, 32), np.uint8)
too_large[3, 5] = 7
BAD = {
    "a label without a class": (
        write_values(too_large),
        r"annotations/training/scene_000001.png: row 3, column 5 has the value 7, expected a class, 1 to 6, or 0 ",
    ),
    "16-bit label": (
        write_values(np.full((32, 32), 300, np.uint16)),
        r"scene_000001.png: row 0, column 0 has the value 300",
    ),
    "no annotation": (
        lambda image, annotation: annotation.unlink(),
        r"images without mask: 1 \(.*/scene_000001.jpg\), beside 3|"
        r"scene_000001.jpg: an image without mask, expected .*/scene_000001.png",
    ),
    "no image": (
        lambda image, annotation: image.unlink(),
        r"masks without image: 1 \(.*/scene_000001.png\), beside 3|"
        r"scene_000001.png: a mask without image, expected .*images/training/scene_000001.jpg",
    ),
    "another size": (
        write_values(np.ones((32, 30), np.uint8)),
        r"scene_000001.png: 32 x 30 pixels, but its image has 32 x 32",
    ),
    "cut annotation": (cut, r"scene_000001.png: cannot be read as an image"),
    "cut image": (lambda image, annotation: image.write_bytes(b"JFIF"), r"scene_000001.jpg: cannot be read"),
    "three channels": (
        write_values(np.ones((32, 32, 3), np.uint8)),
        r"scene_000001.png: PNG of 8 bits with 3 channels \(RGB\), expected one channel .* colors of its classes",
    ),
    "four bits": (packed_gray, r"scene_000001.png: PNG of 4 bits with 1 channels \(L\), expected"),
    "lossy": (
        lambda image, annotation: Image.new("L", (32, 32)).save(annotation, "JPEG"),
        r"scene_000001.png: JPEG, expected a mask without loss",
    ),
    "a link to nowhere": (
        lambda image, annotation: (annotation.unlink(), annotation.symlink_to("gone.png")),
        r"scene_000001.png: cannot be read \(No such file or directory\)",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_stops_with_the_name_of_the_file_or_is_left_out(kind, tokenizer, tmp_path) -> None:
    spoil, message = BAD[kind]
    write_scenes(tmp_path / "ade", images={"training": 4}, size=32)
    folders = [tmp_path / "ade" / name / "training" for name in ("images", "annotations")]
    spoil(folders[0] / "scene_000001.jpg", folders[1] / "scene_000001.png")
    settings = {"source_split": "training", "short_side": 32}
    with pytest.raises(UserError, match=message) as stopped:
        tokenize(tmp_path / "ade", tokenizer, tmp_path / "tokens", **settings)
    assert "--skip-errors" in str(stopped.value) and "\n" not in str(stopped.value)
    tokenize(tmp_path / "ade", tokenizer, tmp_path / "tokens", skip_errors=True, **settings)
    assert len(TokenStore(tmp_path / "tokens")) == 3
    (line,) = (tmp_path / "tokens-train-skipped.txt").read_text().splitlines()
    assert re.search(message, line)


HEADER = "Idx\tRatio\tTrain\tVal\tName\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no class names, expected --classes FILE .* or an objectInfo\*.txt"),
        ({"objectInfo1.txt": HEADER, "objectInfo2.txt": HEADER}, "objectInfo1.txt, objectInfo2.txt, expected one"),
        ({"objectInfo.txt": ""}, "expected a header and rows with Idx and Name"),
        ({"objectInfo.txt": "1\t0.5\t3\t1\twall\n"}, "expected a header and rows with Idx and Name"),
        ({"objectInfo.txt": HEADER + "1\twall\n"}, "expected a header and rows with Idx and Name"),
        ({"objectInfo.txt": HEADER + "2\t0.5\t3\t1\twall\n"}, "numbered 1, 2, .. in order"),
        ({"objectInfo.txt": HEADER + "1\t0\t0\t0\tdoor\n2\t0\t0\t0\tdoor\n"}, "the name door occurs twice"),
        ({"objectInfo.txt": HEADER + "".join(f"{i}\t0\t0\t0\tc{i}\n" for i in range(1, 257))}, "at most 255"),
    ],
)
def test_class_names_that_are_not_as_expected_are_refused(files, message, tmp_path) -> None:
    write_scenes(tmp_path, images={"training": 1}, size=32)
    (tmp_path / "objectInfo6.txt").unlink()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ImageError, match=message):
        open_annotated(tmp_path, "training")


def test_class_names_keep_their_synonyms(tmp_path) -> None:
    write_scenes(tmp_path, images={"training": 1}, size=32)
    (tmp_path / "objectInfo6.txt").unlink()
    names = ["wall", "building, edifice", "bed "]
    rows = [f"{number} \t0.1\t9\t9\t{name}\r\n" for number, name in enumerate(names, 1)]
    (tmp_path / "objectInfo150.txt").write_text(HEADER.replace("\n", "\r\n") + "".join(rows), newline="")
    assert open_annotated(tmp_path, None).class_names == ["wall", "building, edifice", "bed"]


def test_a_split_without_images_and_two_images_of_one_name_are_refused(ade, tmp_path) -> None:
    with pytest.raises(ImageError, match=r"no split 'test' of images and masks, it has training, validation"):
        open_annotated(ade, "test")
    shutil.copytree(ade, tmp_path / "ade")
    image = tmp_path / "ade/images/training/scene_000001.jpg"
    shutil.copy(image, image.with_suffix(".jpeg"))
    with pytest.raises(ImageError, match=r"scene_000001.jpg: has the same name as scene_000001.jpeg"):
        open_annotated(tmp_path / "ade", "training")


# Tokenizers at other sizes


def test_a_vit_vqgan_forgets_the_sizes_in_between() -> None:
    torch.manual_seed(0)
    shape = TransformerShape(width=64, depth=1, heads=1, mlp=128)
    tokenizer = ViTVQGAN(TokenizerSpec("vit_vqgan", (32, 32), 8, num_codes=64, code_dim=16), shape, shape).eval()
    before, own = tokenizer.fingerprint, torch.rand(1, 3, 32, 32)
    wide = torch.rand(1, 3, 32, 48)
    ids = tokenizer.encode(own)
    with tokenizer.at_size((32, 48)):
        expected = tokenizer.encode(wide)
    with tokenizer.at_size((64, 40)):
        pass
    with tokenizer.at_size((32, 48)):
        assert torch.equal(tokenizer.encode(wide), expected)
    assert tokenizer.fingerprint == before and torch.equal(tokenizer.encode(own), ids)


def test_sides_are_multiples_of_what_the_tokenizer_wants(ade, tokenizer, tmp_path) -> None:
    model = tokenizers.load(tokenizer)
    model.set_image_size(64)
    refined = refine(model, torch.rand(1, 3, 64, 64), steps=0)
    refined.save(tmp_path / "refined.safetensors")
    validation = ade / "images/validation"
    tokenize(validation, tmp_path / "refined.safetensors", tmp_path / "tokens", short_side=64)
    grids = TokenStore(tmp_path / "tokens").grids
    assert (grids % 8 == 0).all() and (grids.min(axis=1) == 8).all() and grids.max() > 8
    for path, wrong, multiple in (
        (tokenizer, 36, 8),
        (tokenizer, 0, 8),
        (tmp_path / "refined.safetensors", 72, 64),
    ):
        with pytest.raises(UserError, match=f"--short-side {wrong}: expected a multiple of {multiple}"):
            tokenize(validation, path, tmp_path / "no", short_side=wrong)


def test_a_sliver_is_refused_before_it_is_enormous(tmp_path) -> None:
    Image.new("RGB", (4000, 1)).save(tmp_path / "sliver.png")
    source = tokenize_images.open_source(str(tmp_path), None)
    with pytest.raises(ImageError, match=r"sliver.png: cannot be read as an image \(512 x 2048000 pixels"):
        decode_image(source.read(0), lambda size: fit_short_side(size, 512, 8))


# The scenes


def test_scenes_are_the_same_bytes_and_more_images_change_none(ade, tmp_path) -> None:
    write_scenes(tmp_path, num_classes=6, images={"training": 3, "validation": 9}, size=(32, 72))
    for split, shared in (("training", 3), ("validation", 5)):
        for path in sorted((ade / "images" / split).iterdir())[:shared]:
            assert path.read_bytes() == (tmp_path / path.relative_to(ade)).read_bytes()
    write_scenes(tmp_path / "other", images={"training": 1}, size=(32, 72), seed=1)
    first = "images/training/scene_000000.jpg"
    assert (tmp_path / "other" / first).read_bytes() != (tmp_path / first).read_bytes()


def test_scenes_show_all_classes_some_ignored_pixels_and_sizes_that_differ() -> None:
    scenes = [scene(np.random.default_rng(seed), 6, (40, 64)) for seed in range(40)]
    assert all(image.shape == (*annotation.shape, 3) for image, annotation in scenes)
    assert len({annotation.shape for _, annotation in scenes}) > 30
    values = np.concatenate([annotation.ravel() for _, annotation in scenes])
    shares = np.bincount(values, minlength=7) / len(values)
    assert len(shares) == 7 and 0.01 < shares[0] < 0.15 and 0.4 < shares[1] < 0.75 and (shares[2:] > 0.02).all()


def test_a_class_has_no_place_and_no_color() -> None:
    places, colors = {2: [], 4: []}, {2: [], 4: []}
    for seed in range(150):
        image, annotation = scene(np.random.default_rng(seed), 4, 48)
        for value in places:
            if (annotation == value).any():
                places[value].append(np.argwhere(annotation == value).mean(axis=0))
                red, _, blue = image[annotation == value].mean(axis=0)
                colors[value].append(red - blue)
    for axis in (0, 1):
        assert ks_2samp(*(np.array(found)[:, axis] for found in places.values())).pvalue > 0.01
    assert ks_2samp(*colors.values()).pvalue > 0.01


def test_2_to_169_classes_have_names_and_others_are_refused(tmp_path) -> None:
    assert len(set(class_names(169))) == 169 and class_names(150) == class_names(169)[:150]
    forms, textures = zip(*(name.split(" of coarse ") for name in class_names(6)[1:]), strict=True)
    assert len(set(forms)) < 5 and len(set(textures)) < 5  # neither says alone which class it is
    for wrong in (1, 170):
        with pytest.raises(UserError, match=f"num_classes {wrong}, expected 2 to 169"):
            write_scenes(tmp_path, num_classes=wrong)
    assert scene(np.random.default_rng(0), 169, 64)[1].max() <= 169
