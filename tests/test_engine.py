"""The engine: order of the data, rates, checkpoints, command line."""

import dataclasses
import gc
import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import train
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from seitpp import TokenStore, files
from seitpp.data.dataset import BatchOrder, TokenDataset, evaluation_loader, training_loader
from seitpp.data.digits import digits
from seitpp.engine import checkpoint
from seitpp.engine.config import ConfigError, load_config, parse
from seitpp.engine.distributed import OptimizerState
from seitpp.engine.folder import RunError, choose_folder, enter_folder
from seitpp.engine.metrics import MetricsLog, count_flops
from seitpp.engine.optim import adamw, warmup_cosine
from seitpp.engine.run import Run
from seitpp.engine.signals import Stopped
from seitpp.engine.training import Training
from seitpp.errors import UserError
from seitpp.models import MTM
from seitpp.recipe import run_recipe

# ---------------------------------------------------------------------------------------------- data order


def global_batches(order: BatchOrder, steps: range, ranks: int, accumulation: int) -> list[list[int]]:
    """The images of each step, put together from all ranks and micro-batches."""
    shares = [
        list(order.micro_batches(steps, rank=rank, ranks=ranks, accumulation=accumulation))
        for rank in range(ranks)
    ]
    in_turn = [shares[rank][turn] for turn in range(len(steps) * accumulation) for rank in range(ranks)]
    per_step = ranks * accumulation
    return [np.concatenate(in_turn[at : at + per_step]).tolist() for at in range(0, len(in_turn), per_step)]


def test_global_batches_do_not_depend_on_processes_or_accumulation() -> None:
    order = BatchOrder(103, batch_size=24, seed=5)
    one = global_batches(order, range(10), ranks=1, accumulation=1)
    for ranks, accumulation in [(2, 1), (1, 2), (2, 3), (4, 1)]:
        assert global_batches(order, range(10), ranks, accumulation) == one
    assert global_batches(order, range(3, 10), 2, 1) == one[3:]


def test_an_epoch_shows_an_image_at_most_once_and_epochs_differ() -> None:
    order = BatchOrder(103, batch_size=24, seed=5)
    assert order.steps_per_epoch == 4
    epochs = [np.concatenate(global_batches(order, range(at, at + 4), 1, 1)).tolist() for at in (0, 4)]
    assert all(len(set(epoch)) == 96 and set(epoch) <= set(range(103)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert global_batches(BatchOrder(103, 24, seed=6), range(1), 1, 1)[0] != epochs[0][:24]


def test_order_is_pinned() -> None:
    """A resume after an upgrade must see the same images: this is what numpy's Philox gives, for ever."""
    assert BatchOrder(10, 5, seed=1).epoch_order(2).tolist() == [1, 4, 5, 0, 7, 6, 8, 2, 3, 9]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_images_of_the_order(workers: int) -> None:
    store = TokenStore(digits().store, "train")
    order = BatchOrder(len(store), 64, seed=0)
    loader = training_loader(
        TokenDataset(store), order, range(20, 25), rank=1, ranks=2, accumulation=1, workers=workers
    )
    for batch, expected in zip(
        loader, order.micro_batches(range(20, 25), rank=1, ranks=2, accumulation=1), strict=True
    ):
        assert batch.indices.tolist() == expected.tolist()
        assert batch.ids.dtype == torch.uint16
        assert np.array_equal(batch.ids.numpy(), store.ids(expected))
        assert np.array_equal(batch.labels.numpy(), store.labels[expected])


def test_evaluation_shows_every_image_once() -> None:
    """In the same batches on any number of processes, some of which may have none."""
    dataset = TokenDataset(TokenStore(digits().store, "validation"))
    for ranks in (1, 7, 13):
        loaders = [evaluation_loader(dataset, 32, rank=rank, ranks=ranks, workers=0) for rank in range(ranks)]
        seen = sorted(batch.indices.tolist() for loader in loaders for batch in loader)
        assert seen == [list(range(start, min(start + 32, 360))) for start in range(0, 360, 32)]


def test_too_large_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="batch size 200: expected 1 to 103"):
        BatchOrder(103, 200, 0)


# --------------------------------------------------------------------------------------------------- rates


def test_warmup_then_cosine() -> None:
    rates = [warmup_cosine(step, 110, 10, peak=2.0, start=0.5, final=0.1) for step in range(110)]
    assert rates[0] == 0.5 and rates[5] == pytest.approx(1.25) and rates[10] == 2.0
    assert rates[60] == pytest.approx((2.0 + 0.1) / 2)
    assert np.all(np.diff(rates[10:]) < 0) and 0.1 < rates[-1] < 0.102
    assert warmup_cosine(0, 5, 0, peak=1.0) == 1.0


def test_norms_biases_and_single_vectors_are_not_decayed() -> None:
    model = MTM(
        "mtm_vit_nano", grid=(8, 8), num_codes=64, code_dim=16, decoder_width=32, decoder_depth=1, decoder_heads=2
    )
    optimizer = adamw(model, 0.05, (0.9, 0.95))
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert decayed[id(parameter)] == (0.0 if parameter.ndim == 1 else 0.05), name
    assert id(model.encoder.pos_embed) not in decayed


# --------------------------------------------------------------------------------------------- checkpoints


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
    checkpoint.save(folder, step, "store-a", checkpoint.tensors_of(model, OptimizerState(optimizer), ema=None))


def newest(folder) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.newest(folder))


