"""Checkpoints: the same bits come back; damaged and foreign ones are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from seitpp.engine import checkpoint
from seitpp.engine.distributed import OptimizerState


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.randn(7, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = checkpoint.tensors_of(model, OptimizerState(optimizer), ema=None)
    checkpoint.save(folder, step, data_fingerprint="store-a", tensors=tensors)


def newest(folder) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.newest(folder))


def test_a_checkpoint_brings_back_the_bits(tmp_path) -> None:
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer)
    other, other_optimizer = trained(seed=1)
    found = newest(tmp_path)
    checkpoint.restore(
        found, data_fingerprint="store-a", model=other, optimizer=OptimizerState(other_optimizer), ema=None
    )
    assert found.step == 3
    for one, two in ((model, optimizer), (other, other_optimizer)):
        one(torch.ones(1, 4)).sum().backward()
        two.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_two_checkpoints_are_kept_and_latest_names_the_newest(tmp_path) -> None:
    model, optimizer = trained()
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000002", "step-00000003"]
    assert (tmp_path / "LATEST").read_text() == "step-00000003"
    assert checkpoint.newest(tmp_path / "none") is None


def two_checkpoints(folder: Path) -> list[Path]:
    """The files of the newer of two."""
    model, optimizer = trained()
    save(folder, 1, model, optimizer)
    save(folder, 2, model, optimizer)
    return sorted((folder / "step-00000002").iterdir())


def test_a_flipped_bit_in_any_file_is_refused_and_the_checkpoint_before_taken(tmp_path) -> None:
    generator, paths = np.random.default_rng(0), two_checkpoints(tmp_path)
    for trial in range(300):
        path = paths[trial % len(paths)]
        whole = path.read_bytes()
        data = bytearray(whole)
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        path.write_bytes(data)
        with pytest.warns(UserWarning, match="going back to the checkpoint before it"):
            assert newest(tmp_path).step == 1, path
        path.write_bytes(whole)
    assert newest(tmp_path).step == 2


def test_a_missing_file_is_refused_and_the_checkpoint_before_taken(tmp_path) -> None:
    for path in two_checkpoints(tmp_path):
        whole = path.read_bytes()
        path.unlink()
        with pytest.warns(UserWarning, match="going back to the checkpoint before it"):
            assert newest(tmp_path).step == 1
        path.write_bytes(whole)


def test_only_damaged_checkpoints_are_an_error(tmp_path) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    (tmp_path / "step-00000001" / "model.safetensors").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match=r"model\.safetensors is not the file that was saved"),
        pytest.raises(checkpoint.CheckpointError, match="none of the 1 checkpoints"),
    ):
        newest(tmp_path)


def test_a_checkpoint_of_another_model_or_store_is_refused(tmp_path) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    found = newest(tmp_path)
    other = nn.Sequential(nn.Linear(4, 6))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(
        checkpoint.CheckpointError, match=r"another model: 0\.bias is \(5,\) there, \(6,\) in this run"
    ):
        checkpoint.restore(
            found,
            data_fingerprint="store-a",
            model=other,
            optimizer=OptimizerState(torch.optim.AdamW(other.parameters())),
            ema=None,
        )
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(checkpoint.CheckpointError, match="trained on the data store-a, this run reads store-b"):
        checkpoint.restore(
            found, data_fingerprint="store-b", model=model, optimizer=OptimizerState(optimizer), ema=None
        )
