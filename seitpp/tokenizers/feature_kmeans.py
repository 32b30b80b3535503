"""A tokenizer of meaning: k-means on the patch features of any timm network, with a residual table for each digit.

The features of a frozen network are reduced to their principal components and quantized by Euclidean k-means; each
further table quantizes what the tables before it leave, so that 4 digits of 1,024 codes describe a patch better
than one. Fitting takes minutes. It cannot draw pictures: its tokens decode to features. Results on such tokens are
those of a network that has seen other images, and belong apart from those of the papers.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from seitpp.codebook import Codebook, nearest
from seitpp.errors import refusing, suggest
from seitpp.tensors import built_for, is_checkpoint, load_state_dict, load_tensors
from seitpp.tokenizers.base import (
    HEADER,
    ImageSize,
    Tokenizer,
    TokenizerError,
    TokenizerSpec,
    fp32_copies,
    height_and_width,
    require_equal_shapes,
)
from seitpp.tokenizers.patch_kmeans import centers

KIND = "feature_kmeans"
NETWORK = "network"  # key of the network's name in the header of a saved tokenizer
FIT_PATCHES = 1 << 17  # patches that the tables are fitted to
HUB = "hf-hub:"


class FeatureKMeans(Tokenizer):
    """A tokenizer with the features of `network`, a timm model for the image size of the spec.

    `mean` (C,) and `components` (D, C) project the features, of C channels, to vectors of a mean square of 1 over
    the images that the tokenizer was fitted to. With one digit it has a codebook, with more a table for each.
    """

    def __init__(self, spec: TokenizerSpec, network: nn.Module):
        super().__init__(spec)
        self.name = network.pretrained_cfg["architecture"]
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.zeros(network.num_features))
        self.register_buffer("components", torch.zeros(spec.code_dim, network.num_features))
        self.register_buffer("scale", torch.ones(()))
        for number, size in enumerate(spec.digits or (spec.num_codes,)):
            self.register_buffer(f"table_{number}", torch.zeros(size, spec.code_dim))

    @classmethod
    def fit(
        cls,
        batches: Iterable[UInt8[Tensor, "images 3 any_height any_width"]],
        network: nn.Module,
        *,
        image_size: ImageSize,
        num_codes: int = 1024,
        digits: int = 4,
        code_dim: int = 64,
    ) -> "FeatureKMeans":
        """Fit a tokenizer to batches of images; of many, 2^17 patches are used.

        `network` is that of `open_network`. Raises TokenizerError for a size that does not fit it, for more codes
        than patches, and for a `code_dim` of more dimensions than it has channels.
        """
        patch = _patch(network, height_and_width(image_size))
        mean, std = (tuple(network.pretrained_cfg.get(key) or default) for key, default in NORMALIZATION.items())
        several = {"digits": (num_codes,) * digits, "combine": "sum"} if digits > 1 else {}
        spec = TokenizerSpec(
            KIND,
            height_and_width(image_size),
            patch,
            num_codes=num_codes * digits,
            code_dim=code_dim,
            lookup="euclidean",
            mean=mean,
            std=std,
            **several,
        )
        if not 1 <= code_dim <= network.num_features:
            raise TokenizerError(
                f"code_dim {code_dim}: expected 1 to {network.num_features}, the channels of the network"
            )
        tokenizer = cls(spec, network)
        features, seen = [], 0
        for images in batches:
            maps = tokenizer._features(tokenizer.preprocess(images.float() / 255))
            features.append(rearrange(maps, "b c h w -> (b h w) c"))
            if (seen := seen + len(features[-1])) >= FIT_PATCHES:
                break
        if seen < num_codes:
            raise TokenizerError(f"{seen} patches cannot give {num_codes} codes: use more images or fewer codes")
        tokenizer._fit(torch.cat(features)[:FIT_PATCHES])
        return tokenizer

    @torch.no_grad()
    def _fit(self, features: Tensor) -> None:
        self.mean.copy_(features.mean(dim=0))
        centered = (features - self.mean).double()
        _, vectors = torch.linalg.eigh(centered.T @ centered)  # eigenvalues ascending
        components = vectors.flip(1).T[: self.spec.code_dim].float()
        # The sign of an eigenvector is arbitrary: fix it, so that fitting again gives the same tables.
        signs = components.gather(1, components.abs().argmax(dim=1, keepdim=True)).sign()
        self.components.copy_(components * signs)
        rest = (features - self.mean) @ self.components.T
        self.scale.copy_(rest.square().mean().sqrt())
        rest = rest / self.scale
        for table in self.books.tables:
            found = torch.from_numpy(centers(rest.numpy(), len(table))).float()
            ids = nearest(rest.T[None, :, :, None], found, "euclidean").flatten()
            order = torch.bincount(ids, minlength=len(found)).argsort(descending=True, stable=True)
            table.copy_(found[order])
            rest = rest - found[ids]

    @property
    def books(self) -> Codebook:
        """What the digits of a token mean, on the device of the tokenizer."""
        sizes = self.spec.digits or (self.spec.num_codes,)
        tables = [getattr(self, f"table_{number}") for number in range(len(sizes))]
        return Codebook(tables, self.spec.combine, sizes)

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D) of a tokenizer with one digit. Raises TokenizerError for several."""
        if self.spec.digits:
            raise TokenizerError(
                f"the codebook of a {KIND} tokenizer: a token has {len(self.spec.digits)} digits, expected one: "
                "use its books"
            )
        return self.table_0

    def set_image_size(self, size: ImageSize) -> None:
        """Accept the size of the network alone: others would change its positions. Raises TokenizerError."""
        if height_and_width(size) != self.spec.image_size:
            raise TokenizerError(
                f"the {KIND} tokenizer is for images of {self.spec.image_size}, got {size}: fit one for this size"
            )

    def features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch code_dim rows columns"]:
        """Compute the projected features of preprocessed images."""
        maps = rearrange(self._features(images), "b c h w -> b h w c")
        return (((maps - self.mean) @ self.components.T) / self.scale).permute(0, 3, 1, 2)

    def decode_features(self, ids: Tensor) -> Float[Tensor, "batch channels rows columns"]:
        """Return the network's features, as far as tokens (B, H, W) or (B, Q, H, W) keep them."""
        vectors = self.books.embed(ids).permute(0, 2, 3, 1)
        return (vectors * self.scale @ self.components + self.mean).permute(0, 3, 1, 2)

    def _features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return _maps(self.network, self._model_input(images)).float()

    def _pixels(self, ids: Tensor) -> Tensor:
        raise TokenizerError(f"the {KIND} tokenizer decodes to features of {self.name}, not to pictures")

    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        self.table_0 = rows

    def _header(self) -> dict[str, Any]:
        return {**self.spec.to_json(), NETWORK: self.name}

    @classmethod
    def rebuild(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> "FeatureKMeans":
        """Rebuild a tokenizer from the header and the tensors of a file that it saved.

        Raises TokenizerError, which names the file, if it is incomplete or timm does not know its network.
        """
        spec = TokenizerSpec.from_json({key: value for key, value in header.items() if key != NETWORK})
        name = str(header.get(NETWORK))
        complaint = f"{path} is not a complete {KIND} tokenizer"
        fitting = refusing(TokenizerError, complaint, f"the tensors of {name}")
        with fitting, torch.device("meta"), built_for(len(tensors)):
            empty = cls(spec, _create(name, spec.image_size))
        require_equal_shapes(empty.state_dict(), tensors, complaint)
        empty.load_state_dict(fp32_copies(tensors), assign=True)
        # What is no parameter and not saved, as the positions of some networks, is made anew.
        network = _create(name, spec.image_size)
        network.load_state_dict(empty.network.state_dict())
        tokenizer = cls(spec, network)
        tokenizer.load_state_dict(empty.state_dict())
        return tokenizer.eval()


NORMALIZATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of ImageNet, where none is known


def open_network(name: str, weights: str | None, image_size: ImageSize) -> nn.Module:
    """Return the timm model called `name` with the weights of a file; a name hf-hub:owner/name has its own.

    Raises TokenizerError for a name that timm does not know, missing weights, and a file of another model.
    """
    size = height_and_width(image_size)
    if name.startswith(HUB):
        if weights:
            raise TokenizerError(f"{name} has weights of its own: leave {weights} out")
        with refusing(TokenizerError, f"{name} cannot be loaded", "a model of timm on the hub"):
            return _create(name, size, pretrained=True)
    network = _create(name, size)
    if weights is None:
        raise TokenizerError(f"no weights for {name}: name their file, or a model of the hub as {HUB}owner/name")
    path = Path(weights)
    if not path.is_file():
        raise TokenizerError(f"no file {path}: expected the weights of {name}")
    if is_checkpoint(path):
        tensors = load_state_dict(path, TokenizerError, lambda _: True)
    else:
        _, tensors = load_tensors(path, HEADER, TokenizerError)
    heads = tuple(f"{head}." for head in _heads(network))
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(heads)}
    require_equal_shapes(network.state_dict(), tensors, f"{path} has no weights of {name}")
    network.load_state_dict(tensors)
    return network


