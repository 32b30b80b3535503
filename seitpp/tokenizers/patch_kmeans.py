"""The offline tokenizer: PCA and k-means on image patches. It needs no gradients and no download, only seconds.

A patch is represented by its leading principal components and one constant channel. With that channel the cosine
lookup that all token models use behaves like a Euclidean one, and a code keeps its length: decoding divides by
that channel. (31 + 1 channels at K = 391 gave 23.2 dB on crops of photographs, as good as a Euclidean lookup.)
"""

import math
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from seitpp.codebook import nearest
from seitpp.tokenizers.base import ImageSize, Tokenizer, TokenizerError, TokenizerSpec
from seitpp.tokenizers.counts import code_counts

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
# Standard deviation of pixels in [0, 1] that is rounding alone.
FLAT = 1e-6
# Patches that `fit_to_images` chooses at random from all images, in all and for each code, whichever is more. The
# first are 50 MB for RGB patches of 8 x 8 pixels.
FIT_PATCHES, FIT_PATCHES_PER_CODE = 1 << 16, 32


class PatchKMeans(Tokenizer):
    """A tokenizer that maps each patch linearly to features, and decodes a code with the transposed map.

    `mean` (C p p,) and `components` (D - 1, C p p) are in pixel units, for C channels. The PCA features have a
    mean square of 1 over the images that the tokenizer was fitted to; the constant channel is sqrt(D - 1), their
    typical norm.
    """

    kind = KIND

    def __init__(self, spec: TokenizerSpec):
        super().__init__(spec)
        values = patch_values(spec)
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("components", torch.zeros(spec.code_dim - 1, values))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("codebook", torch.zeros(spec.num_codes, spec.code_dim))

    @classmethod
    def fit(
        cls,
        images: Float[Tensor, "images channels any_height any_width"],
        *,
        image_size: ImageSize,
        patch: int,
        num_codes: int,
        code_dim: int,
    ) -> "PatchKMeans":
        """Fit a tokenizer to images (N, C, any, any) in [0, 1], which are resized to `image_size`.

        Codes are numbered by frequency, 0 the most frequent. For more than 2^27 patches times codes, mini-batch
        k-means is used, with a progress bar. Raises TokenizerError if there are fewer distinct patches than codes,
        or if D - 1 is not between 1 and the number of values in a patch.
        """
        channels, values = images.shape[1], images.shape[1] * patch**2
        if not 1 <= code_dim - 1 <= values:
            raise TokenizerError(f"code_dim {code_dim} for patches of {values} values: expected 2 to {values + 1}")
        spec = TokenizerSpec.unscaled(
            cls.kind, image_size, patch, num_codes=num_codes, code_dim=code_dim, channels=channels
        )
        if (total := len(images) * spec.grid[0] * spec.grid[1]) < num_codes:
            raise TokenizerError(f"{total} patches cannot give {num_codes} codes: use more images or fewer codes")
        tokenizer = cls(spec)
        prepared = tokenizer.preprocess(images)
        patches = tokenizer._patches(prepared).reshape(-1, values)
        if (distinct := len(torch.unique(patches, dim=0))) < num_codes:
            raise TokenizerError(
                f"{distinct} distinct patches cannot give {num_codes} codes: use more images or fewer codes"
            )
        tokenizer._fit_components(patches)
        tokenizer._fit_codebook(tokenizer.features(prepared))
        return tokenizer

    @classmethod
    def fit_to_images(
        cls,
        batches: Iterable[UInt8[Tensor, "images channels any_height any_width"]],
        *,
        image_size: ImageSize,
        patch: int = 8,
        num_codes: int = 391,
        code_dim: int = 32,
        seed: int = 0,
    ) -> "PatchKMeans":
        """Fit a tokenizer to batches (n, C, any, any) uint8 of any images, in bounded memory.

        From all images together, resized to `image_size`, 2^16 patches are chosen by `seed`, or 32 for each code
        if that is more; how the images are split into batches makes no difference. If the patches differ too
        little for `num_codes`, the codebook gets fewer codes, each in use, and a line that says so is printed. The
        code dimension is at most what a patch can have, its number of values plus 1.

        Raises TokenizerError if there are no images, for an image size that does not fit the patch, or if
        `code_dim` is below 2.
        """
        if code_dim < 2:
            raise TokenizerError(f"code_dim {code_dim}: expected at least 2")
        resizer = PatchKMeans(TokenizerSpec.unscaled(KIND, image_size, patch, num_codes=1, code_dim=2))
        prepared = (resizer.preprocess(images.float() / 255) for images in batches)
        limit = max(FIT_PATCHES, FIT_PATCHES_PER_CODE * num_codes)
        patches = _sampled_patches(prepared, patch, limit=limit, seed=seed)
        rows = patches.flatten(1)
        spec = TokenizerSpec.unscaled(
            cls.kind,
            image_size,
            patch,
            num_codes=min(num_codes, len(torch.unique(rows, dim=0))),
            code_dim=min(code_dim, 1 + rows.shape[1]),
            channels=patches.shape[1],
        )
        tokenizer = cls(spec)
        tokenizer._fit_components(rows)
        maps = tokenizer.features(patches)
        with warnings.catch_warnings():
            # Of equal centers, of which one is kept below.
            warnings.filterwarnings("ignore", "Number of distinct clusters")
            tokenizer._fit_codebook(maps)
        used = tokenizer.compact(code_counts(tokenizer.quantize(maps), spec.num_codes))
        if (codes := used.spec.num_codes) < num_codes:
            print(f"the patches of the images differ too little: {codes:,} of {num_codes:,} codes are kept")
        return used

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
        # Of images that are all one color only rounding is left, which must not be scaled up.
        scale = (total / (len(patches) * axes.shape[1])).sqrt()
        self.scale.copy_(scale if scale > FLAT else torch.ones(()))

    def _fit_codebook(self, maps: Tensor) -> None:
        vectors = rearrange(maps, "b d h w -> (b h w) d")
        found = torch.from_numpy(centers(vectors.numpy(), self.spec.num_codes)).float()
        counts = torch.bincount(nearest(maps, found).flatten(), minlength=len(found))
        self.codebook.copy_(found[counts.argsort(descending=True, stable=True)])

    def features(self, images: Tensor) -> Tensor:
        """Compute the feature map (B, D, H, W) of images (B, C, height, width); the last channel is constant."""
        vectors = (self._patches(self._model_input(images)) - self.mean) @ self.components.T / self.scale
        constant = vectors.new_full((*vectors.shape[:-1], 1), math.sqrt(self.spec.code_dim - 1))
        return torch.cat([vectors, constant], dim=-1).permute(0, 3, 1, 2)

    def _scaled_rows(self, ids: Tensor) -> Tensor:
        """Return the rows (B, H, W, D) of ids (B, H, W), scaled so that the constant channel has its value."""
        rows = self.codebook[ids]
        return rows / rows[..., -1:] * math.sqrt(self.spec.code_dim - 1)

    def _patches_of(self, rows: Tensor) -> Tensor:
        """Map scaled rows (B, H, W, D) to the pixels (B, H, W, C p p) of their patches."""
        return rows[..., :-1] * self.scale @ self.components + self.mean

    def _images(self, patches: Tensor) -> Tensor:
        size = self.spec.patch
        return rearrange(patches, "b h w (c p q) -> b c (h p) (w q)", p=size, q=size)

    def _pixels(self, ids: Tensor) -> Tensor:
        return self._images(self._patches_of(self._scaled_rows(ids)))

    def _keep(self, ids: Tensor, rows: Tensor) -> None:
        self.codebook = rows


