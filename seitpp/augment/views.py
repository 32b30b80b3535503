"""The augmentation pipelines by their published names: what a batch of ids looks like to a model."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from seitpp.augment.color import ColorAugment, ColorPreset
from seitpp.augment.geometry import apply_geometry, random_geometry
from seitpp.augment.ids import TokenEDA
from seitpp.augment.keyed import Keys
from seitpp.augment.maps import center_window, crop_resize, random_resized_boxes, random_window, same_boxes
from seitpp.augment.mix import Mix, SoftLabels
from seitpp.codebook import embed, nearest
from seitpp.errors import UserError


class ViewError(UserError):
    """A grid that a view cannot cut as it is told."""


class SeitPPView(nn.Module):
    """The view for masked token modeling (SeiT++): ids -> vectors -> color, then one half by a random resized
    crop, the other through TokenAdapt -> ids.

    `codebook` (K, D) float; `size` the side of the crop in tokens, or None for the whole grid unchanged; `scale`
    the range of the crop's share of the grid. `adapt` is a trained TokenAdapt for this grid and size; the share
    `tokenadapt_fraction` of the images goes through it, evenly spread over the batch. `color`: a preset of
    ColorAugment, None for nothing. `lookup`: how the tokenizer chose the nearest code, as in `nearest`. Raises
    ViewError without `adapt`, unless `tokenadapt_fraction` is 0: it never runs random weights; and with one that
    nothing goes through.
    """

    def __init__(
        self,
        codebook: Tensor,
        *,
        size: int | None,
        scale: tuple[float, float] = (0.2, 1.0),
        adapt: nn.Module | None = None,
        tokenadapt_fraction: float = 0.5,
        color: ColorPreset | None = None,
        lookup: str = "cosine",
    ):
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.size, self.scale, self.lookup = size, scale, lookup
        self.tokenadapt_fraction = tokenadapt_fraction
        self.adapt = _adapting(size, adapt, tokenadapt_fraction, scale)
        self.color = ColorAugment(color) if color else None

    @torch.no_grad()
    def forward(self, ids: Tensor, keys: Keys) -> Tensor:
        """Ids (B, H, W) of any integer dtype, keys of the same B images -> ids (B, size, size) int64.

        Raises PairingError if B is no multiple of 4 and the color op pairs images.
        """
        ids = ids.long()
        if self.size is None and not self.adapt and not self.color:
            return ids
        maps = _colored(ids, self.codebook, self.color, keys)
        if not self.adapt:
            return nearest(self._plain(maps, keys), self.codebook, self.lookup)
        plain, through, order = split_batch(len(ids), self.tokenadapt_fraction, ids.device)
        cropped = self._plain(maps[plain], keys.of(plain))
        adapted = self.adapt(maps[through], keys.of(through))
        return torch.cat([nearest(cropped, self.codebook, self.lookup), adapted])[order]

    def _plain(self, maps: Tensor, keys: Keys) -> Tensor:
        if self.size is None:
            return maps
        return crop_resize(maps, random_resized_boxes(keys, maps.shape[-2:], self.scale), self.size)

    def extra_repr(self) -> str:
        if self.size is None:
            return "whole grid"
        return (
            f"random resized crop, size={self.size}, scale={self.scale}; {self.tokenadapt_fraction:.0%} through "
            f"TokenAdapt; lookup={self.lookup}"
        )


class SeitPPFinetuneView(nn.Module):
    """The view for fine-tuning after masked token modeling (SeiT++): ids, labels -> ids, soft labels.

    Color on the vectors of the whole batch. Then one half: random resized crop, CutMix. The other, the share
    `tokenadapt_fraction`: TokenAdapt, with CutMix or Mixup of f's space before g. Then the nearest codes.
    Arguments as SeitPPView, `cutmix` and `mixup` as Mix; Mixup acts only in f's space. Raises ViewError as
    SeitPPView.
    """

    def __init__(
        self,
        codebook: Tensor,
        *,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        adapt: nn.Module | None = None,
        tokenadapt_fraction: float = 0.5,
        color: ColorPreset | None = "seitpp",
        cutmix: float = 1.0,
        mixup: float = 0.8,
        lookup: str = "cosine",
    ):
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.size, self.scale, self.lookup = size, scale, lookup
        self.tokenadapt_fraction = tokenadapt_fraction
        self.mix = Mix(cutmix)
        self.adapt = _adapting(size, adapt, tokenadapt_fraction, scale, Mix(cutmix, mixup))
        self.color = ColorAugment(color) if color else None

    @torch.no_grad()
    def forward(self, ids: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, SoftLabels]:
        """Ids (B, H, W) of any integer dtype, labels (B,) int64, keys of the same B images ->
        ids (B, size, size) int64 and their labels.

        Raises PairingError if a half of the batch is no multiple of 4 and images are paired.
        """
        maps = _colored(ids.long(), self.codebook, self.color, keys)
        if not self.adapt:
            return self._plain(maps, labels, keys)
        plain, through, order = split_batch(len(ids), self.tokenadapt_fraction, ids.device)
        cropped, targets = self._plain(maps[plain], labels[plain], keys.of(plain))
        adapted, others = self.adapt.mixed(maps[through], labels[through], keys.of(through))
        labels = SoftLabels(*(torch.cat(parts)[order] for parts in zip(targets, others, strict=True)))
        return torch.cat([cropped, adapted])[order], labels

    def _plain(self, maps: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, SoftLabels]:
        boxes = random_resized_boxes(keys, maps.shape[-2:], self.scale)
        mixed, targets = self.mix(crop_resize(maps, boxes, self.size), labels, keys)
        return nearest(mixed, self.codebook, self.lookup), targets

    def extra_repr(self) -> str:
        return (
            f"random resized crop, size={self.size}, scale={self.scale}; {self.tokenadapt_fraction:.0%} through "
            f"TokenAdapt; lookup={self.lookup}"
        )


def _colored(ids: Tensor, codebook: Tensor, color: ColorAugment | None, keys: Keys) -> Tensor:
    """Ids (B, H, W) int64 -> maps (B, D, H, W), before the batch is split, so that every image can be colored by
    its partner (SeiT++ release).
    """
    maps = embed(ids, codebook)
    return color(maps, keys) if color else maps


class TokenAdaptCrop(nn.Module):
    """Vectors -> f -> mirror, affine map, crop, and maybe a mix -> g -> the likeliest codes.

    `adapt` is a trained TokenAdapt; it is frozen. Its own precision is that of the autocast around it. Raises
    ViewError if there is none.
    """

    def __init__(
        self, size: int | None, adapt: nn.Module | None, scale: tuple[float, float], mix: Mix | None = None
    ):
        super().__init__()
        if adapt is None:
            raise ViewError(
                "TokenAdapt has no weights: train them with recipes/tokenadapt_train.py and name its run with "
                "--tokenadapt, or send no image through it with --tokenadapt-fraction 0"
            )
        if adapt.crop != (size, size):
            raise ViewError(f"TokenAdapt gives grids of {adapt.crop}, the crop is {size}: expected the same size")
        self.adapt = adapt.eval().requires_grad_(False)
        self.scale, self.mix = scale, mix or Mix(0.0)

    def forward(self, maps: Tensor, keys: Keys) -> Tensor:
        """Maps (B, D, H, W) -> ids (B, size, size) int64."""
        return self.mixed(maps, torch.zeros_like(keys.indices), keys)[0]

    def mixed(self, maps: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, SoftLabels]:
        """The same, mixed in f's space before g, with the labels of the mixture."""
        if tuple(maps.shape[2:]) != self.adapt.grid:
            raise ViewError(f"a grid of {tuple(maps.shape[2:])} through TokenAdapt, which takes {self.adapt.grid}")
        geometry = random_geometry(keys, self.adapt.grid[0], self.adapt.crop[0], scale=self.scale)
        space = apply_geometry(self.adapt.convert(maps), geometry)
        space, targets = self.mix(space, labels, keys)
        return self.adapt.invert(space).argmax(dim=1), targets