def test_a_checkpoint_brings_back_the_bits(tmp_path) -> None:
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer)
    other, other_optimizer = trained(seed=1)
    found = newest(tmp_path)
    checkpoint.restore(found, "store-a", other, OptimizerState(other_optimizer), None)
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
        checkpoint.restore(found, "store-a", other, OptimizerState(torch.optim.AdamW(other.parameters())), None)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(checkpoint.CheckpointError, match="trained on the data store-a, this run reads store-b"):
        checkpoint.restore(found, "store-b", model, OptimizerState(optimizer), None)


# ----------------------------------------------------------------------------------------- folder and log


def test_a_folder_with_something_in_it_is_never_written_over(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume, overwrite in ((False, False), (False, True), (True, False)):
        with pytest.raises(RunError, match="not empty and holds no run"):
            choose_folder("x", {}, str(tmp_path), resume, overwrite)
    with pytest.raises(RunError, match="--resume without --out"):
        choose_folder("x", {}, None, resume=True, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_overwritten_only_when_told_and_resumed_only_as_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/x", "runs/x-2"):
        folder, resumed = choose_folder("x", {"lr": 1}, None, False, False)
        assert str(folder) == expected and not folder.exists() and not resumed
        files.unlock(enter_folder(folder, {"lr": 1}, resumed, overwrite=False))
    run = Path("runs/x")
    assert choose_folder("x", {"lr": 1, "workers": 3}, "runs/x", resume=True, overwrite=False) == (run, True)
    assert choose_folder("x", {"lr": 1}, "runs/y", resume=True, overwrite=False) == (Path("runs/y"), False)
    with pytest.raises(RunError, match="lr 1 -> 2"):
        choose_folder("x", {"lr": 2}, "runs/x", resume=True, overwrite=False)
    with pytest.raises(RunError, match="not empty: name another --out, or pass --resume or --overwrite"):
        choose_folder("x", {"lr": 2}, "runs/x", resume=False, overwrite=False)
    (run / "old").touch()
    with pytest.raises(RunError, match="another process has run there just now"):
        enter_folder(run, {"lr": 2}, resumed=False, overwrite=False)
    folder, resumed = choose_folder("x", {"lr": 2}, "runs/x", resume=False, overwrite=True)
    files.unlock(enter_folder(folder, {"lr": 2}, resumed, overwrite=True))
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.json"]
    assert json.loads((run / "config.json").read_text()) == {"lr": 2}


def test_a_folder_is_locked_while_its_owner_lives(tmp_path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from seitpp.engine.folder import enter_folder;"
        "enter_folder(Path(sys.argv[1]), {}, False, False); print('locked', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "locked\n"
    with pytest.raises(RunError, match=rf"in use by process {owner.pid} on "):
        enter_folder(tmp_path, {}, resumed=True, overwrite=False)
    owner.kill()
    owner.wait()
    files.unlock(enter_folder(tmp_path, {}, resumed=True, overwrite=False))


def test_metrics_have_no_line_twice_after_a_kill(tmp_path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write([{"step": step, "loss": 1.0} for step in range(1, 6)])
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')
    log.keep_until(3)
    log.write([{"step": 4, "loss": 2.0}])
    assert [(line["step"], line["loss"]) for line in log.read()] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


# -------------------------------------------------------------------------------------------- command line


@dataclasses.dataclass(frozen=True)
class Config:
    out: str | None = None
    steps: int = 10
    scale: tuple[float, float] = (0.2, 1.0)
    resume: bool = False


PRESETS = {"published": Config(), "smoke": Config(steps=1)}


def test_command_line() -> None:
    assert parse(PRESETS, "smoke", []) == Config(steps=1)
    assert parse(PRESETS, "smoke", ["published", "--scale", "0.5", "1", "--resume"]) == Config(
        scale=(0.5, 1.0), resume=True
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publisched"], "unknown preset 'publisched': expected one of published, smoke; did you mean published?"),
        (["smoke", "--stepps", "3"], "unknown flag --stepps; did you mean --steps?"),
        (["--config", "none.json"], "--config none.json: expected the config.json of a run"),
    ],
)
def test_command_line_errors_suggest(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(PRESETS, "smoke", arguments)
    assert str(error.value).startswith(message)


def test_config_file_repeats_a_run(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(Config(steps=7, scale=(0.3, 0.4)))))
    assert parse(PRESETS, "smoke", ["--config", str(path), "--resume"]) == Config(None, 7, (0.3, 0.4), True)
    path.write_text(json.dumps({"steps": 7, "depth": 3}))
    with pytest.raises(ConfigError, match="differs in depth, out, resume, scale"):
        load_config(Config, path)


def test_what_the_user_can_mend_is_one_line_and_a_defect_keeps_its_traceback(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "smoke"])

    def fails(config: Config) -> None:
        raise RunError("no disk, buy one")

    with pytest.raises(SystemExit) as exit_:
        run_recipe(fails, PRESETS, "smoke")
    assert exit_.value.code == 2 and capsys.readouterr().err == "error: no disk, buy one\n"

    def stops(config: Config) -> None:
        raise Stopped("stopped after step 5", signal.SIGTERM)

    with pytest.raises(SystemExit) as exit_:
        run_recipe(stops, PRESETS, "smoke")
    assert exit_.value.code == 143 and capsys.readouterr().err == "stopped after step 5\n"

    def breaks(config: Config) -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_recipe(breaks, PRESETS, "smoke")


def test_flops_are_those_of_a_real_step() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16))
    # Forward, and twice that backward; the first layer's input needs no gradient.
    forward = 2 * (64 * 32 + 32 * 16)
    assert count_flops(model, torch.zeros(3, 64, device="meta")) == 3 * (3 * forward - 2 * 64 * 32)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 64)).sum().backward()
    assert counter.get_total_flops() == count_flops(model, torch.zeros(3, 64, device="meta"))
    assert all(p.grad is not None and p.device.type == "cpu" for p in model.parameters())


