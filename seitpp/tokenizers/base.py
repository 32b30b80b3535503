"""The interface of all tokenizers: a specification, features, a nearest-code lookup and a decoder."""

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import KW_ONLY, MISSING, asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64, Integer
from torch import Tensor, nn

from seitpp.books import MAX_DIGITS, Combine
from seitpp.codebook import LOOKUP_CELLS, LOOKUPS, Codebook, full_precision
from seitpp.errors import UserError
from seitpp.tensors import save_tensors

# Codebook rows at most this far apart are the same code, rounded differently.
SAME_ROW = 1e-5
MOST = 1 << 20  # of any size of a tokenizer
LARGEST = sys.float_info.max  # an int can be larger, and is then no number to compute with
RESIZES = ("bicubic", "bilinear")  # the filters that torch antialiases
HEADER = "tokenizer"  # key of the spec in the header of a tokenizer file


# The size of images in pixels: an int for squares, or (height, width).
ImageSize = int | tuple[int, int]


class TokenizerError(UserError):
    """Raised for a tokenizer file, images or ids that a tokenizer cannot use."""


@dataclass(frozen=True)
class TokenizerSpec:
    """The specification of a tokenizer, stored with the tokens (as JSON in `tokens.json`).

    Images have `channels` channels and are resized to exactly `image_size` = (height, width) in pixels with the
    `resize` filter, antialiased, without keeping the aspect ratio. The network receives (image - mean) / std of an
    image in [0, 1], per channel. One token covers `patch` x `patch` pixels and is the id of the nearest of
    `num_codes` codes of dimension `code_dim`; `lookup` is the distance: "cosine" (features and codes
    L2-normalized) or "euclidean".
    Of a tokenizer with a table for each digit of a token, `num_codes` is the number of rows of all tables and
    `digits` that of each; `combine` is that of `Books`. Where tokens have no rows and columns, `sequence` is the
    number of them in an image, and `patch` only what a side of the image must be a multiple of.
    Raises TokenizerError for an unknown lookup or filter, for sizes that are not in [1, 2^20] or do not fit the
    patch, and for means or deviations of another number of channels, or that are not finite.
    """

    kind: str
    image_size: tuple[int, int]
    patch: int
    _: KW_ONLY
    num_codes: int
    code_dim: int
    lookup: str = "cosine"
    resize: str = "bicubic"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels: int = 3
    digits: tuple[int, ...] = ()
    combine: Combine = "index"
    sequence: int = 0

    def __post_init__(self):
        if not isinstance(self.kind, str):
            raise TokenizerError(f"a tokenizer of kind {self.kind!r}, expected its name")
        if self.lookup not in LOOKUPS:
            raise TokenizerError(f"{self.kind} tokenizer: got lookup {self.lookup!r}, expected one of {LOOKUPS}")
        if self.resize not in RESIZES:
            raise TokenizerError(f"{self.kind} tokenizer: got resize {self.resize!r}, expected one of {RESIZES}")
        sizes = (*self.image_size, self.patch, self.num_codes, self.code_dim, self.channels)
        if len(self.image_size) != 2 or not all(type(size) is int and 0 < size <= MOST for size in sizes):
            raise TokenizerError(
                f"{self.kind} tokenizer: got image_size, patch, num_codes, code_dim and channels {sizes}, "
                f"expected positive integers up to {MOST:,}, two of them for image_size"
            )
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise TokenizerError(
                f"{self.kind} tokenizer: got {len(self.mean)} means and {len(self.std)} deviations, expected one "
                f"for each of {self.channels} channels"
            )
        numbers = (*self.mean, *self.std)
        finite = all(type(number) in (int, float) and abs(number) <= LARGEST for number in numbers)
        if not finite or min(self.std) <= 0:
            raise TokenizerError(
                f"{self.kind} tokenizer: got means {self.mean} and deviations {self.std}, expected finite "
                "numbers, the deviations more than 0"
            )
        self._check_tokens()
        if any(side % self.patch for side in self.image_size):
            raise TokenizerError(
                f"{self.kind} tokenizer: image_size {self.image_size} is not a multiple of patch {self.patch}: "
                "change one of them"
            )

    def _check_tokens(self) -> None:
        """Raise TokenizerError unless the digits and the length of a sequence can be those of a tokenizer."""
        sizes = (*self.digits, *([self.sequence] if self.sequence != 0 else []))
        several = isinstance(self.digits, tuple) and 2 <= len(self.digits) <= MAX_DIGITS
        tables = several and self.combine in ("concat", "sum")
        plain = self.digits == () and self.combine == "index"
        whole = all(type(size) is int and 0 < size <= MOST for size in sizes)
        if not (plain or tables) or not whole or sum(self.digits) not in (0, self.num_codes):
            raise TokenizerError(
                f"{self.kind} tokenizer: got digits {self.digits} combined by {self.combine!r} and a sequence of "
                f"{self.sequence!r}, expected positive numbers up to {MOST:,}, the digits none, or "
                f"2 .. {MAX_DIGITS} of {self.num_codes} rows in all combined by concat or sum"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """The token grid of an image: (rows, columns); a sequence is one row."""
        if self.sequence:
            return 1, self.sequence
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    def to_json(self) -> dict:
        """Return the fields, ready for JSON; those that older versions lack only where they say something."""
        defaults = {"channels": 3, "digits": (), "combine": "index", "sequence": 0}
        return {name: value for name, value in asdict(self).items() if defaults.get(name, ...) != value}

    @classmethod
    def unscaled(
        cls,
        kind: str,
        image_size: ImageSize,
        patch: int,
        *,
        num_codes: int,
        code_dim: int,
        channels: int = 3,
    ) -> "TokenizerSpec":
        """Return the spec of a tokenizer whose network receives images in [0, 1], of any number of channels."""
        return cls(
            kind,
            height_and_width(image_size),
            patch,
            num_codes=num_codes,
            code_dim=code_dim,
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            channels=channels,
        )

    @classmethod
    def from_json(cls, values: Mapping) -> "TokenizerSpec":
        """Create a spec from its fields, as read from JSON. Raises TokenizerError for any other value."""
        if not isinstance(values, Mapping):
            raise TokenizerError(f"not the spec of a tokenizer: got {values!r}, expected a mapping")
        try:
            return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
        except TypeError as error:
            raise TokenizerError(
                f"not the spec of a tokenizer: got {dict(values)}, expected the fields of TokenizerSpec ({error})"
            ) from error


class Tokenizer(nn.Module, ABC):
    """The base class of all tokenizers.

    A subclass has a `codebook` (K, D) float and implements `features`, `_pixels` and `_keep`. Images are
    (B, C, height, width) float in [0, 1], with the C channels of the spec; ids are (B, H, W) int64 in [0, K), or
    digits (B, Q, H, W) where stores have them: for more than 65,536 codes, and where a token is the rows of
    several tables. Such a tokenizer implements `books` instead of having a codebook.
    """

    codebook: Tensor

    @property
    def books(self) -> Codebook:
        """What the digits of a token mean, on the device of the tokenizer."""
        return Codebook.of(self.codebook.detach())

    def __init__(self, spec: TokenizerSpec):
        super().__init__()
        self.spec = spec

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network computes. `quantize` uses fp32 all the same."""
        return next(t.dtype for t in chain(self.parameters(), self.buffers()) if t.is_floating_point())

    def preprocess(
        self, images: Float[Tensor, "batch channels any_height any_width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Resize images in [0, 1] to the image size of the spec, antialiased, and clamp them to [0, 1]."""
        resized = F.interpolate(images, self.spec.image_size, mode=self.spec.resize, antialias=True)
        return resized.clamp(0, 1)

    def set_image_size(self, size: ImageSize) -> None:
        """Set the size of the images to tokenize: an int for squares, or (height, width), in pixels.

        Raises TokenizerError unless it is a multiple of the patch.
        """
        self.spec = replace(self.spec, image_size=height_and_width(size))

    @property
    def side_multiple(self) -> int:
        """The number of pixels of which both sides of an image must be multiples."""
        return self.spec.patch

    @contextmanager
    def at_size(self, size: tuple[int, int]) -> Iterator[None]:
        """Set the image size to (height, width) within the block. Raises TokenizerError like `set_image_size`."""
        before = self.spec.image_size
        self.set_image_size(size)
        try:
            yield
        finally:
            self.set_image_size(before)

    def _model_input(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalize images in [0, 1] to the input of the network: (images - mean) / std, in its dtype."""
        # With Python numbers, since copying `mean` and `std` to a device would make the host wait.
        channels = zip(images.unbind(dim=1), self.spec.mean, self.spec.std, strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1).to(self.dtype)

    def _from_model(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Bring images as the network sees them to [0, 1], as float32: the inverse of `_model_input`."""
        channels = zip(images.float().unbind(dim=1), self.spec.mean, self.spec.std, strict=True)
        return torch.stack([channel * std + mean for channel, mean, std in channels], dim=1)

    @abstractmethod
    def features(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch code_dim rows columns"]:
        """Compute the unquantized feature map of preprocessed images."""

    @abstractmethod
    def _pixels(self, ids: Tensor) -> Tensor:
        """Decode ids to images (B, C, height, width), not yet clamped to [0, 1].

        The ids are (B, H, W) int64 in [0, K), or with several tables digits (B, Q, H, W).
        """

    @abstractmethod
    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        """Keep only the codes `ids` (K',) int64, in this order, with `rows` (K', D) as their vectors."""

    def quantize(
        self, maps: Float[Tensor, "batch code_dim rows columns"]
    ) -> Int64[Tensor, "batch *digits rows columns"]:
        """Return the ids of the code nearest to each vector of a feature map."""
        return self.books.nearest(maps, self.spec.lookup)

    def _ids(self, images: Tensor) -> Tensor:
        """Return the ids of preprocessed images, with one table always its rows (B, H, W)."""
        return self.quantize(self.features(images))

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Int64[Tensor, "batch *digits rows columns"]:
        """Tokenize preprocessed images. Raises TokenizerError unless they have channels and size of the spec."""
        channels, (height, width) = self.spec.channels, self.spec.image_size
        if images.ndim == 4 and images.shape[1] != channels:
            raise TokenizerError(
                f"images of {images.shape[1]} channels given to the {self.spec.kind} tokenizer, expected "
                f"{channels}: read images of {channels} channels, or train a tokenizer for {images.shape[1]}"
            )
        if images.ndim != 4 or tuple(images.shape[2:]) != (height, width):
            raise TokenizerError(
                f"images of shape {tuple(images.shape)} given to the {self.spec.kind} tokenizer, expected "
                f"(B, {channels}, {height}, {width}): pass them through its preprocess() first"
            )
        with full_precision(images.device):
            ids = self._ids(images)
        return self.books.split(ids) if ids.ndim == 3 else ids

    @torch.no_grad()
    def decode(
        self, ids: Integer[Tensor, "batch *digits rows columns"]
    ) -> Float32[Tensor, "batch channels height width"]:
        """Decode ids to images in [0, 1].

        Raises TokenizerError if the ids have another number of dimensions, are not integers or are outside [0, K).
        """
        owner, books = f"the {self.spec.kind} tokenizer", self.books
        planes = books.planes
        if ids.ndim != 3 + len(planes) or tuple(ids.shape[1 : 1 + len(planes)]) != planes:
            expected = f"(B, {planes[0]}, H, W)" if planes else "(B, H, W)"
            raise TokenizerError(
                f"{self.spec.kind} tokenizer: got ids of shape {tuple(ids.shape)}, expected {expected}"
            )
        digits = ids.unbind(dim=1) if planes else [ids]
        checked = [check_ids(plane, size, owner) for plane, size in zip(digits, books.sizes, strict=True)]
        ids = torch.stack(checked, dim=1) if planes else checked[0]
        with full_precision(ids.device):
            return self._pixels(books.joined(ids) if books.combine == "index" else ids).float().clamp(0, 1)

    def compact(self, counts: Tensor) -> "Tokenizer":
        """Return a copy that has only the used codes, renumbered by frequency: 0 is the most frequent code.

        `counts` (K,) says how often each code occurs (`seitpp.tokenizers.code_counts`); codes with equal counts
        keep their order. Where a kept code was the nearest one, its id is renumbered; elsewhere the nearest kept
        code replaces it. Raises TokenizerError if `counts` has another shape or a negative entry, or if no code is
        used.
        """
        self._require_one_table()
        if tuple(counts.shape) != (self.spec.num_codes,) or not (counts > 0).any() or (counts < 0).any():
            raise TokenizerError(
                f"counts of shape {tuple(counts.shape)} with sum {counts.sum().item()} for a tokenizer of "
                f"{self.spec.num_codes} codes: expected ({self.spec.num_codes},), none negative, not all zero"
            )
        kept = by_frequency(counts).to(self.codebook.device)
        return self._cut(kept, self.codebook.detach()[kept])

    def select(self, rows: Tensor) -> "Tokenizer":
        """Return a copy that has only the codes with the vectors `rows` (K', D), in this order.

        Its `codebook` equals `rows` exactly, so its ids agree with those of other users of this codebook. Each
        row must be at most 1e-5 from its nearest code, and no two rows may have the same one; with the cosine
        lookup, rows and codes are L2-normalized first. Raises TokenizerError otherwise, with the number of rows
        that were not found and the largest distance.
        """
        self._require_one_table()
        rows = rows.detach().to(self.codebook, copy=True)
        if rows.ndim != 2 or rows.shape[1] != self.spec.code_dim or len(rows) == 0:
            raise TokenizerError(
                f"rows of shape {tuple(rows.shape)} for the {self.spec.kind} tokenizer, whose codes have "
                f"{self.spec.code_dim} dimensions: use the tokenizer that the codebook belongs to"
            )
        distances, ids = self._nearest_codes(rows)
        missing = int((~(distances <= SAME_ROW)).sum())  # also counts rows at a distance of nan
        if missing:
            raise TokenizerError(
                f"{missing} of {len(rows)} rows are not among the {self.spec.num_codes} codes of the "
                f"{self.spec.kind} tokenizer, the farthest {distances.max().item():.2g} away, expected at most "
                f"{SAME_ROW:.0e}: use the tokenizer that the codebook belongs to"
            )
        if repeated := len(rows) - len(ids.unique()):
            raise TokenizerError(
                f"{self.spec.kind} tokenizer: {repeated} of {len(rows)} rows repeat the code of another row, "
                "expected each code once"
            )
        return self._cut(ids, rows)

    def _require_one_table(self) -> None:
        if self.spec.digits:
            raise TokenizerError(
                f"{self.spec.kind} tokenizer: a code is the rows of {len(self.spec.digits)} tables, expected one "
                "table to keep some codes of: keep all"
            )

    def _nearest_codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance of each row (K', D) to the nearest code (-1 to an equal one), and its id."""
        table, minima = self.codebook.detach(), []
        for chunk in rows.split(max(1, LOOKUP_CELLS // len(table))):
            distances = raw = _distances(chunk, table)
            if self.spec.lookup == "cosine":
                distances = _distances(F.normalize(chunk, dim=1), F.normalize(table, dim=1))
            # An equal code wins by -1, since another code can have the same direction.
            minima.append(distances.masked_fill(raw == 0, -1).min(dim=1))
        return torch.cat([part.values for part in minima]), torch.cat([part.indices for part in minima])

    def _cut(self, ids: Tensor, rows: Tensor) -> "Tokenizer":
        copy = deepcopy(self)
        copy.spec = replace(self.spec, num_codes=len(ids))
        copy._keep(ids, rows)
        return copy

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the spec and every tensor, as hex.

        Fields of the spec at their default are left out, so that a new field does not change older fingerprints.
        """
        settings = {
            field.name: value
            for field in fields(self.spec)
            if (value := getattr(self.spec, field.name)) != field.default or field.default is MISSING
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + data.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with the spec in its header, which `tokenizers.load` reads.

        Raises TokenizerError for a network of another library that cannot be rebuilt from a file.
        """
        save_tensors(Path(path), self.state_dict(), key=HEADER, header=self._header())

    def _header(self) -> dict:
        """Return what `load` needs besides the tensors, ready for JSON: the spec."""
        return self.spec.to_json()

    def description(self) -> dict:
        """Return what a store records about its tokenizer: fingerprint and spec, ready for JSON."""
        return {"fingerprint": self.fingerprint, "spec": self.spec.to_json()}


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Return an image size as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def require_equal_shapes(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], complaint: str) -> None:
    """Raise TokenizerError that begins with `complaint` unless all tensors have the same names and shapes.

    Floating-point numbers are expected where there are any.
    """
    problems = [
        *(f"{name} is missing" for name in expected if name not in got),
        *(f"{name} is unexpected" for name in got if name not in expected),
        *(
            f"{name} is {tuple(got[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in got and got[name].shape != tensor.shape
        ),
        *(
            f"{name} is {got[name].dtype}, expected {tensor.dtype}"
            for name, tensor in expected.items()
            if name in got and tensor.is_floating_point() and not got[name].is_floating_point()
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise TokenizerError(f"{complaint}: {'; '.join(problems[:5])}{more}")


def fp32_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, so that a tokenizer does not depend on its file staying as it is; floats become fp32."""
    return {
        name: tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in tensors.items()
    }


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    # Without a matrix product, whose rounding errors exceed the distances that matter here.
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def by_frequency(counts: Integer[Tensor, " codes"]) -> Int64[Tensor, " used_codes"]:
    """Return the ids of the used codes, the most frequent first; codes with equal counts stay in order."""
    return counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]


def check_ids(ids: Integer[Tensor, "*shape"], num_codes: int, owner: str) -> Int64[Tensor, "*shape"]:
    """Return ids as int64. Raises TokenizerError naming their `owner` unless they are integers in [0, K)."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TokenizerError(f"ids of dtype {ids.dtype} of {owner}: expected integers")
    ids = ids.long()
    low, high = (ids.min().item(), ids.max().item()) if ids.numel() else (0, 0)
    if low < 0 or high >= num_codes:
        raise TokenizerError(
            f"ids {low} to {high} of {owner}, expected 0 to {num_codes - 1}: use the tokenizer they belong to"
        )
    return ids
