"""How different two images look to a network that was trained to classify them."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models import vgg16

from seitpp.models.stem import ModelError

VGG_BLOCKS = (4, 9, 16, 23, 30)  # of torchvision's vgg16().features: the end of each block, before it is pooled


class VGGDistance(nn.Module):
    """Distance of VGG16 features (LPIPS with all its linear weights equal, arXiv 1801.03924); not trained.

    At the end of each of the five blocks features are normalized over channels; squared differences are summed
    over channels, averaged over places, images and blocks. `state` holds the tensors features.* of torchvision's
    VGG16. Raises ModelError if it does not.
    """

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        with torch.device("meta"):  # the layers without numbers: these are `state`'s
            features = vgg16(weights=None).features
        named = {name.removeprefix("features."): tensor.float().clone() for name, tensor in state.items()}
        try:
            features.load_state_dict(named, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"no VGG16 weights of torchvision: {reason}") from error
        self.blocks = nn.ModuleList(
            features[start:end] for start, end in zip((0, *VGG_BLOCKS), VGG_BLOCKS, strict=False)
        )
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(-1, 1, 1))
        self.requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Two batches (B, 3, h, w) around [0, 1], at least 16 pixels a side -> ()."""
        a, b = ((batch - self.mean) / self.std for batch in (images, targets))
        distance = a.new_zeros(())
        for block in self.blocks:
            a, b = block(a), block(b)
            distance = distance + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean()
        return distance / len(self.blocks)
