"""Adapters that turn a tokenizer of another library, passed as the library's own object, into a `Tokenizer`.

| class or function | for | codebook (K, D) | decodes |
|---|---|---|---|
| `DiffusersVQ` | diffusers `VQModel` (aMUSEd, MoVQ, ldm) | embedding rows | yes |
| `ChameleonVQ` | transformers `ChameleonVQVAE` | embedding rows | no |
| `Emu3VQ` | transformers `Emu3VQVAE` | embedding rows | yes |
| `JanusVQ` | transformers `JanusVQVAE` | embedding rows, L2-normalized | yes |
| `TamingVQ` | taming-transformers, LlamaGen and IBQ style modules | embedding rows | yes |
| `TorchScriptVQ` | an encoder and a decoder in TorchScript (Cosmos DI8x8, DI16x16) | `fsq_codebook` | yes |
| `from_functions` | anything else, also with a table for each digit of a token | given | if given |

None of these libraries is imported here. Images are in [0, 1]; the adapter converts them to the network's range.
"""

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seitpp.books import Books
from seitpp.codebook import Codebook, nearest
from seitpp.tokenizers.base import Tokenizer, TokenizerError, TokenizerSpec, check_ids

HALF = (0.5, 0.5, 0.5)  # as mean and std: [0, 1] -> [-1, 1]
# Chameleon's own preprocessing is 0.0078 * byte - 1, not exactly [-1, 1].
CHAMELEON = (1 / (0.0078 * 255),) * 3
COSMOS_LEVELS = (8, 8, 8, 5, 5, 5)
NETWORK = "network"  # key of the library's config in the header of a saved tokenizer


class Adapter(Tokenizer):
    """A tokenizer with the network of another library, `model`, and that network's whole codebook, `table` (K, D).

    `kept` (K',) holds the codes in use: all of them until `compact` or `select`. A subclass implements `_images`
    if its library has a decoder.
    """

    def __init__(self, spec: TokenizerSpec, table: Tensor, model: nn.Module | None):
        super().__init__(spec)
        self.model = model
        self.register_buffer("table", table.detach().float().clone())
        self.register_buffer("kept", torch.arange(len(table), device=table.device))
        self.eval()

    @property
    def codebook(self) -> Tensor:
        """The codes in use, (K', D) float."""
        return self.table[self.kept]

    def _images(self, ids: Tensor) -> Tensor:
        """Decode ids of the network (B, H, W) to images (B, C, height, width) in the network's own range."""
        raise TokenizerError(f"the {self.spec.kind} tokenizer has no decoder: it can only encode")

    def _pixels(self, ids: Tensor) -> Tensor:
        return self._from_model(self._images(self.kept[ids]))

    def _rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table).permute(0, 3, 1, 2).to(self.dtype)

    def _require_grid(self, maps: Tensor) -> Tensor:
        if tuple(maps.shape[2:]) != self.spec.grid or maps.shape[1] != self.spec.code_dim:
            raise TokenizerError(
                f"the {self.spec.kind} network gave a map of {tuple(maps.shape)}, expected {self.spec.code_dim} "
                f"channels on a grid of {self.spec.grid}: check that its patch is {self.spec.patch}"
            )
        return maps

    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        self.kept = self.kept[ids]
        self.table[self.kept] = rows

    def restore(self, spec: TokenizerSpec, tensors: Mapping[str, Tensor], path: str) -> "Adapter":
        """Take over the spec and the codes of a tokenizer with the same network that `save` wrote; return itself.

        Raises TokenizerError naming `path` if they do not belong to this network.
        """
        kept, table = tensors.get("kept", torch.empty(0)), tensors.get("table", torch.empty(0))
        same = replace(spec, image_size=self.spec.image_size, num_codes=self.spec.num_codes) == self.spec
        if not same or table.shape != self.table.shape or tuple(kept.shape) != (spec.num_codes,):
            raise TokenizerError(f"{path} is not a complete {self.spec.kind} tokenizer: its codes do not fit")
        self.kept = check_ids(kept, len(table), path)
        self.table, self.spec = table.to(torch.float32, copy=True), spec
        return self

    def _header(self) -> dict:
        raise TokenizerError(
            f"the {self.spec.kind} tokenizer cannot be saved, since its network is code: keep all of its codes, "
            "and load it where it is"
        )


class LibraryAdapter(Adapter):
    """An adapter for a network that its library can rebuild from its `config`, so that it can be saved."""

    def _header(self) -> dict:
        config = self.model.config
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        return {**self.spec.to_json(), NETWORK: json.loads(json.dumps(values, default=str))}


