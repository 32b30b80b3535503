"""The perceptual distance: how much two images differ in the features of a trained classifier."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models import vgg16

from seitpp.models.stem import ModelError

VGG_BLOCKS = (4, 9, 16, 23, 30)  # where the blocks of torchvision's vgg16().features end, before their pooling


class VGGDistance(nn.Module):
    """The distance of VGG16 features: LPIPS (arXiv 1801.03924) with all linear weights equal, not trained.

    The features at the end of each of the five blocks are normalized over channels; their squared differences are
    summed over channels and averaged over positions, images and blocks. `state` holds the tensors features.* of
    torchvision's VGG16; otherwise ModelError is raised.
    """

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        with torch.device("meta"):  # without values: those of `state` are assigned
            features = vgg16(weights=None).features
        tensors = {name.removeprefix("features."): tensor.float().clone() for name, tensor in state.items()}
        try:
            features.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"no VGG16 weights of torchvision: {reason}") from error
        self.blocks = nn.ModuleList(
            features[start:end] for start, end in zip((0, *VGG_BLOCKS), VGG_BLOCKS, strict=False)
        )
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(-1, 1, 1))
        self.requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], targets: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, ""]:
        """Return the mean distance of two batches with values around [0, 1], height and width at least 16."""
        a, b = ((batch - self.mean) / self.std for batch in (images, targets))
        distance = a.new_zeros(())
        for block in self.blocks:
            a, b = block(a), block(b)
            distance = distance + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean()
        return distance / len(self.blocks)
