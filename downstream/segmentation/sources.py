"""Where a run of segmentation takes its batches from, tokens of a store or pixels, and the backbone for them."""

from functools import partial
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from downstream.segmentation.backbone import PixelTokenViT, TokenViT, backbone_from
from downstream.segmentation.data import Segmented, SegmentedTokens
from downstream.segmentation.evaluation import WholeImage, WholePixels, WholeTokens
from downstream.segmentation.pixel_pipeline import PixelBatch, PixelPipeline
from downstream.segmentation.view import SegmentView
from seitpp.augment import Keys
from seitpp.data.dataset import BatchOrder
from seitpp.engine.inputs import check_codes, image_facts, store_facts, train_subset
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.annotated import AnnotatedSource
from seitpp.images.decode import fit_short_side
from seitpp.models import load_pretrained
from seitpp.store import TokenStore
from seitpp.tokenizers import Tokenizer


class Source(Protocol):
    """Training and validation images with label maps, and how they become what a backbone takes.

    `patch` is the pixels along one side of a token, `cells` how many cells the inputs have along it: one, or those
    pixels. `tokenizer` is for inside the backbone. `name` and `fingerprint` are those of the data; str(source) is
    what a run says of it.
    """

    train: Dataset
    validation: Dataset
    order: BatchOrder
    tokenizer: Tokenizer | None
    codebook: np.ndarray
    class_names: list[str]
    patch: int
    cells: int
    name: str
    fingerprint: str
    facts: dict[str, Any]  # for result.json

    def augmented(self, batch: Segmented | PixelBatch, keys: Keys, backbone: TokenViT) -> tuple[Tensor, Tensor]:
        """A batch of `train` -> the backbone's inputs, labels (B, h, w) int64."""
        ...

    def inputs(self, image: WholeImage, backbone: TokenViT) -> Tensor:
        """An image of `validation` -> the backbone's inputs."""
        ...


class TokenSource:
    """The splits of a store, through `view`."""

    tokenizer, cells = None, 1

    def __init__(self, run: Run, train: TokenStore, validation: TokenStore, view: SegmentView):
        self.store, self.train = train, train_subset(run.config, SegmentedTokens(train, view.patch))
        self.validation = WholeTokens(SegmentedTokens(validation, view.patch))
        self.order = BatchOrder(len(self.train), run.config.batch_size, run.config.seed)
        self.codebook, self.class_names, self.patch = train.codebook, train.class_names, view.patch
        self.name, self.fingerprint, self.lookup = str(train.path), train.fingerprint, train.lookup
        self.view, self.facts = view, store_facts(train, validation, run.config)

    def augmented(self, batch: Segmented, keys: Keys, backbone: TokenViT) -> tuple[Tensor, Tensor]:
        maps, labels = self.view(batch, keys)
        return backbone.from_maps(maps, self.view.codebook, self.lookup), labels

    def inputs(self, image: WholeImage, backbone: TokenViT) -> Tensor:
        return backbone.from_ids(image.inputs, self.view.codebook)

    def __str__(self) -> str:
        store = self.store
        sides = " x ".join(f"{side.min()}-{side.max()}" for side in store.grids.T)
        flip = (
            ""
            if self.view.mirror
            else "no image is mirrored: that takes the weights of a TokenAdapt (--tokenadapt)\n"
        )
        return (
            f"{self.view}\n{flip}{len(self.train):,} images of {self.name}, "
            f"{store.payload_bytes / len(store):.1f} bytes each, grids {sides}, K = {store.num_codes}"
        )


class PixelSource:
    """Images and annotations in the layout of ADE-20k, through mmsegmentation's pipeline.

    `crop` counts tokens, `short_side` pixels.
    """

    def __init__(
        self,
        run: Run,
        data: str,
        tokenizer: Tokenizer,
        *,
        crop: int,
        short_side: int,
        scale: tuple[float, float],
        max_share: float,
    ):
        train, validation = (AnnotatedSource(data, split) for split in ("training", "validation"))
        self.tokenizer, self.patch = tokenizer, tokenizer.spec.patch
        self.cells, batch_size, seed = self.patch, run.config.batch_size, run.config.seed
        self.pipeline = PixelPipeline(train, seed, self.patch * crop, short_side, scale, max_share)
        self.train = train_subset(run.config, self.pipeline)
        size = partial(fit_short_side, short_side=short_side, multiple=tokenizer.side_multiple)
        self.validation = WholePixels(validation, size)
        self.order = BatchOrder(len(self.train), batch_size, seed)
        self.codebook, self.class_names = tokenizer.codebook.detach().cpu().numpy(), train.class_names
        self.name, self.facts = data, image_facts(self.train, train, validation)
        classes = len(self.class_names)
        self.fingerprint = f"{len(self.train)} images of {classes} classes by {tokenizer.fingerprint}"

    def augmented(self, batch: PixelBatch, keys: Keys, backbone: TokenViT) -> tuple[Tensor, Tensor]:
        return batch.images.flip(1) / 255, batch.labels.long()

    def inputs(self, image: WholeImage, backbone: TokenViT) -> Tensor:
        return image.inputs / 255

    def __str__(self) -> str:
        return f"{self.pipeline}\n{len(self.train):,} images of {self.name}"


def open_backbone(checkpoint: str | None, model: str, source: Source, window: int, drop_path: float) -> TokenViT:
    """The ViT of a checkpoint, or without one a new one of the name `model`, with positions for window x window
    tokens. Raises UserError if the checkpoint is of another codebook, or no ViT of tokens.
    """
    if checkpoint:
        saved = load_pretrained(checkpoint)
        check_codes(source.codebook, source=source.name, saved=saved, checkpoint=checkpoint)
        return backbone_from(saved.model, window, drop_path, source.tokenizer)
    num_codes, dim = source.codebook.shape
    sizes = {"img_size": window, "in_chans": dim, "drop_path_rate": drop_path}
    if model.startswith("mtm_"):
        sizes["num_codes"] = num_codes
    return PixelTokenViT(source.tokenizer, model, **sizes) if source.tokenizer else TokenViT(model, **sizes)


def pixels_a_token(store: TokenStore) -> int:
    """Along one side, as the store's tokenizer says. Raises UserError if nothing is known of it."""
    try:
        return store.tokenizer["spec"]["patch"]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{store.path}: says nothing of its tokenizer, so the pixels of a token are not known: make it with "
            "recipes/tokenize_images.py"
        ) from error