# ------------------------------------------------------------------------------------------ names of before


def test_a_field_of_one_version_ago_is_read_under_its_name_of_today(tmp_path, capsys) -> None:
    from mtm_pretrain import PRESETS, Config

    today = parse(PRESETS, "smoke", ["--crop-size", "7", "--tokenadapt-fraction", "0.25", "--color", "seitpp"])
    assert parse(PRESETS, "smoke", ["--crop=7", "--adapted", "0.25", "--colour", "seitpp"]) == today
    assert "--crop is called --crop-size now; the old name ends with the next version" in capsys.readouterr().err
    settings = asdict(today)
    for new, old in (("crop_size", "crop"), ("tokenadapt_fraction", "adapted"), ("mask_ratio", "mask")):
        settings[old] = settings.pop(new)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load_config(Config, tmp_path / "config.json") == today
    assert choose_folder("run", asdict(today), str(tmp_path), resume=True, overwrite=False) == (tmp_path, True)
    with pytest.raises(UserError, match="unknown flag --cropp; did you mean"):
        parse(PRESETS, "smoke", ["--cropp", "7"])


def test_a_run_that_is_over_is_gone_with_its_last_name(tmp_path) -> None:
    """Without the garbage collector: threads of process groups that live to the interpreter's end can abort it."""
    gc.collect()
    gc.disable()
    try:
        train(tmp_path / "run", steps=2)
        alive = [thing for thing in gc.get_objects() if type(thing) in (Run, Training)]
    finally:
        gc.enable()
    assert not alive