class MapAdapter(Adapter):
    """An adapter for a network that gives access to its features. A subclass implements `_maps`."""

    def features(self, images: Tensor) -> Tensor:
        """Compute the unquantized feature map (B, D, H, W) of preprocessed images."""
        return self._require_grid(self._maps(self._model_input(images)))

    @abstractmethod
    def _maps(self, inputs: Tensor) -> Tensor:
        """Compute the feature map (B, D, H, W) of normalized images (B, C, height, width)."""


class IdAdapter(Adapter):
    """An adapter for a network that returns ids but not its features. A subclass implements `_network_ids`.

    After `compact` or `select`, an id that was not kept is replaced by the kept id with the nearest row.
    """

    def __init__(self, spec: TokenizerSpec, table: Tensor, model: nn.Module | None):
        super().__init__(spec, table, model)
        self.register_buffer("renumber", self.kept.clone())

    def features(self, images: Tensor) -> Tensor:
        """Return the codebook rows (B, D, H, W) that the network chose for preprocessed images."""
        return F.embedding(self._checked(self._model_input(images)), self.table).permute(0, 3, 1, 2)

    @abstractmethod
    def _network_ids(self, inputs: Tensor) -> Tensor:
        """Compute the ids of normalized images, in any shape that holds B grids row by row."""

    def _checked(self, inputs: Tensor) -> Tensor:
        ids = check_ids(self._network_ids(inputs), len(self.table), f"the {self.spec.kind} network")
        height, width = self.spec.grid
        if ids.numel() != len(inputs) * height * width:
            raise TokenizerError(
                f"the {self.spec.kind} network gave ids of shape {tuple(ids.shape)} for {len(inputs)} images, "
                f"expected {height} x {width} each: check that its patch is {self.spec.patch}"
            )
        return ids.reshape(len(inputs), height, width)

    def _ids(self, images: Tensor) -> Tensor:
        return self.renumber[self._checked(self._model_input(images))]

    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        super()._keep(ids, rows)
        all_rows = self.table.T[None, :, :, None]
        self.renumber = nearest(all_rows, self.codebook, self.spec.lookup).flatten()
        # A kept code keeps its own id even if another row is equal.
        self.renumber[self.kept] = torch.arange(len(self.kept), device=self.kept.device)


class DiffusersVQ(LibraryAdapter, MapAdapter):
    """An adapter for the diffusers `VQModel`; the patch is read from its config."""

    def __init__(self, model: nn.Module, image_size: int = 256):
        patch = 2 ** (len(model.config.block_out_channels) - 1)
        table = model.quantize.embedding.weight
        super().__init__(_spec("diffusers_vq", image_size, patch, table, "euclidean"), table, model)

    def _maps(self, inputs: Tensor) -> Tensor:
        return self.model.encode(inputs).latents

    def _images(self, ids: Tensor) -> Tensor:
        if not self.model.config.lookup_from_codebook:
            return self.model.decode(self._rows(ids), force_not_quantize=True).sample
        # With this setting (as in aMUSEd) `decode` expects ids, and the shape of the map of their rows.
        shape = (*ids.shape, self.spec.code_dim)
        return self.model.decode(ids, force_not_quantize=True, shape=shape).sample


class ChameleonVQ(LibraryAdapter, MapAdapter):
    """An adapter for the transformers `ChameleonVQVAE`, which cannot decode; the patch is read from its config."""

    def __init__(self, model: nn.Module, image_size: int = 256):
        table = model.quantize.embedding.weight
        spec = _spec("chameleon_vq", image_size, _multiplier_patch(model), table, "euclidean")
        super().__init__(replace(spec, mean=CHAMELEON, std=CHAMELEON), table, model)

    def _maps(self, inputs: Tensor) -> Tensor:
        return self.model.quant_conv(self.model.encoder(inputs))


class Emu3VQ(LibraryAdapter, MapAdapter):
    """An adapter for the transformers `Emu3VQVAE`, for still images; the patch is read from its config."""

    def __init__(self, model: nn.Module, image_size: int = 256):
        table = model.quantize.embedding.weight
        super().__init__(_spec("emu3_vq", image_size, _multiplier_patch(model), table, "euclidean"), table, model)

    def _maps(self, inputs: Tensor) -> Tensor:
        # The network encodes clips: repeat the image over the frames that one token covers.
        frames = inputs.unsqueeze(1).repeat(1, self.model.config.temporal_downsample_factor, 1, 1, 1)
        maps = self.model.quant_conv(self.model.encoder(frames).transpose(1, 2))
        return maps.squeeze(2)

    def _images(self, ids: Tensor) -> Tensor:
        return self.model.decode(ids)


