"""Recipes that need classes say so in one line, before they train or score."""

from pathlib import Path

import evaluate
import finetune
import probe
import pytest
import seit_train
import timm
from support.models import tiny_mtm
from support.running import digits_codebook, refused

from seitpp import StoreWriter, TokenStore
from seitpp.data.digits import digits
from seitpp.models import save_classifier
from seitpp.models.weights.pretrained import save_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A part of the digits, as a store whose validation images have no label but one; several an image; models."""
    folder = tmp_path_factory.mktemp("unlabeled")
    for split in ("train", "validation"):
        source = TokenStore(digits().store, split)
        ids, labels = source.ids(range(40)), source.labels[:40].tolist()
        common = {"codebook": source.codebook, "grid": source.grid, "split": split, "tokenizer": source.tokenizer}
        with StoreWriter(folder / "partly", class_names=source.class_names, **common) as writer:
            writer.add_batch(ids, labels if split == "train" else [labels[0], *[None] * 39])
        with StoreWriter(folder / "several", class_names=source.class_names, multi_label=True, **common) as writer:
            writer.add_batch(ids, [(label, (label + 1) % 10) for label in labels])
    model = timm.create_model("seit_vit_nano", num_classes=10, img_size=8, in_chans=32)
    save_classifier(folder / "classifier", model, digits_codebook(), class_names=None)
    save_pretrained(folder / "mtm.safetensors", tiny_mtm(), digits_codebook())
    return folder


@pytest.mark.parametrize(
    ("recipe", "checkpoint"),
    [(seit_train, None), (finetune, "mtm.safetensors"), (evaluate, "classifier")],
)
def test_what_needs_classes_refuses_images_without(folder, tmp_path, capfd, monkeypatch, recipe, checkpoint):
    arguments = ["smoke", "--store", folder / "partly", "--out", tmp_path / "run"]
    arguments += ["--checkpoint", folder / checkpoint] if checkpoint else []
    words = (f"{recipe.__name__} needs classes: 39 of 40 images of split 'validation'", "have none; tokenize them")
    refused(capfd, monkeypatch, recipe, arguments, *words)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("several", "the training images have several each"),
        ("partly", "the 40 validation images are all of one class"),
    ],
)
def test_a_probe_needs_two_classes(folder, tmp_path, capfd, monkeypatch, store: str, words: str):
    arguments = ["--checkpoint", folder / "mtm.safetensors", "--out", tmp_path / "run"]
    refused(capfd, monkeypatch, probe, ["smoke", "--store", folder / store, *arguments], words)
