"""`--fraction`: a share of the training images, the same on every process, in every recipe that trains."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.data import global_batches
from support.running import TRAINING_RECIPES, recipe, smoke_config

from seitpp import TokenStore
from seitpp.data.dataset import Chosen, TokenDataset, few_labels, fraction_of, training_loader
from seitpp.data.digits import digits
from seitpp.data.order import BatchOrder
from seitpp.errors import UserError


def test_a_share_is_of_its_size_chosen_by_the_seed_and_a_part_of_a_larger_one() -> None:
    shares = {fraction: fraction_of(1001, fraction, seed=3) for fraction in (0.2, 0.6, 1.0)}
    assert [len(share) for share in shares.values()] == [200, 601, 1001]
    assert set(shares[0.2]) < set(shares[0.6]) and np.array_equal(shares[1.0], np.arange(1001))
    assert all((np.diff(share) > 0).all() for share in shares.values())
    assert not np.array_equal(shares[0.2], fraction_of(1001, 0.2, seed=4))
    assert np.histogram(shares[0.6], 10, (0, 1001))[0].min() > 45  # from all over the set
    # What a run has used must be found again after an upgrade.
    assert fraction_of(20, 0.3, seed=1).tolist() == [3, 5, 8, 14, 15, 16]
    assert len(fraction_of(3, 1e-9, seed=0)) == 1


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(
        UserError, match=r"--fraction .*: expected a fraction of the images, more than 0 and at most 1"
    ):
        fraction_of(10, fraction, seed=0)


def test_batches_keep_the_images_own_numbers_on_any_number_of_processes() -> None:
    store = TokenStore(digits().store, "train")
    indices = fraction_of(len(store), 0.5, seed=0)
    some = Chosen(TokenDataset(store), indices)
    order = BatchOrder(len(some), 64, seed=0)
    for ranks in (1, 2):
        loaders = [
            training_loader(some, order, range(3), rank=rank, ranks=ranks, accumulation=1, workers=0)
            for rank in range(ranks)
        ]
        steps = [list(batches) for batches in zip(*loaders, strict=True)]
        seen = [np.concatenate([batch.indices.numpy() for batch in batches]) for batches in steps]
        expected = [indices[positions] for positions in global_batches(order, range(3), 1, 1)]
        assert all(np.array_equal(one, two) for one, two in zip(seen, expected, strict=True))
        batch = steps[0][0]
        assert np.array_equal(batch.labels.numpy(), store.labels[batch.indices.numpy()])
        assert np.array_equal(batch.ids.numpy(), store.ids(batch.indices.numpy()))


def test_few_labels_are_so_many_of_each_class() -> None:
    labels = TokenStore(digits().store, "train").labels
    indices = few_labels(labels, 5, seed=2)
    assert np.bincount(labels[indices]).tolist() == [5] * 10 and len(set(indices)) == 50
    with pytest.raises(UserError, match="200 labels per class: one class has"):
        few_labels(labels, 200, seed=2)


@pytest.mark.parametrize("name", TRAINING_RECIPES)
def test_every_recipe_that_trains_takes_a_share(name: str, tmp_path: Path) -> None:
    config = replace(smoke_config(name, tmp_path), fraction=1.5)
    with pytest.raises(UserError, match=r"--fraction 1\.5: expected a fraction"):
        recipe(name).main(config)
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_it_used(tmp_path: Path, capsys) -> None:
    module, store = recipe("mtm_pretrain"), TokenStore(digits().store, "train")
    config = module.PRESETS["smoke"]
    module.main(replace(config, fraction=0.2, epochs=1, out=str(tmp_path / "run")))
    indices = fraction_of(len(store), 0.2, seed=0)
    size = sum(len(store.codec.encode(store[index][0].ravel())) for index in indices.tolist())
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["training_images"], result["training_bytes"], result["steps"]) == (287, size, 2)
    assert f"--fraction 0.2: 287 of 1,437 training images, {size:,} bytes of ids" in capsys.readouterr().out
    assert store.payload_sizes.sum() == store.payload_bytes


def test_image_recipes_read_a_share_of_their_images(tmp_path: Path) -> None:
    module = recipe("tokenizer_train")
    smoke = replace(module.PRESETS["smoke"], fraction=0.5, epochs=1, batch_size=128, out=str(tmp_path / "run"))
    module.main(smoke)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["training_images"], result["steps"]) == (718, 5) and "training_bytes" not in result
