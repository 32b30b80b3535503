"""The augmentation pipelines of the papers: from a batch of ids to the input of a model."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor, nn

from seitpp.augment.color import ColorAugment, ColorPreset
from seitpp.augment.geometry import apply_geometry, random_geometry
from seitpp.augment.ids import TokenEDA
from seitpp.augment.keyed import Keys
from seitpp.augment.maps import (
    Sides,
    both_sides,
    center_window,
    crop_ratio,
    crop_resize,
    random_flip,
    random_resized_boxes,
    random_window,
    same_boxes,
)
from seitpp.augment.mix import Labels, Mix, SoftLabels
from seitpp.books import Books
from seitpp.codebook import Codebook
from seitpp.errors import UserError


class ViewError(UserError):
    """Raised if the grid, the crop and TokenAdapt of a view do not fit together."""


class SeitPPView(nn.Module):
    """The view for masked token modeling (SeiT++): ids -> vectors -> color augmentation -> crop -> ids.

    A fraction `tokenadapt_fraction` of the images, evenly spread over the batch, is augmented by `adapt`, a
    trained TokenAdapt for this grid and size; the others get a random resized crop. `size` is the side of the crop
    in tokens, or its height and width, None to keep the whole grid; `scale` is the range of the crop's area as a
    fraction of the grid. `flip` is the probability that the grid of one of the others is mirrored, see
    `random_flip`. `color` is a preset of ColorAugment or None. `lookup` is that of the tokenizer, as in `nearest`.
    Raises ViewError if one of `adapt` and `tokenadapt_fraction` is given without the other, and if the
    sizes do not fit.
    """

    def __init__(
        self,
        codebook: Codebook | Books | Float[Tensor, "codes dim"],
        *,
        size: Sides | None,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.0,
        adapt: nn.Module | None = None,
        tokenadapt_fraction: float = 0.5,
        color: ColorPreset | None = None,
        lookup: str = "cosine",
    ):
        super().__init__()
        self.codebook = Codebook.of(codebook)
        self.size, self.scale, self.flip, self.lookup = size, scale, flip, lookup
        self.tokenadapt_fraction = tokenadapt_fraction
        self.adapt = _adapting(size, adapt, tokenadapt_fraction, scale)
        self.color = ColorAugment(color) if color else None

    @torch.no_grad()
    def forward(
        self, ids: Integer[Tensor, "batch *digits height width"], keys: Keys
    ) -> Int64[Tensor, "batch *digits crop_height crop_width"]:
        """Return the augmented ids; `keys` are those of the same images.

        Raises PairingError if ColorAdapt is on and the batch is no multiple of 4.
        """
        ids = ids.long()
        if self.size is None and not self.adapt and not self.color and not self.flip:
            return ids
        maps = _colored(ids, self.codebook, self.color, keys)
        if not self.adapt:
            return self.codebook.nearest(self._plain(maps, keys), self.lookup)
        plain, through, order = split_batch(len(ids), self.tokenadapt_fraction, ids.device)
        cropped = self._plain(maps[plain], keys.of(plain))
        adapted = self.adapt(maps[through], keys.of(through))
        return torch.cat([self.codebook.nearest(cropped, self.lookup), adapted])[order]

    def _plain(self, maps: Tensor, keys: Keys) -> Tensor:
        maps = random_flip(maps, keys, self.flip)
        if self.size is None:
            return maps
        return _random_resized_crop(maps, keys, self.size, scale=self.scale)

    def extra_repr(self) -> str:
        flip = f", flip={self.flip:g}" if self.flip else ""
        if self.size is None:
            return f"whole grid{flip}"
        return (
            f"random resized crop, size={self.size}, scale={self.scale}{flip}; {self.tokenadapt_fraction:.0%} "
            f"through TokenAdapt; lookup={self.lookup}"
        )


class SeitPPFinetuneView(nn.Module):
    """The view for fine-tuning after masked token modeling (SeiT++): ids, labels -> ids, soft labels.

    The vectors of the whole batch get the color augmentation. Then a fraction `tokenadapt_fraction` of the images
    is augmented by TokenAdapt, with CutMix or Mixup of its feature maps, and the others by a random resized crop
    and CutMix (never Mixup). The result is mapped to ids. Arguments and errors are those of SeitPPView, `cutmix`
    and `mixup` those of Mix.
    """

    def __init__(
        self,
        codebook: Codebook | Books | Float[Tensor, "codes dim"],
        *,
        size: Sides | None,
        scale: tuple[float, float] = (0.08, 1.0),
        adapt: nn.Module | None = None,
        tokenadapt_fraction: float = 0.5,
        color: ColorPreset | None = "seitpp",
        cutmix: float = 1.0,
        mixup: float = 0.8,
        lookup: str = "cosine",
    ):
        super().__init__()
        self.codebook = Codebook.of(codebook)
        self.size, self.scale, self.lookup = size, scale, lookup
        self.tokenadapt_fraction = tokenadapt_fraction
        self.mix = Mix(cutmix)
        self.adapt = _adapting(size, adapt, tokenadapt_fraction, scale, Mix(cutmix, mixup))
        self.color = ColorAugment(color) if color else None

    @torch.no_grad()
    def forward(
        self, ids: Integer[Tensor, "batch *digits height width"], labels: Labels, keys: Keys
    ) -> tuple[Int64[Tensor, "batch *digits crop_height crop_width"], SoftLabels]:
        """Return the augmented ids and their labels; `keys` are those of the same images.

        Raises PairingError if images are paired and the batch, or a part of it, is no multiple of 4.
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
        cropped = maps if self.size is None else _random_resized_crop(maps, keys, self.size, scale=self.scale)
        mixed, targets = self.mix(cropped, labels, keys)
        return self.codebook.nearest(mixed, self.lookup), targets

    def extra_repr(self) -> str:
        if self.size is None:
            return f"whole grid; lookup={self.lookup}"
        return (
            f"random resized crop, size={self.size}, scale={self.scale}; {self.tokenadapt_fraction:.0%} through "
            f"TokenAdapt; lookup={self.lookup}"
        )


