"""What every tokenizer is: a spec, features, a nearest-code lookup and a decoder."""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Cells of the token x code similarity matrix that are held at once: 64 MiB in fp32.
LOOKUP_CELLS = 1 << 24


class TokenizerError(ValueError):
    """A tokenizer file or an image that this tokenizer cannot work with."""


@dataclass(frozen=True)
class TokenizerSpec:
    """The facts of a tokenizer that travel with the tokens (as JSON in `tokens.json`).

    `image_size` is the exact (height, width) in pixels that images are resized to (bicubic, aspect ratio
    not kept); one token covers `patch` x `patch` pixels.
    """

    kind: str
    image_size: tuple[int, int]
    patch: int
    num_codes: int
    code_dim: int

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) tokens of an image."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch


def nearest(maps: Tensor, codebook: Tensor) -> Tensor:
    """Ids of the codes with the largest cosine similarity to each vector.

    `maps` (B, D, H, W) float, `codebook` (K, D) float -> (B, H, W) int64. Both sides are L2-normalised
    (SeiT release). Always fp32, since half precision changes ids, and in chunks, so that the token x
    code matrix stays bounded. Equal similarities give the smallest id.
    """
    batch, dim, height, width = maps.shape
    with torch.autocast(maps.device.type, enabled=False):
        vectors = F.normalize(maps.detach().float().permute(0, 2, 3, 1).reshape(-1, dim), dim=1)
        rows = F.normalize(codebook.detach().float(), dim=1)
        chunks = vectors.split(max(1, LOOKUP_CELLS // len(rows)))
        ids = torch.cat([(chunk @ rows.T).argmax(dim=1) for chunk in chunks])
    return ids.view(batch, height, width)


class Tokenizer(nn.Module, ABC):
    """Base of all tokenizers; a subclass gives `features` and `decode` and a `codebook` buffer.

    Images are (B, 3, height, width) float in [0, 1]; ids are (B, H, W) int64 in [0, K).
    """

    codebook: Tensor

    def __init__(self, spec: TokenizerSpec):
        super().__init__()
        self.spec = spec

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, any, any) in [0, 1] -> (B, 3, *image_size) in [0, 1], bicubic and antialiased."""
        resized = F.interpolate(images, self.spec.image_size, mode="bicubic", antialias=True)
        return resized.clamp(0, 1)

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Preprocessed images -> unquantized map (B, D, H, W)."""

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """Ids (B, H, W) -> images (B, 3, *image_size) in [0, 1]."""

    def quantize(self, maps: Tensor) -> Tensor:
        """Map (B, D, H, W) -> ids (B, H, W) int64."""
        return nearest(maps, self.codebook)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Preprocessed images -> ids (B, H, W) int64. Raises TokenizerError for another image size."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.spec.image_size):
            height, width = self.spec.image_size
            raise TokenizerError(
                f"images of shape {tuple(images.shape)} given to the {self.spec.kind} tokenizer, expected "
                f"(B, 3, {height}, {width}): pass them through its preprocess() first"
            )
        return self.quantize(self.features(images))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the spec and every tensor, as hex: equal exactly when the tokens are."""
        digest = hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def description(self) -> dict:
        """What a store keeps about its tokenizer: fingerprint and spec, JSON-able."""
        return {"fingerprint": self.fingerprint, "spec": asdict(self.spec)}
