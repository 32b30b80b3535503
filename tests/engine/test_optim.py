"""Optimizers and learning rates: LAMB by its published formula, AdamW's groups, warm-up and cosine."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from support.models import tiny_mtm
from torch import Tensor, nn

from seitpp.engine import checkpoint
from seitpp.engine.distributed import OptimizerState, ZeroLaunch
from seitpp.engine.optim import OPTIMIZERS, adamw, lamb, warmup_cosine
from seitpp.errors import UserError


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("seit_vit_nano", img_size=4, in_chans=8, num_classes=5, depth=1)


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    maps = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(step))
    nn.functional.cross_entropy(model(maps), torch.arange(4)).backward()


def by_formula(weight: Tensor, gradients: list[Tensor], rates: list[float], decay: float) -> Tensor:
    """LAMB of one weight in float64 (You et al., algorithm 2), the norms left out where nothing is decayed."""
    weight, first, second = weight.double(), 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first, second = 0.9 * first + 0.1 * gradient.double(), 0.999 * second + 0.001 * gradient.double() ** 2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8) + decay * weight
        ratio = weight.norm() / update.norm() if decay else 1.0
        weight = weight - rate * ratio * update
    return weight


def test_lamb_is_that_of_its_formula() -> None:
    model = model_of(0)
    begun = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer, gradients, rates = lamb(model, 0.3, layer_decay=0.5), {name: [] for name in begun}, [0.1, 0.05, 0.2]
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        backward(model, step)
        for name, parameter in model.named_parameters():
            gradients[name].append(parameter.grad.clone())
        optimizer.step()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = groups[id(parameter)]
        scaled = [rate * group["lr_scale"] for rate in rates]
        expected = by_formula(begun[name], gradients[name], scaled, group["weight_decay"])
        torch.testing.assert_close(parameter.double(), expected, atol=1e-5, rtol=1e-4, msg=name)
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.3}
    assert min(group["lr_scale"] for group in groups.values()) == 0.25


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_every_optimizer_has_the_same_groups(layer_decay: float) -> None:
    model = model_of(0)
    one, two = (
        [
            (group["weight_decay"], group.get("lr_scale"), [id(parameter) for parameter in group["params"]])
            for group in make(model, 0.05, layer_decay=layer_decay).param_groups
        ]
        for make in (adamw, lamb)
    )
    assert one == two


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_brings_back_the_bits(name: str, tmp_path: Path) -> None:
    """The number of updates too, which LAMB keeps in its groups; through Accelerate, which copies them."""

    def prepared(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = model_of(seed)
        optimizer = OPTIMIZERS[name](model, 0.1, layer_decay=0.5)
        Accelerator(cpu=True).prepare(model, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        return model, optimizer

    model, optimizer = prepared(0)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    tensors = checkpoint.tensors_of(model, OptimizerState(optimizer), ema=None)
    checkpoint.save(tmp_path, 3, data_fingerprint="store", tensors=tensors)
    other, other_optimizer = prepared(1)
    checkpoint.restore(
        checkpoint.load(checkpoint.newest(tmp_path)),
        data_fingerprint="store",
        model=other,
        optimizer=OptimizerState(other_optimizer),
        ema=None,
    )
    for one, two in ((model, optimizer), (other, other_optimizer)):
        for step in (3, 4):
            backward(one, step)
            two.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_lamb_is_refused_where_weights_are_cut_into_rows() -> None:
    launch = ZeroLaunch(Accelerator())
    launch.check_optimizer(adamw(model_of(0), 0.1))
    with pytest.raises(UserError, match="--optimizer lamb: got a launch with DeepSpeed, expected DDP or FSDP"):
        launch.check_optimizer(lamb(model_of(0), 0.1))


def test_warmup_then_cosine() -> None:
    rates = [warmup_cosine(step, steps=110, warmup=10, peak=2.0, start=0.5, final=0.1) for step in range(110)]
    assert rates[0] == 0.5 and rates[5] == pytest.approx(1.25) and rates[10] == 2.0
    assert rates[60] == pytest.approx((2.0 + 0.1) / 2)
    assert np.all(np.diff(rates[10:]) < 0) and 0.1 < rates[-1] < 0.102
    assert warmup_cosine(0, steps=5, warmup=0, peak=1.0) == 1.0


def test_norms_biases_and_single_vectors_are_not_decayed() -> None:
    model = tiny_mtm(code_dim=16)
    optimizer = adamw(model, 0.05, betas=(0.9, 0.95))
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert decayed[id(parameter)] == (0.0 if parameter.ndim == 1 else 0.05), name
    assert id(model.encoder.pos_embed) not in decayed
