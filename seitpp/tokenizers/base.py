"""What every tokenizer is: a spec, features, a nearest-code lookup and a decoder."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seitpp.codebook import LOOKUP_CELLS, LOOKUPS, full_precision, nearest
from seitpp.errors import UserError

# Up to this distance two rows are the same code, rounded in two ways.
SAME_ROW = 1e-5
HEADER = "tokenizer"  # the key of the spec in the header of a tokenizer file


class TokenizerError(UserError):
    """A tokenizer file, an image or ids that a tokenizer cannot work with."""


@dataclass(frozen=True)
class TokenizerSpec:
    """The facts of a tokenizer that travel with the tokens (as JSON in `tokens.json`).

    Images are resized to exactly `image_size` = (height, width) pixels with the `resize` filter, antialiased,
    aspect ratio not kept; the network is given (image - mean) / std for an image in [0, 1], one number a
    channel. One token covers `patch` x `patch` pixels and is the id of the nearest of `num_codes` codes with
    `code_dim` numbers each, by `lookup`: "cosine" (both sides L2-normalized) or "euclidean".
    """

    kind: str
    image_size: tuple[int, int]
    patch: int
    num_codes: int
    code_dim: int
    lookup: str = "cosine"
    resize: str = "bicubic"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        if self.lookup not in LOOKUPS:
            raise TokenizerError(f"lookup {self.lookup!r} of the {self.kind} tokenizer: expected one of {LOOKUPS}")
        sizes = (*self.image_size, self.patch, self.num_codes, self.code_dim)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise TokenizerError(f"sizes of the {self.kind} tokenizer are {sizes}: expected positive integers")
        if any(side % self.patch for side in self.image_size):
            raise TokenizerError(
                f"image_size {self.image_size} of the {self.kind} tokenizer is not a multiple of patch "
                f"{self.patch}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) tokens of an image."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @classmethod
    def from_json(cls, values: Mapping) -> "TokenizerSpec":
        """The spec that `asdict` and JSON made `values` of. Raises TokenizerError for other values."""
        if not isinstance(values, Mapping):
            raise TokenizerError(f"not the spec of a tokenizer: {values!r}")
        try:
            return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
        except TypeError as error:
            raise TokenizerError(f"not the spec of a tokenizer: {dict(values)} ({error})") from error


class Tokenizer(nn.Module, ABC):
    """Base of all tokenizers. A subclass has `codebook` (K, D) float and gives `features`, `_pixels`, `_keep`.

    Images are (B, 3, height, width) float in [0, 1]; ids are (B, H, W) int64 in [0, K).
    """

    codebook: Tensor

    def __init__(self, spec: TokenizerSpec):
        super().__init__()
        self.spec = spec

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; the lookup is fp32 all the same."""
        return next(t.dtype for t in chain(self.parameters(), self.buffers()) if t.is_floating_point())

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, any, any) in [0, 1] -> (B, 3, *image_size) in [0, 1], resized and antialiased."""
        resized = F.interpolate(images, self.spec.image_size, mode=self.spec.resize, antialias=True)
        return resized.clamp(0, 1)

    def set_image_size(self, size: int | tuple[int, int]) -> None:
        """Tokenize images of another size, an int or (height, width), from now on.

        Raises TokenizerError unless it is a multiple of the patch.
        """
        size = (size, size) if isinstance(size, int) else tuple(size)
        self.spec = replace(self.spec, image_size=size)

    @property
    def side_multiple(self) -> int:
        """Pixels of which both sides of every image size are multiples."""
        return self.spec.patch

    @contextmanager
    def at_size(self, size: tuple[int, int]) -> Iterator[None]:
        """Tokenize images of another (height, width) within the block. Raises TokenizerError as set_image_size."""
        before = self.spec.image_size
        self.set_image_size(size)
        try:
            yield
        finally:
            self.set_image_size(before)

    def model_input(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> what the network is given: (images - mean) / std, in its dtype."""
        # Number by number: to copy three numbers to a device, the host would wait for it.
        channels = zip(images.unbind(dim=1), self.spec.mean, self.spec.std, strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1).to(self.dtype)

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Preprocessed images -> unquantized map (B, D, H, W)."""

    @abstractmethod
    def _pixels(self, ids: Tensor) -> Tensor:
        """Ids (B, H, W) int64 in [0, K) -> images (B, 3, height, width) around [0, 1]."""

    @abstractmethod
    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        """Keep the codes `ids` (K',) int64 only, in this order, with `rows` (K', D) as their vectors."""

    def quantize(self, maps: Tensor) -> Tensor:
        """Map (B, D, H, W) -> ids (B, H, W) int64."""
        return nearest(maps, self.codebook, self.spec.lookup)

    def _ids(self, images: Tensor) -> Tensor:
        return self.quantize(self.features(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Preprocessed images -> ids (B, H, W) int64. Raises TokenizerError for another image size."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.spec.image_size):
            height, width = self.spec.image_size
            raise TokenizerError(
                f"images of shape {tuple(images.shape)} given to the {self.spec.kind} tokenizer, expected "
                f"(B, 3, {height}, {width}): pass them through its preprocess() first"
            )
        with full_precision(images.device):
            return self._ids(images)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids (B, H, W) of any integer dtype -> images (B, 3, height, width) float32 in [0, 1].

        Raises TokenizerError for ids of another shape or dtype, or outside [0, K).
        """
        checked = check_ids(ids, self.spec.num_codes, f"the {self.spec.kind} tokenizer")
        if ids.ndim != 3:
            raise TokenizerError(f"ids of shape {tuple(ids.shape)} to decode, expected (B, H, W)")
        with full_precision(ids.device):
            return self._pixels(checked).float().clamp(0, 1)

    def compact(self, counts: Tensor) -> "Tokenizer":
        """A copy with the used codes only, re-numbered by frequency: 0 the most frequent, among equals the
        smaller old id. `counts` (K,) says how often each code was seen (`seitpp.tokenizers.code_counts`).

        Ids of images that use kept codes only are the old ids re-numbered; elsewhere the nearest kept code is
        taken. Raises TokenizerError for counts of another shape or without a used code.
        """
        if tuple(counts.shape) != (self.spec.num_codes,) or not (counts > 0).any() or (counts < 0).any():
            raise TokenizerError(
                f"counts of shape {tuple(counts.shape)} with sum {counts.sum().item()} for a tokenizer of "
                f"{self.spec.num_codes} codes: expected ({self.spec.num_codes},), none negative, not all zero"
            )
        kept = by_frequency(counts).to(self.codebook.device)
        return self._cut(kept, self.codebook.detach()[kept])

    def select(self, rows: Tensor) -> "Tokenizer":
        """A copy with the codes whose vectors are `rows` (K', D) only, in this order: so its ids are those of
        whoever else has this codebook, and its `codebook` is exactly `rows`.

        A row is the code nearest to it, at most 1e-5 away, and each a code of its own; with the cosine lookup both
        are L2-normalized before. Raises TokenizerError saying how many rows are not found and how far they are.
        """
        rows = rows.detach().to(self.codebook, copy=True)
        if rows.ndim != 2 or rows.shape[1] != self.spec.code_dim or len(rows) == 0:
            raise TokenizerError(
                f"rows of shape {tuple(rows.shape)} for the {self.spec.kind} tokenizer, whose codes have "
                f"{self.spec.code_dim} dimensions: take the tokenizer that the codebook belongs to"
            )
        distances, ids = self._nearest_codes(rows)
        missing = int((~(distances <= SAME_ROW)).sum())  # a row that is not finite has no distance
        if missing:
            raise TokenizerError(
                f"{missing} of {len(rows)} rows are not among the {self.spec.num_codes} codes of the "
                f"{self.spec.kind} tokenizer, the farthest {distances.max().item():.2g} away, expected at most "
                f"{SAME_ROW:.0e}: take the tokenizer that the codebook belongs to"
            )
        if repeated := len(rows) - len(ids.unique()):
            raise TokenizerError(
                f"{repeated} of {len(rows)} rows repeat the code of another row: expected each code once"
            )
        return self._cut(ids, rows)

    def _nearest_codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row (K', D) the distance to the nearest code (-1 to an equal one), and its id."""
        table, found = self.codebook.detach(), []
        for chunk in rows.split(max(1, LOOKUP_CELLS // len(table))):
            distances = raw = _distances(chunk, table)
            if self.spec.lookup == "cosine":
                distances = _distances(F.normalize(chunk, dim=1), F.normalize(table, dim=1))
            # Equal rows come first, since another code can have the same direction.
            found.append(distances.masked_fill(raw == 0, -1).min(dim=1))
        return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])

    def _cut(self, ids: Tensor, rows: Tensor) -> "Tokenizer":
        other = deepcopy(self)
        other.spec = replace(self.spec, num_codes=len(ids))
        other._keep(ids, rows)
        return other

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the spec and every tensor, as hex: equal exactly when the tokens are.

        Facts at their default are left out, so that a fact added to the spec changes no older fingerprint.
        """
        facts = {
            field.name: value
            for field in fields(self.spec)
            if (value := getattr(self.spec, field.name)) != field.default or field.default is MISSING
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + data.numpy().tobytes())
        return digest.hexdigest()

    def description(self) -> dict:
        """What a store keeps about its tokenizer: fingerprint and spec, JSON-able."""
        return {"fingerprint": self.fingerprint, "spec": asdict(self.spec)}


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    # Not by a matrix product, whose rounding is larger than the distances that matter.
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def by_frequency(counts: Tensor) -> Tensor:
    """The used codes (K',) int64 of counts (K,), the most frequent first, among equals the smaller id."""
    return counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]


def check_ids(ids: Tensor, num_codes: int, whose: str) -> Tensor:
    """Ids of any shape as int64. Raises TokenizerError naming `whose` unless they are integers in [0, K)."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TokenizerError(f"ids of dtype {ids.dtype} of {whose}: expected integers")
    ids = ids.long()
    low, high = (ids.min().item(), ids.max().item()) if ids.numel() else (0, 0)
    if low < 0 or high >= num_codes:
        raise TokenizerError(
            f"ids {low} to {high} of {whose}, expected 0 to {num_codes - 1}: are they of another tokenizer?"
        )
    return ids
