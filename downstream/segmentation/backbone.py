"""The token ViT as a backbone of mmsegmentation: it takes token ids or maps and returns four feature levels."""

from typing import Literal

import timm
import torch
from mmseg.registry import MODELS
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from downstream.segmentation.sources import Source
from seitpp.codebook import embed, nearest
from seitpp.engine.inputs import check_codes
from seitpp.models import MTM, ModelError, classifier_from, input_kind, input_size, load_pretrained
from seitpp.tokenizers.base import Tokenizer

LEVELS = (4, 6, 8, 12)  # of 12 blocks, the number whose output is each level (MAE, BEiT: indices 3, 5, 7, 11)


def level_blocks(depth: int) -> list[int]:
    """Return the 0-based indices of the blocks whose outputs are the four levels, at 4, 6, 8 and 12 twelfths of
    the depth, rounded up.

    12 -> (3, 5, 7, 11), 24 -> (7, 11, 15, 23), 3 -> (0, 1, 1, 2): a shallow ViT uses an output twice.
    """
    return [-(-depth * level // 12) - 1 for level in LEVELS]


@MODELS.register_module()
class TokenViT(nn.Module):
    """A token ViT without its final norm and head, so that every parameter receives a gradient.

    `vit` is a seit_vit_* or mtm_vit_* model, which is modified in place, or the name of one to create with
    `timm.create_model(vit, **arguments)`. Raises ModelError for any other model.
    """

    def __init__(self, vit: VisionTransformer | str, **arguments):
        super().__init__()
        if isinstance(vit, str):
            vit = timm.create_model(vit, num_classes=0, dynamic_img_size=True, **arguments)
        self.input_kind: Literal["ids", "maps"] = input_kind(_of_tokens(vit))
        vit.reset_classifier(0, "")
        vit.norm, vit.fc_norm = nn.Identity(), nn.Identity()
        self.vit = vit
        self.blocks = level_blocks(len(vit.blocks))

    @property
    def width(self) -> int:
        """The number of channels C of each level."""
        return self.vit.embed_dim

    @property
    def window(self) -> tuple[int, int]:
        """The (height, width) in tokens that the position embeddings fit; for other sizes they are resampled."""
        return input_size(self.vit)

    def from_ids(self, ids: Tensor, codebook: Tensor) -> Tensor:
        """Convert ids (B, H, W) of any integer dtype to the backbone's inputs, with the codebook (K, D)."""
        return ids.long() if self.input_kind == "ids" else embed(ids, codebook)

    def from_maps(self, maps: Tensor, codebook: Tensor, lookup: str) -> Tensor:
        """Convert maps (B, D, H, W) to the backbone's inputs: a backbone that takes ids gets those of the nearest
        codes, by the `lookup` of the tokenizer.
        """
        return nearest(maps, codebook, lookup) if self.input_kind == "ids" else maps

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Ids (B, H, W) int64 or maps (B, D, H, W) -> four levels (B, C, H / 2, W / 2), one cell per patch."""
        images = inputs.unsqueeze(1) if self.input_kind == "ids" else inputs
        chosen = sorted(set(self.blocks))
        outputs = self.vit.forward_intermediates(
            images, indices=chosen, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return [outputs[chosen.index(block)] for block in self.blocks]


@MODELS.register_module()
class PixelTokenViT(TokenViT):
    """A TokenViT that takes pixels and tokenizes them with a frozen tokenizer, for mmsegmentation's own pipeline.

    The tokenizer is not a submodule, so state dict, parameter groups and averages are those of a TokenViT.
    """

    def __init__(self, tokenizer: Tokenizer, vit: VisionTransformer | str, **arguments):
        super().__init__(vit, **arguments)
        self._tokenizer = (tokenizer.eval().requires_grad_(False),)  # in a tuple nn.Module does not see it

    def _apply(self, change, recurse: bool = True):
        self._tokenizer[0]._apply(change, recurse)  # so that .to(device) moves it, too
        return super()._apply(change, recurse)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Tokenize images (B, 3, p H, p W) float in [0, 1], p x p pixels per token, to inputs of a TokenViT."""
        (tokenizer,) = self._tokenizer
        if tokenizer.spec.image_size != tuple(images.shape[-2:]):
            tokenizer.set_image_size(tuple(images.shape[-2:]))
        return self.from_ids(tokenizer.encode(images.float()), tokenizer.codebook)

    def forward(self, images: Tensor) -> list[Tensor]:
        return super().forward(self.tokenize(images))


def backbone_from(
    source: nn.Module,
    window: int | tuple[int, int] | None = None,
    *,
    drop_path_rate: float = 0.0,
    tokenizer: Tokenizer | None = None,
) -> TokenViT:
    """Create a backbone with the weights of an MTM's encoder or of a classifier, ours or official.

    Position embeddings are resampled bicubically to `window` tokens (None: they keep their size) and are
    trainable. With a `tokenizer` the backbone takes pixels. Raises ModelError if `source` is not a token ViT.
    """
    _of_tokens(source.encoder if isinstance(source, MTM) else source)
    vit = classifier_from(source, 1, img_size=window, drop_path_rate=drop_path_rate, dynamic_img_size=True)
    return PixelTokenViT(tokenizer, vit) if tokenizer else TokenViT(vit)


def open_backbone(
    checkpoint: str | None, model: str, source: Source, *, window: int, drop_path: float
) -> TokenViT:
    """Load the ViT of `checkpoint`, or create the one named `model` if `checkpoint` is None.

    The position embeddings are for window x window tokens. Raises UserError if the checkpoint has another codebook
    than `source`, or is not a token ViT.
    """
    if checkpoint:
        saved = load_pretrained(checkpoint)
        check_codes(source.codebook, source=source.name, saved=saved, checkpoint=checkpoint)
        return backbone_from(saved.model, window, drop_path_rate=drop_path, tokenizer=source.tokenizer)
    num_codes, dim = source.codebook.shape
    sizes = {"img_size": window, "in_chans": dim, "drop_path_rate": drop_path}
    if model.startswith("mtm_"):
        sizes["num_codes"] = num_codes
    return PixelTokenViT(source.tokenizer, model, **sizes) if source.tokenizer else TokenViT(model, **sizes)


def _of_tokens(model: nn.Module) -> VisionTransformer:
    if not isinstance(model, VisionTransformer) or input_kind(model) == "pixels":
        raise ModelError(
            f"backbone: got a {type(model).__name__}, expected a ViT of tokens: a seit_vit_* or mtm_vit_*"
        )
    return model