def _colored(ids: Tensor, codebook: Codebook, color: ColorAugment | None, keys: Keys) -> Tensor:
    """Embed ids and augment their colors; called before the batch is split, so that every partner is available."""
    maps = codebook.embed(ids)
    return color(maps, keys) if color else maps


class TokenAdaptCrop(nn.Module):
    """TokenAdapt as an augmentation: vectors -> f -> flip, affine transform, crop and mix -> g -> ids.

    `adapt` is a trained TokenAdapt; it is frozen, and runs in the precision of the surrounding autocast. `size`
    and `scale` are those of the view's crop. Raises ViewError if `adapt` is None, trained for another crop, or not
    for squares.
    """

    def __init__(
        self,
        size: Sides | None,
        adapt: nn.Module | None,
        *,
        scale: tuple[float, float],
        mix: Mix | None = None,
    ):
        super().__init__()
        if adapt is None:
            raise ViewError(
                "TokenAdapt: got no weights: train it with recipes/tokenadapt_train.py and pass its run with "
                "--tokenadapt, or pass --tokenadapt-fraction 0 to do without"
            )
        if size is None or adapt.crop != both_sides(size):
            raise ViewError(
                f"TokenAdapt: got one for a crop of {adapt.crop}, but the crop is {size}: train it with this crop"
            )
        if adapt.grid[0] != adapt.grid[1] or adapt.crop[0] != adapt.crop[1]:
            raise ViewError(
                f"TokenAdapt: got the grid {adapt.grid} and a crop of {adapt.crop}, expected squares: pass "
                "--tokenadapt-fraction 0 to do without"
            )
        self.adapt = adapt.eval().requires_grad_(False)
        self.scale, self.mix = scale, mix or Mix(0.0)

    def forward(
        self, maps: Float[Tensor, "batch dim height width"], keys: Keys
    ) -> Int64[Tensor, "batch *digits size size"]:
        """Return the ids of the augmented images; `keys` are those of the same images."""
        return self.mixed(maps, torch.zeros_like(keys.indices), keys)[0]

    def mixed(
        self, maps: Float[Tensor, "batch dim height width"], labels: Labels, keys: Keys
    ) -> tuple[Int64[Tensor, "batch *digits size size"], SoftLabels]:
        """Return the ids of the augmented images and their labels, mixed in the feature space between f and g.

        Raises ViewError for maps of another grid than that of TokenAdapt.
        """
        if tuple(maps.shape[2:]) != self.adapt.grid:
            raise ViewError(
                f"TokenAdapt: got a grid of {tuple(maps.shape[2:])}, expected {self.adapt.grid}: pass one that "
                "was trained on this grid"
            )
        geometry = random_geometry(keys, self.adapt.grid[0], self.adapt.crop[0], scale=self.scale)
        space = apply_geometry(self.adapt.convert(maps), geometry)
        space, targets = self.mix(space, labels, keys)
        return self.adapt.likeliest(space), targets


