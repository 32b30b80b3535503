"""segment_ade20k and evaluate_segmentation as a user runs them: exact figures, two processes, killed, resumed."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import evaluate_segmentation
import numpy as np
import predict
import pytest
import segment_ade20k
import tokenize_images
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from support.models import tiny_mtm
from support.paths import RECIPES
from support.running import call, distributed, kill_after_an_evaluation, lines_of, refused, result_of, run
from torch import Tensor
from torch.utils.data import Dataset

from downstream.segmentation.data import WholePixels, decode_labels
from downstream.segmentation.default import FEW_SCENES, Scenes, SceneSettings, default_scenes
from downstream.segmentation.evaluation import WholeImage, count_pixels, mirror_whole, stride_of
from downstream.segmentation.metric import SegmentationScore
from downstream.segmentation.model import load_segmenter
from downstream.segmentation.pixel_pipeline import PixelPipeline
from downstream.segmentation.prediction import label_name, open_predictor, predict_picture, write_label_maps
from downstream.segmentation.scenes import scene, write_scenes
from seitpp import StoreWriter, TokenStore, plots, tokenizers
from seitpp.codebook import codebook_fingerprint, embed
from seitpp.data.dataset import Chosen, MicroBatch
from seitpp.engine.config import parse
from seitpp.engine.findings import segmented
from seitpp.engine.optim import warmup_linear
from seitpp.errors import UserError
from seitpp.images.annotated import AnnotatedSource, open_annotated, smallest_png
from seitpp.images.decode import decode_image
from seitpp.images.masks import MaskRules
from seitpp.images.sources import open_source
from seitpp.models import TokenAdapt
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.recipe import rehearse

STEPS, WARMUP, EVALUATION, EPOCH = 16, 4, 8, 6  # of the smoke preset; 48 images in batches of 8
FIGURES = ("mIoU", "aAcc", "mAcc")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return default_scenes(FEW_SCENES)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """An uninterrupted run of the smoke preset, through the command line."""
    folder = tmp_path_factory.mktemp("segment") / "run"
    finished = run("segment_ade20k", "smoke", "--out", folder)
    assert finished.returncode == 0, finished.stderr
    (folder.parent / "stdout").write_text(finished.stdout)
    return folder


def counted(folder: Path) -> str:
    """Every figure of every class, unrounded."""
    return (folder / "per_class.csv").read_text()


# Training


def test_a_run_says_what_it_does_and_what_it_found(smoke: Path, scenes: Scenes) -> None:
    printed, result = (smoke.parent / "stdout").read_text(), result_of(smoke)
    assert "no image is mirrored" in printed and "--tokenadapt" in printed and str(scenes.store) in printed
    assert ", ".join(f"{name} {result[name]:.2f}" for name in FIGURES) + " of 13 images" in printed
    rows = [line.split(",") for line in counted(smoke).splitlines()]
    assert rows[0] == ["class", "IoU", "Acc", "share"]
    assert [row[0] for row in rows[1:]] == TokenStore(scenes.store).class_names
    assert np.mean([float(row[1]) for row in rows[1:]]) == pytest.approx(result["mIoU"])
    for picture in ("curves.png", "validation.png"):
        assert (smoke / picture).read_bytes().startswith(b"\x89PNG")


def test_every_step_and_every_evaluation_is_written_down_once(smoke: Path) -> None:
    lines, evaluations = lines_of(smoke / "metrics.jsonl"), lines_of(smoke / "evaluations.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["lr"] for line in lines] == [
        warmup_linear(step, steps=STEPS, warmup=WARMUP, peak=2e-3) for step in range(STEPS)
    ]
    assert lines[0]["loss"] == pytest.approx(1.4 * np.log(6), rel=0.15), "both heads guess, one counts 0.4"
    assert [line["step"] for line in evaluations] == [EVALUATION]
    assert set(evaluations[0]) == {"step", *FIGURES}


def test_the_rate_rises_and_falls_in_straight_lines() -> None:
    rates = [warmup_linear(step, steps=10, warmup=4, peak=8.0) for step in range(11)]
    assert rates == pytest.approx([0, 2, 4, 6, 8, 8 * 5 / 6, 8 * 4 / 6, 4, 8 * 2 / 6, 8 / 6, 0])


def test_killed_and_resumed_gives_the_same_bits(smoke: Path, tmp_path: Path) -> None:
    """Killed right after an evaluation, two steps after a checkpoint."""
    folder = tmp_path / "run"
    kill_after_an_evaluation("segment_ade20k", folder, STEPS)

    call(segment_ade20k, "smoke", "--out", folder, "--resume")
    clock = {"images_per_second", "data_wait", "memory_gib"}
    learned = [
        [{name: value for name, value in at.items() if name not in clock} for at in lines_of(run)]
        for run in (smoke / "metrics.jsonl", folder / "metrics.jsonl")
    ]
    assert learned[0] == learned[1] and len(learned[0][0]) > 6
    last = f"checkpoints/step-{STEPS:08d}"
    for name in (
        *("evaluations.jsonl", "model.safetensors", "per_class.csv"),
        *(f"{last}/{part}.safetensors" for part in ("model", "optimizer")),
    ):
        assert (folder / name).read_bytes() == (smoke / name).read_bytes(), name


def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    """13 images on two processes, each with its own batch norms in training; judged again by one process."""
    few = ("--steps", 3, "--warmup-steps", 1, "--evaluation-steps", 2)
    together = distributed(2, RECIPES / "segment_ade20k.py", "smoke", *few, "--out", tmp_path / "two")
    assert together.returncode == 0, together.stderr
    assert result_of(tmp_path / "two")["processes"] == 2 and len(lines_of(tmp_path / "two/evaluations.jsonl")) == 1
    call(evaluate_segmentation, "smoke", "--checkpoint", tmp_path / "two", "--out", tmp_path / "one")
    assert counted(tmp_path / "one") == counted(tmp_path / "two")


def pretrained(path: Path, store: TokenStore, codebook: np.ndarray) -> dict[str, Tensor]:
    """Write a masked token model of a codebook; the tensors of its encoder."""
    torch.manual_seed(1)
    model = tiny_mtm(grid=store.grid, num_codes=store.num_codes, code_dim=codebook.shape[1], dropout=0.0)
    save_pretrained(path, model, codebook_fingerprint(codebook))
    return model.encoder.state_dict()


def test_training_starts_from_a_checkpoint(scenes: Scenes, tmp_path: Path) -> None:
    """The first update has the rate 0."""
    store = TokenStore(scenes.store)
    encoder = pretrained(tmp_path / "mtm.safetensors", store, store.codebook)
    way = ("--checkpoint", tmp_path / "mtm.safetensors", "--crop-size", 16, "--steps", 1, "--warmup-steps", 1)
    call(segment_ade20k, "smoke", *way, "--out", tmp_path / "run")
    written = load_file(tmp_path / "run/model.safetensors")
    shared = [name for name in encoder if not name.startswith(("norm.", "fc_norm.", "head."))]
    assert len(shared) > 40
    for name in shared:
        assert torch.equal(written[f"backbone.vit.{name}"], encoder[name]), name


def test_a_rehearsal_goes_through_everything_and_leaves_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rehearse(segment_ade20k.main, parse(segment_ade20k.PRESETS, "scenes", ["smoke", "--dry-run"]))
    printed = capsys.readouterr().out
    assert "from step 0" in printed and "from step 1" in printed and "dry run: started, saved, resumed" in printed
    assert not list(tmp_path.iterdir())


# Evaluation


def test_evaluation_repeats_the_figures_of_the_run(smoke: Path, scenes: Scenes, tmp_path: Path) -> None:
    call(evaluate_segmentation, "smoke", "--checkpoint", smoke, "--out", tmp_path / "tokens")
    pixels = ("--data", scenes.images, "--tokenizer", scenes.tokenizer)
    file = smoke / "model.safetensors"
    call(evaluate_segmentation, "smoke", "--checkpoint", file, *pixels, "--out", tmp_path / "pixels")
    for folder in ("tokens", "pixels"):
        assert counted(tmp_path / folder) == counted(smoke), folder
        assert [result_of(tmp_path / folder)[name] for name in FIGURES] == [
            result_of(smoke)[name] for name in FIGURES
        ]
        page = (tmp_path / folder / "report.html").read_text()
        assert "pictures.png" in page and "disc of coarse dots" in page
        with Image.open(tmp_path / folder / "pictures.png") as picture:
            assert picture.width > 1000


def test_images_of_many_sizes_go_the_whole_way(scenes: Scenes, tmp_path: Path) -> None:
    """From a folder to a store, a run, and two evaluations: of the store and of the folder."""
    write_scenes(tmp_path / "data", 6, images={"training": 12, "validation": 5}, size=(70, 130), seed=3)
    settings = {"data": str(tmp_path / "data"), "tokenizer": str(scenes.tokenizer), "out": str(tmp_path / "store")}
    for source_split, split in (("training", "train"), ("validation", "validation")):
        sizes = {"short_side": 64, "workers": 0}
        tokenize_images.main(tokenize_images.Config(**settings, **sizes, source_split=source_split, split=split))
    store = TokenStore(tmp_path / "store", "validation")
    assert store.grid is None and len(np.unique(store.grids, axis=0)) > 2
    few = ("--steps", 2, "--warmup-steps", 1, "--batch-size", 4)
    call(segment_ade20k, "smoke", "--store", store.path, *few, "--out", tmp_path / "run")
    folder = ("--data", settings["data"], "--tokenizer", settings["tokenizer"])
    for name, data in (("tokens", ("--store", store.path)), ("pixels", folder)):
        call(evaluate_segmentation, "smoke", "--checkpoint", tmp_path / "run", *data, "--out", tmp_path / name)
        assert counted(tmp_path / name) == counted(tmp_path / "run"), name


def test_scales_and_flips_are_other_views(smoke: Path, scenes: Scenes, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapt = TokenAdapt((8, 8), crop=(8, 8), num_codes=32, code_dim=32, width=64, heads=1, mlp=64)
    save_pretrained(tmp_path / "adapt.safetensors", adapt, codebook_fingerprint(TokenStore(scenes.store).codebook))
    found = {counted(smoke)}
    for name, flags in {
        "scales": ("--scales", 0.75, 1.25),
        "flip": ("--flip", tmp_path / "adapt.safetensors"),
    }.items():
        call(evaluate_segmentation, "smoke", "--checkpoint", smoke, *flags, "--out", tmp_path / name)
        found.add(counted(tmp_path / name))
    assert len(found) == 3


@pytest.mark.parametrize("size", [(8, 8), (5, 8), (11, 19), (16, 9)])
def test_a_whole_image_is_mirrored_window_by_window(size: tuple[int, int]) -> None:
    """By a mirror for boxes that is exact, so that the whole has to be, too."""
    codebook = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(40, (2, *size), generator=torch.Generator().manual_seed(1))

    def exact(ids: Tensor, boxes: Tensor, grids: Tensor) -> Tensor:
        assert grids.tolist() == [list(size)] * 2
        (top, left, height, width), *_ = boxes.tolist()
        filled = torch.nn.functional.pad(ids, (0, 8, 0, 8))
        return embed(filled[:, top : top + height, left : left + width].flip(2), codebook)

    mirrored = mirror_whole(exact, codebook=codebook, window=8, lookup="cosine")(embed(ids, codebook))
    assert torch.equal(mirrored, embed(ids.flip(2), codebook))


def test_the_published_stride_is_two_thirds_of_the_window() -> None:
    assert stride_of(64, None) == 43 and stride_of(64, 20) == 20


class ManyImages(Dataset):
    """Images that are made when they are asked for; `alive` are those that somebody still holds."""

    def __init__(self, images: int):
        self.images, self.alive = images, weakref.WeakSet()

    def __len__(self) -> int:
        return self.images

    def __getitems__(self, indices: list[int]) -> WholeImage:
        (index,) = indices
        image = WholeImage(torch.zeros(1, 1, 1), torch.full((1, 5 + index, 8), index % 3, dtype=torch.uint8))
        self.alive.update(image)
        return image


def test_an_evaluation_holds_one_image_at_a_time() -> None:
    dataset, held = ManyImages(40), []

    def predict(image: WholeImage) -> Tensor:
        found = image.labels.clone()
        dataset.alive.add(found)
        held.append(len(dataset.alive))
        return found

    score = count_pixels(predict, dataset, list("abc"), accelerator=Accelerator(cpu=True))
    assert score.images == 40 and score.counts.shape == (4, 3)
    assert int(score.counts[3].sum()) == sum(8 * (5 + index) for index in range(40))
    assert max(held) <= 6, "inputs, labels and prediction of this image and of the last one"
    assert len(dataset.alive) == 0


# The scenes


def test_the_scenes_are_the_same_wherever_they_are_made(tmp_path: Path, monkeypatch) -> None:
    settings = SceneSettings(training=6, validation=2, num_codes=16)
    fingerprints = []
    for name in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        made = default_scenes(settings)
        assert default_scenes(settings) == made and made.store.is_relative_to(tmp_path / name)
        fingerprints.append(TokenStore(made.store).fingerprint)
    assert fingerprints[0] == fingerprints[1]
    assert (len(TokenStore(made.store)), len(TokenStore(made.store, "validation"))) == (6, 2)


# Pixels


def pipeline(scenes: Scenes, seed: int = 0) -> PixelPipeline:
    return PixelPipeline(
        open_annotated(scenes.images, "training"),
        seed=seed,
        crop=32,
        short_side=64,
        scale=(0.25, 2.0),
        max_share=0.75,
    )


def test_the_pipeline_draws_by_seed_epoch_and_image(scenes: Scenes) -> None:
    first = pipeline(scenes).__getitems__(MicroBatch([3, 7], epoch=0))
    again = Chosen(pipeline(scenes), np.array([3, 7])).__getitems__(MicroBatch([1, 0], epoch=0))
    assert first.images.shape == (2, 3, 32, 32) and first.images.dtype == torch.uint8
    assert torch.equal(first.images[[1, 0]], again.images) and torch.equal(first.labels[[1, 0]], again.labels)
    assert not torch.equal(first.images[0], pipeline(scenes).__getitems__(MicroBatch([3], epoch=1)).images[0])
    other = pipeline(scenes, seed=1).__getitems__(MicroBatch([7], epoch=0))
    assert not torch.equal(first.images[1], other.images[0])
    labels = pipeline(scenes).__getitems__(MicroBatch(range(48), epoch=0)).labels
    assert set(labels.unique().tolist()) == {0, 1, 2, 3, 4, 5, 255}


def test_pixels_train_and_are_judged_as_tokens(scenes: Scenes, tmp_path: Path) -> None:
    """The tokens of patch_kmeans do not depend on the window that they are made in."""
    data = ("--data", scenes.images, "--tokenizer", scenes.tokenizer)
    call(segment_ade20k, "smoke", *data, "--steps", 3, "--warmup-steps", 1, "--out", tmp_path / "run")
    assert lines_of(tmp_path / "run/metrics.jsonl")[-1]["lr"] > 0
    call(evaluate_segmentation, "smoke", "--checkpoint", tmp_path / "run", "--out", tmp_path / "tokens")
    assert counted(tmp_path / "tokens") == counted(tmp_path / "run")
    assert load_segmenter(tmp_path / "run/model.safetensors").pixels_per_token == 4


# Other sets


def write_ground_and_crack(folder: Path) -> Path:
    """images/SPLIT and masks/SPLIT of two sizes, masks of 0 (ground) and 1 (crack), and names.txt."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 6), ("val", 4)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(number):
            image = rng.integers(0, 100, (32, 40 + 8 * (index % 2), 3), np.uint8)
            mask = np.zeros(image.shape[:2], np.uint8)
            mask[8:14] = 1
            image[mask == 1] += 150
            Image.fromarray(image).save(folder / f"images/{split}/{index}.png")
            Image.fromarray(mask).save(folder / f"masks/{split}/{index}.png")
    (folder / "names.txt").write_text("ground\ncrack\n")
    return folder


