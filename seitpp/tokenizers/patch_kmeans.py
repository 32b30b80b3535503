"""The offline tokenizer: PCA and k-means on image patches. It needs no gradients and no download, only seconds.

A patch is represented by its leading principal components and one constant channel. With that channel the cosine
lookup that all token models use behaves like a Euclidean one, and a code keeps its length: decoding divides by
that channel. (31 + 1 channels at K = 391 gave 23.2 dB on crops of photographs, as good as a Euclidean lookup.)
"""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from sklearn.cluster import KMeans, MiniBatchKMeans, kmeans_plusplus
from torch import Tensor
from tqdm import tqdm

from seitpp.codebook import nearest
from seitpp.tensors import save_tensors
from seitpp.tokenizers.base import HEADER, Tokenizer, TokenizerError, TokenizerSpec

KIND = "patch_kmeans"
# Up to this many patches times codes, every iteration of k-means uses all patches: about a minute.
EXACT_CELLS = 1 << 27
# Above it: patches per mini-batch, and passes over all patches.
BATCH = 1 << 16
PASSES = 5
# Centers that one run of k-means++ chooses.
PART = 1 << 10
# Patches that are copied to double precision at a time.
CHUNK = 1 << 18


class PatchKMeans(Tokenizer):
    """A tokenizer that maps each patch linearly to features, and decodes a code with the transposed map.

    `mean` (3 p p,) and `components` (D - 1, 3 p p) are in pixel units. The PCA features have a mean square of 1
    over the images that the tokenizer was fitted to; the constant channel is sqrt(D - 1), their typical norm.
    """

    def __init__(self, spec: TokenizerSpec):
        super().__init__(spec)
        pixels = 3 * spec.patch**2
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("components", torch.zeros(spec.code_dim - 1, pixels))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("codebook", torch.zeros(spec.num_codes, spec.code_dim))

    @classmethod
    def fit(cls, images: Tensor, *, image_size: int, patch: int, num_codes: int, code_dim: int) -> "PatchKMeans":
        """Fit a tokenizer to images (N, 3, any, any) in [0, 1], which are resized to `image_size`.

        Codes are numbered by frequency, 0 the most frequent. For more than 2^27 patches times codes, mini-batch
        k-means is used, with a progress bar. Raises TokenizerError if there are fewer distinct patches than codes,
        or if D - 1 is not between 1 and the number of values in a patch.
        """
        pixels = 3 * patch**2
        if not 1 <= code_dim - 1 <= pixels:
            raise TokenizerError(f"code_dim {code_dim} for patches of {pixels} values: expected 2 to {pixels + 1}")
        spec = TokenizerSpec(KIND, (image_size, image_size), patch, num_codes=num_codes, code_dim=code_dim)
        if (total := len(images) * spec.grid[0] * spec.grid[1]) < num_codes:
            raise TokenizerError(f"{total} patches cannot give {num_codes} codes: use more images or fewer codes")
        tokenizer = cls(spec)
        prepared = tokenizer.preprocess(images)
        patches = tokenizer._patches(prepared).reshape(-1, pixels)
        if (distinct := len(torch.unique(patches, dim=0))) < num_codes:
            raise TokenizerError(
                f"{distinct} distinct patches cannot give {num_codes} codes: use more images or fewer codes"
            )
        tokenizer._fit_components(patches)
        tokenizer._fit_codebook(tokenizer.features(prepared))
        return tokenizer

    def _patches(self, images: Tensor) -> Tensor:
        size = self.spec.patch
        return rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=size, q=size)

    def _fit_components(self, patches: Tensor) -> None:
        self.mean.copy_(patches.mean(dim=0))
        chunks = patches.split(CHUNK)
        centered = ((chunk - self.mean).double() for chunk in chunks)
        _, vectors = torch.linalg.eigh(sum(rows.T @ rows for rows in centered))  # eigenvalues ascending
        components = vectors.flip(1).T[: self.spec.code_dim - 1]
        # The sign of an eigenvector is arbitrary: fix it, so that fitting again gives the same codebook.
        signs = components.gather(1, components.abs().argmax(dim=1, keepdim=True)).sign()
        self.components.copy_(components * signs)
        axes = self.components.double().T
        total = sum(((chunk - self.mean).double() @ axes).square().sum() for chunk in chunks)
        self.scale.copy_((total / (len(patches) * axes.shape[1])).sqrt())

    def _fit_codebook(self, maps: Tensor) -> None:
        vectors = rearrange(maps, "b d h w -> (b h w) d")
        centers = torch.from_numpy(_centers(vectors.numpy(), self.spec.num_codes)).float()
        counts = torch.bincount(nearest(maps, centers).flatten(), minlength=len(centers))
        self.codebook.copy_(centers[counts.argsort(descending=True, stable=True)])

    def features(self, images: Tensor) -> Tensor:
        """Compute the feature map (B, D, H, W) of images (B, 3, height, width); the last channel is constant."""
        vectors = (self._patches(self.model_input(images)) - self.mean) @ self.components.T / self.scale
        constant = vectors.new_full((*vectors.shape[:-1], 1), math.sqrt(self.spec.code_dim - 1))
        return torch.cat([vectors, constant], dim=-1).permute(0, 3, 1, 2)

    def _scaled_rows(self, ids: Tensor) -> Tensor:
        """Return the rows (B, H, W, D) of ids (B, H, W), scaled so that the constant channel has its value."""
        rows = self.codebook[ids]
        return rows / rows[..., -1:] * math.sqrt(self.spec.code_dim - 1)

    def _patches_of(self, rows: Tensor) -> Tensor:
        """Map scaled rows (B, H, W, D) to the pixels (B, H, W, 3 p p) of their patches."""
        return rows[..., :-1] * self.scale @ self.components + self.mean

    def _images(self, patches: Tensor) -> Tensor:
        size = self.spec.patch
        return rearrange(patches, "b h w (c p q) -> b c (h p) (w q)", c=3, p=size, q=size)

    def _pixels(self, ids: Tensor) -> Tensor:
        return self._images(self._patches_of(self._scaled_rows(ids)))

    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        self.codebook = rows

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with the spec in its header, which `tokenizers.load` reads."""
        save_tensors(Path(path), self.state_dict(), key=HEADER, header=asdict(self.spec))


def _centers(vectors: np.ndarray, num_codes: int) -> np.ndarray:
    """Compute the k-means centers (K, D) of vectors (N, D) float32."""
    if len(vectors) * num_codes <= EXACT_CELLS:
        return KMeans(num_codes, n_init=1, random_state=0).fit(vectors).cluster_centers_
    rng = np.random.default_rng(0)
    init = _first_centers(vectors[rng.permutation(len(vectors))[: max(BATCH, 16 * num_codes)]], num_codes)
    # Without reassignment, which moves rare centers and cost 0.4 dB.
    kmeans = MiniBatchKMeans(num_codes, init=init, n_init=1, reassignment_ratio=0, random_state=0)
    starts = range(0, len(vectors), BATCH)
    with tqdm(total=PASSES * len(starts), desc="k-means", unit=" batches", disable=None) as bar:
        for _ in range(PASSES):
            order = rng.permutation(len(vectors))
            for start in starts:
                kmeans.partial_fit(vectors[order[start : start + BATCH]])
                bar.update()
    return kmeans.cluster_centers_


def _first_centers(vectors: np.ndarray, num_codes: int) -> np.ndarray:
    """Run k-means++ on parts of the vectors and of the centers, because its time grows with both."""
    parts = -(-num_codes // PART)
    sizes = [len(part) for part in np.array_split(np.empty(num_codes), parts)]
    pairs = zip(np.array_split(vectors, parts), sizes, strict=True)
    bar = tqdm(pairs, "k-means++", parts, unit=" parts", disable=None)
    return np.concatenate([kmeans_plusplus(part, size, random_state=0)[0] for part, size in bar])
