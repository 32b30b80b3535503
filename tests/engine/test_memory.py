"""Memory: bytes of a step by hand and against a real one, how a batch is shared out, the table in the docs."""

import json
import runpy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from support.paths import ROOT
from support.running import TRAINING_RECIPES, metrics, recipe, smoke_config, unlabeled_digits
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import seitpp.models
from seitpp.engine import accumulation
from seitpp.engine.accumulation import Need, accumulations, choose_accumulation
from seitpp.engine.folder import RunError
from seitpp.engine.memory import footprint, state_bytes

MIB = 2**20


def summed(*shape: int):
    """A step on zeros of this shape whose loss is a sum, which saves nothing."""

    def loss(images: int, device: torch.device, model: nn.Module) -> Tensor:
        return model(torch.zeros(images, *shape, device=device)).sum()

    return loss


# ------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("precision", "saved"),
    [
        ("no", 4 * 64 + 4 * 128 + 128 + 4 * 128),  # inputs of linear, GELU and linear, and a mask of bools
        ("bf16", 2 * 64 + 2 * 128 + 128 + 2 * 128),
        ("fp16", 2 * 64 + 2 * 128 + 128 + 2 * 128),
    ],
)
def test_bytes_that_are_counted_by_hand(precision: str, saved: int) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 16))
    found = footprint(summed(64), precision, model)
    assert found.saved == saved and found.peak > saved
    assert state_bytes(model, 1) == 3 * 4 * (64 * 128 + 128 + 128 * 16 + 16) == state_bytes(model, 2) * 3 / 4
    assert all(p.device.type == "cpu" and not p.is_meta for p in model.parameters())


def test_it_is_what_a_real_step_saves() -> None:
    """Of a network without dropout and attention, in float32, where a CPU saves what a GPU does."""
    model = timm.create_model("seit_resnet18", img_size=28, in_chans=16, num_classes=10).train()
    found, sizes = footprint(summed(16, 28, 28), "no", model), []
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    for images in (2, 6):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=storages: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        ):
            loss = model(torch.zeros(images, 16, 28, 28)).sum()
        sizes.append(sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in own))
        loss.backward()
    assert found.saved == pytest.approx((sizes[1] - sizes[0]) / 4, rel=0.01)


def test_attention_keeps_no_matrix_and_a_frozen_part_nothing() -> None:
    saved = [footprint(summed(tokens, 64), "bf16", Block(64, 2)).saved for tokens in (128, 256)]
    assert saved[1] == pytest.approx(2 * saved[0], rel=0.01)  # with its matrix it would be 3.4 times
    frozen = nn.Linear(64, 64).requires_grad_(False)
    trained = nn.Linear(64, 64)

    def loss(images: int, device: torch.device, model: nn.Module, beside: nn.Module) -> Tensor:
        with torch.no_grad():
            inputs = beside(torch.zeros(images, 64, device=device)) + 1
        return model(inputs).sum()

    found = footprint(loss, "no", trained, frozen)
    assert found.saved == 4 * 64 < found.peak


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tests/bench/memory.py")))


def test_the_published_classifier(bench: SimpleNamespace) -> None:
    """Its figure is the sum over the layers of its blocks, and a little for stem and head, and is in the docs."""
    case = bench.CASES["seit_train, seit_vit_base"]()
    found, checkpointed = bench.footprints(case)
    by_hand = 12 * 197 * (2 * 4 * 768 + 2 * 768 * (1 + 3 + 1 + 1 + 4 + 4))
    assert found.saved == pytest.approx(by_hand, rel=0.05) and found.saved == pytest.approx(62.5 * MIB, rel=0.01)
    assert checkpointed.saved < found.saved / 8
    # One block at a time is done again: its share of the whole comes back on top.
    block = (found.saved - checkpointed.saved) / 12
    assert checkpointed.saved + block <= checkpointed.peak <= checkpointed.saved + 2 * block
    assert not bench.differs(
        bench.cells(case, found, checkpointed), bench.documented()["seit_train, seit_vit_base"]
    )


def test_the_table_in_the_docs_is_what_is_counted(bench: SimpleNamespace) -> None:
    """Two more rows; `python tests/bench/memory.py --check` checks all."""
    expected = bench.documented()
    assert list(expected) == list(bench.CASES)
    for name in ("mtm_pretrain, mtm_vit_small", "seit_train, seit_resnet18"):
        case = bench.CASES[name]()
        assert not bench.differs(bench.cells(case, *bench.footprints(case)), expected[name]), name
    assert bench.differs(["1.0", ""], ["1.2", ""]) and bench.differs(["1.0", ""], ["1.0", "1.0"])


# ----------------------------------------------------------------------------------------------- sharing


def gib(value: float) -> int:
    return round(value * 2**30)


