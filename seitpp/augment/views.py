"""The augmentation pipelines by their published names: what a batch of ids looks like to a model."""

from torch import Tensor, nn

from seitpp.augment.keyed import Keys
from seitpp.augment.maps import centre_window, crop_resize, random_resized_boxes
from seitpp.tokens.codebook import embed, nearest


class SeitPPView(nn.Module):
    """The view for masked token modeling: ids -> vectors -> random resized crop -> ids again.

    `codebook` (K, D) float; `size` the side of the crop in tokens, or None for the whole grid unchanged;
    `scale` the range of the crop's share of the grid (SeiT++: (0.2, 1)).
    """

    def __init__(self, codebook: Tensor, size: int | None, scale: tuple[float, float] = (0.2, 1.0)):
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.size, self.scale = size, scale

    def forward(self, ids: Tensor, keys: Keys) -> Tensor:
        """Ids (B, H, W) of any integer dtype, keys of the same B images -> ids (B, size, size) int64."""
        if self.size is None:
            return ids.long()
        boxes = random_resized_boxes(keys, ids.shape[-2:], self.scale)
        return nearest(crop_resize(embed(ids, self.codebook), boxes, self.size), self.codebook)

    def extra_repr(self) -> str:
        return "whole grid" if self.size is None else f"random resized crop, size={self.size}, scale={self.scale}"


class EvalView(nn.Module):
    """The view for evaluation: the central window of the grid, no resize."""

    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, H, W) -> ids (B, *grid) int64."""
        return centre_window(ids, self.grid).long()

    def extra_repr(self) -> str:
        return f"central window, grid={self.grid}"
