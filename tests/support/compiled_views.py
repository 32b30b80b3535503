"""Compiled views are one graph: no break, the same ids, and one more graph when the epoch is seen to change.

A program of its own, since the checks of shapes that tests put on functions would break the graphs.
"""

import torch
from torch._dynamo.utils import counters

from seitpp.augment import Keys, SeitPPView, SeitView
from seitpp.models import TokenAdapt


def some_adapt() -> TokenAdapt:
    """Weights that send tokens to many codes."""
    adapt = TokenAdapt((8, 8), crop=(6, 6), num_codes=64, code_dim=32, width=64, heads=1, mlp=256)
    for parameter in adapt.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapt


def check(view: torch.nn.Module, *given: torch.Tensor) -> None:
    torch._dynamo.reset()
    counters.clear()
    draws = [Keys(1, epoch, torch.arange(16) + 16 * step) for epoch in range(3) for step in range(2)]
    plain = [view(*given, keys) for keys in draws]
    view.compile(backend="eager")
    for expected, keys in zip(plain, draws, strict=True):
        found = view(*given, keys)
        assert torch.equal(*((found, expected) if torch.is_tensor(found) else (found[0], expected[0])))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], counters


def main() -> None:
    codebook, ids, labels = torch.randn(64, 32), torch.randint(64, (16, 8, 8)), torch.arange(16)
    check(SeitPPView(codebook, size=6, adapt=some_adapt(), color="coloradapt"), ids.to(torch.uint16))
    check(SeitView(codebook, size=6, color="release", mixup=0.8), ids.to(torch.uint16), labels)


if __name__ == "__main__":
    main()
