"""recipes/finetune.py from every source to every target, what it leaves alone; the views of SeiT++."""

import shutil
from dataclasses import replace
from pathlib import Path

import evaluate
import finetune
import mtm_pretrain
import numpy as np
import pytest
import seit_train
import timm
import torch
from PIL import Image
from support.models import tiny_mtm
from support.running import accuracies, call, lines_of, refused
from torch import Tensor

from seitpp import StoreWriter, TokenStore
from seitpp.augment import Keys, SeitPPFinetuneView, SeitPPView, ViewError
from seitpp.augment.color import ColorAugment
from seitpp.augment.geometry import apply_geometry, random_geometry
from seitpp.augment.maps import crop_resize, random_resized_boxes
from seitpp.augment.mix import Mix, PairingError, SoftLabels
from seitpp.augment.views import split_batch
from seitpp.codebook import codebook_fingerprint, embed, nearest
from seitpp.data.dataset import MicroBatch
from seitpp.data.digits import digits
from seitpp.engine.config import parse
from seitpp.engine.optim import adamw
from seitpp.engine.run import Run
from seitpp.models import (
    Loaded,
    TokenAdapt,
    classifier_from,
    load_classifier,
    load_pretrained,
    load_tokenadapt,
    save_classifier,
    save_release,
)
from seitpp.models.weights.pretrained import save_pretrained

TWO_STEPS = ["--epochs", 2 / 11, "--warmup-epochs", 0]


