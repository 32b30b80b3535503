"""ResNets on maps of code vectors (SeiT): timm's ResNets with a Stem-Adapter.

`timm.create_model("seit_resnet50", in_chans=D, num_classes=...)` builds one. A transposed convolution maps
D x 28 x 28 to 64 x 56 x 56, the size after the stem of a ResNet for pixels, and there is no pooling before the
stages. Maps of every size work, so `img_size`, which the other models need, is ignored; `stem` is deconv.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from seitpp.models.stem import DECONV, ModelError


class TokenResNet(ResNet):
    """timm's ResNet with a transposed convolution as `conv1`: map (B, D, H, W) -> logits (B, classes).

    The reductions in `feature_info` are in pixels of the tokenized image, 8 per token.
    """

    def __init__(self, *args, in_chans: int = 32, **kwargs):
        super().__init__(*args, in_chans=in_chans, **kwargs)
        factory = {"device": self.conv1.weight.device, "dtype": self.conv1.weight.dtype}
        self.conv1 = nn.ConvTranspose2d(in_chans, self.conv1.out_channels, *DECONV, bias=False, **factory)
        self.maxpool = nn.Identity()
        self.feature_info[0]["reduction"] = 4  # half a token; 2 in a ResNet for pixels


default_cfgs = generate_default_cfgs(
    {
        f"seit_resnet{depth}.untrained": {"input_size": (32, 28, 28), "first_conv": "conv1", "classifier": "fc"}
        for depth in (18, 50)
    }
)


def _seit_resnet(variant: str, pretrained: bool, stem: str = "deconv", **kwargs) -> TokenResNet:
    if stem != "deconv":
        raise ModelError(f"got stem {stem!r} of a ResNet: expected deconv, the others are for ViTs")
    return build_model_with_cfg(TokenResNet, variant, pretrained, kwargs_filter=("img_size",), **kwargs)


@register_model
def seit_resnet18(pretrained: bool = False, **kwargs) -> TokenResNet:
    """ResNet-18 (published) on maps: two basic blocks per stage."""
    return _seit_resnet("seit_resnet18", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)


@register_model
def seit_resnet50(pretrained: bool = False, **kwargs) -> TokenResNet:
    """ResNet-50 (published) on maps: stages of 3, 4, 6 and 3 bottleneck blocks."""
    return _seit_resnet("seit_resnet50", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs)
