"""Training a tokenizer: losses by hand, dead codes, crops, and the recipe as a user runs it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizer_train
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from support.paths import RECIPES
from support.running import distributed, run
from torch import Tensor, nn
from torchvision.models import vgg16

from seitpp import tokenizers
from seitpp.augment import Keys
from seitpp.data.digits import DigitsSource
from seitpp.engine.optim import adamw
from seitpp.engine.reconstruction import quality
from seitpp.errors import UserError
from seitpp.images.batches import ImageDataset
from seitpp.images.sources import SourceSubset, open_source
from seitpp.models import ModelError
from seitpp.models.discriminator import Discriminator
from seitpp.models.weights.perceptual import load_vgg_distance
from seitpp.objectives import VQTraining, restart_due
from seitpp.objectives.vq import vq_losses, weighted_sum
from seitpp.tokenizers import TokenizerSpec, ViTVQGAN
from seitpp.tokenizers.transformer import TransformerShape

# Six steps, a checkpoint after the third, dead codes restarted in the second and fourth.
TINY = replace(
    tokenizer_train.PRESETS["smoke"], batch_size=228, num_codes=128, epochs=1, checkpoint_epochs=0.5, base_lr=5e-3
)


def small_model(discriminator: bool = True) -> VQTraining:
    torch.manual_seed(0)
    shape = TransformerShape(64, 1, 1, 64)
    tokenizer = ViTVQGAN(TokenizerSpec("vit_vqgan", (16, 16), 4, num_codes=12, code_dim=6), shape, shape)
    return VQTraining(tokenizer, Discriminator(16, widest=8) if discriminator else None)


def images_16() -> Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------- losses


class Says(nn.Module):
    """A discriminator whose opinion is the images' mean, times a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * images.mean(dim=(1, 2, 3))


def test_every_term_by_hand() -> None:
    model = small_model(discriminator=False)
    model.discriminator = Says()
    images = images_16()
    output = model(images)
    losses = vq_losses(output, images, lambda a, b: (a - b).abs().max())
    made, target = output.images.detach().double().numpy(), images.double().numpy()
    codes = model.tokenizer.codebook.detach().double().numpy()
    rows = (codes / np.linalg.norm(codes, axis=1, keepdims=True))[output.ids.numpy()].transpose(0, 3, 1, 2)
    real, fake = (10 * batch.mean(axis=(1, 2, 3)) for batch in (target, made))
    expected = {
        "pixels": ((made - target) ** 2).mean(),
        "codebook": 1.25 * ((rows - output.vectors.double().numpy()) ** 2).mean(),
        "perceptual": np.abs(made - target).max(),
        "adversarial": -fake.mean(),
        "discriminator": (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()) / 2,
    }
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)
    total = (
        expected["pixels"]
        + expected["codebook"]
        + 0.1 * expected["perceptual"]
        + 0.1 * expected["adversarial"]
        + expected["discriminator"]
    )
    assert weighted_sum(losses).item() == pytest.approx(total, rel=1e-4)


