"""`mtm_pretrain --init-from`: the weights of another masked token model, and nothing else of it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mtm_pretrain
import numpy as np
import pytest
import timm
from safetensors.torch import load_file
from support.running import digits_codebook, metrics, unlabeled_digits

from seitpp import StoreWriter, TokenStore
from seitpp.data.digits import digits
from seitpp.engine.contents import content_fingerprint
from seitpp.errors import UserError
from seitpp.models import MTM, save_classifier, save_release
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.store import grow

SMOKE = replace(mtm_pretrain.PRESETS["smoke"], dropout=0.0)


@pytest.fixture(scope="module", autouse=True)
def few_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All runs that name no store train on 768 images without labels."""
    store = unlabeled_digits(tmp_path_factory.mktemp("tokens") / "store", 768)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "SMOKE", replace(SMOKE, store=store))
        yield


def pretrain(out: Path, **settings) -> Path:
    mtm_pretrain.main(replace(SMOKE, out=str(out), **settings))
    return out


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    return pretrain(tmp_path_factory.mktemp("first") / "run")


def same_weights(one: Path, two: Path) -> bool:
    found, expected = load_file(one), load_file(two)
    return found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected)


def test_it_begins_with_those_weights_at_step_0(first: Path, tmp_path: Path) -> None:
    for number, path in enumerate((first, first / "model.safetensors")):
        still = pretrain(
            tmp_path / f"still-{number}", init_from=str(path), base_lr=0.0, weight_decay=0.0, epochs=1
        )
        assert same_weights(still / "model.safetensors", first / "model.safetensors")
        lines = metrics(still)
        assert lines[0]["step"] == 1 and lines[0]["loss"] == pytest.approx(metrics(first)[-1]["loss"], abs=0.02)


def test_a_run_goes_on_on_a_store_that_has_grown(tmp_path: Path) -> None:
    """The grown store is another one for --resume, and each run says which it was trained on."""
    whole, path = TokenStore(digits().store, "train"), tmp_path / "tokens"
    common = {"codebook": whole.codebook, "grid": whole.grid, "class_names": whole.class_names}
    for store, images in ((path, range(512)), (tmp_path / "more", range(512, 768))):
        with StoreWriter(store, tokenizer=whole.tokenizer, **common) as writer:
            writer.add_batch(whole.ids(images), whole.labels[np.array(images)])
    before = pretrain(tmp_path / "before", store=str(path))
    grow.append(path, [tmp_path / "more"], split="train")
    with pytest.raises(UserError, match="has the content"):
        pretrain(before, store=str(path), resume=True)
    still = {"base_lr": 0.0, "weight_decay": 0.0, "epochs": 1}
    after = pretrain(tmp_path / "after", store=str(path), init_from=str(before), **still)
    assert same_weights(after / "model.safetensors", before / "model.safetensors")
    assert metrics(after)[0]["loss"] == pytest.approx(metrics(before)[-1]["loss"], abs=0.1)
    states = [json.loads((run / "inputs.json").read_text())["store"] for run in (before, after)]
    assert states[0] != states[1] == content_fingerprint(str(path))


def test_an_official_checkpoint_is_taken(tmp_path: Path) -> None:
    sizes = {"encoder": "mtm_vit_tiny", "grid": (8, 8), "num_codes": 64, "decoder_width": 64, "decoder_heads": 2}
    official, model = MTM(**sizes), MTM(**sizes)
    save_release(official, tmp_path / "official.pth")
    mtm_pretrain.start_from(model, str(tmp_path / "official.pth"), TokenStore(digits().store, "train"))
    expected = official.state_dict()
    assert all(value.equal(expected[name]) for name, value in model.state_dict().items())


def json_settings(run: Path) -> dict:
    from safetensors import safe_open

    with safe_open(run / "model.safetensors", "pt") as file:
        header = file.metadata()
    return next(json.loads(value)["settings"] for value in header.values() if "settings" in value)


def test_a_checkpoint_of_its_own_wins(first: Path, tmp_path: Path) -> None:
    """Resumed when the other model is gone, the run goes on to the same bits."""
    start = shutil.copytree(first, tmp_path / "start")
    folder = pretrain(tmp_path / "run", init_from=str(start))
    expected = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints" / (folder / "checkpoints/LATEST").read_text())
    shutil.rmtree(start)
    pretrain(folder, init_from=str(start), resume=True)
    assert (folder / "model.safetensors").read_bytes() == expected


def test_another_model_is_refused(first: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"other sizes: decoder_blocks\.1\..* is \(.*\) there, nothing in this run"
    ):
        pretrain(out, init_from=str(first), decoder_depth=1)
    other = tmp_path / "other.safetensors"
    save_pretrained(other, MTM(**json_settings(first)), "0" * 64)
    with pytest.raises(UserError, match="is not the codebook 0000000000000000 that"):
        pretrain(out, init_from=str(other))
    classifier = timm.create_model("seit_vit_nano", img_size=8, in_chans=32, num_classes=10)
    save_classifier(tmp_path / "classifier.safetensors", classifier, digits_codebook(), class_names=None)
    with pytest.raises(UserError, match="holds a classifier: expected a masked token model"):
        pretrain(out, init_from=str(tmp_path / "classifier.safetensors"))
    assert not out.exists()