def write_tokens(source: AnnotatedSource, split: str, *, tokenizer: Path, out: Path) -> None:
    model = tokenizers.load(tokenizer)
    with StoreWriter(
        out,
        codebook=model.codebook.numpy(),
        grid=None,
        split=split,
        class_names=source.class_names,
        tokenizer={**model.description(), "short_side": 32},
        columns={"annotation": "binary"},
    ) as writer:
        for index in range(len(source)):
            sample = source.read(index)
            pixels = torch.from_numpy(decode_image(sample, lambda size: size))[None] / 255
            with model.at_size(tuple(pixels.shape[2:])):
                ids = model.encode(pixels)[0].numpy()
            writer.add(ids, sample.label, {"annotation": smallest_png(sample.annotation)})


def test_a_background_of_zeros_is_judged_as_a_class(scenes: Scenes, tmp_path: Path) -> None:
    """From masks of 0 and 1 to a run and two evaluations; read as ADE-20k's, every prediction would be right."""
    data, store = write_ground_and_crack(tmp_path / "data"), tmp_path / "store"
    rules = MaskRules(classes=str(data / "names.txt"), background_class=True)
    for split in ("train", "validation"):
        write_tokens(open_annotated(data, split, rules), split, tokenizer=scenes.tokenizer, out=store)
    few = ("--steps", 2, "--warmup-steps", 1, "--batch-size", 4)
    call(segment_ade20k, "smoke", "--store", store, *few, "--out", tmp_path / "run")
    saved = load_segmenter(tmp_path / "run/model.safetensors")
    assert saved.class_names == ["ground", "crack"] and saved.short_side == 32
    flags = ("--data", data, "--tokenizer", scenes.tokenizer, "--classes", rules.classes, "--background-class")
    for name, where in (("tokens", ("--store", store)), ("pixels", flags)):
        call(evaluate_segmentation, "smoke", "--checkpoint", tmp_path / "run", *where, "--out", tmp_path / name)
        assert counted(tmp_path / name) == counted(tmp_path / "run"), name
    shares = [float(line.split(",")[3]) for line in counted(tmp_path / "run").splitlines()[1:]]
    assert shares == pytest.approx([100 * 26 / 32, 100 * 6 / 32])

    (data / "wrong.txt").write_text("1 ground\n2 crack\n")
    wrong = MaskRules(classes=str(data / "wrong.txt"), ignore_label=(0,))
    scores = []
    for read in (rules, wrong):
        score = SegmentationScore(["ground", "crack"])
        labels = WholePixels(open_annotated(data, "val", read), lambda size: size).__getitems__([0]).labels
        score.add(torch.zeros_like(labels), labels)
        scores.append(score.summary()["mIoU"])
    assert scores == pytest.approx([50 * 26 / 32, 100])
    call(
        segment_ade20k,
        "smoke",
        *flags,
        *few,
        "--crop-size",
        8,
        "--short-side",
        32,
        "--out",
        tmp_path / "pixel-run",
    )
    assert load_segmenter(tmp_path / "pixel-run/model.safetensors").class_names == ["ground", "crack"]