def moved(model: VQTraining, loss: Tensor) -> set[str]:
    """Names of the parameters that a loss would move."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_gradients_go_where_they_should() -> None:
    """The pixels reach encoder and decoder straight through; the codebook is moved by its own loss; the two
    adversarial terms move one side each; together every parameter is moved.
    """
    model = small_model()
    with torch.no_grad():  # an opinion beyond the margin: else the gradients of real and fake cancel in a bias
        model.discriminator.opinion.bias.fill_(2)
    images = images_16()
    losses = vq_losses(model(images), images, None)
    names = {name for name, _ in model.named_parameters()}
    codebook = {"tokenizer.quantizer.embedding.weight"}
    judge = {name for name in names if name.startswith("discriminator.")}
    assert moved(model, losses["pixels"]) == names - judge - codebook
    assert codebook < moved(model, losses["codebook"]) < {n for n in names if "decoder" not in n} - judge
    assert moved(model, losses["adversarial"]) == names - judge - codebook
    assert moved(model, losses["discriminator"]) == judge
    assert moved(model, weighted_sum(losses)) == names


def test_a_discriminator_learns_to_tell_noise_from_gray() -> None:
    torch.manual_seed(0)
    judge = Discriminator(20, widest=8)  # 20 -> 10 -> 5 -> 2
    optimizer = torch.optim.Adam(judge.parameters(), 3e-3)
    noise, gray = torch.rand(16, 3, 20, 20), torch.full((16, 3, 20, 20), 0.5)
    for _ in range(30):
        real, fake = judge(noise), judge(gray)
        loss = (1 - real).relu().mean() + (1 + fake).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert judge(noise).shape == (16, 1) and judge(noise).min() > judge(gray).max()


def test_quality_by_hand() -> None:
    images = images_16()
    shifted = images.clone()
    shifted[1] += 0.1
    exact, off = quality(shifted, images)[:2].tolist()
    assert exact == pytest.approx([100, 1]) and off[0] == pytest.approx(20, abs=1e-3) and 0.5 < off[1] < 1


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    """Random weights under the names and in the shapes of torchvision's file."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in vgg16(weights=None).features.state_dict().items()}
    torch.manual_seed(0)
    tensors = {
        f"features.{name}": torch.randn(shape) * (2 / (shape[1] * 9)) ** 0.5
        if len(shape) > 1
        else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**tensors, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


def test_perceptual_distance_against_a_plain_forward(vgg_file) -> None:
    distance = load_vgg_distance(vgg_file)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    others = (images + 0.1).requires_grad_()
    weights = torch.load(vgg_file, weights_only=True)

    def levels(batch: Tensor) -> list[Tensor]:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        maps, found, index = (batch - mean.view(3, 1, 1)) / std.view(3, 1, 1), [], 0
        for convolutions in (2, 2, 3, 3, 3):
            for _ in range(convolutions):
                name = f"features.{index}"
                maps = nn.functional.conv2d(maps, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)
                maps, index = maps.relu(), index + 2
            found.append(maps / maps.norm(dim=1, keepdim=True).clamp(min=1e-12))
            maps, index = nn.functional.max_pool2d(maps, 2), index + 1
        return found

    pairs = zip(levels(images), levels(others), strict=True)
    expected = sum(((a - b) ** 2).sum(dim=1).mean() for a, b in pairs) / 5
    got = distance(others, images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    got.backward()
    assert others.grad.abs().sum() > 0 and distance(images, images) == 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_other_files_than_vgg_weights_are_refused(vgg_file, tmp_path) -> None:
    with pytest.raises(ModelError, match="no VGG16 weights at"):
        load_vgg_distance(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(vgg_file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cut\.pth cannot be read"):
        load_vgg_distance(tmp_path / "cut.pth")
    tensors = torch.load(vgg_file, weights_only=True)
    del tensors["features.28.weight"]
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"other\.pth holds no VGG16 weights.*28\.weight"):
        load_vgg_distance(tmp_path / "other.pth")


# ---------------------------------------------------------------------------------------------- codes


def test_dead_codes_move_onto_vectors_and_others_stay() -> None:
    model, before = small_model(), small_model().tokenizer.codebook.detach()
    vectors = torch.randn(2, 6, 4, 4)
    counts = torch.full((12,), 1000)
    counts[[3, 7]] = torch.tensor([0, 15])  # the mean is 834.6, 2 % of it 16.7
    counts[5] = 18
    even = torch.full((12,), 5)
    assert model.count(even).item() == pytest.approx(12)  # equally frequent
    model.counts.zero_()
    assert model.count(counts).item() < 12
    model.restart(vectors, seed=4, step=9, optimizer=adamw(model, 0.0))
    after = model.tokenizer.codebook.detach()
    candidates = vectors.permute(0, 2, 3, 1).reshape(-1, 6)
    changed = (after != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3, 7] and model.restarted == 2 and model.counts.sum() == 0
    assert all((candidates == after[code]).all(dim=1).any() for code in changed)
    again, other = small_model(), small_model()
    for twin, step in ((again, 9), (other, 10)):
        twin.count(counts)
        twin.restart(vectors, seed=4, step=step, optimizer=adamw(twin, 0.0))
    assert torch.equal(again.tokenizer.codebook, after) and not torch.equal(other.tokenizer.codebook, after)
    assert {"counts", "restarted"} <= model.state_dict().keys() - model.tokenizer.state_dict().keys()


def test_a_restarted_code_stays_where_it_is_put() -> None:
    """The moments of its old place do not move it; the other codes keep theirs."""
    model = small_model(discriminator=False)
    optimizer, codebook = adamw(model, weight_decay=0.0), model.tokenizer.codebook
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    codebook.grad = torch.ones_like(codebook)
    optimizer.step()
    counts = torch.full((12,), 1000)
    counts[[3, 7]] = 0
    model.count(counts)
    model.restart(torch.randn(2, 6, 4, 4), seed=4, step=9, optimizer=optimizer)
    put, moved = codebook.detach().clone(), [code for code in range(12) if code not in (3, 7)]
    codebook.grad.zero_()
    optimizer.step()
    assert torch.equal(codebook[[3, 7]], put[[3, 7]])
    assert (codebook[moved] < put[moved]).all()


def test_restarts_are_a_function_of_the_step() -> None:
    due = [step for step in range(100) if restart_due(step, steps=100, tokens=1024, num_codes=64)]
    assert due == [12, 25, 38, 51, 64, 77]  # every 200 tokens a code, rounded up to 13 steps; none from 80 on
    assert [step for step in range(10) if restart_due(step, steps=10, tokens=10**6, num_codes=64)] == list(
        range(8)
    )


# ---------------------------------------------------------------------------------------------- the recipe


def test_crops_are_windows_keyed_by_image_and_epoch() -> None:
    images = torch.randint(256, (40, 3, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    indices = torch.arange(40)
    seen = tokenizer_train.crop_and_flip(images, Keys(0, 0, indices), 8)
    places = set()
    for image, crop in zip(images, (seen * 255).round().byte(), strict=True):
        for mirrored in (False, True):
            source = crop.flip(2) if mirrored else crop
            for top, left in np.ndindex(3, 3):
                if torch.equal(image[:, top : top + 8, left : left + 8], source):
                    places.add((mirrored, top, left))
                    break
            else:
                continue
            break
        else:
            raise AssertionError("no window of the image")
    assert len(places) > 12  # of 18
    alone = tokenizer_train.crop_and_flip(images[5:6], Keys(0, 0, indices[5:6]), 8)
    assert torch.equal(alone, seen[5:6])
    assert not torch.equal(tokenizer_train.crop_and_flip(images, Keys(0, 1, indices), 8), seen)
    whole = tokenizer_train.crop_and_flip(images, Keys(0, 0, indices), 10)
    straight = (whole == images / 255).flatten(1).all(dim=1)
    assert 10 < straight.sum() < 30 and torch.equal(whole[~straight].flip(3), images[~straight] / 255)


def test_crops_of_any_shape_and_any_channels() -> None:
    images = torch.randint(256, (5, 13, 6, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = (tokenizer_train.crop_and_flip(images, Keys(0, 0, torch.arange(5)), (4, 8)) * 255).round().byte()
    assert seen.shape == (5, 13, 4, 8)
    for image, crop in zip(images, seen, strict=True):
        windows = [image[:, top : top + 4, left : left + 8] for top in range(3) for left in range(2)]
        assert any(torch.equal(crop, window) or torch.equal(crop.flip(2), window) for window in windows)


def test_bands_and_heights_and_widths_train() -> None:
    torch.manual_seed(0)
    shape = TransformerShape(64, 1, 1, 64)
    spec = TokenizerSpec.unscaled("vit_vqgan", (8, 24), 4, num_codes=12, code_dim=6, channels=5)
    model = VQTraining(ViTVQGAN(spec, shape, shape), Discriminator(spec.image_size, widest=8, channels=5))
    with torch.no_grad():  # as above
        model.discriminator.opinion.bias.fill_(2)
    images = torch.rand(4, 5, 8, 24)
    losses = vq_losses(model(images), images)
    assert moved(model, weighted_sum(losses)) == {name for name, _ in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.* codes used")
@pytest.mark.parametrize(
    ("kind", "size", "load", "patch"),
    [
        ("patch_kmeans", (16, 32), 36, 4),
        ("patch_kmeans", 7, 36, 1),
        ("patch_kmeans", 4, 36, 4),
        ("vit_vqgan", (16, 32), (20, 36), 4),
        ("vit_vqgan", 2, 4, 1),
        ("vit_vqgan", 7, 7, 7),
    ],
)
def test_any_size_patch_and_grid(kind, size, load, patch, tmp_path) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    changes = {"kind": kind, "image_size": size, "load_size": load, "patch": patch, "epochs": 0.02}
    config = replace(tokenizer_train.PRESETS["smoke"], num_codes=8, code_dim=4, fit_images=100, **changes)
    tokenizer_train.main(replace(config, out=str(tmp_path / "run"), refine_steps=2 * (kind == "patch_kmeans")))
    tokenizer = tokenizers.load(tmp_path / "run" / "tokenizer.safetensors")
    assert tokenizer.spec.grid == (height // patch, width // patch)
    assert tokenizer.encode(torch.rand(2, 3, height, width)).shape == (2, *tokenizer.spec.grid)


def held_out_digits() -> Tensor:
    return ImageDataset(DigitsSource("validation"), (32, 32)).__getitems__(list(range(360))).images / 255


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_smoke_through_the_command_line(tmp_path) -> None:
    out = tmp_path / "run"
    finished = run("tokenizer_train", "smoke", "--out", out)
    assert finished.returncode == 0, finished.stderr
    result, lines = result_of(out), metrics(out)
    assert f"{result['codes_used']} of 64 codes used" in finished.stdout
    assert f"PSNR {result['psnr']:.2f} dB" in finished.stdout
    tokenizer = tokenizers.load(out / "tokenizer.safetensors")
    images = held_out_digits()
    ids = tokenizer.encode(images)
    assert ids.shape == (360, 8, 8) and len(ids.unique()) == result["codes_used"] > 32
    found = quality(tokenizer.decode(ids), images).mean(dim=0).tolist()
    assert found == pytest.approx([result["psnr"], result["ssim"]], rel=1e-3)
    assert [at["step"] for at in lines] == list(range(1, 179))
    assert found[0] > 15 > 5 > -10 * np.log10(lines[0]["pixels"])
    for picture in ("reconstructions.png", "losses.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


class Killed(Exception):
    pass


def test_killed_and_resumed_gives_the_same_bits(tmp_path, monkeypatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tokenizer_train.main(replace(TINY, out=str(whole)))
    crop, calls = tokenizer_train.crop_and_flip, []

    def crop_until_killed(*arguments) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise Killed
        return crop(*arguments)

    monkeypatch.setattr(tokenizer_train, "crop_and_flip", crop_until_killed)
    with pytest.raises(Killed):
        tokenizer_train.main(replace(TINY, out=str(broken)))
    monkeypatch.undo()
    assert [path.name for path in (broken / "checkpoints").glob("step-*")] == ["step-00000003"]
    kept = load_file(broken / "checkpoints/step-00000003/model.safetensors")
    assert kept["restarted"] > 0 and kept["counts"].sum() == 228 * 64  # of the third step
    tokenizer_train.main(replace(TINY, out=str(broken), resume=True))
    for name in ("tokenizer.safetensors", "checkpoints/step-00000006/model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    names = ("loss", "perplexity", "grad_norm")
    learned = [[[at[name] for name in names] for at in metrics(run)] for run in (whole, broken)]
    assert learned[0] == learned[1] and len(learned[0]) == 6
    tokenizer_train.main(replace(TINY, out=str(broken), resume=True))  # as if killed before judging
    assert (broken / "tokenizer.safetensors").read_bytes() == (whole / "tokenizer.safetensors").read_bytes()
    last = load_file(whole / "checkpoints/step-00000006/model.safetensors")
    assert last["restarted"] > kept["restarted"], "else the resumed run did not have to restart the same codes"


def test_two_processes_train_the_same_tokenizer(tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    changes = {"epochs": 4 / 6, "warmup_epochs": 0.0, "num_codes": 64}
    tokenizer_train.main(replace(TINY, out=str(one), **changes))
    script = RECIPES / "tokenizer_train.py"
    finished = distributed(2, script, "--config", one / "config.json", "--out", two)
    assert finished.returncode == 0, finished.stderr
    for name in ("loss", "perplexity"):
        values = [[at[name] for at in metrics(run)] for run in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-3), name
    # Sums are rounded otherwise on two processes; a restarted code would be elsewhere altogether.
    books = [tokenizers.load(run / "tokenizer.safetensors").codebook for run in (one, two)]
    torch.testing.assert_close(*books, atol=2e-3, rtol=0)
    checkpoint = load_file(two / "checkpoints/step-00000004/model.safetensors")
    assert checkpoint["restarted"] > 0 and result_of(two)["processes"] == 2
    assert result_of(two)["psnr"] == pytest.approx(result_of(one)["psnr"], rel=1e-3)


@pytest.mark.filterwarnings("ignore:.* codes used")
def test_a_discriminator_and_vgg_train_through_the_recipe(tmp_path, vgg_file) -> None:
    out = tmp_path / "run"
    extra = {"batch_size": 2, "epochs": 2 / 718, "warmup_epochs": 0.0}
    tokenizer_train.main(replace(TINY, out=str(out), adversarial=True, perceptual_vgg=str(vgg_file), **extra))
    lines = metrics(out)
    assert len(lines) == 2 and {"perceptual", "adversarial", "discriminator"} <= lines[0].keys()
    first, second = (at["discriminator"] for at in lines)
    assert first != second
    assert not any("discriminator" in name for name in load_file(out / "tokenizer.safetensors"))


def test_patch_kmeans_is_the_default(tmp_path) -> None:
    config = tokenizer_train.PRESETS["digits"]
    assert config.kind == "patch_kmeans"
    tokenizer_train.main(replace(config, out=str(tmp_path / "run")))
    result = result_of(tmp_path / "run")
    tokenizer = tokenizers.load(tmp_path / "run" / "tokenizer.safetensors")
    assert isinstance(tokenizer, tokenizers.PatchKMeans) and tokenizer.spec.grid == (8, 8)
    assert result["codes_used"] >= 60 and result["psnr"] > 26
    assert (tmp_path / "run" / "reconstructions.png").exists()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Forty crops of 64 pixels, two classes."""
    root = tmp_path_factory.mktemp("photographs")
    for name, image in zip(("china", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir()
        for at in range(20):
            Image.fromarray(image[at * 16 : at * 16 + 64, at * 24 : at * 24 + 64]).save(
                root / name / f"{at:02}.png"
            )
    return root


@pytest.mark.filterwarnings("ignore:.* codes used")
def test_a_folder_is_split_and_a_tokenizer_refined(photographs, tmp_path) -> None:
    config = replace(
        tokenizer_train.PRESETS["photos"], data=str(photographs), image_size=64, num_codes=64, workers=0
    )
    train, held_out = tokenizer_train.open_data(config)
    names = [[part.read(index).name for index in range(len(part))] for part in (train, held_out)]
    assert names[1] == ["china/19.png", "flower/19.png"] and len({*names[0], *names[1]}) == 40
    named = tokenizer_train.open_data(replace(config, split="china", validation_split="flower"))
    assert [len(part) for part in named] == [20, 20] and len(named[1].read(0).data) > 0
    tokenizer_train.main(replace(config, out=str(tmp_path / "run"), refine_steps=2))
    tokenizer = tokenizers.load(tmp_path / "run" / "tokenizer.safetensors")
    assert isinstance(tokenizer, tokenizers.RefinedPatchKMeans)


def test_a_collapsed_codebook_is_warned_of(photographs, tmp_path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(20):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(flat / f"{number}.png")
    config = replace(
        tokenizer_train.PRESETS["photos"], data=str(photographs), image_size=64, num_codes=64, workers=0
    )
    mixed = SourceSubset(open_source(str(flat), None), [19])
    parts = tokenizer_train.open_data(config)[0], mixed
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match=r"\d of 64 codes used"):
        patch.setattr(tokenizer_train, "open_data", lambda _: parts)
        tokenizer_train.main(replace(config, out=str(tmp_path / "run")))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preset": "published"}, "preset published needs --data"),
        ({"data": "{empty}"}, "no images below it"),
        ({"data": "{few}"}, "3 images in .* expected at least 20"),
        ({"image_size": 30}, r"image_size \(30, 30\).*not a multiple of patch 4"),
        ({"kind": "patch_kmeans", "image_size": 30}, r"image_size \(30, 30\).*not a multiple of patch 4"),
        ({"kind": "patch_kmeans", "fit_images": 2, "num_codes": 500}, "patches cannot give 500 codes"),
        ({"kind": "patch_kmeans", "adversarial": True}, "--adversarial has no meaning for --kind patch_kmeans"),
        ({"refine_steps": 5}, "--refine-steps has no meaning for --kind vit_vqgan"),
        ({"load_size": 28}, "--load-size 28.*at least --image-size 32"),
        ({"load_size": (40, 28)}, r"--load-size \(40, 28\).*at least --image-size 32"),
        ({"bands": 5}, r"expected 5 band\(s\)"),
        ({"bands": 5, "perceptual_vgg": "{few}/none"}, "--perceptual-vgg with --bands 5: VGG16 takes 3 channels"),
        ({"batch_size": 5000}, "batch size 5000: expected 1 to 1437"),
        ({"perceptual_vgg": "{few}/none"}, "no VGG16 weights at"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(change, message, tmp_path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    (tmp_path / "empty").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(few / f"{number}.png")
    paths = {"few": few, "empty": tmp_path / "empty"}
    change = {name: v.format(**paths) if isinstance(v, str) else v for name, v in change.items()}
    out = tmp_path / "run"
    with pytest.raises(UserError, match=message) as error:
        tokenizer_train.main(replace(tokenizer_train.PRESETS["smoke"], out=str(out), **change))
    assert "\n" not in str(error.value) and not out.exists()
