"""The augmentation pipelines by their published names: what a batch of ids looks like to a model."""

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from seitpp.augment.colour import ColourAugment
from seitpp.augment.geometry import apply_geometry, random_geometry
from seitpp.augment.ids import TokenEDA
from seitpp.augment.keyed import Keys
from seitpp.augment.maps import centre_window, crop_resize, random_resized_boxes, random_window
from seitpp.augment.mix import Mix, SoftLabels
from seitpp.errors import UserError
from seitpp.tokens.codebook import embed, nearest


class ViewError(UserError):
    """A grid that a view cannot cut as it is told."""


class SeitPPView(nn.Module):
    """The view for masked token modeling (SeiT++): ids -> vectors, one half by a random resized crop, the other
    through TokenAdapt -> colour -> ids.

    `codebook` (K, D) float; `size` the side of the crop in tokens, or None for the whole grid unchanged; `scale`
    the range of the crop's share of the grid. `adapt` is a trained TokenAdapt for this grid and size; the share
    `adapted` of the images goes through it, evenly spread over the batch. `colour`: a preset of ColourAugment,
    None for nothing. Raises ViewError without `adapt`, unless `adapted` is 0: it never runs random weights; and
    with one that nothing goes through.
    """

    def __init__(
        self,
        codebook: Tensor,
        size: int | None,
        scale: tuple[float, float] = (0.2, 1.0),
        adapt: nn.Module | None = None,
        adapted: float = 0.5,
        colour: Literal["coloradapt"] | None = None,
    ):
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.size, self.scale = size, scale
        self.adapt, self.adapted = _adapting(codebook, size, adapt, adapted, scale), adapted
        self.colour = ColourAugment(colour) if colour else None

    @torch.no_grad()
    def forward(self, ids: Tensor, keys: Keys) -> Tensor:
        """Ids (B, H, W) of any integer dtype, keys of the same B images -> ids (B, size, size) int64.

        Raises PairingError if B is no multiple of 4 and the colour op pairs images.
        """
        if self.size is None and not self.adapt and not self.colour:
            return ids.long()
        plain, through, order = split_places(len(ids), self.adapted, ids.device)
        parts = [self._plain(ids[plain], keys.of(plain))]
        if self.adapt:
            parts.append(self.adapt(ids[through], keys.of(through)))
        maps = torch.cat(parts)[order]
        if self.colour:
            maps = self.colour(maps, keys)
        return nearest(maps, self.codebook)

    def _plain(self, ids: Tensor, keys: Keys) -> Tensor:
        maps = embed(ids, self.codebook)
        if self.size is None:
            return maps
        return crop_resize(maps, random_resized_boxes(keys, ids.shape[-2:], self.scale), self.size)

    def extra_repr(self) -> str:
        if self.size is None:
            return "whole grid"
        return f"random resized crop, size={self.size}, scale={self.scale}; {self.adapted:.0%} through TokenAdapt"