# New pictures


def test_label_maps_of_new_pictures(smoke: Path, scenes: Scenes, tmp_path: Path) -> None:
    """Unreadable ones are named, two processes write what one writes, and sizes are those of the pictures."""
    for folder in ("x", "sub"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for number, path in enumerate(("x/a.jpg", "x/b.png", "sub/a.jpg", "x/c.jpg")):
        picture, _ = scene(np.random.default_rng(number), 6, 40 + 10 * number)
        Image.fromarray(picture[:, : 40 + number]).save(tmp_path / "data" / path)
    (tmp_path / "data/x/broken.jpg").write_bytes(b"JFIF")
    pictures, tokenizer = open_source(str(tmp_path / "data"), None), tokenizers.load(scenes.tokenizer)
    saved = load_segmenter(smoke)
    vectors = tokenizer.codebook.numpy()
    names = str(smoke), str(scenes.tokenizer)
    predictor = open_predictor(saved, vectors, lookup="cosine", names=names, device=torch.device("cpu"))
    settings = {"tokenizer": tokenizer, "short_side": saved.short_side}
    with pytest.raises(UserError, match=r"broken\.jpg: cannot be read"):
        write_label_maps(predictor, pictures, tmp_path / "stopped", **settings)
    skipping = {**settings, "skip_errors": True}
    errors = write_label_maps(predictor, pictures, tmp_path / "one", **skipping)
    shared = [write_label_maps(predictor, pictures, tmp_path / "two", **skipping, rank=r, ranks=2) for r in (0, 1)]
    assert len(errors) == 1 and "broken.jpg: cannot be read" in errors[0] and sorted(map(len, shared)) == [0, 1]

    written = {path.relative_to(tmp_path / "one").as_posix() for path in (tmp_path / "one").rglob("*.*")}
    assert written == {
        "classes.txt",
        "legend.png",
        *(f"labels/{name}.png" for name in ("x/a", "x/b", "x/c", "sub/a")),
    }
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in written
    )
    assert (tmp_path / "one/classes.txt").read_text().splitlines() == saved.class_names
    with (
        Image.open(tmp_path / "one/labels/sub/a.png") as labels,
        Image.open(tmp_path / "data/sub/a.jpg") as picture,
    ):
        assert labels.mode == "P" and labels.size == picture.size
        sample = next(s for s in map(pictures.read, range(5)) if s.name == "sub/a.jpg")
        expected = predict_picture(predictor, sample, **settings)
        assert np.array_equal(np.asarray(labels), expected)
        colors = (plots.class_colors(6) * 255).round().byte().numpy()
        assert np.array_equal(np.asarray(labels.convert("RGB")), colors[expected])

    line = ["smoke", "--checkpoint", smoke, "--data", tmp_path / "data", "--tokenizer", scenes.tokenizer]
    call(predict, *line, "--skip-errors", "--out", tmp_path / "three")
    for name in written:
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert "broken.jpg" in (tmp_path / "three/skipped.txt").read_text()

    again = write_label_maps(predictor, pictures, tmp_path / "one", **skipping)
    assert len(again) == 5 and sum("exists already" in line for line in again) == 4


