"""Stores, models, tokenizers, settings and runs of earlier versions are read for ever.

tests/golden/files_v1 was written by the version that had no version numbers in its headers; the stores of both
versions are in tests/store. A file here never changes.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.paths import GOLDEN, RECIPES
from support.running import metrics, recipe, result_of
from torch import Tensor

from downstream.segmentation.model import load_segmenter
from seitpp import tensors, tokenizers
from seitpp.engine import checkpoint, config
from seitpp.engine.checkpoint import CheckpointError
from seitpp.engine.config import ConfigError, load_config
from seitpp.engine.folder import choose_folder
from seitpp.models.stem import ModelError
from seitpp.models.weights.pretrained import load_pretrained, load_pretrained_tokenadapt, save_pretrained
from seitpp.tokenizers import TokenizerError

FILES = GOLDEN / "files_v1"
BOOK = "ab" * 32
SETTINGS = sorted(path.stem for path in (FILES / "configs").iterdir())


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FILES / "expected.safetensors")


@torch.no_grad()
def test_models_compute_what_they_computed(expected: dict[str, Tensor]) -> None:
    maps, ids = expected["maps"], expected["ids"]
    classifier, tagger, mtm = (
        load_pretrained(FILES / f"{name}.safetensors") for name in ("classifier", "mtm_classifier", "mtm")
    )
    adapt = load_pretrained_tokenadapt(FILES / "tokenadapt.safetensors")
    segmenter = load_segmenter(FILES / "segmenter.safetensors")
    outputs = {
        "classifier": classifier.model(maps),
        "mtm_classifier": tagger.model(ids),
        "mtm": mtm.model.encoder(ids),
        "tokenadapt": adapt.model.convert(maps),
        "segmenter": segmenter.model(ids),
    }
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    assert {loaded.codebook for loaded in (classifier, tagger, mtm, adapt, segmenter)} == {BOOK}
    assert classifier.class_names == segmenter.class_names == ["cat", "dog", "bird"]
    assert classifier.window == (8, 8) and tagger.multi_label and not classifier.multi_label
    assert segmenter.pixels_per_token == 4 and segmenter.short_side == 32


@pytest.mark.parametrize("name", ["patch_kmeans", "refined", "vit_vqgan", "compact"])
def test_tokenizers_give_the_same_ids(name: str, expected: dict[str, Tensor]) -> None:
    tokenizer = tokenizers.load(FILES / f"{name}.safetensors")
    ids = tokenizer.encode(expected["images"])
    assert (ids == expected[f"{name}_ids"]).float().mean() > 0.98  # a near tie may round to the other code
    pixels = tokenizer.decode(expected[f"{name}_ids"])
    torch.testing.assert_close(pixels, expected[f"{name}_pixels"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_read_and_compared(name: str, tmp_path: Path) -> None:
    """As `--config` and as those of a run that is resumed: what is new since then has its default."""
    stored = FILES / f"configs/{name}.json"
    smoke = recipe(name).PRESETS["smoke"]
    loaded = load_config(type(smoke), stored)
    assert loaded == type(loaded)(**{**vars(smoke), "out": "run"})
    if not hasattr(smoke, "resume"):
        return
    shutil.copyfile(stored, tmp_path / "config.json")
    defaults = vars(type(smoke)())
    settings = {**vars(smoke), "out": str(tmp_path)}
    assert choose_folder(name, settings, out=str(tmp_path), resume=True, overwrite=False, defaults=defaults)[1]


def test_every_recipe_has_settings_of_before() -> None:
    assert {path.stem for path in RECIPES.glob("*.py")} == {*SETTINGS}


def test_a_run_goes_on(tmp_path: Path, monkeypatch) -> None:
    """One that was stopped in the middle, with its model, its optimizer and the fingerprints of its data."""
    shutil.copytree(FILES / "run", tmp_path / "run")
    shutil.copy(FILES / "patch_kmeans.safetensors", tmp_path)
    before = metrics(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    module = recipe("tokenadapt_train")
    module.main(
        config.parse(
            module.PRESETS,
            "digits",
            ["smoke", "--tokenizer", "patch_kmeans.safetensors", "--out", "run", "--resume"],
        )
    )
    after = metrics(tmp_path / "run")
    assert (
        after[: len(before)] == before
        and len(before) == 14
        and [line["step"] for line in after] == [*range(1, 23)]
    )
    assert result_of(tmp_path / "run")["steps"] == 22


def test_what_a_newer_version_has_written_is_refused(tmp_path: Path, monkeypatch) -> None:
    tokenizer, model = tokenizers.load(FILES / "vit_vqgan.safetensors"), load_pretrained(FILES / "mtm.safetensors")
    with monkeypatch.context() as newer:
        newer.setattr(tensors, "VERSION", 2)
        tokenizer.save(tmp_path / "tokenizer.safetensors")
        save_pretrained(tmp_path / "mtm.safetensors", model.model, BOOK)
    (tmp_path / "config.json").write_text(json.dumps({"version": 2, "seed": 0}))
    shutil.copytree(FILES / "run/checkpoints/step-00000014", tmp_path / "step-00000014")
    (tmp_path / "step-00000014/state.json").write_text(json.dumps({"version": "x", "step": 14, "store": ""}))
    readers = {
        "tokenizer.safetensors": (tokenizers.load, TokenizerError),
        "mtm.safetensors": (load_pretrained, ModelError),
        "config.json": (partial(load_config, config.RunConfig), ConfigError),
        "step-00000014": (checkpoint.load, CheckpointError),
    }
    for name, (read, error) in readers.items():
        with pytest.raises(error, match=f"{name}: .*version (2|'x') .*expected 1: upgrade seitpp"):
            read(tmp_path / name)
