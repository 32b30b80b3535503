"""What a batch of segmented images looks like in training: a random box of tokens, resized, and its labels.

As mmsegmentation's usual pipeline for ADE20K (RandomResize, RandomCrop, RandomFlip), but on tokens: to resize an
image by s and cut out a crop is to resize one box of crop / s tokens a side.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from downstream.segmentation.data import IGNORED, Segmented
from seitpp.augment import Keys, ViewError, crop_resize
from seitpp.augment.color import ColorAugment, ColorPreset
from seitpp.augment.views import split_batch
from seitpp.codebook import embed
from seitpp.models import TokenAdapt
from seitpp.models.tokenadapt import CELLS

ATTEMPTS = 10  # boxes whose share of one class is looked at (mmsegmentation, RandomCrop)


class SegmentView(nn.Module):
    """Tokens and labels -> a random box -> maybe its mirror image -> color -> maps and labels.

    `codebook` (K, D) float; `crop` the side of the maps in tokens, `patch` the pixels along one side of a token;
    `scale` the range of the resize; `max_share` the largest share that one class has of the labelled pixels of a
    box; `color` a preset of ColorAugment, None for nothing. `adapt` is a trained TokenAdapt for this codebook,
    of any grid: every second image of a batch is mirrored through it. Without one nothing is mirrored, since the
    mirrored tokens of an image are not the tokens of its mirror image. Raises ViewError if `adapt` is for other
    codes.
    """

    def __init__(
        self,
        codebook: Tensor,
        *,
        crop: int,
        patch: int,
        scale: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        color: ColorPreset | None = None,
        adapt: TokenAdapt | None = None,
    ):
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.crop, self.patch, self.scale, self.max_share = crop, patch, scale, max_share
        self.mirror = TokenAdaptMirror(codebook, crop, adapt) if adapt else None
        self.color = ColorAugment(color) if color else None

    @torch.no_grad()
    def forward(self, batch: Segmented, keys: Keys) -> tuple[Tensor, Tensor]:
        """Images of any grids, keys of the same B images -> maps (B, D, crop, crop) of the codebook's dtype,
        labels (B, patch crop, patch crop) int64.

        Where a box is larger than its image, labels are 255 and vectors those of the image's edge. Raises
        ViewError if B is odd and one half is mirrored, PairingError if B is no multiple of 4 and the color op
        pairs images.
        """
        boxes = random_boxes(batch, keys, self.crop, self.patch, self.scale, self.max_share)
        labels = crop_labels(batch, boxes.unsqueeze(1), self.patch, self.patch * self.crop).squeeze(1)
        if self.mirror is None:
            maps = self._resized(batch.ids, boxes, batch.grids)
        else:
            maps, labels = self._half_mirrored(batch, boxes, labels)
        if self.color:
            maps = self.color(maps, keys)
        return maps, labels.long()

    def _resized(self, ids: Tensor, boxes: Tensor, grids: Tensor) -> Tensor:
        return crop_resize(embed(ids, self.codebook), boxes, self.crop, grids=grids)

    def _half_mirrored(self, batch: Segmented, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Maps and labels of the boxes; those at odd places of the batch are mirrored."""
        if len(boxes) % 2:
            raise ViewError(
                f"a batch of {len(boxes)} images on one process, of which one half is mirrored: expected an even "
                "number; change the batch size, the number of processes or the accumulation"
            )
        plain, through, order = split_batch(len(boxes), 0.5, boxes.device)
        ids, grids = batch.ids.long(), batch.grids
        maps = [
            self._resized(ids[plain], boxes[plain], grids[plain]),
            self.mirror(ids[through], boxes[through], grids[through]),
        ]
        labels = [labels[plain], labels[through].flip(2)]
        return torch.cat(maps)[order], torch.cat(labels)[order]

    def extra_repr(self) -> str:
        mirror = (
            "half of the images mirrored through TokenAdapt" if self.mirror else "no mirror without TokenAdapt"
        )
        return f"crop={self.crop}, patch={self.patch}, scale={self.scale}, max_share={self.max_share}; {mirror}"


def random_boxes(
    batch: Segmented, keys: Keys, crop: int, patch: int, scale: tuple[float, float], max_share: float
) -> Tensor:
    """One square box an image: (B, 4) int64 = top, left, height, width in tokens.

    The side is crop / s, rounded, s uniform in `scale`; the place is uniform over the image. A box that is larger
    than its image begins at the first row or column and reaches beyond the last. As in mmsegmentation's
    RandomCrop, the first of ten places is taken where no class has more than `max_share` of the labelled pixels,
    else an eleventh; here one pixel a token of the crop is looked at.
    """
    draws = keys.uniform("segmentation boxes", 1 + 2 * (ATTEMPTS + 1))
    side = (crop / (scale[0] + (scale[1] - scale[0]) * draws[:, :1])).round().long()
    places = (batch.grids - side).clamp(min=0) + 1
    corners = (draws[:, 1:].unflatten(1, (-1, 2)) * places.unsqueeze(1)).long()
    boxes = torch.cat([corners, side.unsqueeze(1).expand_as(corners)], dim=2)
    wanted = _is_varied(crop_labels(batch, boxes, patch, crop), max_share)
    wanted[:, -1] = True
    first = wanted.int().argmax(dim=1).view(-1, 1, 1).expand(-1, 1, 4)
    return boxes.gather(1, first).squeeze(1)


