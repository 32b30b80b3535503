"""The embedded digits: their split never changes, and their tokens are those of their tokenizer."""

from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from support.forks import run_forks

from seitpp import TokenStore, tokenizers
from seitpp.data.digits import digits, digits_images
from seitpp.errors import UserError


def test_the_split_of_the_digits_never_changes() -> None:
    (train, train_labels), (validation, labels) = digits_images("train"), digits_images("validation")
    assert train.shape == (1437, 3, 8, 8) and validation.shape == (360, 3, 8, 8)
    assert torch.bincount(labels).tolist() == [36] * 10
    assert validation.min() == 0 and validation.max() == 1
    assert labels[:20].tolist() == [0, 1, 6, 7, 9, 3, 8, 0, 6, 4, 6, 3, 1, 0, 6, 5, 8, 9, 0, 9]
    pixels = validation[:, 0].mul(16).sum(dim=(1, 2))
    assert pixels[:8].tolist() == [337.0, 338.0, 378.0, 325.0, 320.0, 327.0, 355.0, 340.0]
    assert len(train_labels) == 1437


def test_other_digits_than_those_of_before_are_refused(monkeypatch) -> None:
    changed = sklearn.datasets.load_digits()
    changed.images[700, 3, 3] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: changed)
    expected = f"scikit-learn {sklearn.__version__} have the SHA-256 .* install another scikit-learn"
    with pytest.raises(UserError, match=expected):
        digits_images("train")


def test_digits_are_tokenized_once_and_reused(tmp_path) -> None:
    cache, script = tmp_path / "cache", tmp_path / "digits.py"
    script.write_text("from seitpp.data.digits import digits; print(digits().store)")
    environment = {"XDG_CACHE_HOME": str(cache)}
    both = run_forks(script, environments=[environment, environment])
    assert both.returncode == 0, both.stderr
    store, other = both.stdout.splitlines()
    assert store == other and cache in Path(store).parents
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert run_forks(script, environments=[environment]).stdout.splitlines() == [store]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert len(list((cache / "seitpp").iterdir())) == 1


def test_stored_digits_are_those_of_the_tokenizer() -> None:
    data = digits()
    tokenizer = tokenizers.load(data.tokenizer)
    for split in ("train", "validation"):
        images, labels = digits_images(split)
        store = TokenStore(data.store, split)
        assert np.array_equal(store.ids(range(len(store))), tokenizer.encode(tokenizer.preprocess(images)).numpy())
        assert np.array_equal(store.labels, labels.numpy())
        assert store.tokenizer["fingerprint"] == tokenizer.fingerprint
    assert np.array_equal(store.codebook, tokenizer.codebook.numpy())
    assert store.class_names == [str(digit) for digit in range(10)]
