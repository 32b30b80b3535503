"""What several tests of tokenizers need."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def images() -> Tensor:
    """Two images of noise (2, 3, 32, 32) in [0, 1]."""
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