class SeitPPFinetuneView(nn.Module):
    """The view for fine-tuning after masked token modeling (SeiT++): ids, labels -> ids, soft labels.

    One half: random resized crop, CutMix. The other, the share `adapted`: TokenAdapt, with CutMix or Mixup of f's
    space before g. Then colour on the vectors of both, and the nearest codes. Arguments as SeitPPView, `cutmix`
    and `mixup` as Mix; Mixup acts only in f's space. Raises ViewError as SeitPPView.
    """

    def __init__(
        self,
        codebook: Tensor,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        adapt: nn.Module | None = None,
        adapted: float = 0.5,
        colour: Literal["seitpp", "paper", "release"] | None = "seitpp",
        cutmix: float = 1.0,
        mixup: float = 0.8,
    ):
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.size, self.scale, self.adapted = size, scale, adapted
        self.mix = Mix(cutmix)
        self.adapt = _adapting(codebook, size, adapt, adapted, scale, Mix(cutmix, mixup))
        self.colour = ColourAugment(colour) if colour else None

    @torch.no_grad()
    def forward(self, ids: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, SoftLabels]:
        """Ids (B, H, W) of any integer dtype, labels (B,) int64, keys of the same B images ->
        ids (B, size, size) int64 and their labels.

        Raises PairingError if a half of the batch is no multiple of 4 and images are paired.
        """
        plain, through, order = split_places(len(ids), self.adapted, ids.device)
        parts = [self._plain(ids[plain], labels[plain], keys.of(plain))]
        if self.adapt:
            parts.append(self.adapt.mixed(ids[through], labels[through], keys.of(through)))
        maps, targets = zip(*parts, strict=True)
        maps = torch.cat(maps)[order]
        if self.colour:
            maps = self.colour(maps, keys)
        labels = SoftLabels(*(torch.cat(part)[order] for part in zip(*targets, strict=True)))
        return nearest(maps, self.codebook), labels

    def _plain(self, ids: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, SoftLabels]:
        boxes = random_resized_boxes(keys, ids.shape[-2:], self.scale)
        return self.mix(crop_resize(embed(ids, self.codebook), boxes, self.size), labels, keys)

    def extra_repr(self) -> str:
        return f"random resized crop, size={self.size}, scale={self.scale}; {self.adapted:.0%} through TokenAdapt"


class TokenAdaptCrop(nn.Module):
    """ids -> f -> mirror, affine map, crop, and maybe a mix -> g -> the vectors of the likeliest codes.

    `adapt` is a trained TokenAdapt; it is frozen. Raises ViewError if there is none.
    """

    def __init__(
        self,
        codebook: Tensor,
        size: int | None,
        adapt: nn.Module | None,
        scale: tuple[float, float],
        mix: Mix | None = None,
    ):
        super().__init__()
        if adapt is None:
            raise ViewError(
                "TokenAdapt has no weights: train them with recipes/tokenadapt_train.py and name its run with "
                "--tokenadapt, or send no image through it with --adapted 0"
            )
        if adapt.crop != (size, size):
            raise ViewError(f"TokenAdapt gives grids of {adapt.crop}, the crop is {size}: expected the same size")
        self.register_buffer("codebook", codebook, persistent=False)
        self.adapt = adapt.eval().requires_grad_(False)
        self.scale, self.mix = scale, mix or Mix(0.0)

    def forward(self, ids: Tensor, keys: Keys) -> Tensor:
        """Ids (B, H, W) -> maps (B, D, size, size)."""
        return self.mixed(ids, torch.zeros_like(keys.indices), keys)[0]

    def mixed(self, ids: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, SoftLabels]:
        """The same, mixed in f's space before g, with the labels of the mixture."""
        if tuple(ids.shape[1:]) != self.adapt.grid:
            raise ViewError(f"a grid of {tuple(ids.shape[1:])} through TokenAdapt, which takes {self.adapt.grid}")
        geometry = random_geometry(keys, self.adapt.grid[0], self.adapt.crop[0], scale=self.scale)
        space = apply_geometry(self.adapt.convert(embed(ids, self.codebook)), geometry)
        space, targets = self.mix(space, labels, keys)
        return embed(self.adapt.invert(space).argmax(dim=1), self.codebook), targets


def _adapting(
    codebook: Tensor,
    size: int | None,
    adapt: nn.Module | None,
    adapted: float,
    scale: tuple[float, float],
    mix: Mix | None = None,
) -> TokenAdaptCrop | None:
    if adapted:
        return TokenAdaptCrop(codebook, size, adapt, scale, mix)
    if adapt is not None:
        raise ViewError(
            "TokenAdapt is given, but no image goes through it: pass --adapted 0.5, or no --tokenadapt"
        )
    return None