class JanusVQ(LibraryAdapter, MapAdapter):
    """An adapter for the transformers `JanusVQVAE`; the patch and the default image size are read from its config.

    The library's `encode` finds the nearest row without normalization, but its `decode` uses normalized rows, as
    in training. Here both normalize, so ids can differ from those of `encode`.
    """

    def __init__(self, model: nn.Module, image_size: int | None = None):
        patch = _multiplier_patch(model)
        table = F.normalize(model.quantize.embedding.weight.detach().float(), dim=1)
        size = image_size or model.config.num_patches * patch
        super().__init__(_spec("janus_vq", size, patch, table, "cosine"), table, model)

    def _maps(self, inputs: Tensor) -> Tensor:
        return self.model.quant_conv(self.model.encoder(inputs))

    def _images(self, ids: Tensor) -> Tensor:
        # The library's decode(ids) does the same, but only for the grid of its config.
        return self.model.decoder(self.model.post_quant_conv(self._rows(ids)))


class TamingVQ(IdAdapter):
    """An adapter for modules like those of taming-transformers.

    `model.encode(images)[2][2]` returns ids, and `model.decode(map)` decodes a map of codebook rows. `lookup` is
    "cosine" for networks that normalize features and rows (LlamaGen). `encode` raises TokenizerError if the
    network is in half precision, because the lookup happens inside it.
    """

    def __init__(self, model: nn.Module, *, patch: int, image_size: int = 256, lookup: str = "euclidean"):
        table = model.quantize.embedding.weight
        table = F.normalize(table.detach().float(), dim=1) if lookup == "cosine" else table
        super().__init__(_spec("taming_vq", image_size, patch, table, lookup), table, model)

    def _network_ids(self, inputs: Tensor) -> Tensor:
        if inputs.dtype != torch.float32:
            raise TokenizerError(f"a taming_vq network in {inputs.dtype} changes ids: call its .float() first")
        return self.model.encode(inputs)[2][2]

    def _images(self, ids: Tensor) -> Tensor:
        return self.model.decode(self._rows(ids))


class TorchScriptVQ(IdAdapter):
    """An adapter for an encoder and a decoder that are separate modules, in TorchScript or not.

    The encoder maps images in [-1, 1] to ids, or to a tuple that begins with them; the decoder maps ids (B, H, W)
    int32 to images in [-1, 1]. `codebook` (K, D) holds the vectors of the ids, by default those of the discrete
    image tokenizers of Cosmos (64000, 6).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        patch: int,
        image_size: int = 256,
        codebook: Tensor | None = None,
    ):
        table = fsq_codebook(COSMOS_LEVELS) if codebook is None else codebook
        model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        # Euclidean, since FSQ rows also differ in length, and one of them is zero.
        super().__init__(_spec("torchscript_vq", image_size, patch, table, "euclidean"), table, model)

    def _network_ids(self, inputs: Tensor) -> Tensor:
        output = self.model["encoder"](inputs)
        return output if isinstance(output, Tensor) else output[0]

    def _images(self, ids: Tensor) -> Tensor:
        return self.model["decoder"](ids.int())


class FunctionsVQ(IdAdapter):
    """The adapter that `from_functions` returns."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        codebook: Tensor,
        *,
        decode: Callable[[Tensor], Tensor] | None,
        spec: TokenizerSpec,
    ):
        super().__init__(spec, codebook, None)
        self._encode, self._decode = encode, decode

    def _network_ids(self, inputs: Tensor) -> Tensor:
        return self._encode(inputs)

    def _images(self, ids: Tensor) -> Tensor:
        return super()._images(ids) if self._decode is None else self._decode(ids)