def test_a_label_map_is_predicted_as_an_evaluation_does(smoke: Path, scenes: Scenes) -> None:
    store, tokenizer = TokenStore(scenes.store, "validation"), tokenizers.load(scenes.tokenizer)
    source, saved = open_annotated(scenes.images, "validation"), load_segmenter(smoke)
    names = str(smoke), str(scenes.store)
    predictor = open_predictor(saved, store.codebook, lookup=store.lookup, names=names, device=torch.device("cpu"))
    score = SegmentationScore(saved.class_names)
    for index in range(len(source)):
        sample = source.read(index)
        labels = predict_picture(predictor, sample, tokenizer=tokenizer, short_side=saved.short_side)
        ids = torch.from_numpy(store[index][0].astype(np.int64))[None]
        assert np.array_equal(predictor(ids, labels.shape)[0].numpy(), labels)
        score.add(torch.from_numpy(labels), torch.from_numpy(decode_labels(sample.annotation, sample.name)))
    assert score.summary()["mIoU"] == pytest.approx(result_of(smoke)["mIoU"])


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        ("a.jpg", "a.png"),
        ("sub/a.b.TIF", "sub/a.b.png"),
        ("/home/../a.png", "home/a.png"),
        ("part.parquet#12", "part.parquet#12.png"),
    ],
)
def test_label_maps_have_the_names_of_their_pictures(picture: str, expected: str) -> None:
    assert str(label_name(picture)) == expected


