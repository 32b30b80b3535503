"""Vision transformers on tokens: `seit_vit_*` take maps of code vectors (SeiT), `mtm_vit_*` take ids (SeiT++).

`timm.create_model("seit_vit_base", img_size=28, in_chans=D, stem="conv4", num_classes=...)` and
`timm.create_model("mtm_vit_base", img_size=28, in_chans=D, num_codes=K, num_classes=...)` build them; `img_size`
is the token grid (H, W). For tokens of several digits, `num_codes` has the number of values of each; patches of
other than 2 x 2 tokens are a `patch_size`. `mtm_vit_*` is the encoder of masked token modeling, which is later
fine-tuned; its D is the width of the learned code embedding. Both have learned positions and a cls token; the
classifier is the mean over the patches, LayerNorm (eps 1e-6) and a linear head. The sizes:

| name  | width | depth | heads |
|-------|-------|-------|-------|
| nano  | 96    | 3     | 3     |
| tiny  | 192   | 12    | 3     |
| small | 384   | 12    | 6     |
| base  | 768   | 12    | 12    |

`vit_nano_patch8_32` is the smallest of them for pixels; timm has the others (`vit_base_patch16_224`).
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float, Int64
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from seitpp.models.stem import StemAdapter, stem_geometry

PATCH = 2  # tokens along one side of a patch, unless a model has another `patch_size` (SeiT++ release: 2 x 2)
NORM_EPS = 1e-6
NormLayer = partial(nn.LayerNorm, eps=NORM_EPS)
SIZES = {
    "nano": {"embed_dim": 96, "depth": 3, "num_heads": 3},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}


class TokenEmbed(PatchEmbed):
    """The stem of a model on ids: learned code embedding, LayerNorm, dropout, then a convolution to patches.

    Ids are in [0, num_codes); they may have a channel axis of size 1, for functions of timm that need the shape of
    an image. Where a token has several digits, `num_codes` has the number of values of each, the ids have an axis
    of digits there, and the embedding of a token is the sum of those of its digits. `drop_rate` is the dropout of
    the embedding (SeiT++ release: 0.1).
    """

    def __init__(self, *args, in_chans: int, num_codes: int | Sequence[int], drop_rate: float, **kwargs):
        super().__init__(*args, in_chans=in_chans, **kwargs)
        self.sizes = digit_sizes(num_codes)
        self.token_emb = nn.Embedding(sum(self.sizes), in_chans)
        first = [0, *accumulate(self.sizes)][:-1]
        self.register_buffer("first_rows", torch.tensor(first).view(-1, 1, 1), persistent=False)
        self.token_norm = NormLayer(in_chans)
        self.token_drop = nn.Dropout(drop_rate)

    def forward(
        self, ids: Int64[Tensor, "batch *digits height width"]
    ) -> Float[Tensor, "batch *patches channels"]:
        planes = ids if ids.ndim == 4 else ids.unsqueeze(1)
        if len(self.sizes) == 1:
            vectors = self.token_emb(planes.squeeze(1))
        else:
            vectors = self.token_emb(planes + self.first_rows).sum(dim=1)
        return super().forward(self.token_drop(self.token_norm(vectors)).permute(0, 3, 1, 2))


def digit_sizes(num_codes: int | Sequence[int]) -> tuple[int, ...]:
    """Return the number of values of each digit of a token; a plain token has one digit, its id."""
    return (num_codes,) if isinstance(num_codes, int) else tuple(num_codes)


default_cfgs = generate_default_cfgs(
    {
        f"{kind}_vit_{size}.untrained": {"first_conv": "patch_embed.proj", "classifier": "head"}
        for kind in ("seit", "mtm")
        for size in SIZES
    }
    | {
        "vit_nano_patch8_32.untrained": {
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "input_size": (3, 32, 32),
        }
    }
)


def _seit_vit(size: str, pretrained: bool, stem: str = "conv4", **kwargs) -> VisionTransformer:
    # The defaults are the sizes of the published tokens; recipes pass the sizes of their store.
    stride = stem_geometry(stem).stride
    embed = partial(StemAdapter, stem=stem)
    return _vit(f"seit_vit_{size}", size, pretrained, embed, stride, **{"img_size": 14 * stride, **kwargs})


def _mtm_vit(
    size: str,
    pretrained: bool,
    *,
    num_codes: int | Sequence[int] = 391,
    token_drop_rate: float = 0.1,
    patch_size: int | tuple[int, int] = PATCH,
    **kwargs,
) -> VisionTransformer:
    embed = partial(TokenEmbed, num_codes=num_codes, drop_rate=token_drop_rate)
    return _vit(f"mtm_vit_{size}", size, pretrained, embed, patch_size, **{"img_size": 14 * PATCH, **kwargs})


def _vit(
    name: str, size: str, pretrained: bool, embed: partial, patch_size: int | tuple[int, int], **kwargs
) -> VisionTransformer:
    return build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        embed_layer=embed,
        patch_size=patch_size,
        norm_layer=NormLayer,
        **{"in_chans": 32, "global_pool": "avg", **SIZES[size], **kwargs},
    )


@register_model
def seit_vit_nano(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A small ViT on maps, for thumbnails and tests: width 96, depth 3, 3 heads."""
    return _seit_vit("nano", pretrained, **kwargs)


@register_model
def seit_vit_tiny(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-Ti on maps: width 192, depth 12, 3 heads."""
    return _seit_vit("tiny", pretrained, **kwargs)


@register_model
def seit_vit_small(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-S on maps (published): width 384, depth 12, 6 heads."""
    return _seit_vit("small", pretrained, **kwargs)


@register_model
def seit_vit_base(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-B on maps (published): width 768, depth 12, 12 heads."""
    return _seit_vit("base", pretrained, **kwargs)


@register_model
def mtm_vit_nano(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A small ViT on ids, for thumbnails and tests: width 96, depth 3, 3 heads."""
    return _mtm_vit("nano", pretrained, **kwargs)


@register_model
def mtm_vit_tiny(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-Ti on ids: width 192, depth 12, 3 heads."""
    return _mtm_vit("tiny", pretrained, **kwargs)


@register_model
def mtm_vit_small(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-S on ids: width 384, depth 12, 6 heads."""
    return _mtm_vit("small", pretrained, **kwargs)


@register_model
def mtm_vit_base(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-B on ids (published): width 768, depth 12, 12 heads."""
    return _mtm_vit("base", pretrained, **kwargs)


@register_model
def vit_nano_patch8_32(
    pretrained: bool = False, patch_size: int | tuple[int, int] = 8, **kwargs
) -> VisionTransformer:
    """A small ViT on pixels, for thumbnails and tests: 32 pixels, patches of 8, width 96, depth 3, 3 heads."""
    sizes = {"img_size": 32, "in_chans": 3, **kwargs}
    return _vit("vit_nano_patch8_32", "nano", pretrained, partial(PatchEmbed), patch_size, **sizes)