def _adapting(
    size: Sides | None,
    adapt: nn.Module | None,
    fraction: float,
    scale: tuple[float, float],
    mix: Mix | None = None,
) -> TokenAdaptCrop | None:
    if fraction:
        return TokenAdaptCrop(size, adapt, scale=scale, mix=mix)
    if adapt is not None:
        raise ViewError(
            "TokenAdapt: got weights, but no image goes through it: pass --tokenadapt-fraction 0.5, or leave out "
            "--tokenadapt"
        )
    return None


def split_batch(
    batch: int, fraction: float, device: torch.device
) -> tuple[Int64[Tensor, " plain"], Int64[Tensor, " through"], Int64[Tensor, " {batch}"]]:
    """Split the positions of a batch in two: the rest, and `fraction` of them, evenly spread.

    Returns both and the order that restores the batch from the concatenation of the two. A fraction of 0.5 gives
    the even and the odd positions. They are created on the device: a copy from the CPU would be a sync in every
    step.
    """
    through = math.floor(batch * fraction)
    positions = torch.arange(batch, device=device)
    chosen = (positions + 1) * through // batch > positions * through // batch
    joined = chosen.int().argsort(stable=True)
    return joined[: batch - through], joined[batch - through :], joined.argsort()


def _random_resized_crop(maps: Tensor, keys: Keys, size: Sides, *, scale: tuple[float, float]) -> Tensor:
    boxes = random_resized_boxes(keys, tuple(maps.shape[-2:]), scale, ratio=crop_ratio(size))
    return crop_resize(maps, boxes, size)


