"""The token ViT as a backbone of mmsegmentation: ids or maps in, four levels of features out."""

from typing import Literal

import timm
import torch
from mmseg.registry import MODELS
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from seitpp.codebook import embed, nearest
from seitpp.models import MTM, ModelError, classifier_from, input_kind, input_size
from seitpp.tokenizers.base import Tokenizer

LEVELS = (4, 6, 8, 12)  # blocks of twelve that lie below each level: those of MAE and BEiT, (3, 5, 7, 11) from 0


def level_blocks(depth: int) -> list[int]:
    """The block, from 0, whose output is each of the four levels: the twelfths of 12 blocks, rounded up.

    12 -> (3, 5, 7, 11), 24 -> (7, 11, 15, 23), 3 -> (0, 1, 1, 2): a shallow ViT gives an output twice.
    """
    return [-(-depth * level // 12) - 1 for level in LEVELS]


@MODELS.register_module()
class TokenViT(nn.Module):
    """A ViT of tokens without its last norm and head, so that every parameter takes part in the four levels.

    `vit` is a seit_vit_* or mtm_vit_*, which is changed, or the name of one, made new with `arguments` for
    `timm.create_model`. Raises ModelError for any other model.
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
        """Channels C of each level."""
        return self.vit.embed_dim

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) in tokens of what the positions are made for; they are resampled for other windows."""
        return input_size(self.vit)

    def from_ids(self, ids: Tensor, codebook: Tensor) -> Tensor:
        """What the backbone takes, of ids (B, H, W) of any integer dtype and the codebook (K, D)."""
        return ids.long() if self.input_kind == "ids" else embed(ids, codebook)

    def from_maps(self, maps: Tensor, codebook: Tensor, lookup: str) -> Tensor:
        """What the backbone takes, of maps (B, D, H, W): for ids those of the nearest codes by the tokenizer's
        `lookup`.
        """
        return nearest(maps, codebook, lookup) if self.input_kind == "ids" else maps

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Ids (B, H, W) int64 or maps (B, D, H, W) -> four levels (B, C, H / 2, W / 2), a cell for each patch."""
        images = inputs.unsqueeze(1) if self.input_kind == "ids" else inputs
        chosen = sorted(set(self.blocks))
        outputs = self.vit.forward_intermediates(
            images, indices=chosen, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return [outputs[chosen.index(block)] for block in self.blocks]


@MODELS.register_module()
class PixelTokenViT(TokenViT):
    """A TokenViT that is given pixels, with the frozen tokenizer inside: for mmsegmentation's own pipeline.

    `tokenizer` is no part of the weights, so files, parameter groups and averages are those of a TokenViT.
    """

    def __init__(self, tokenizer: Tokenizer, vit: VisionTransformer | str, **arguments):
        super().__init__(vit, **arguments)
        self._tokenizer = (tokenizer.eval().requires_grad_(False),)  # a tuple hides it from nn.Module

    def _apply(self, change, recurse: bool = True):
        self._tokenizer[0]._apply(change, recurse)  # to another device
        return super()._apply(change, recurse)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Images (B, 3, p H, p W) float in [0, 1], p pixels a token side -> what a TokenViT is given."""
        (tokenizer,) = self._tokenizer
        if tokenizer.spec.image_size != tuple(images.shape[-2:]):
            tokenizer.set_image_size(tuple(images.shape[-2:]))
        return self.from_ids(tokenizer.encode(images.float()), tokenizer.codebook)

    def forward(self, images: Tensor) -> list[Tensor]:
        return super().forward(self.tokenize(images))


def backbone_from(
    source: nn.Module,
    window: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    tokenizer: Tokenizer | None = None,
) -> TokenViT:
    """A backbone with the weights of an MTM's encoder or of a classifier, ours or official.

    Positions are resampled bicubically to `window` tokens (None: those of the source) and trained. With a
    `tokenizer` the backbone takes pixels. Raises ModelError if `source` is no ViT of tokens.
    """
    _of_tokens(source.encoder if isinstance(source, MTM) else source)
    vit = classifier_from(source, 1, img_size=window, drop_path_rate=drop_path_rate, dynamic_img_size=True)
    return PixelTokenViT(tokenizer, vit) if tokenizer else TokenViT(vit)


def _of_tokens(model: nn.Module) -> VisionTransformer:
    if not isinstance(model, VisionTransformer) or input_kind(model) == "pixels":
        raise ModelError(f"got a {type(model).__name__}, expected a ViT of tokens: a seit_vit_* or mtm_vit_*")
    return model