def _heads(network: nn.Module) -> tuple[str, ...]:
    heads = network.pretrained_cfg.get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _create(name: str, size: tuple[int, int], pretrained: bool = False) -> nn.Module:
    known = name.startswith(HUB) if pretrained else timm.is_model(name)
    if not known:  # create_model would look for other names on the network
        raise TokenizerError(f"timm has no model {name!r}{suggest(name, timm.list_models())}: name one of timm's")
    model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    if hasattr(model, "set_input_size"):
        with refusing(TokenizerError, f"{name} for images of {size}", "a size that fits its patches"):
            model.set_input_size(size)
    return model.eval()


def _maps(network: nn.Module, images: Tensor) -> Tensor:
    """The last feature map (B, C, H, W) of a timm model, after its last norm."""
    return network.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[-1]


def _patch(network: nn.Module, size: tuple[int, int]) -> int:
    """The side in pixels of a token of images of a size."""
    if not hasattr(network, "forward_intermediates"):
        raise TokenizerError(f"{type(network).__name__} gives no feature maps: name a ViT or a ConvNet of timm")
    patch = network.feature_info[-1]["reduction"]
    if size[0] % patch or size[1] % patch:
        raise TokenizerError(f"images of {size} pixels: expected multiples of {patch}, which one token covers")
    return patch
