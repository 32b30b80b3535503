"""Training augmentation for segmentation on tokens: a random box of tokens and its labels, resized to the crop.

It corresponds to mmsegmentation's usual pipeline for ADE20K (RandomResize, RandomCrop, RandomFlip), but works on
tokens: resizing an image by s and then cropping equals resizing one box with a side of crop / s tokens.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, Integer, UInt8
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from downstream.segmentation.data import IGNORED, Segmented
from seitpp.augment import Keys, ViewError, crop_resize
from seitpp.augment.color import ColorAugment, ColorPreset
from seitpp.augment.views import split_batch
from seitpp.codebook import embed
from seitpp.models import TokenAdapt
from seitpp.models.tokenadapt import CELLS

ATTEMPTS = 10  # boxes that are checked for a dominating class (mmsegmentation, RandomCrop)


class SegmentView(nn.Module):
    """Random resized crop of tokens and labels, followed by a mirror image for half of the batch and by color ops.

    `codebook` (K, D) is float. `crop` is the side of the output maps in tokens, and `pixels_per_token` the number
    of pixels along one side of a token. `scale` is the range of the resize factor. `max_share` is the largest
    fraction of a box's labeled pixels that one class may have. `color` is a preset of ColorAugment (None: no color
    ops). `adapt` is a TokenAdapt trained for this codebook, with any grid; every second image of a batch is
    mirrored with it. Without it nothing is mirrored, since mirroring an image changes its tokens, not only their
    order. Raises ViewError if `adapt` was trained for a codebook of another size.
    """

    def __init__(
        self,
        codebook: Tensor,
        *,
        crop: int,
        pixels_per_token: int,
        scale: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        color: ColorPreset | None = None,
        adapt: TokenAdapt | None = None,
    ):
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.crop, self.pixels_per_token, self.scale, self.max_share = crop, pixels_per_token, scale, max_share
        self.mirror = TokenAdaptMirror(codebook, crop, adapt) if adapt else None
        self.color = ColorAugment(color) if color else None

    @torch.no_grad()
    def forward(
        self, batch: Segmented, keys: Keys
    ) -> tuple[Float[Tensor, "batch dim crop crop"], Int64[Tensor, "batch height width"]]:
        """Augment images with grids of any size; `keys` are those of the same B images.

        The maps have the dtype of the codebook; labels are pixels_per_token times as large. Where a box extends
        beyond its image, labels are 255 and the vectors at the edge of the image are repeated. Raises ViewError if
        B is odd and half of the batch is mirrored, and PairingError if B is not a multiple of 4 and the color op
        mixes pairs of images.
        """
        p = self.pixels_per_token
        boxes = random_boxes(
            batch, keys, crop=self.crop, pixels_per_token=p, scale=self.scale, max_share=self.max_share
        )
        labels = crop_labels(batch, boxes.unsqueeze(1), pixels_per_token=p, size=p * self.crop).squeeze(1)
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
        """Return maps and labels of the boxes; images at odd positions in the batch are mirrored."""
        if len(boxes) % 2:
            raise ViewError(
                f"mirroring half of the images: got a batch of {len(boxes)} images on one process, expected an "
                "even number: change the batch size, the number of processes or the accumulation"
            )
        plain, mirrored, order = split_batch(len(boxes), 0.5, boxes.device)
        ids, grids = batch.ids.long(), batch.grids
        maps = [
            self._resized(ids[plain], boxes[plain], grids[plain]),
            self.mirror(ids[mirrored], boxes[mirrored], grids[mirrored]),
        ]
        labels = [labels[plain], labels[mirrored].flip(2)]
        return torch.cat(maps)[order], torch.cat(labels)[order]

    def extra_repr(self) -> str:
        mirror = (
            "half of the images mirrored through TokenAdapt" if self.mirror else "no mirror without TokenAdapt"
        )
        return (
            f"crop={self.crop}, pixels_per_token={self.pixels_per_token}, scale={self.scale}, "
            f"max_share={self.max_share}; {mirror}"
        )


def random_boxes(
    batch: Segmented,
    keys: Keys,
    *,
    crop: int,
    pixels_per_token: int,
    scale: tuple[float, float],
    max_share: float,
) -> Int64[Tensor, "batch 4"]:
    """Draw one square box per image: top, left, height, width in tokens.

    The side is crop / s, rounded, with s uniform in `scale`; the position is uniform over the image. A box larger
    than its image starts at the first row or column and extends beyond the last. As in mmsegmentation's
    RandomCrop, ten positions are tried, the first where no class has more than `max_share` of the labeled pixels
    is used, and if there is none, an eleventh. The check looks at one pixel per token of the crop only.
    """
    draws = keys.uniform("segmentation boxes", 1 + 2 * (ATTEMPTS + 1))
    side = (crop / (scale[0] + (scale[1] - scale[0]) * draws[:, :1])).round().long()
    positions = (batch.grids - side).clamp(min=0) + 1
    corners = (draws[:, 1:].unflatten(1, (-1, 2)) * positions.unsqueeze(1)).long()
    boxes = torch.cat([corners, side.unsqueeze(1).expand_as(corners)], dim=2)
    accepted = _is_varied(crop_labels(batch, boxes, pixels_per_token=pixels_per_token, size=crop), max_share)
    accepted[:, -1] = True
    first = accepted.int().argmax(dim=1).view(-1, 1, 1).expand(-1, 1, 4)
    return boxes.gather(1, first).squeeze(1)


def _is_varied(labels: Tensor, max_share: float) -> Tensor:
    """Return (B, T): whether labels (B, T, S, S) have labeled pixels, at most `max_share` of them of one class."""
    values = labels.flatten(2).long()
    counts = values.new_zeros(*values.shape[:2], IGNORED + 1).scatter_add_(2, values, torch.ones_like(values))
    counts = counts[..., :IGNORED]
    total = counts.sum(dim=2)
    return (total > 0) & (counts.amax(dim=2) <= max_share * total)


def crop_labels(
    batch: Segmented, boxes: Integer[Tensor, "batch boxes 4"], *, pixels_per_token: int, size: int
) -> UInt8[Tensor, "batch boxes {size} {size}"]:
    """Cut the labels in one or more boxes, in tokens, from each image and resize them with nearest-neighbor.

    An output pixel takes the label at its center. The position is computed in integers, so a box of size /
    pixels_per_token tokens is copied exactly. Pixels outside the image are 255.
    """
    starts, sides = (pixels_per_token * part[..., None] for part in (boxes[..., :2], boxes[..., 2:]))
    centers = 2 * torch.arange(size, device=boxes.device) + 1
    positions = starts + sides * centers // (2 * size)
    ends = pixels_per_token * batch.grids[:, None, :, None]
    outside, positions = positions >= ends, torch.minimum(positions, ends - 1)
    pixels = positions[:, :, 0, :, None] * batch.labels.shape[2] + positions[:, :, 1, None, :]
    labels = batch.labels.flatten(1).gather(1, pixels.flatten(1)).view_as(pixels)
    return labels.masked_fill(outside[:, :, 0, :, None] | outside[:, :, 1, None, :], IGNORED)


class TokenAdaptMirror(nn.Module):
    """Mirrors a box of tokens with TokenAdapt (SeiT++): f, crop and flip, g, vectors of the likeliest codes.

    `adapt` was trained on smaller grids, so f is applied to tiles of its own grid, and g to the whole crop with
    its position embeddings resized to it. On unseen mirrored photographs, a TokenAdapt of 8 x 8 tokens predicts
    57 % of the tokens correctly, on its own grid as well as on 16 x 16, but 44 % with positions extrapolated
    beyond its own grid; flipping the tokens alone gives 41 %. The box is cut and resized between f and g: at
    s = 0.8 that gives 46 %, resizing before f only 36 %.
    """

    def __init__(self, codebook: Tensor, crop: int, adapt: TokenAdapt):
        super().__init__()
        trained_on = adapt.head.out_features, adapt.embed.in_features
        if trained_on != tuple(codebook.shape):
            raise ViewError(
                f"got a TokenAdapt for a codebook of {trained_on}, expected one for {tuple(codebook.shape)}: "
                "train it on tokens of the same tokenizer"
            )
        self.register_buffer("codebook", codebook, persistent=False)
        self.adapt = _with_crop(adapt, crop).eval().requires_grad_(False)

    def forward(
        self,
        ids: Int64[Tensor, "batch height width"],
        boxes: Int64[Tensor, "batch 4"],
        grids: Int64[Tensor, "batch 2"],
    ) -> Float[Tensor, "batch dim crop crop"]:
        """Return the maps of the mirrored boxes; boxes and grids are in tokens."""
        size = CELLS * self.adapt.crop[0]
        space = crop_resize(self._convert(ids), CELLS * boxes, size, grids=CELLS * grids)
        return embed(self.adapt.invert(space.flip(3)).argmax(dim=1), self.codebook)

    def _convert(self, ids: Tensor) -> Tensor:
        """Apply f in tiles: ids (B, H, W) -> (B, D, 2 H', 2 W'), where H' and W' are multiples of f's own grid.

        Tiles are padded with code 0, as batches are; padding with the edge of the image was not more accurate.
        """
        h, w = self.adapt.grid
        rows, columns = -(-ids.shape[1] // h), -(-ids.shape[2] // w)
        padded = F.pad(ids, (0, columns * w - ids.shape[2], 0, rows * h - ids.shape[1]))
        tiles = rearrange(padded, "b (r h) (c w) -> (b r c) h w", h=h, w=w)
        space = self.adapt.convert(embed(tiles, self.codebook))
        return rearrange(space, "(b r c) d h w -> b d (r h) (c w)", r=rows, c=columns)


def _with_crop(adapt: TokenAdapt, crop: int) -> TokenAdapt:
    """Return a copy whose g produces crop x crop tokens."""
    copy = deepcopy(adapt)
    copy.crop = crop, crop
    copy.invert_positions = resample_abs_pos_embed(
        adapt.invert_positions, list(copy.crop), list(adapt.crop), num_prefix_tokens=0
    )
    return copy