def _adapting(
    size: int | None,
    adapt: nn.Module | None,
    fraction: float,
    scale: tuple[float, float],
    mix: Mix | None = None,
) -> TokenAdaptCrop | None:
    if fraction:
        return TokenAdaptCrop(size, adapt, scale, mix)
    if adapt is not None:
        raise ViewError(
            "TokenAdapt is given, but no image goes through it: pass --tokenadapt-fraction 0.5, or no --tokenadapt"
        )
    return None


def split_batch(batch: int, fraction: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Places of a batch that are left as they are, those of the other `fraction`, evenly spread, and the order
    that brings the two, joined, back: for a half the even and the odd places.

    Made on the device: to copy them there, a step would wait for it.
    """
    through = math.floor(batch * fraction)
    places = torch.arange(batch, device=device)
    chosen = (places + 1) * through // batch > places * through // batch
    joined = chosen.int().argsort(stable=True)
    return joined[: batch - through], joined[batch - through :], joined.argsort()


class SeitView(nn.Module):
    """The view for supervised training (SeiT): ids -> Token-EDA -> vectors -> crop -> color -> mix.

    `codebook` (K, D) float; `size` the side of the maps. `crop`: "resized" (random resized crop, with the range
    `scale` of its share of the grid), "window" (one random window as it is) or None (the whole grid). `eda`,
    `color`: presets of TokenEDA and ColorAugment, None for nothing. `cutmix`, `mixup`: as Mix. With `adapt`, a
    trained TokenAdapt (SeiT++ without masked modeling), the share `tokenadapt_fraction` of the images goes through
    it instead of the crop. Raises ViewError if it does not fit.
    """

    def __init__(
        self,
        codebook: Tensor,
        *,
        size: int,
        crop: Literal["resized", "window"] | None = "resized",
        scale: tuple[float, float] = (0.08, 1.0),
        eda: Literal["paper", "release"] | None = "release",
        color: ColorPreset | None = "paper",
        cutmix: float = 1.0,
        mixup: float = 0.0,
        adapt: nn.Module | None = None,
        tokenadapt_fraction: float = 0.0,
    ):
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.size, self.crop, self.scale = size, crop, scale
        self.tokenadapt_fraction = tokenadapt_fraction
        self.eda = TokenEDA(codebook, eda) if eda else None
        self.adapt = _adapting(size, adapt, tokenadapt_fraction, scale)
        self.color = ColorAugment(color) if color else None
        self.mix = Mix(cutmix, mixup)

    @torch.no_grad()
    def forward(self, ids: Tensor, labels: Tensor, keys: Keys) -> tuple[Tensor, SoftLabels]:
        """Ids (B, H, W) of any integer dtype, labels (B,) int64, keys of the same B images ->
        maps (B, D, size, size) and their labels.

        Raises ViewError if the grid does not give such maps, PairingError if B is no multiple of 4 and images are
        paired.
        """
        ids = ids.long()
        if self.eda:
            ids = self.eda(ids, keys)
        if self.color and self.color.rates.whole_grid:
            maps = self._cut(self.color(embed(ids, self.codebook), keys), keys)
        else:
            maps = self._cut(embed(ids, self.codebook), keys)
            maps = self.color(maps, keys) if self.color else maps
        return self.mix(maps, labels, keys)

    def _cut(self, maps: Tensor, keys: Keys) -> Tensor:
        """Maps (B, D, H, W) -> (B, D, size, size), some by a crop, some through TokenAdapt."""
        if not self.adapt:
            return self._crop(maps, keys)
        plain, through, order = split_batch(len(maps), self.tokenadapt_fraction, maps.device)
        adapted = embed(self.adapt(maps[through], keys.of(through)), self.codebook)
        return torch.cat([self._crop(maps[plain], keys.of(plain)), adapted])[order]

    def _crop(self, maps: Tensor, keys: Keys) -> Tensor:
        grid = maps.shape[2:]
        if self.crop == "resized":
            return crop_resize(maps, random_resized_boxes(keys, grid, self.scale), self.size)
        if self.crop == "window":
            _check_window(grid, (self.size, self.size))
            return random_window(maps.permute(0, 2, 3, 1), keys, self.size).permute(0, 3, 1, 2)
        if tuple(grid) != (self.size, self.size):
            raise ViewError(
                f"grid {tuple(grid)} without a crop: expected {self.size} x {self.size} tokens, "
                "the size of the maps; choose a crop"
            )
        return maps

    def extra_repr(self) -> str:
        crop = {
            "resized": f"random resized crop, scale={self.scale}",
            "window": "random window",
            None: "whole grid",
        }
        adapt = f"; {self.tokenadapt_fraction:.0%} through TokenAdapt" if self.adapt else ""
        return f"{crop[self.crop]}, size={self.size}{adapt}"


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
        _check_window(ids.shape[1:], self.window)
        ids = center_window(ids, self.window).long()
        if self.codebook is None:
            return ids
        maps = embed(ids, self.codebook)
        if self.size is None:
            return maps
        whole = same_boxes(torch.arange(len(ids), device=ids.device), (0, 0, *self.window))
        return crop_resize(maps, whole, self.size)

    def extra_repr(self) -> str:
        gives = "ids" if self.codebook is None else "maps"
        return f"central window={self.window}, {gives}, size={self.size}"


def _check_window(grid: tuple[int, int], window: tuple[int, int]) -> None:
    height, width = grid
    if height < window[0] or width < window[1]:
        raise ViewError(
            f"a window of {window[0]} x {window[1]} tokens of the grid {(height, width)}: "
            "expected at most the grid"
        )
