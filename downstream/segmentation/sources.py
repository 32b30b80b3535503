"""Data sources of a segmentation run: tokens of a store, or images that are tokenized inside the backbone."""

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from downstream.segmentation.data import Segmented, SegmentedTokens, WholeImage, WholePixels, WholeTokens
from downstream.segmentation.pixel_pipeline import PixelBatch, PixelPipeline
from downstream.segmentation.view import SegmentView
from seitpp.augment import Keys
from seitpp.data.order import BatchOrder
from seitpp.engine.inputs import image_facts, open_once, readable, store_facts, train_subset
from seitpp.engine.run import Run
from seitpp.errors import UserError
from seitpp.images.annotated import open_annotated
from seitpp.images.decode import fit_short_side
from seitpp.images.masks import Layout, MaskRules
from seitpp.store import TokenStore
from seitpp.tokenizers import Tokenizer

if TYPE_CHECKING:  # the backbone needs the optional mmsegmentation, these classes do not
    from downstream.segmentation.backbone import TokenViT


class Source(Protocol):
    """Training and validation images with label maps, and their conversion to the inputs of a backbone.

    `pixels_per_token` is the number of pixels along one side of a token. `short_side` is that of the images in
    pixels (None: unknown). `cells` is the number of input cells along a token: 1 for tokens, `pixels_per_token`
    for pixels. `tokenizer` is the one inside a backbone that takes pixels, else None. `name` and `fingerprint`
    identify the data; str(source) describes it for the log.
    """

    train: Dataset
    validation: Dataset
    order: BatchOrder
    tokenizer: Tokenizer | None
    codebook: np.ndarray
    class_names: list[str]
    pixels_per_token: int
    short_side: int | None
    cells: int
    name: str
    fingerprint: str
    facts: dict[str, Any]  # written to result.json

    def augmented(self, batch: Segmented | PixelBatch, keys: Keys, backbone: "TokenViT") -> tuple[Tensor, Tensor]:
        """Augment a batch of `train` and return the backbone's inputs and labels (B, h, w) int64."""
        ...

    def inputs(self, image: WholeImage, backbone: "TokenViT") -> Tensor:
        """Return the backbone's inputs for an image of `validation`."""
        ...


class TokenSource:
    """Two splits of a token store, augmented by `view`."""

    tokenizer, cells = None, 1

    def __init__(self, run: Run, *, train: TokenStore, validation: TokenStore, view: SegmentView):
        self.pixels_per_token = view.pixels_per_token
        self.store, self.train = train, train_subset(run.config, SegmentedTokens(train, self.pixels_per_token))
        self.validation = WholeTokens(SegmentedTokens(validation, self.pixels_per_token))
        self.order = BatchOrder(len(self.train), run.config.batch_size, run.config.seed)
        self.codebook, self.class_names = train.books.only_table("segmentation"), train.class_names
        self.name, self.fingerprint, self.lookup = str(train.path), train.fingerprint, train.lookup
        self.short_side = short_side_of(train, self.pixels_per_token)
        self.view, self.facts = view, store_facts(train, validation, run.config)

    def augmented(self, batch: Segmented, keys: Keys, backbone: "TokenViT") -> tuple[Tensor, Tensor]:
        maps, labels = self.view(batch, keys)
        return backbone.from_maps(maps, self.view.codebook, self.lookup), labels

    def inputs(self, image: WholeImage, backbone: "TokenViT") -> Tensor:
        return backbone.from_ids(image.inputs, self.view.codebook)

    def __str__(self) -> str:
        store = self.store
        sides = " x ".join(f"{side.min()}-{side.max()}" for side in store.grids.T)
        flip = (
            ""
            if self.view.mirror
            else "no image is mirrored: mirroring tokens needs the weights of a TokenAdapt (--tokenadapt)\n"
        )
        return (
            f"{self.view}\n{flip}{len(self.train):,} images of {self.name}, "
            f"{store.payload_bytes / len(store):.1f} bytes each, grids {sides}, K = {store.num_codes}"
        )


class PixelSource:
    """The splits train and validation of images with masks, augmented by mmsegmentation's pipeline.

    `rules` are what the user says about the masks; `crop` is in tokens, `short_side` in pixels.
    """

    def __init__(
        self,
        run: Run,
        data: str,
        tokenizer: Tokenizer,
        *,
        rules: MaskRules,
        crop: int,
        short_side: int,
        scale: tuple[float, float],
        max_share: float,
    ):
        splits = "train", "validation"
        parts = open_once(run.accelerator, lambda: [open_annotated(data, split, rules) for split in splits])
        train, validation = (readable(part, run) for part in parts)
        self.tokenizer, self.pixels_per_token = tokenizer, tokenizer.spec.patch
        self.short_side = short_side
        self.cells, batch_size, seed = self.pixels_per_token, run.config.batch_size, run.config.seed
        self.pipeline = PixelPipeline(
            train,
            seed=seed,
            crop=self.pixels_per_token * crop,
            short_side=short_side,
            scale=scale,
            max_share=max_share,
        )
        self.train = train_subset(run.config, self.pipeline)
        size = partial(fit_short_side, short_side=short_side, multiple=tokenizer.side_multiple)
        self.validation = WholePixels(validation, size)
        self.order = BatchOrder(len(self.train), batch_size, seed)
        self.codebook = tokenizer.books.to_books().only_table("segmentation")
        self.class_names = train.class_names
        self.name, self.facts = data, image_facts(self.train, train, validation)
        classes = len(self.class_names)
        self.fingerprint = f"{len(self.train)} images of {classes} classes by {tokenizer.fingerprint}"

    def augmented(self, batch: PixelBatch, keys: Keys, backbone: "TokenViT") -> tuple[Tensor, Tensor]:
        return batch.images.flip(1) / 255, batch.labels.long()

    def inputs(self, image: WholeImage, backbone: "TokenViT") -> Tensor:
        return image.inputs / 255

    def __str__(self) -> str:
        return f"{self.pipeline}\n{len(self.train):,} of {self.pipeline.source}"


def short_side_of(store: TokenStore, pixels_per_token: int) -> int | None:
    """Return the short side in pixels of the images of a store, None if the store does not say it."""
    if store.grid:
        return pixels_per_token * min(store.grid)
    return (store.tokenizer or {}).get("short_side")


def pixels_a_token(store: TokenStore) -> int:
    """Return the number of pixels along one side of a token, from the store's record of its tokenizer.

    Raises UserError if the store has no such record.
    """
    try:
        return store.tokenizer["spec"]["patch"]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{store.path}: got a store without a description of its tokenizer, expected one with the number of "
            "pixels per token: write the store with recipes/tokenize_images.py"
        ) from error


class MaskFlags(Protocol):
    """The flags of a recipe that say how the masks of --data are read."""

    data: str | None
    layout: Layout | None
    classes: str | None
    ignore_label: tuple[int, ...]
    background_class: bool


def mask_rules(flags: MaskFlags) -> MaskRules:
    """Return what the flags say about masks. Raises UserError if they are given without --data."""
    rules = MaskRules(flags.layout, flags.classes, flags.ignore_label, flags.background_class)
    if flags.data is None and rules != MaskRules():
        raise UserError(
            "got --layout, --classes, --ignore-label or --background-class without --data, expected them with "
            "images: a store has read its masks already, remove them"
        )
    return rules
