"""The loss of hidden tokens whose logits are never all there, against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from seitpp.models import cross_entropy
from seitpp.models.cross_entropy import linear_cross_entropy

TOKENS, DIM = 203, 8


def some_tokens(codes: int, tokens: int = TOKENS) -> tuple[Tensor, ...]:
    """Vectors, table, bias and targets, some of which are the likeliest code."""
    torch.manual_seed(codes)
    vectors, table, bias = (torch.randn(*size) for size in ((tokens, DIM), (codes, DIM), (codes,)))
    targets = torch.randint(codes, (tokens,))
    targets[::3] = (vectors @ table.T + bias)[::3].argmax(dim=1)
    return vectors, table, bias, targets


def plain(vectors: Tensor, table: Tensor, bias: Tensor, *, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = (vectors @ table.T + bias).float()
    return F.cross_entropy(logits, targets), (logits.argmax(dim=1) == targets).float().mean()


def with_gradients(function, vectors: Tensor, table: Tensor, bias: Tensor, targets: Tensor, scale: float = 1.0):
    """Loss, accuracy, and the gradients of `scale` times the loss."""
    vectors, bias = vectors.clone().requires_grad_(), bias.clone().requires_grad_()
    loss, accuracy = function(vectors, table, bias, targets=targets)
    (scale * loss).backward()
    return loss.detach(), accuracy, vectors.grad, bias.grad


@pytest.mark.parametrize("chunk", [1, 7, 64, TOKENS])
@pytest.mark.parametrize("codes", [7, 391, 5000])
def test_agrees_with_the_plain_loss(monkeypatch, codes: int, chunk: int) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_CELLS, "cpu", chunk * codes)
    tokens = some_tokens(codes)
    expected = with_gradients(plain, *tokens, scale=3.0)
    assert 0.3 < expected[1] < 0.9
    for found, wanted in zip(with_gradients(linear_cross_entropy, *tokens, scale=3.0), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("codes", [7, 391, 5000])
def test_half_precision_is_in_the_product_only(codes: int) -> None:
    """Under autocast the loss is that of the plain way, whose gradients pass through bfloat16 once more."""
    tokens = some_tokens(codes)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (with_gradients(function, *tokens) for function in (linear_cross_entropy, plain))
    assert all(part.dtype == torch.float32 for part in found)
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-6)
    assert found[1] == expected[1]
    for gradient, wanted in zip(found[2:], expected[2:], strict=True):
        assert (gradient - wanted).norm() < 0.01 * wanted.norm()


def test_float16_gradients_neither_vanish_nor_overflow() -> None:
    """As a GradScaler asks for them: a token's share of a mean over 200,000 is below what fp16 can hold."""
    vectors, table, bias, targets = some_tokens(391, tokens=200_000)
    wanted = with_gradients(plain, vectors, table, bias, targets)[2:]
    small = [wanted[0].half(), wanted[1]]
    assert (small[0] == 0).float().mean() > 0.001
    with torch.autocast("cpu", torch.float16):
        found = with_gradients(linear_cross_entropy, vectors.half(), table, bias, targets, scale=2.0**16)[2:]
    assert [part.dtype for part in found] == [torch.float16, torch.float32]
    for gradient, expected in zip(found, wanted, strict=True):
        assert gradient.isfinite().all()
        assert (gradient.float() / 2.0**16 - expected).norm() < 0.01 * expected.norm()


def test_logits_are_never_all_there() -> None:
    """Nothing that is allocated is larger than a chunk, and only gradients are kept."""
    tokens = some_tokens(5000, tokens=4096)  # 82 MB of logits
    tokens[0].requires_grad_()
    kept = []
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t
        ),
    ):
        loss, _ = linear_cross_entropy(*tokens[:3], targets=tokens[3])
    loss.backward()
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert 2**20 < largest <= 4 * cross_entropy.CHUNK_CELLS["cpu"] + 2**16
    assert sorted(kept) == [5000, 4096 * DIM]


def test_is_a_proper_operator() -> None:
    vectors, table, bias, targets = some_tokens(391)
    arguments = (vectors.requires_grad_(), table, bias.requires_grad_(), targets, torch.float32)
    torch.library.opcheck(torch.ops.seitpp.linear_cross_entropy.default, arguments)


def test_its_products_are_counted() -> None:
    for device in ("cpu", "meta"):
        vectors, table, bias, targets = (part.to(device) for part in some_tokens(391))
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(vectors.requires_grad_(), table, bias, targets=targets)[0].backward()
        assert counter.get_total_flops() == 2 * (2 * TOKENS * 391 * DIM)
