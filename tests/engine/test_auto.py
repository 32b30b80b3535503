"""Preset `auto`: what is chosen for which images and which device, and who has the last word."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import mtm_pretrain
import numpy as np
import pytest
from support.paths import ROOT

from seitpp import StoreWriter
from seitpp.engine.auto import SAID, Facts, check_maskable, choose, explain, patches
from seitpp.engine.config import Choice, named_settings, parse, settings_table
from seitpp.engine.inputs import open_splits
from seitpp.errors import UserError
from seitpp.recipe import run_recipe

PRESETS = mtm_pretrain.PRESETS
PAGE = (ROOT / "docs/recipes.md").read_text()


def values(facts: Facts, **said) -> dict:
    return {name: choice.value for name, choice in choose(facts, said).items()}


def of_preset(name: str, names) -> dict:
    return {field: value for field, value in dataclasses.asdict(PRESETS[name]).items() if field in names}


def test_the_known_runs_are_what_is_chosen_for_their_images() -> None:
    imagenet = values(Facts(1_281_167, (32, 32), "cuda", processes=8, cores=12))
    assert imagenet == of_preset("plain", imagenet)
    with_adapt = values(Facts(1_281_167, (32, 32), "cuda", processes=8, cores=12, adapts=True))
    assert with_adapt == of_preset("published", with_adapt)
    few = values(Facts(1437, (8, 8), "cpu", cores=2))
    assert few | {"accumulation": None} == of_preset("digits", few)


def test_a_cpu_is_busy_for_minutes_to_an_hour() -> None:
    """At 8,000 to 24,000 patches a second, the slow and the fast core on which the small model was measured."""
    for images, grid in ((5_000, (32, 32)), (1_437, (8, 8)), (200, (32, 32)), (20_000, (16, 16))):
        chosen = values(Facts(images, grid, "cpu", cores=2))
        work = images * chosen["epochs"] * patches(grid, chosen)
        assert work / 24_000 / 60 > 1 and work / 8_000 / 60 < 90, (images, grid)
        assert chosen["model"] == "mtm_vit_nano" and chosen["precision"] == "no" and not chosen["compile"]
        assert images // chosen["batch_size"] * chosen["epochs"] >= 1100, "as many updates as for the digits"


def test_the_page_of_the_recipe_says_what_is_chosen() -> None:
    rows = re.findall(r"^\| ([\d,]+)[^|]*\| (a CPU|a GPU) \| `(\w+)` \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for images, device, model, batch, epochs in rows:
        chosen = values(Facts(int(images.replace(",", "")), (32, 32), "cpu" if "CPU" in device else "cuda"))
        assert (model, int(batch), int(epochs)) == (chosen["model"], chosen["batch_size"], chosen["epochs"])


def test_a_hundred_thousand_images_on_one_gpu() -> None:
    chosen = values(Facts(100_000, (32, 32), "cuda", cores=16))
    expected = {"model": "mtm_vit_small", "batch_size": 1024, "epochs": 400, "warmup_epochs": 40, "crop_size": 28}
    assert chosen.items() >= (expected | {"precision": "bf16", "compile": True, "accumulation": None}).items()
    assert PRESETS["plain"].base_lr < chosen["base_lr"] < PRESETS["digits"].base_lr
    assert values(Facts(100_000, (32, 32), "cuda", bf16=False))["precision"] == "fp16"


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("images", [20, 500, 3_000, 2_000_000])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_every_choice_can_be_trained(device: str, images: int, processes: int) -> None:
    chosen = values(Facts(images, (14, 20), device, processes=processes, cores=2))
    assert processes <= chosen["batch_size"] <= images and chosen["batch_size"] % processes == 0
    assert chosen["batch_size"] // processes % (chosen["accumulation"] or 1) == 0
    assert chosen["warmup_epochs"] < chosen["epochs"] and chosen["checkpoint_epochs"] <= chosen["epochs"]
    assert 1e-4 < chosen["base_lr"] * chosen["batch_size"] / 256 <= 3.1e-3, "the peak"


@pytest.mark.parametrize(
    ("grid", "crop_size"),
    [
        *[((32, 32), 28), ((16, 24), 14), ((16, 64), None), ((8, 8), None), ((12, 8), None), ((2, 4), None)],
        *[((7, 7), 6), ((7, 9), 6), ((15, 80), 14), ((17, 80), 16)],  # odd: no patches without a crop
    ],
)
def test_a_crop_is_even_and_leaves_small_and_long_grids_alone(grid, crop_size) -> None:
    assert values(Facts(1000, grid, "cpu"))["crop_size"] == crop_size


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 3), (1, 64), (2, 3)])
def test_a_grid_without_two_patches_is_refused(grid) -> None:
    with pytest.raises(UserError, match=rf"grid {grid[0]} x {grid[1]}: got [01] patches of 2 x 2"):
        choose(Facts(1000, grid, "cpu"), {})
    check_maskable((2, 4), (2, 4), 2)


def test_patches_of_one_token_and_sequences() -> None:
    assert values(Facts(1000, (7, 9), "cpu"), patch_size=1)["crop_size"] is None
    assert values(Facts(1000, (17, 30), "cpu"), patch_size=1)["crop_size"] == 15
    chosen = values(Facts(1000, (1, 64), "cpu", sequence=True))
    assert (chosen["patch_size"], chosen["crop_size"]) == (1, None)
    with pytest.raises(UserError, match="got 1 patches of 1 x 1"):
        choose(Facts(1000, (1, 1), "cpu", sequence=True), {})


def test_the_user_has_the_last_word_and_the_rest_follows_from_it() -> None:
    facts = Facts(5_000, (32, 32), "cpu", cores=2)
    said = {"model": "mtm_vit_small", "epochs": 50, "batch_size": 64}
    chosen = choose(facts, said)
    assert {name for name, choice in chosen.items() if choice.reason == SAID} == set(said)
    assert chosen["decoder_width"].value == 512 and chosen["warmup_epochs"].value == 5.0
    assert str(facts) == "5,000 training images, grid 32 x 32, a CPU"
    assert all(len(choice.reason) > 5 for choice in chosen.values())


def test_auto_is_the_preset_where_a_store_is_named_and_nothing_else_is(tmp_path: Path) -> None:
    def preset(*arguments: str) -> str:
        return parse(PRESETS, "digits", list(arguments)).preset

    assert preset("--store", "tokens") == preset("--epochs", "3", "--store=tokens") == "auto"
    assert preset() == preset("--epochs", "3") == "digits"
    assert preset("smoke", "--store", "tokens") == "smoke"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dataclasses.asdict(PRESETS["coloradapt"])))
    assert preset("--config", str(config), "--store", "tokens") == "coloradapt"
    assert named_settings(["smoke", "--no-compile", "--base-lr=1", "--out", "x"]) == {"compile", "base_lr", "out"}


def test_a_resumed_run_and_config_repeat_what_was_chosen(tmp_path: Path, monkeypatch) -> None:
    ids = np.random.default_rng(0).integers(8, size=(400, 4, 4))
    with StoreWriter(tmp_path / "store", codebook=np.eye(8, dtype=np.float32), grid=(4, 4)) as writer:
        writer.add_batch(ids, np.zeros(400, int))
    out, configs = tmp_path / "run", []

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["mtm_pretrain.py", *map(str, arguments)])
        run_recipe(configs.append, PRESETS, "digits", settle=mtm_pretrain.choose)

    call("--store", tmp_path / "store", "--out", out, "--epochs", 7)
    reasons = explain(configs[0], open_splits(tmp_path / "store", verify=False)[0])
    assert reasons["preset"] == Choice("auto", "380 training images, grid 4 x 4, a CPU")
    assert [name for name, choice in reasons.items() if choice.reason == SAID] == ["epochs"]
    lines = settings_table(configs[0], reasons).splitlines()
    assert "epochs                 7              you said" in lines
    assert not any(line.startswith("trackers") for line in lines)  # at its default
    out.mkdir()
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(configs[0])))
    with StoreWriter(tmp_path / "large", codebook=np.eye(8, dtype=np.float32), grid=(4, 4)) as writer:
        writer.add_batch(np.tile(ids, (10, 1, 1)), np.zeros(4_000, int))
    call("--store", tmp_path / "large", "--out", out, "--resume")  # of other settings if it were new
    call("--config", out / "config.json", "--seed", 3)
    first, resumed, repeated = configs
    assert (first.epochs, first.batch_size, first.preset) == (7, 64, "auto")
    assert resumed == dataclasses.replace(first, resume=True, store=str(tmp_path / "large"))
    assert repeated == dataclasses.replace(first, seed=3)
    call("--store", tmp_path / "large", "--out", tmp_path / "other", "--resume")  # no run there yet
    assert configs[-1].batch_size == 128