def patch_values(spec: TokenizerSpec) -> int:
    """Return the number of values in a patch: channels times pixels."""
    return spec.channels * spec.patch**2


def _sampled_patches(batches: Iterable[Tensor], patch: int, *, limit: int, seed: int) -> Tensor:
    """Choose `limit` patches of batches of images (n, C, h, w) at random -> (N, C, p, p)."""
    # Each patch draws a number, and those with the smallest numbers stay: the choice does not need their total.
    rng, numbers, kept = np.random.default_rng(seed), [], []
    for images in batches:
        kept.append(rearrange(images, "b c (h p) (w q) -> (b h w) c p q", p=patch, q=patch))
        numbers.append(torch.from_numpy(rng.random(len(kept[-1]))))
        if sum(map(len, kept)) > 2 * limit:
            numbers, kept = ([part] for part in _smallest(numbers, kept, limit))
    if not kept:
        raise TokenizerError("no images to fit a tokenizer to: expected at least one")
    return _smallest(numbers, kept, limit)[1]


def _smallest(numbers: list[Tensor], patches: list[Tensor], limit: int) -> tuple[Tensor, Tensor]:
    drawn = torch.cat(numbers)
    chosen = drawn.argsort()[:limit]
    return drawn[chosen], torch.cat(patches)[chosen]


def centers(vectors: Float[np.ndarray, "vectors dim"], num_codes: int) -> Float[np.ndarray, "codes dim"]:
    """Compute the k-means centers (K, D) of vectors (N, D) float32."""
    from sklearn.cluster import KMeans, MiniBatchKMeans  # takes a second, and only fitting needs it

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
    from sklearn.cluster import kmeans_plusplus

    parts = -(-num_codes // PART)
    sizes = [len(part) for part in np.array_split(np.empty(num_codes), parts)]
    pairs = zip(np.array_split(vectors, parts), sizes, strict=True)
    bar = tqdm(pairs, "k-means++", parts, unit=" parts", disable=None)
    return np.concatenate([kmeans_plusplus(part, size, random_state=0)[0] for part, size in bar])
