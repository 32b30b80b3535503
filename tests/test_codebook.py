"""Look-ups in a codebook: the nearest code, exactly, in any chunks, in one graph."""

import subprocess
import sys

import pytest
import torch

from seitpp import codebook as codebook_module
from seitpp.codebook import nearest

TF32_SETTINGS = """
import torch
from seitpp.codebook import full_precision
{set}
with torch.autocast("cpu", dtype=torch.bfloat16):
    with full_precision(torch.device("cpu")):
        assert {off}
        assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_enabled("cpu")
assert {on}
"""
LEGACY = "torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32"
NEW = "torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision"


def test_nearest_is_the_nearest_in_any_chunks(monkeypatch) -> None:
    maps, codebook = torch.randn(2, 5, 6, 7), torch.randn(40, 5) * torch.rand(40, 1) * 3
    vectors = maps.permute(0, 2, 3, 1).double()
    by_distance = torch.cdist(vectors.flatten(0, 2), codebook.double()).argmin(dim=1).view(2, 6, 7)
    by_direction = torch.cosine_similarity(vectors.unsqueeze(-2), codebook.double(), dim=-1).argmax(dim=-1)
    assert not torch.equal(by_distance, by_direction)
    for cells in (codebook_module.LOOKUP_CELLS, 1, 100):
        monkeypatch.setattr(codebook_module, "LOOKUP_CELLS", cells)
        assert torch.equal(nearest(maps, codebook, "euclidean"), by_distance)
        assert torch.equal(nearest(maps, codebook), by_direction)
    assert nearest(maps, codebook[:1].repeat(3, 1), "euclidean").unique().tolist() == [0]  # equals: smallest id


@pytest.mark.parametrize(
    "settings",
    [
        {
            "set": "torch.set_float32_matmul_precision('high')",
            "off": f"({LEGACY}) == (False, False)",
            "on": f"torch.get_float32_matmul_precision() == 'high' and ({LEGACY}) == (True, True)",
        },
        {
            "set": "torch.backends.fp32_precision = 'tf32'",
            "off": f"({NEW}) == ('ieee', 'ieee')",
            "on": f"({NEW}) == ('tf32', 'tf32')",
        },
    ],
)
def test_full_precision_leaves_the_settings_as_they_were(settings) -> None:
    # In a process of its own: torch refuses to mix its old and its new settings, even one after the other.
    subprocess.run([sys.executable, "-c", TF32_SETTINGS.format(**settings)], check=True)


def test_lookup_compiles_into_one_graph() -> None:
    maps, codebook = torch.randn(2, 5, 6, 7), torch.randn(40, 5)
    compiled = torch.compile(nearest, backend="eager", fullgraph=True)
    assert torch.equal(compiled(maps, codebook), nearest(maps, codebook))