class DigitsVQ(Tokenizer):
    """The adapter that `from_functions` returns for books with a table for each digit of a token."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        books: Books,
        *,
        decode: Callable[[Tensor], Tensor] | None,
        spec: TokenizerSpec,
    ):
        super().__init__(spec)
        self._books = Codebook.of(books)
        self._encode, self._decode = encode, decode

    @property
    def books(self) -> Codebook:
        """What the digits of a token mean."""
        return self._books

    @property
    def dtype(self) -> torch.dtype:
        """The functions receive float32."""
        return torch.float32

    def features(self, images: Tensor) -> Tensor:
        """Return the vectors (B, D, H, W) of the digits that the function chose for preprocessed images."""
        return self.books.embed(self._ids(images))

    def _ids(self, images: Tensor) -> Tensor:
        ids, shape = self._encode(self._model_input(images)), (len(images), *self.books.planes, *self.spec.grid)
        if ids.numel() != math.prod(shape) or tuple(ids.shape[:2]) != shape[:2]:
            raise TokenizerError(
                f"the {self.spec.kind} function gave digits of shape {tuple(ids.shape)}, expected {shape}: return "
                "one plane for each digit"
            )
        owner, planes = f"the {self.spec.kind} function", ids.reshape(shape).unbind(dim=1)
        digits = [check_ids(plane, size, owner) for plane, size in zip(planes, self.books.sizes, strict=True)]
        return torch.stack(digits, dim=1)

    def _pixels(self, ids: Tensor) -> Tensor:
        if self._decode is None:
            raise TokenizerError(f"the {self.spec.kind} tokenizer has no decoder: it can only encode")
        return self._from_model(self._decode(ids))

    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        raise AssertionError("only a tokenizer with one table keeps some of its codes")

    def _header(self) -> dict:
        raise TokenizerError(
            f"the {self.spec.kind} tokenizer cannot be saved, since it is code: load it where it is"
        )


def from_functions(
    encode: Callable[[Tensor], Tensor],
    codebook: Tensor | Books,
    decode: Callable[[Tensor], Tensor] | None = None,
    *,
    spec: TokenizerSpec,
) -> Tokenizer:
    """Create a tokenizer from two functions and a codebook (K, D) float, or the books of several digits.

    `encode` receives images normalized by the spec's mean and std and returns ids in any shape that holds B grids
    row by row. `decode` receives ids (B, H, W) int64 and returns images in the range that `encode` receives;
    without it the tokenizer can only encode. With books, `encode` returns digits (B, Q, H, W), or (B, Q, N) of
    sequences, and `decode` receives (B, Q, H, W). The fingerprint covers the spec and the codebook, not the
    functions: identify them by `spec.kind`. Raises TokenizerError if spec and codebook disagree.
    """
    if isinstance(codebook, Books):
        got = (codebook.sizes, codebook.combine, codebook.dim)
        if got != (expected := (spec.digits, spec.combine, spec.code_dim)):
            raise TokenizerError(
                f"{spec.kind} tokenizer: got books with digits, combine and code_dim {got}, expected {expected}"
            )
        return DigitsVQ(encode, codebook, decode=decode, spec=spec)
    if tuple(codebook.shape) != (spec.num_codes, spec.code_dim):
        raise TokenizerError(
            f"{spec.kind} tokenizer: got a codebook of shape {tuple(codebook.shape)}, expected "
            f"({spec.num_codes}, {spec.code_dim}) as in its spec"
        )
    return FunctionsVQ(encode, codebook, decode=decode, spec=spec)


def fsq_codebook(levels: Sequence[int]) -> Tensor:
    """Return the codebook of finite scalar quantization (arXiv 2309.15505): (prod(levels), len(levels)) float32.

    The first dimension varies fastest with the id; a dimension of n levels has the values
    (i - n // 2) / (n // 2) for i from 0 to n - 1.
    """
    ids, columns = torch.arange(math.prod(levels)), []
    for level in levels:
        columns.append((ids % level - level // 2) / (level // 2))
        ids = ids // level
    return torch.stack(columns, dim=1)


def fsq_books(levels: Sequence[int]) -> Books:
    """Return the books of finite scalar quantization: each dimension's level is a digit (see `fsq_codebook`)."""
    tables = [(np.arange(level)[:, None] - level // 2) / (level // 2) for level in levels]
    return Books.join(tables, "concat")


def binary_books(bits: int, *, digits: int, scale: float = 1.0) -> Books:
    """Return the books of a quantizer that keeps the sign of each of `bits` dimensions, in equal digits.

    It is that of lookup-free quantization (MAGVIT2, arXiv 2310.05737: `scale` 1) and of binary spherical
    quantization (arXiv 2406.07548: `scale` 1 / sqrt(bits)). Each digit has the bits of so many dimensions, the
    first the highest: an id of all bits in base 2^(bits / digits). Raises TokenizerError unless `digits` divides.
    """
    if digits < 2 or bits % digits or bits // digits > 16:
        raise TokenizerError(f"{bits} bits in {digits} digits: expected 2 or more equal digits of at most 16 bits")
    width = bits // digits
    rows = (np.arange(2**width)[:, None] >> np.arange(width)[::-1] & 1) * 2.0 - 1
    return Books.join([rows * scale] * digits, "concat")


def _spec(kind: str, image_size: int, patch: int, table: Tensor, lookup: str) -> TokenizerSpec:
    num_codes, code_dim = table.shape
    size = image_size, image_size
    return TokenizerSpec(
        kind, size, patch, num_codes=num_codes, code_dim=code_dim, lookup=lookup, mean=HALF, std=HALF
    )


def _multiplier_patch(model: Any) -> int:
    return 2 ** (len(model.config.channel_multiplier) - 1)
