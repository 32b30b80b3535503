"""Exported models: timm makes them again, the card says what the run knew, and nothing else is written."""

import json
import os
import re
import shutil
import stat
import sys
from dataclasses import asdict, replace
from pathlib import Path

import finetune
import pytest
import seit_train
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from support.exported import finished, pretrained, with_noise
from torch import nn

from seitpp import StoreWriter, cli
from seitpp.augment import CentralBoxes, EvalPixelView, EvalView
from seitpp.engine.config import load_config
from seitpp.errors import UserError
from seitpp.export import export_model
from seitpp.images.batches import ImageDataset
from seitpp.images.sources import open_source
from seitpp.models import (
    TokenAdapt,
    load_classifier,
    load_mtm,
    load_pretrained,
    pixel_classifier_from,
    save_classifier,
)
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.objectives import mask_plan

NAMES = [f"digit {label}" for label in range(10)]
DATA = {
    "images": {"train": 1437, "validation": 360},
    "grid": [8, 8],
    "num_codes": 64,
    "code_dim": 32,
    "codec": "ans",
    "fingerprint": "0f" * 32,
    "tokenizer": {"fingerprint": "e1" * 32, "spec": {"kind": "patch_kmeans"}},
}
MODELS = {
    "maps": ("seit_vit_nano", {"img_size": 8, "stem": "conv4"}, (8, 8)),
    "linear": ("seit_vit_nano", {"img_size": 4, "stem": "linear"}, (8, 8)),
    "resnet": ("seit_resnet18", {}, (6, 8)),
    "ids": ("mtm_vit_nano", {"img_size": (6, 8), "num_codes": 64}, (6, 8)),
}


def classifier(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, arguments, _ = MODELS[kind]
    return with_noise(timm.create_model(name, in_chans=32, num_classes=10, **arguments))


def trained(folder: Path, kind: str, **result: object) -> Path:
    """A run of seit_train, or of finetune where the model takes ids."""
    module = finetune if kind == "ids" else seit_train
    finished(folder, module, {"top1": 12.5, "top5": 50.0, **result})
    save_classifier(
        folder / "model.safetensors", classifier(kind), "cb" * 32, class_names=NAMES, window=MODELS[kind][2]
    )
    return folder


def from_timm(folder: Path, **arguments: object) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


def rows(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, flags=re.MULTILINE))


def example(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]


# What timm makes of it


@pytest.mark.parametrize("kind", MODELS)
def test_timm_makes_the_same_model(tmp_path: Path, kind: str) -> None:
    """Names of the tensors, their values, and the logits; then with a head of its own."""
    out = export_model(trained(tmp_path / "run", kind), tmp_path / "out")
    original, again = classifier(kind), from_timm(out)
    weights = load_file(out / "model.safetensors")
    assert list(again.state_dict()) == list(original.state_dict()) and set(weights) == set(again.state_dict())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in original.state_dict().items())
    inputs = torch.randint(64, (3, 6, 8)) if kind == "ids" else torch.randn(3, 32, *MODELS[kind][2])
    if kind == "linear":
        inputs = torch.randn(3, 32, 4, 4)
    with torch.no_grad():
        assert torch.equal(again(inputs), original(inputs))
        assert torch.equal(load_pretrained(out).model(inputs), original(inputs))
    assert list(again.pretrained_cfg["label_names"]) == NAMES
    fewer = from_timm(out, num_classes=3)
    head = original.pretrained_cfg["classifier"]
    assert fewer.get_submodule(head).weight.shape[0] == 3
    assert all(
        torch.equal(tensor, weights[name])
        for name, tensor in fewer.state_dict().items()
        if not name.startswith(f"{head}.")
    )


def test_a_model_of_pixels_and_its_transform(tmp_path: Path) -> None:
    """Fine-tuned to pixels: the card's example gives the logits of the recipe's own view."""
    torch.manual_seed(0)
    model = with_noise(pixel_classifier_from(classifier("maps"), 10, img_size=32))
    run = finished(tmp_path / "run", finetune, {"top1": 12.5}, data="photos", checkpoint="runs/tokens")
    save_classifier(run / "model.safetensors", model, None, class_names=NAMES)
    out = export_model(run, tmp_path / "out")
    picture = tmp_path / "pictures/picture.png"
    picture.parent.mkdir()
    Image.fromarray(torch.randint(256, (50, 70, 3), dtype=torch.uint8).numpy()).save(picture)
    card = (out / "README.md").read_text()
    found = {}
    exec(example(card).replace("FOLDER", str(out)).replace("PICTURE", str(picture)), found)
    batch = ImageDataset(open_source(str(picture.parent)), (32, 32), CentralBoxes((32, 32))).__getitems__([0])
    expected = model(EvalPixelView()(batch.images))
    # Pillow takes a box in single precision: of some pixels the last bit differs.
    torch.testing.assert_close(found["logits"], expected, atol=1e-3, rtol=0)
    assert "images of 32 x 32 pixels" in card and "codebook" not in card and "seitpp.models" not in example(card)
    assert (rows(card)["data"], rows(card)["initialized from"]) == ("photos", "runs/tokens")
    assert ModelCard(card).data.pipeline_tag == "image-classification"