@pytest.fixture(scope="module")
def codebook() -> np.ndarray:
    """(64, 32), the digits'."""
    return TokenStore(digits().store).codebook


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Of two steps each: what they learned does not matter here."""
    root = tmp_path_factory.mktemp("runs")
    call(seit_train, "smoke", *TWO_STEPS, "--out", root / "seit")
    call(mtm_pretrain, "smoke", *TWO_STEPS, "--out", root / "mtm")
    return {name: root / name for name in ("seit", "mtm")}


def random_store(path: Path, codebook: np.ndarray, grid: tuple[int, int], images: int = 64) -> Path:
    """With a third as many validation images, of the classes a, b and c."""
    generator = np.random.default_rng(0)
    for split, number in (("train", images), ("validation", images // 3)):
        with StoreWriter(path, codebook=codebook, grid=grid, split=split, class_names=list("abc")) as writer:
            ids = generator.integers(len(codebook), size=(number, *grid))
            writer.add_batch(ids, np.arange(number) % 3)
    return path


@pytest.fixture(scope="module")
def other_store(codebook: np.ndarray, tmp_path_factory) -> Path:
    """The digits' codes, another grid, other classes."""
    return random_store(tmp_path_factory.mktemp("other") / "store", codebook, (12, 12))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """64 training and 9 validation images of three classes; each a shade of red, green or blue."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, images in (("train", 64), ("validation", 9)):
        for at in range(images):
            pixels = generator.integers(64, size=(20, 20, 3), dtype=np.uint8)
            pixels[..., at % 3] += 128
            folder = root / split / ("red", "green", "blue")[at % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{at:02}.png")
    return root


def repeated(folder: Path, out: Path, *data: object) -> None:
    """evaluate.py finds the accuracies that the run wrote down."""
    call(evaluate, "smoke", "--checkpoint", folder, *data, "--out", out)
    assert accuracies(out) == accuracies(folder)


# Sources and targets


@pytest.mark.parametrize("source", ["seit", "mtm"])
def test_tokens_to_the_same_tokens(
    runs: dict[str, Path], codebook: np.ndarray, tmp_path: Path, source: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs[source].rglob("*")}
    few = ["--epochs", 4 / 11, "--warmup-epochs", 1 / 11, "--evaluation-epochs", 2 / 11]
    call(finetune, "smoke", "--checkpoint", runs[source], *few, "--out", tmp_path / "run")
    lines, evaluations = (lines_of(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [line["step"] for line in evaluations] == [2]
    assert lines[0]["lr"] == 0 and lines[1]["lr"] == pytest.approx(8e-3 * (128 / 1024) ** 0.5)
    assert lines[0]["loss"] == pytest.approx(np.log(10), abs=1e-3), "of a new head"
    saved = load_classifier(tmp_path / "run" / "model.safetensors")
    assert saved.class_names == [str(digit) for digit in range(10)]
    assert saved.codebook == codebook_fingerprint(codebook)
    repeated(tmp_path / "run", tmp_path / "evaluation")
    assert {path: path.stat().st_mtime_ns for path in runs[source].rglob("*")} == before


@pytest.mark.parametrize("source", ["seit", "mtm"])
def test_another_grid_and_other_classes(
    runs: dict[str, Path], other_store: Path, tmp_path: Path, source: str
) -> None:
    """With a rate of 0, what is saved is what training began with."""
    still = ["--base-lr", 0, "--min-lr", 0, "--batch-size", 32, "--epochs", 1, "--warmup-epochs", 0]
    size = ["--store", other_store, "--size", 12]
    call(finetune, "smoke", "--checkpoint", runs[source], *size, *still, "--out", tmp_path / "run")
    saved = load_classifier(tmp_path / "run" / "model.safetensors")
    expected = classifier_from(load_pretrained(runs[source]).model, 3, img_size=(12, 12)).state_dict()
    for name, tensor in saved.model.state_dict().items():
        assert torch.equal(tensor, expected[name]) or name.startswith("head."), name
    assert saved.model.pos_embed.shape == (1, 37, 96) and saved.class_names == list("abc")
    repeated(tmp_path / "run", tmp_path / "evaluation", "--store", other_store)


def test_three_stages(runs: dict[str, Path], other_store: Path, pictures: Path, tmp_path: Path) -> None:
    few = ["smoke", "--batch-size", 32, "--epochs", 1, "--warmup-epochs", 0]
    tokens, pixels = tmp_path / "tokens", tmp_path / "pixels"
    call(finetune, *few, "--checkpoint", runs["seit"], "--store", other_store, "--out", tokens)
    call(finetune, *few, "--checkpoint", tokens, "--data", pictures, "--size", 32, "--out", pixels)
    before, after = load_pretrained(tokens).model, load_pretrained(pixels)
    assert after.codebook is None and after.class_names == ["blue", "green", "red"]
    assert after.model.patch_embed.proj.weight.shape == (96, 3, 16, 16) and after.model.pos_embed.shape == (
        1,
        5,
        96,
    )
    moved = (after.model.blocks[0].mlp.fc1.weight - before.blocks[0].mlp.fc1.weight).abs().max()
    assert 0 < moved < 0.01, "the blocks are those that were trained on tokens"
    repeated(pixels, tmp_path / "evaluation", "--data", pictures)


def test_the_preset_of_pixels(runs: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """LAMB, 3-Augment and crops drawn by two workers; resumed, it goes on with the same bits."""
    here = ["--precision", "no", "--no-compile", "--workers", 2, "--log-steps", 1, "--base-lr", 0.1]
    length = ["--epochs", 1.5, "--warmup-epochs", 0.5, "--checkpoint-epochs", 0.5, "--evaluation-epochs", 9]
    line = [
        "pixels",
        "--checkpoint",
        runs["seit"],
        "--data",
        pictures,
        "--size",
        32,
        "--batch-size",
        32,
        *here,
        *length,
    ]
    call(finetune, *line, "--out", tmp_path / "run")
    head = load_pretrained(tmp_path / "run").model.head.weight
    assert head.std().item() == pytest.approx(0.02, abs=0.01), "of the new head: LAMB would not move one of 2e-5"
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000003")
    call(finetune, *line, "--workers", 0, "--out", tmp_path / "again")
    call(finetune, *line, "--out", tmp_path / "run", "--resume")
    for other in ("run", "again"):
        again = lines_of(tmp_path / other / "metrics.jsonl")
        assert [at["loss"] for at in again] == [at["loss"] for at in lines] and len(lines) == 3


def test_images_without_a_validation_split(runs: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    few = ["smoke", "--batch-size", 16, "--epochs", 1 / 3, "--warmup-epochs", 0, "--size", 32]
    data = ["--data", pictures / "train", "--split", None, "--validation-split", None]
    call(finetune, *few, *data, "--checkpoint", runs["mtm"], "--out", tmp_path / "run")
    assert accuracies(tmp_path / "run")[0] * 3 / 100 in (0, 1, 2, 3), "of the 20th, 40th and 60th image"
    assert load_pretrained(tmp_path / "run").model.patch_embed.proj.weight.shape == (96, 3, 16, 16)


def official(kind: str, path: Path, adapt: TokenAdapt | None = None) -> Path:
    """A checkpoint in the released layout, whose heads are 64 channels wide (32 in a decoder), `adapt` beside."""
    size = {"embed_dim": 64, "depth": 2, "num_heads": 1}
    if kind == "MTM":
        model = tiny_mtm(encoder_size=size)
    else:
        model = timm.create_model("mtm_vit_nano", img_size=8, in_chans=32, num_codes=64, num_classes=5, **size)
    save_release(model, path, adapt)
    return path


@pytest.mark.parametrize("kind", ["MTM", "SeiT++ classifier"])
def test_official_checkpoints(tmp_path: Path, kind: str) -> None:
    checkpoint = official(kind, tmp_path / "official.pth")
    call(finetune, "smoke", *TWO_STEPS, "--checkpoint", checkpoint, "--out", tmp_path / "run")
    model = load_pretrained(tmp_path / "run").model
    assert model.embed_dim == 64 and model.num_classes == 10
    repeated(tmp_path / "run", tmp_path / "evaluation")


def test_a_checkpoint_of_pixels_keeps_its_stem(runs: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    few = ["smoke", "--batch-size", 32, "--epochs", 0.5, "--warmup-epochs", 0, "--data", pictures, "--size", 32]
    call(finetune, *few, "--checkpoint", runs["seit"], "--out", tmp_path / "one")
    still = ["--base-lr", 0, "--min-lr", 0]
    call(finetune, *few, *still, "--checkpoint", tmp_path / "one", "--out", tmp_path / "two")
    one, two = (load_pretrained(tmp_path / name).model.patch_embed.proj.weight for name in ("one", "two"))
    assert torch.equal(one, two)


@pytest.mark.parametrize("network", ["vit_nano_patch8_32", "resnet18"])
def test_pixels_from_random_weights(pictures: Path, tmp_path: Path, network: str) -> None:
    """Resumed, with the same bits; and tested again and fine-tuned from where it was saved."""
    few = ["--batch-size", 32, "--epochs", 1.5, "--warmup-epochs", 0.5, "--evaluation-epochs", 9, "--mixup", 0.8]
    data = ["smoke", "--data", pictures, "--size", 32, *few]
    line = [*data, "--model", network, "--out", tmp_path / "run"]
    call(finetune, *line)
    saved, lines = load_pretrained(tmp_path / "run"), lines_of(tmp_path / "run" / "metrics.jsonl")
    assert saved.spec.name == network and saved.class_names == ["blue", "green", "red"] and len(lines) == 3
    assert lines[0]["loss"] == pytest.approx(np.log(3), abs=0.4), "of random weights"
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000003")
    call(finetune, *line, "--resume")
    again = load_pretrained(tmp_path / "run").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.model.state_dict().items())
    repeated(tmp_path / "run", tmp_path / "evaluation", "--data", pictures)
    if network == "resnet18":
        assert saved.window == (32, 32), "a ResNet does not know its input"
    else:
        call(finetune, *data, "--checkpoint", tmp_path / "run", "--epochs", 0.5, "--out", tmp_path / "again")


def test_the_digits_as_pixels_and_the_published_baselines(tmp_path: Path) -> None:
    few = ["--epochs", 2 / 11, "--warmup-epochs", 0]
    call(finetune, "deit_digits", *few, "--out", tmp_path / "run")
    assert load_pretrained(tmp_path / "run").model.patch_embed.grid_size == (4, 4)
    for name in ("deit_base", "deit_small", "resnet50", "resnet18"):
        preset = finetune.PRESETS[name]
        assert timm.is_model(preset.model) and preset.checkpoint is None and preset.preset == name
        assert (preset.batch_size, preset.base_lr, preset.weight_decay, preset.epochs) == (1024, 1e-3, 0.05, 300)


# What is trained, and how fast


@pytest.fixture(scope="module")
def resnet(codebook: np.ndarray, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("resnet") / "model.safetensors"
    model = timm.create_model("seit_resnet18", in_chans=32, num_classes=10)
    save_classifier(path, model, codebook_fingerprint(codebook), class_names=None)
    return path


@pytest.mark.parametrize(("source", "trained"), [("mtm", "head"), ("mtm", "attention"), ("resnet", "head")])
def test_what_is_not_trained_stays_as_it_was(
    runs: dict[str, Path], resnet: Path, tmp_path: Path, source: str, trained: str
) -> None:
    checkpoint = resnet if source == "resnet" else runs[source]
    few = ["smoke", "--epochs", 2 / 44, "--warmup-epochs", 0, "--batch-size", 32, "--trainable", trained]
    call(finetune, *few, "--checkpoint", checkpoint, "--out", tmp_path / "run")
    before = classifier_from(load_pretrained(checkpoint).model, 10).state_dict()
    after = load_pretrained(tmp_path / "run").model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    if source == "resnet":
        assert changed == {"fc.weight", "fc.bias"} and "layer4.1.bn2.running_mean" in after
        return
    attention = {name for name in after if ".attn." in name} | {"pos_embed"}
    assert changed - attention == {"head.weight", "head.bias"}
    assert (changed & attention == attention) if trained == "attention" else not changed & attention


@pytest.mark.parametrize("name", ["mtm_vit_nano", "seit_vit_nano", "seit_resnet18"])
def test_lower_layers_learn_more_slowly(name: str) -> None:
    model = timm.create_model(name, img_size=8, in_chans=32, num_classes=10)
    groups = adamw(model, 0.1, layer_decay=0.65).param_groups
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    scale = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    if name == "seit_resnet18":
        assert scale["conv1.weight"] < scale["layer1.0.conv1.weight"] < scale["layer4.1.conv2.weight"] < 1
        assert scale["fc.weight"] == 1
        return
    stem = {name for name in scale if name.startswith(("patch_embed.", "cls_token", "pos_embed"))}
    assert {scale[name] for name in stem} == {0.65**4}
    assert [scale[f"blocks.{at}.attn.qkv.weight"] for at in range(3)] == pytest.approx([0.65**3, 0.65**2, 0.65])
    assert scale["head.weight"] == scale["head.bias"] == 1


# Presets and refusals


@pytest.mark.parametrize("preset", finetune.PRESETS)
def test_every_preset_fits_the_published_tokens(preset: str, pictures: Path, tmp_path: Path) -> None:
    config, codebook = finetune.PRESETS[preset], np.random.default_rng(0).standard_normal((391, 32), np.float32)
    assert config.preset == preset and parse(finetune.PRESETS, "digits", [preset]) == config
    for split in ("train", "validation"):
        with StoreWriter(tmp_path / "store", codebook=codebook, grid=(32, 32), split=split) as writer:
            writer.add_batch(np.random.default_rng(1).integers(391, size=(8, 32, 32)), np.arange(8))
    on_pixels = preset == "pixels" or config.model is not None
    where = {"data": str(pictures)} if on_pixels else {"store": str(tmp_path / "store")}
    if config.tokenadapt_fraction and not on_pixels:
        adapt = TokenAdapt(width=64, heads=1, mlp=64)
        save_pretrained(tmp_path / "adapt.safetensors", adapt, codebook_fingerprint(codebook))
        where["tokenadapt"] = str(tmp_path / "adapt.safetensors")
    config = replace(config, precision="no", batch_size=8, out=str(tmp_path / "run"), **where)
    stem = {"num_codes": 391} if preset in ("published", "digits", "smoke") else {}
    name = "mtm_vit_nano" if stem else "seit_vit_nano"
    source = Loaded(timm.create_model(name, img_size=28, in_chans=32, num_classes=5, **stem), None, None, None)
    make = finetune.pixel_task if on_pixels else finetune.token_task
    task = make(config, Run("finetune", config), None if config.model else source)
    batch = task.train.images.__getitems__(MicroBatch(range(8), epoch=0))
    for inputs in (
        task.view(getattr(batch, task.field), batch.labels, Keys(0, 0, batch.indices))[0],
        task.center_view(getattr(batch, task.field)),
    ):
        assert inputs.shape[-1] == ((config.size or 224) if on_pixels else 28)
        assert task.model(inputs).shape == (8, 3 if on_pixels else 8)


def small_adapt(crop: int = 8) -> TokenAdapt:
    """Untrained, but its first prediction is not always code 0."""
    torch.manual_seed(0)
    adapt = TokenAdapt((8, 8), crop=(crop, crop), num_codes=64, code_dim=32, width=64, heads=1, mlp=64)
    torch.nn.init.normal_(adapt.head.weight)
    return adapt


def test_tokenadapt_in_a_run(tmp_path: Path) -> None:
    """With color and Mixup, from one file that holds both, as published."""
    checkpoint = official("MTM", tmp_path / "official.pth", small_adapt())
    way = ["--tokenadapt", checkpoint, "--tokenadapt-fraction", 0.5, "--color", "seitpp", "--mixup", 0.8]
    call(finetune, "smoke", *TWO_STEPS, "--checkpoint", checkpoint, *way, "--out", tmp_path / "run")
    repeated(tmp_path / "run", tmp_path / "evaluation")


def test_what_cannot_be_fine_tuned_is_refused(
    runs, codebook, pictures, other_store, resnet, tmp_path: Path, capfd, monkeypatch
) -> None:
    out = ["smoke", "--out", tmp_path / "run"]
    seit, mtm = ["--checkpoint", runs["seit"]], ["--checkpoint", runs["mtm"]]
    foreign = random_store(tmp_path / "foreign", codebook + 1, (8, 8), 128)
    wide = random_store(tmp_path / "wide", np.tile(codebook, (2, 2)), (8, 8), 128)
    size = {"embed_dim": 64, "depth": 1, "num_heads": 1}
    save_release(timm.create_model("seit_vit_nano", img_size=8, num_classes=5, **size), tmp_path / "seit.pth")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    save_classifier(tmp_path / "pixels", vit, None, class_names=None)
    save_release(
        TokenAdapt((8, 8), crop=(8, 8), num_codes=64, code_dim=32, width=64, heads=1, mlp=64),
        tmp_path / "adapt.pth",
    )
    oblong = random_store(tmp_path / "oblong", codebook, (12, 8))
    for arguments, *words in (
        ([], "--checkpoint", "--model", "neither"),
        ([*seit, "--model", "resnet18"], "--checkpoint", "--model", runs["seit"], "resnet18"),
        (["--model", "resnet81"], "resnet81", "did you mean"),
        (["--model", "seit_vit_nano"], "takes tokens"),
        (["--model", "convnext_tiny"], "ConvNeXt", "expected a ViT or ResNet"),
        (["--model", "resnet18", "--store", other_store], "--store", "--model"),
        (["deit_base", "--precision", "no"], "deit_base", "--data"),
        (["--checkpoint", tmp_path / "none"], "no model file", tmp_path / "none"),
        ([*seit, "--store", foreign], "codebook", foreign, runs["seit"]),
        (["--checkpoint", tmp_path / "seit.pth", "--store", wide], "seit.pth", wide, 64, 32),
        (["--checkpoint", official("MTM", tmp_path / "mtm.pth"), "--store", wide], "mtm.pth", wide, 128, 64),
        ([*seit, "--tokenadapt-fraction", 0.5], "takes maps", "--tokenadapt-fraction 0"),
        ([*mtm, "--tokenadapt-fraction", 0.5], "no weights", "--tokenadapt"),
        ([*mtm, "--eda", "paper"], "takes ids", "--eda"),
        ([*mtm, "--size", 9], "--size 9", "(8, 8)"),
        (["--checkpoint", tmp_path / "pixels"], "takes pixels", "--data"),
        (["--checkpoint", tmp_path / "adapt.pth"], "adapt.pth", "TokenAdapt"),
        ([*seit, "--store", oblong, "--size", 12], "--size 12", "(12, 8)", "shorter side"),
        ([*seit, "--store", oblong, "--size", 8, 12], "--size 8 12", "(12, 8)", "height and width"),
        ([*seit, "--data", pictures, "--store", other_store], "--store"),
        ([*seit, "--data", pictures, "--color", "paper"], "--color"),
        ([*seit, "--data", pictures, "--tokenadapt", tmp_path], "--tokenadapt"),
        ([*seit, "--data", pictures / "train"], "no folder 'train'"),
        (["--checkpoint", resnet, "--data", pictures], "expected a ViT"),
        (["--checkpoint", resnet, "--trainable", "attention"], "no attention"),
    ):
        preset = [] if arguments[:1] == ["deit_base"] else out[:1]
        refused(capfd, monkeypatch, finetune, [*preset, *arguments, *out[1:]], *words)
    assert not (tmp_path / "run").exists()


# The views of SeiT++ with TokenAdapt; those of pixels are in test_pixels.py

CODES = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(64, (16, 8, 8), generator=torch.Generator().manual_seed(1))
LABELS, KEYS = torch.arange(16), Keys(3, 0, torch.arange(100, 116))
EVEN, ODD = torch.arange(0, 16, 2), torch.arange(1, 16, 2)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_share_of_a_batch_is_spread_evenly_and_put_back(share: float) -> None:
    plain, through, order = split_batch(32, share, torch.device("cpu"))
    assert torch.equal(torch.cat([plain, through])[order], torch.arange(32))
    assert torch.equal(through // 4, torch.arange(8).repeat_interleave(int(4 * share)))
    first = split_batch(8, share, torch.device("cpu"))[1]
    assert torch.equal(through[: len(first)], first), "of a share of the batch as of the whole"


def through_tokenadapt(
    adapt: TokenAdapt, maps: Tensor, scale: tuple[float, float], mix: Mix
) -> tuple[Tensor, SoftLabels]:
    """Ids of the odd places, and their labels."""
    geometry = random_geometry(KEYS.of(ODD), 8, adapt.crop[0], scale=scale)
    space = apply_geometry(adapt.convert(maps[ODD]), geometry)
    space, targets = mix(space, LABELS[ODD], KEYS.of(ODD))
    return adapt.invert(space).argmax(dim=1), targets


@pytest.mark.parametrize("size", [7, 8])
def test_odd_places_go_through_tokenadapt(size: int) -> None:
    adapt, scale = small_adapt(size), (0.2, 1.0)
    ids = SeitPPView(CODES, size=size, scale=scale, adapt=adapt)(IDS.to(torch.uint16), KEYS)
    assert ids.shape == (16, size, size) and ids.dtype == torch.int64
    cropped = crop_resize(embed(IDS[EVEN], CODES), random_resized_boxes(KEYS.of(EVEN), (8, 8), scale), size)
    assert torch.equal(ids[EVEN], nearest(cropped, CODES))
    assert torch.equal(ids[ODD], through_tokenadapt(adapt, embed(IDS, CODES), scale, Mix(0.0))[0])
    assert len(ids[ODD].unique()) > 5 and not adapt.training
    assert not any(parameter.requires_grad for parameter in adapt.parameters())
    every = SeitPPView(CODES, size=size, scale=scale, adapt=adapt, tokenadapt_fraction=1.0)(IDS, KEYS)
    assert torch.equal(every[ODD], ids[ODD]) and not torch.equal(every[EVEN], ids[EVEN])


def test_the_view_of_fine_tuning_goes_in_the_order_of_seitpp() -> None:
    adapt, scale = small_adapt(7), (0.08, 1.0)
    ids, labels = SeitPPFinetuneView(CODES, size=7, scale=scale, adapt=adapt)(IDS.to(torch.uint16), LABELS, KEYS)
    colored = ColorAugment("seitpp")(embed(IDS, CODES), KEYS)
    assert not torch.equal(colored, embed(IDS, CODES))
    expected, share, others = torch.empty(16, 7, 7).long(), torch.empty(16), torch.empty(16).long()
    cropped = crop_resize(colored[EVEN], random_resized_boxes(KEYS.of(EVEN), (8, 8), scale), 7)
    mixed, plain = Mix(1.0)(cropped, LABELS[EVEN], KEYS.of(EVEN))
    expected[EVEN] = nearest(mixed, CODES)
    expected[ODD], through = through_tokenadapt(adapt, colored, scale, Mix(1.0, 0.8))
    for places, targets in ((EVEN, plain), (ODD, through)):
        share[places], others[places] = targets.weight, targets.others
    assert torch.equal(ids, expected)
    assert torch.equal(labels.labels, LABELS) and torch.equal(labels.others, LABELS ^ 4)
    assert torch.equal(labels.weight, share) and torch.equal(labels.others, others)
    assert ids.shape == (16, 7, 7) and ids.min() >= 0 and ids.max() < 64


def test_views_do_not_depend_on_how_a_batch_is_split() -> None:
    for view in (
        SeitPPView(CODES, size=7, adapt=small_adapt(7), color="coloradapt"),
        SeitPPFinetuneView(CODES, size=7, adapt=small_adapt(7)),
    ):
        halves = []
        for part in (slice(None), slice(0, 8), slice(8, 16)):
            keys = Keys(KEYS.seed, KEYS.epoch, KEYS.indices[part])
            given = (IDS[part], keys) if isinstance(view, SeitPPView) else (IDS[part], LABELS[part], keys)
            made = view(*given)
            halves.append([made] if isinstance(view, SeitPPView) else [made[0], *made[1]])
        for whole, *parts in zip(*halves, strict=True):
            assert torch.equal(whole, torch.cat(parts))


def test_without_tokenadapt_the_views_agree() -> None:
    plain = SeitPPView(CODES, size=7, scale=(0.08, 1.0), tokenadapt_fraction=0.0)(IDS, KEYS)
    ids, labels = SeitPPFinetuneView(CODES, size=7, tokenadapt_fraction=0.0, color=None, cutmix=0.0)(
        IDS, LABELS, KEYS
    )
    assert torch.equal(ids, plain) and torch.equal(labels.labels, LABELS) and labels.weight.eq(1).all()
    assert not torch.equal(SeitPPFinetuneView(CODES, size=7, tokenadapt_fraction=0.0)(IDS, LABELS, KEYS)[0], plain)


def test_views_refuse_what_tokenadapt_was_not_trained_for() -> None:
    for view in (SeitPPView, SeitPPFinetuneView):
        with pytest.raises(ViewError, match=r"no weights.*--tokenadapt.*--tokenadapt-fraction 0"):
            view(CODES, size=8)
        with pytest.raises(ViewError, match=r"\(7, 7\).*the crop is 8"):
            view(CODES, size=8, adapt=small_adapt(7))
        with pytest.raises(ViewError, match="no image goes through it: pass --tokenadapt-fraction"):
            view(CODES, size=7, adapt=small_adapt(7), tokenadapt_fraction=0.0)
    with pytest.raises(ViewError, match=r"\(12, 12\).*\(8, 8\)"):
        SeitPPView(CODES, size=7, adapt=small_adapt(7))(torch.zeros(8, 12, 12, dtype=torch.long), KEYS.of(EVEN))
    with pytest.raises(PairingError, match="6 images"):
        SeitPPFinetuneView(CODES, size=7, adapt=small_adapt(7))(IDS[:12], LABELS[:12], KEYS.of(torch.arange(12)))


def test_a_tokenadapt_from_a_file_fits_the_views(tmp_path: Path) -> None:
    adapt = small_adapt(7)
    save_pretrained(tmp_path / "model.safetensors", adapt, "0")
    loaded, *_ = load_tokenadapt(tmp_path / "model.safetensors")
    expected, found = (SeitPPView(CODES, size=7, adapt=model)(IDS, KEYS) for model in (adapt, loaded))
    assert torch.equal(found, expected)