def _is_varied(labels: Tensor, max_share: float) -> Tensor:
    """Whether there are labelled pixels and no class has more than `max_share` of them: (B, T, S, S) -> (B, T)."""
    values = labels.flatten(2).long()
    counts = values.new_zeros(*values.shape[:2], IGNORED + 1).scatter_add_(2, values, torch.ones_like(values))
    counts = counts[..., :IGNORED]
    total = counts.sum(dim=2)
    return (total > 0) & (counts.amax(dim=2) <= max_share * total)


def crop_labels(batch: Segmented, boxes: Tensor, patch: int, size: int) -> Tensor:
    """The labels in T boxes of each image, resized by nearest: boxes (B, T, 4) in tokens -> (B, T, size, size)
    uint8.

    A pixel takes the label at its center, in whole numbers, so a box of size / patch tokens is copied as it is.
    Pixels outside the image are 255.
    """
    centers = 2 * torch.arange(size, device=boxes.device) + 1
    places = patch * boxes[..., :2, None] + patch * boxes[..., 2:, None] * centers // (2 * size)
    ends = patch * batch.grids[:, None, :, None]
    outside, places = places >= ends, torch.minimum(places, ends - 1)
    pixels = places[:, :, 0, :, None] * batch.labels.shape[2] + places[:, :, 1, None, :]
    labels = batch.labels.flatten(1).gather(1, pixels.flatten(1)).view_as(pixels)
    return labels.masked_fill(outside[:, :, 0, :, None] | outside[:, :, 1, None, :], IGNORED)


class TokenAdaptMirror(nn.Module):
    """The mirror image of a box: ids -> f -> box, mirror -> g -> the vectors of the likeliest codes (SeiT++).

    `adapt` was trained for smaller grids: f works in tiles of its own grid, g on the whole crop with its positions
    stretched over it. Of the tokens of a mirrored photograph never seen, a TokenAdapt of 8 x 8 tokens finds 57 %,
    on its own grid and on 16 x 16 alike, but 44 % with positions continued beyond its own; mirrored tokens are
    41 %. The box is cut and resized between f and g: at s = 0.8 that finds 46 %, a resize before f only 36 %.
    """

    def __init__(self, codebook: Tensor, crop: int, adapt: TokenAdapt):
        super().__init__()
        known = adapt.head.out_features, adapt.embed.in_features
        if known != tuple(codebook.shape):
            raise ViewError(
                f"TokenAdapt for a codebook of {known}, the codebook is {tuple(codebook.shape)}: train it on "
                "tokens of the same tokenizer"
            )
        self.register_buffer("codebook", codebook, persistent=False)
        self.adapt = _with_crop(adapt, crop).eval().requires_grad_(False)

    def forward(self, ids: Tensor, boxes: Tensor, grids: Tensor) -> Tensor:
        """Ids (B, H, W) int64, boxes (B, 4) and grids (B, 2) in tokens -> maps (B, D, crop, crop)."""
        size = CELLS * self.adapt.crop[0]
        space = crop_resize(self._convert(ids), CELLS * boxes, size, grids=CELLS * grids)
        return embed(self.adapt.invert(space.flip(3)).argmax(dim=1), self.codebook)

    def _convert(self, ids: Tensor) -> Tensor:
        """f in tiles: ids (B, H, W) -> (B, D, 2 H', 2 W'), where H' and W' are multiples of f's own grid.

        Tiles are filled with code 0, as batches are: with the edge of the image no more tokens were right.
        """
        h, w = self.adapt.grid
        rows, columns = -(-ids.shape[1] // h), -(-ids.shape[2] // w)
        filled = F.pad(ids, (0, columns * w - ids.shape[2], 0, rows * h - ids.shape[1]))
        tiles = rearrange(filled, "b (r h) (c w) -> (b r c) h w", h=h, w=w)
        space = self.adapt.convert(embed(tiles, self.codebook))
        return rearrange(space, "(b r c) d h w -> b d (r h) (c w)", r=rows, c=columns)


def _with_crop(adapt: TokenAdapt, crop: int) -> TokenAdapt:
    """A copy whose g gives crop x crop tokens."""
    copy = deepcopy(adapt)
    copy.crop = crop, crop
    copy.invert_positions = resample_abs_pos_embed(
        adapt.invert_positions, list(copy.crop), list(adapt.crop), num_prefix_tokens=0
    )
    return copy