def test_of_a_masked_token_model_the_encoder_and_all_of_it(tmp_path: Path) -> None:
    out = export_model(pretrained(tmp_path / "run"), tmp_path / "out")
    whole, codebook, *_ = load_mtm(out / "mtm/model.safetensors")
    original, *_ = load_mtm(tmp_path / "run/model.safetensors")
    assert codebook == "ab" * 32 == load_pretrained(out).codebook
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in original.state_dict().items())
    encoder, ids = from_timm(out), torch.randint(64, (3, 6, 8))
    assert list(encoder.state_dict()) == list(original.encoder.state_dict())
    everything = mask_plan(torch.zeros(3, 12), 0, 0)
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids), original.encode(ids, everything)[:, 0])
    card = (out / "README.md").read_text()
    assert "# mtm_vit_nano, pre-trained on the embedded digits" in card and "features = model(" in card
    assert rows(card)["linear probe of the frozen encoder, top-1, %"] == "68.25"
    assert rows(card)["loss of the last update, nats per hidden token"] == "4.159"
    assert "classes" not in rows(card)


def test_timm_takes_it_from_the_hub(tmp_path: Path) -> None:
    """From huggingface_hub's cache, as it lies there after a download."""
    out = export_model(trained(tmp_path / "run", "maps"), tmp_path / "out")
    cache = tmp_path / "cache/models--me--digits"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    shutil.copytree(out, cache / "snapshots" / ("0" * 40))
    model = timm.create_model("hf-hub:me/digits", pretrained=True, cache_dir=tmp_path / "cache").eval()
    maps = torch.randn(2, 32, 8, 8)
    assert torch.equal(model(maps), classifier("maps")(maps))


# The card


@pytest.mark.parametrize("kind", ["maps", "linear"])
def test_the_example_of_the_card_repeats_the_evaluation(tmp_path: Path, kind: str) -> None:
    out = export_model(trained(tmp_path / "run", kind), tmp_path / "out")
    codebook, ids = torch.randn(64, 32), torch.randint(64, (8, 8, 8))
    with StoreWriter(tmp_path / "store", codebook=codebook.numpy(), grid=(8, 8), split="validation") as writer:
        writer.add_batch(ids.numpy(), [0] * len(ids))
    found = {}
    text = example((out / "README.md").read_text()).replace("FOLDER", str(out))
    exec(text.replace("STORE", str(tmp_path / "store")), found)
    view = EvalView((8, 8), codebook, MODELS[kind][1]["img_size"])
    assert torch.equal(found["logits"], classifier(kind)(view(ids)))