@pytest.mark.parametrize(
    ("batch", "processes", "multiple", "free", "asked", "chosen"),
    [
        (4096, 1, 8, 300, None, 1),
        (4096, 1, 8, 79, None, 4),  # 1024 images: 62 of 71 GiB
        (4096, 8, 8, 79, None, 1),
        (4096, 1, 8, 15, None, 32),  # 128 images: 10 GiB; 256: 17
        (4096, 1, 8, 79, 16, 16),  # what is asked for and fits is taken
        (4096, 1, 8, 79, 4, 4),
        (96, 1, 8, 5, None, 3),  # 32 images: 3.9 GiB; 48: 4.9, and 4.5 are taken
        (100, 1, 4, 5.2, None, 5),  # 20 images; 25 and 50 cannot be paired
        (100, 1, 8, 300, None, 1),  # the view says what is wrong with 100 images
    ],
)
def test_as_few_micro_batches_as_fit(
    batch: int, processes: int, multiple: int, free: float, asked: int | None, chosen: int
) -> None:
    need = Need(an_image=gib(0.06), fixed=gib(2))
    limits = {"processes": processes, "multiple": multiple, "need": need, "free": gib(free)}
    assert choose_accumulation(batch, **limits, requested=asked, advice="") == chosen


def test_what_does_not_fit_is_one_line_that_says_what_does() -> None:
    limits = {"processes": 1, "multiple": 8, "need": Need(an_image=gib(0.06), fixed=gib(2))}
    with pytest.raises(RunError) as error:
        choose_accumulation(4096, **limits, free=gib(79), requested=2, advice="")
    assert str(error.value) == (
        "2048 images at a time need 124.9 GiB, 79.0 GiB are free on the device, of which 90% may be used: pass "
        "--accumulation 4 (1024 images at a time, 63.4 GiB), or leave it out"
    )
    with pytest.raises(RunError) as error:
        advice = "pass --grad-checkpointing, or take a smaller model"
        choose_accumulation(4096, **limits, free=gib(2.5), requested=None, advice=advice)
    assert str(error.value) == (
        "8 images at a time need 2.5 GiB, 2.5 GiB are free on the device, of which 90% may be used: pass "
        "--grad-checkpointing, or take a smaller model"
    )
    assert accumulations(96, 2, 8) == [1, 2, 3, 6] and accumulations(100, 1, 8) == [1]


@pytest.fixture
def card(monkeypatch):
    """Gives the runs a device with so much free memory."""

    def install(free: int | None) -> None:
        monkeypatch.setattr(accumulation, "free_memory", lambda device: free)

    return install


def smoke_need(module) -> Need:
    """Of the smoke preset of mtm_pretrain."""
    model = seitpp.models.MTM(
        "mtm_vit_nano", grid=(8, 8), num_codes=64, code_dim=32, decoder_width=96, decoder_depth=2, decoder_heads=4
    )
    found = footprint(module.zeros_loss((8, 8), (7, 16), 0.0), "no", model)
    return Need(found.peak, found.fixed + state_bytes(model, 1))


def test_a_run_chooses_prints_and_goes_on_with_another_number_elsewhere(card, tmp_path, capsys) -> None:
    module, out = recipe("mtm_pretrain"), tmp_path / "run"
    need, store = smoke_need(module), unlabeled_digits(tmp_path / "store", 800)
    config = replace(module.PRESETS["smoke"], store=store, dropout=0.0, epochs=1, out=str(out))
    card(round((need.fixed + 40 * need.an_image) / accumulation.USABLE))
    module.main(config)
    printed = capsys.readouterr().out
    assert "GiB per image" in printed and "             4                32" in printed
    assert next(line for line in printed.splitlines() if line.endswith("<- chosen")).split()[:2] == ["4", "32"]
    assert json.loads((out / "config.json").read_text())["accumulation"] is None
    losses = [line["loss"] for line in metrics(out)]
    card(None)  # a CPU
    module.main(replace(config, resume=True))
    module.main(replace(config, out=str(tmp_path / "whole")))
    assert losses == pytest.approx([line["loss"] for line in metrics(tmp_path / "whole")], abs=1e-5)
    assert len(losses) == 5 and len(set(losses)) == 5


@pytest.mark.parametrize("name", [name for name in TRAINING_RECIPES if name not in ("mtm_pretrain", "continual")])
def test_every_recipe_counts_its_step(name: str, card, tmp_path) -> None:
    config = smoke_config(name, tmp_path)
    card(MIB)
    with pytest.raises(RunError, match=r"images at a time need .* GiB are free on the device"):
        recipe(name).main(config)
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_is_refused_before_it_begins(card, tmp_path) -> None:
    module, out = recipe("mtm_pretrain"), tmp_path / "run"
    need = smoke_need(module)
    config = replace(module.PRESETS["smoke"], accumulation=1, out=str(out))
    card(round((need.fixed + 40 * need.an_image) / accumulation.USABLE))
    with pytest.raises(
        RunError, match=r"128 images at a time need .*: pass --accumulation 4 \(32 images at a time"
    ):
        module.main(config)
    card(need.fixed)
    with pytest.raises(
        RunError, match=r"^8 images at a time need .*: pass --grad-checkpointing, or take a smaller"
    ):
        module.main(replace(config, accumulation=None))
    with pytest.raises(RunError, match=r": take a smaller model$"):
        module.main(replace(config, accumulation=None, grad_checkpointing=True))
    assert not out.exists()