class SeitView(nn.Module):
    """The view for supervised training (SeiT): ids -> Token-EDA -> vectors -> crop -> color augmentation -> mix.

    `size` is the side of the maps in tokens, or their height and width. `crop`: "resized" (random resized crop,
    its area in the range `scale` of fractions of the grid), "window" (a random window, not resized) or None (the
    whole grid). `flip` is the probability that the grid is mirrored before, see `random_flip`. `eda` and `color`
    are presets of TokenEDA and ColorAugment or None; `cutmix` and `mixup` are those of Mix. With `adapt`, a
    trained TokenAdapt (SeiT++ without masked modeling), a fraction `tokenadapt_fraction` of the images is
    augmented by it instead of flip and crop. Raises ViewError as SeitPPView.
    """

    def __init__(
        self,
        codebook: Codebook | Books | Float[Tensor, "codes dim"],
        *,
        size: Sides,
        crop: Literal["resized", "window"] | None = "resized",
        scale: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.0,
        eda: Literal["paper", "release"] | None = "release",
        color: ColorPreset | None = "paper",
        cutmix: float = 1.0,
        mixup: float = 0.0,
        adapt: nn.Module | None = None,
        tokenadapt_fraction: float = 0.0,
    ):
        super().__init__()
        self.codebook = Codebook.of(codebook)
        self.size, self.crop, self.scale, self.flip = size, crop, scale, flip
        self.tokenadapt_fraction = tokenadapt_fraction
        self.eda = TokenEDA(self.codebook, eda) if eda else None
        self.adapt = _adapting(size, adapt, tokenadapt_fraction, scale)
        self.color = ColorAugment(color) if color else None
        self.mix = Mix(cutmix, mixup)

    @torch.no_grad()
    def forward(
        self, ids: Integer[Tensor, "batch *digits height width"], labels: Labels, keys: Keys
    ) -> tuple[Float[Tensor, "batch dim crop_height crop_width"], SoftLabels]:
        """Return the augmented maps of vectors and their labels; `keys` are those of the same images.

        Raises ViewError if the grid does not fit `size`, PairingError if images are paired and the batch is no
        multiple of 4.
        """
        ids = ids.long()
        if self.eda:
            ids = self.eda(ids, keys)
        if self.color and self.color.rates.whole_grid:
            maps = self._cut(self.color(self.codebook.embed(ids), keys), keys)
        else:
            maps = self._cut(self.codebook.embed(ids), keys)
            maps = self.color(maps, keys) if self.color else maps
        return self.mix(maps, labels, keys)

    def _cut(self, maps: Tensor, keys: Keys) -> Tensor:
        """Maps (B, D, H, W) -> (B, D, *size), by the crop or by TokenAdapt."""
        if not self.adapt:
            return self._crop(maps, keys)
        plain, through, order = split_batch(len(maps), self.tokenadapt_fraction, maps.device)
        adapted = self.codebook.embed(self.adapt(maps[through], keys.of(through)))
        return torch.cat([self._crop(maps[plain], keys.of(plain)), adapted])[order]

    def _crop(self, maps: Tensor, keys: Keys) -> Tensor:
        maps = random_flip(maps, keys, self.flip)
        if self.crop == "resized":
            return _random_resized_crop(maps, keys, self.size, scale=self.scale)
        grid, size = tuple(maps.shape[2:]), both_sides(self.size)
        if self.crop == "window":
            _check_window(grid, size)
            return random_window(maps.permute(0, 2, 3, 1), keys, size).permute(0, 3, 1, 2)
        if grid != size:
            raise ViewError(
                f"grid: got {grid} without a crop, expected {size[0]} x {size[1]} tokens, the size of the maps: "
                "choose a crop"
            )
        return maps

    def extra_repr(self) -> str:
        crop = {
            "resized": f"random resized crop, scale={self.scale}",
            "window": "random window",
            None: "whole grid",
        }
        flip = f", flip={self.flip:g}" if self.flip else ""
        adapt = f"; {self.tokenadapt_fraction:.0%} through TokenAdapt" if self.adapt else ""
        return f"{crop[self.crop]}, size={self.size}{flip}{adapt}"


class EvalView(nn.Module):
    """The view for evaluation: the central window of the grid, as ids or as maps of vectors.

    `window` is (height, width) in tokens. With `codebook` the view returns maps, with `size`, a side or height and
    width, these are resized to so many tokens (for the linear stem).
    """

    def __init__(
        self,
        window: tuple[int, int],
        codebook: Codebook | Books | Float[Tensor, "codes dim"] | None = None,
        size: Sides | None = None,
    ):
        super().__init__()
        self.codebook = None if codebook is None else Codebook.of(codebook)
        self.window, self.size = window, size

    def forward(
        self, ids: Integer[Tensor, "batch *digits height width"]
    ) -> (
        Int64[Tensor, "batch *digits {self.window[0]} {self.window[1]}"]
        | Float[Tensor, "batch dim out_height out_width"]
    ):
        """Return the ids or maps of the central window. Raises ViewError if the window is larger than the grid."""
        _check_window(ids.shape[-2:], self.window)
        ids = center_window(ids, self.window).long()
        if self.codebook is None:
            return ids
        maps = self.codebook.embed(ids)
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
            f"window: got {window[0]} x {window[1]} tokens, expected at most the grid, {height} x {width}: "
            "choose a smaller window"
        )