def test_the_card_says_what_the_run_knew(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "maps", data=DATA)
    card = (export_model(run, tmp_path / "out") / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {"library_name": "timm", "tags": ["timm", "seitpp", "image-tokens"]}
    assert "\n# license: " in card.split("---")[1]
    facts = rows(card)
    assert facts["images"] == "train 1,437, validation 360" and facts["bytes per image"] == "44.1"
    assert facts["grid"] == "8 x 8 tokens" and facts["codes"] == "64 of dimension 32"
    assert (facts["codec"], facts["fingerprint of the store"]) == ("ans", "0f" * 8)
    assert facts["tokenizer"] == f"patch_kmeans {'e1' * 8}" and facts["classes"] == "10"
    assert facts["fingerprint of the codebook"] == "cb" * 8
    assert (facts["top-1, %"], facts["top-5, %"]) == ("12.5", "50")
    assert facts["recipe"] == "recipes/seit_train.py, preset smoke"
    assert (facts["updates"], facts["throughput"]) == ("22 of 128 images", "1,234 images/s")
    assert facts["seitpp"].endswith(", commit c0ffee")
    size = sum(parameter.numel() for parameter in classifier("maps").parameters()) / 1e6
    assert (
        f"A classifier of 10 classes with {size:.1f} M parameters. It takes images as tokens: maps of 8 x 8"
        in card
    )


def test_the_card_says_less_where_the_run_knew_less(tmp_path: Path) -> None:
    """An older run, an installed package."""
    run = trained(tmp_path / "run", "ids")
    result = json.loads((run / "result.json").read_text())
    gone = ("recipe", "data", "payload_bytes_per_image", "images_per_second", "top5")
    left = {name: value for name, value in result.items() if name not in gone}
    (run / "result.json").write_text(json.dumps({**left, "git_commit": None}))
    card = (export_model(run, tmp_path / "out") / "README.md").read_text()
    facts = rows(card)
    assert set(facts) == {
        *("fact", "metric", "---", "data", "fingerprint of the codebook", "classes", "top-1, %"),
        *("updates", "total seconds", "processes", "seitpp"),
    }
    assert facts["seitpp"] == result["seitpp"] and "None" not in card.split("```json")[0]
    assert "accelerate launch" not in card


def test_the_moving_average_and_its_figures(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "maps", top1_ema=75.25)
    average = with_noise(classifier("maps"))
    save_classifier(run / "model_ema.safetensors", average, None, class_names=NAMES, window=(8, 8))
    maps = torch.randn(2, 32, 8, 8)
    for ema, model, top1 in ((True, average, "75.25"), (False, classifier("maps"), "12.5")):
        out = export_model(run, tmp_path / f"out-{ema}", ema)
        card = (out / "README.md").read_text()
        assert torch.equal(from_timm(out)(maps), model(maps)) and rows(card)["top-1, %"] == top1
        assert ("moving average" in card) == ema


def test_the_command_of_the_card_has_the_settings_of_the_run(tmp_path: Path) -> None:
    """And shows no folder of the user's."""
    folder, secret = tmp_path / "run", tmp_path / "secret"
    finished(folder, seit_train, {"top1": 1.0}, store=str(secret / "imagenet-tokens"), seed=7, overwrite=True)
    save_classifier(folder / "model.safetensors", classifier("maps"), None, class_names=None, window=(8, 8))
    out = export_model(folder, tmp_path / "out")
    card = (out / "README.md").read_text()
    (line,) = re.findall(r"```sh\n(.*?)\n```", card, flags=re.DOTALL)
    assert line.replace("\\\n", "").split() == [
        *("accelerate", "launch", "recipes/seit_train.py", "--config", "recipe.json", "--out", "RUN"),
        *("--store", "imagenet-tokens"),
    ]
    config = load_config(seit_train.Config, out / "recipe.json")
    expected = replace(seit_train.PRESETS["smoke"], store="imagenet-tokens", seed=7)
    assert config == expected and json.loads(card.split("```json\n")[1].split("```")[0]) == json.loads(
        json.dumps({"version": 1, **asdict(expected)})
    )
    assert all(
        str(tmp_path) not in (out / name).read_text() for name in ("README.md", "recipe.json", "config.json")
    )


# The folder


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, folder: int, file: int) -> None:
    run = pretrained(tmp_path / "run")
    before = os.umask(umask)
    try:
        out = export_model(run, tmp_path / "new/out")
    finally:
        os.umask(before)
    modes = {str(path.relative_to(out)): stat.S_IMODE(path.stat().st_mode) for path in [out, *out.rglob("*")]}
    names = ("model.safetensors", "mtm/model.safetensors", "config.json", "recipe.json", "README.md")
    assert modes == {".": folder, "mtm": folder, **dict.fromkeys(names, file)}


def test_nothing_is_overwritten_and_the_run_stays_as_it_is(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "maps")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = export_model(run, tmp_path / "out")
    for taken in (out, run):
        with pytest.raises(UserError, match="exists already and nothing is overwritten"):
            export_model(run, taken)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def refuse_unfinished(run: Path) -> str:
    (run / "result.json").unlink()
    return r"no .*/result\.json: the run is not finished; .* --resume"


def refuse_no_run(run: Path) -> str:
    shutil.rmtree(run)
    return r"no .*/run/config\.json: expected the folder of a run"


def refuse_no_model(run: Path) -> str:
    (run / "model.safetensors").unlink()
    return r"no .*/model\.safetensors: expected a run of seit_train, finetune or mtm_pretrain"


def refuse_damaged_result(run: Path) -> str:
    (run / "result.json").write_text('{"top1": ')
    return r"result\.json cannot be read"


def refuse_damaged_model(run: Path) -> str:
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return r"model\.safetensors cannot be read"


def refuse_other_model(run: Path) -> str:
    save_pretrained(
        run / "model.safetensors",
        TokenAdapt((4, 4), crop=(4, 4), num_codes=8, code_dim=4, width=8, heads=1, mlp=8),
        "ab",
    )
    return r"model\.safetensors holds a TokenAdapt: expected a classifier or a masked token model"


REFUSALS = [value for name, value in globals().items() if name.startswith("refuse_")]


@pytest.mark.parametrize("refuse", REFUSALS, ids=lambda refuse: refuse.__name__)
def test_what_is_no_finished_run_is_one_line(tmp_path: Path, monkeypatch, capsys, refuse) -> None:
    run, out = trained(tmp_path / "run", "maps"), tmp_path / "out"
    message = refuse(run)
    monkeypatch.setattr(sys, "argv", ["seitpp", "export-model", str(run), str(out)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("error: ") and re.search(message, line), line
    assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())


def test_the_command(tmp_path: Path, monkeypatch, capsys) -> None:
    run = trained(tmp_path / "run", "maps", top1_ema=75.25)
    save_classifier(
        run / "model_ema.safetensors", with_noise(classifier("maps")), None, class_names=NAMES, window=(8, 8)
    )
    monkeypatch.setattr(sys, "argv", ["seitpp", "export-model", str(run), str(tmp_path / "out"), "--no-ema"])
    cli.main()
    said = capsys.readouterr().out
    assert "out: README.md, config.json, model.safetensors, recipe.json\n" in said and "names no license" in said
    maps = torch.randn(2, 32, 8, 8)
    assert torch.equal(load_classifier(tmp_path / "out/model.safetensors").model(maps), classifier("maps")(maps))
