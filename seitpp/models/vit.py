"""Vision transformers that take token ids: the encoder of masked token modeling, later fine-tuned as it is.

`timm.create_model(name, img_size=grid, in_chans=D, num_codes=K, num_classes=..., global_pool=...)` builds one;
`img_size` is the token grid (H, W) and `in_chans` the width D of the embedding. The four names:

| name          | width | depth | heads |
|---------------|-------|-------|-------|
| mtm_vit_nano  | 96    | 3     | 3     |
| mtm_vit_tiny  | 192   | 12    | 3     |
| mtm_vit_small | 384   | 12    | 6     |
| mtm_vit_base  | 768   | 12    | 12    |
"""

from functools import partial

from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

PATCH = 2  # tokens along one side of a patch (SeiT++ release: 2 x 2)
NORM_EPS = 1e-6
NormLayer = partial(nn.LayerNorm, eps=NORM_EPS)


class TokenEmbed(PatchEmbed):
    """The stem of a token-id model: ids -> learned embedding, LayerNorm, dropout -> conv 2x2 -> patches.

    Ids (B, H, W) int64 in [0, K), or (B, 1, H, W) for timm functions that need the shape of an image ->
    patches (B, L, C). `drop_rate` is the dropout of the embedding (SeiT++ release: 0.1).
    """

    def __init__(self, *args, in_chans: int, num_codes: int, drop_rate: float, **kwargs):
        super().__init__(*args, in_chans=in_chans, **kwargs)
        self.token_emb = nn.Embedding(num_codes, in_chans)
        self.token_norm = NormLayer(in_chans)
        self.token_drop = nn.Dropout(drop_rate)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.squeeze(1) if ids.ndim == 4 else ids
        vectors = self.token_drop(self.token_norm(self.token_emb(ids)))
        return super().forward(vectors.permute(0, 3, 1, 2))


default_cfgs = generate_default_cfgs(
    {
        f"mtm_vit_{size}.untrained": {"first_conv": "patch_embed.proj", "classifier": "head"}
        for size in ("nano", "tiny", "small", "base")
    }
)


def _mtm_vit(
    variant: str, pretrained: bool, num_codes: int = 391, token_drop_rate: float = 0.1, **kwargs
) -> VisionTransformer:
    # The sizes of the published tokens are the defaults; a recipe reads its own from the store.
    kwargs = {"img_size": 28, "in_chans": 32, "patch_size": PATCH, "global_pool": "avg", **kwargs}
    return build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        embed_layer=partial(TokenEmbed, num_codes=num_codes, drop_rate=token_drop_rate),
        norm_layer=NormLayer,
        **kwargs,
    )


@register_model
def mtm_vit_nano(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """For thumbnails and tests: width 96, depth 3, 3 heads."""
    return _mtm_vit("mtm_vit_nano", pretrained, **{"embed_dim": 96, "depth": 3, "num_heads": 3, **kwargs})


@register_model
def mtm_vit_tiny(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-Ti: width 192, depth 12, 3 heads."""
    return _mtm_vit("mtm_vit_tiny", pretrained, **{"embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs})


@register_model
def mtm_vit_small(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-S: width 384, depth 12, 6 heads."""
    return _mtm_vit("mtm_vit_small", pretrained, **{"embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})


@register_model
def mtm_vit_base(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-B, the published model: width 768, depth 12, 12 heads."""
    return _mtm_vit("mtm_vit_base", pretrained, **{"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})