# Bad input


def test_what_cannot_be_segmented_is_refused(
    smoke: Path, scenes: Scenes, tmp_path: Path, capfd, monkeypatch
) -> None:
    store = TokenStore(scenes.store)
    other = store.codebook[::-1] + 1
    pretrained(tmp_path / "other.safetensors", store, other)
    plain, renamed, single = (tmp_path / name for name in ("plain", "renamed", "single"))
    for path, codebook, names, columns in (
        (plain, store.codebook, store.class_names, {}),
        (renamed, store.codebook, ["sky", *store.class_names[1:]], {"annotation": "binary"}),
        (single, store.codebook, ["crack"], {"annotation": "binary"}),
    ):
        for split in ("train", "validation"):
            with StoreWriter(
                path,
                codebook=codebook,
                grid=store.grid,
                split=split,
                class_names=names,
                tokenizer=store.tokenizer,
                columns=columns,
            ) as writer:
                annotation = {"annotation": store.column("annotation")[0]} if columns else None
                writer.add(store[0][0], 0, annotation)
    data = ["--data", scenes.images]
    out = ["--out", tmp_path / "run"]
    for arguments, *words in (
        (["published", "--precision", "no"], "published", "--store", "--data"),
        (["smoke", "--checkpoint", tmp_path / "other.safetensors"], "codebook", scenes.store, "other.safetensors"),
        (["smoke", "--checkpoint", tmp_path / "none"], tmp_path / "none"),
        (["smoke", "--store", plain, "--batch-size", 1], "at least 2 images"),
        (["smoke", "--store", plain], plain, "'annotation'"),
        (["smoke", *data], "--tokenizer"),
        (["smoke", "--tokenizer", scenes.tokenizer], "--tokenizer", "--data"),
        (["smoke", *data, "--tokenizer", scenes.tokenizer, "--color", "paper"], "--color"),
        (["smoke", "--background-class"], "--background-class", "without --data"),
        (["smoke", "--store", single], "'crack' alone", "--background-class"),
    ):
        refused(capfd, monkeypatch, segment_ade20k, [*arguments, *out], *words)
    judged = ["smoke", "--checkpoint", smoke, *out]
    for arguments, *words in (
        (["smoke", *out], "--checkpoint"),
        (["smoke", "--checkpoint", tmp_path / "other.safetensors", *out], "other.safetensors", "another kind"),
        ([*judged, "--store", renamed], renamed, "'background', not 'sky'"),
        ([*judged, "--store", plain], plain, "'annotation'"),
        ([*judged, *data], "--tokenizer"),
        ([*judged, "--ignore-label", 0], "--ignore-label", "without --data"),
        ([*judged, "--flip", tmp_path / "none.safetensors"], "none.safetensors"),
    ):
        refused(capfd, monkeypatch, evaluate_segmentation, arguments, *words)
    assert not (tmp_path / "run").exists()


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path) -> None:
    """With an mmengine in front of the real one that cannot be imported, as one that is not installed."""
    (tmp_path / "mmengine.py").write_text("raise ModuleNotFoundError(\"No module named 'mmengine'\")\n")
    line = [sys.executable, str(RECIPES / "evaluate_segmentation.py"), "smoke", "--out", str(tmp_path / "run")]
    blocked = {**os.environ, "PYTHONPATH": str(tmp_path)}
    finished = subprocess.run(line, capture_output=True, text=True, check=False, env=blocked)
    assert finished.returncode == 2 and len(finished.stderr.splitlines()) == 1, finished.stderr
    assert 'pip install "seitpp[segmentation]"' in finished.stderr and not (tmp_path / "run").exists()