@lru_cache(maxsize=8)  # else a step would wait for two small copies to the device
def split_places(batch: int, share: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Places of a batch that are left as they are, those of the other `share`, evenly spread, and the order that
    brings the two, joined, back: for a half the even and the odd places.
    """
    chosen = [math.floor((place + 1) * share) > math.floor(place * share) for place in range(batch)]
    joined = sorted(range(batch), key=chosen.__getitem__)
    order = sorted(range(batch), key=joined.__getitem__)
    left = batch - sum(chosen)
    joined, order = torch.tensor([joined, order], device=device)
    return joined[:left], joined[left:], order


class SeitView(nn.Module):
    """The view for supervised training (SeiT): ids -> Token-EDA -> crop -> vectors -> colour -> mix.

    `codebook` (K, D) float; `size` the side of the maps. `crop`: "resized" (random resized crop, with the range
    `scale` of its share of the grid), "window" (one random window as it is) or None (the whole grid).
    `eda`, `colour`: presets of TokenEDA and ColourAugment, None for nothing. `cutmix`, `mixup`: as Mix.
    """

    def __init__(
        self,
        codebook: Tensor,
        size: int,
        crop: Literal["resized", "window"] | None = "resized",
        scale: tuple[float, float] = (0.08, 1.0),
        eda: Literal["paper", "release"] | None = "release",
        colour: Literal["paper", "release", "seitpp", "coloradapt"] | None = "paper",
        cutmix: float = 1.0,
        mixup: float = 0.0,
    ):
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.size, self.crop, self.scale = size, crop, scale
        self.eda = TokenEDA(codebook, eda) if eda else None
        self.colour = ColourAugment(colour) if colour else None
        self.mix = Mix(cutmix, mixup)

    def forward(self, ids: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, SoftLabels]:
        """Ids (B, H, W) of any integer dtype, labels (B,) int64, keys of the same B images ->
        maps (B, D, size, size) and their labels.

        Raises ViewError if the grid does not give such maps, PairingError if B is no multiple of 4 and images are
        paired.
        """
        ids = ids.long()
        if self.eda:
            ids = self.eda(ids, keys)
        maps = self._crop(ids, keys)
        if self.colour:
            maps = self.colour(maps, keys)
        return self.mix(maps, labels, keys)

    def _crop(self, ids: Tensor, keys: Keys) -> Tensor:
        if self.crop == "resized":
            boxes = random_resized_boxes(keys, ids.shape[1:], self.scale)
            return crop_resize(embed(ids, self.codebook), boxes, self.size)
        if self.crop == "window":
            _check_window(ids, (self.size, self.size))
            return embed(random_window(ids, keys, self.size), self.codebook)
        if tuple(ids.shape[1:]) != (self.size, self.size):
            raise ViewError(
                f"grid {tuple(ids.shape[1:])} without a crop: expected {self.size} x {self.size} tokens, "
                "the size of the maps; choose a crop"
            )
        return embed(ids, self.codebook)

    def extra_repr(self) -> str:
        crop = {
            "resized": f"random resized crop, scale={self.scale}",
            "window": "random window",
            None: "whole grid",
        }
        return f"{crop[self.crop]}, size={self.size}"


class EvalView(nn.Module):
    """The view for evaluation: the central window of the grid.

    `window` (height, width) in tokens. With `codebook` (K, D) it gives maps, with `size` too, these resized to
    size x size (for the linear stem).
    """

    def __init__(self, window: tuple[int, int], codebook: Tensor | None = None, size: int | None = None):
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.window, self.size = window, size

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, H, W) of any integer dtype -> ids (B, *window) int64, maps (B, D, *window) or
        (B, D, size, size). Raises ViewError if the grid is smaller than the window.
        """
        _check_window(ids, self.window)
        ids = centre_window(ids, self.window).long()
        if self.codebook is None:
            return ids
        maps = embed(ids, self.codebook)
        if self.size is None:
            return maps
        whole = torch.tensor([0, 0, *self.window], device=ids.device)
        return crop_resize(maps, whole.expand(len(ids), 4), self.size)

    def extra_repr(self) -> str:
        gives = "ids" if self.codebook is None else "maps"
        return f"central window={self.window}, {gives}, size={self.size}"


def _check_window(ids: Tensor, window: tuple[int, int]) -> None:
    height, width = ids.shape[1:]
    if height < window[0] or width < window[1]:
        raise ViewError(
            f"a window of {window[0]} x {window[1]} tokens of the grid {(height, width)}: "
            "expected at most the grid"
        )