# Pictures


def test_classes_and_errors_are_painted_exactly() -> None:
    colors = plots.class_colors(150)
    assert len({tuple(color) for color in (colors * 255).round().int().tolist()}) == 150
    assert colors.min() >= 0 and colors.max() <= 1
    labels = torch.tensor([[0, 3, 255], [149, 1, 2]], dtype=torch.uint8)
    painted = plots.paint_classes(labels, colors)
    assert painted.shape == (3, 2, 3) and torch.equal(painted[:, 0, 2], torch.zeros(3))
    assert torch.equal(painted[:, 1, 0], colors[149]) and torch.equal(painted[:, 0, 1], colors[3])
    errors = plots.paint_errors(torch.tensor([[0, 4, 5], [149, 1, 7]]), labels)
    red, light = (torch.tensor(plots.VERDICTS[kind]) for kind in (1, 0))
    assert torch.equal(errors[:, 0, 1], red) and torch.equal(errors[:, 1, 2], red)
    assert torch.equal(errors[:, 0, 0], light) and torch.equal(errors[:, 0, 2], torch.zeros(3))


def test_the_table_of_a_report_leaves_out_what_is_no_number(tmp_path: Path) -> None:
    columns = {"IoU": np.array([50.0, np.nan]), "Acc": np.array([75.0, np.nan])}
    table = plots.class_table(["a < b", "c"], columns)
    assert table.columns == ("class", "IoU (%)", "Acc (%)") and len(set(table.colors)) == 2
    assert table.rows == [["a < b", 50.0, 75.0], ["c", None, None]]
    said = segmented({"mIoU": 50.0, "aAcc": 80.0}, ["a < b", "c"], columns["IoU"])
    assert len(said) == 1 and "50.0 % (mIoU), the mean over 1 class" in said[0]
    images = {"truth": [torch.zeros(3, 4, 6), torch.zeros(3, 5, 4)]}
    shown = plots.segmented_pictures(tmp_path, images)
    assert (tmp_path / shown.file).is_file() and [picture.label for picture in shown.pictures] == ["truth"]
