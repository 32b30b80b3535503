"""ResNets on maps of code vectors (SeiT): timm's ResNets with a Stem-Adapter, and the reduced one of GEM.

`timm.create_model("seit_resnet50", in_chans=D, num_classes=...)` builds one. A transposed convolution maps
D x 28 x 28 to 64 x 56 x 56, the size after the stem of a ResNet for pixels, and there is no pooling before the
stages. Maps of every size work, so `img_size`, which the other models need, is ignored; `stem` is deconv.

`seit_resnet18_reduced` takes maps and images alike: in class-incremental learning SeiT compares the two by it.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from seitpp.models.stem import DECONV, ModelError

REDUCED = (20, 40, 80, 160)  # widths of the stages


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


class ReducedResNet(ResNet):
    """The ResNet-18 of GEM (Lopez-Paz and Ranzato, arXiv 1706.08840): inputs (B, C, H, W) -> logits (B, classes).

    Its widths are 20, 40, 80 and 160. The stem is a 3 x 3 convolution of stride 1, and there is no max-pooling, so
    that small inputs keep their size until the second stage. Its weights begin as torch's, not as timm's, with
    which no block does anything at first. The reductions in `feature_info` are relative to the input.
    """

    def __init__(self, *args, in_chans: int = 32, **kwargs):
        # A deep stem is the one whose width timm lets choose: twice `stem_width`.
        sizes = {"stem_type": "deep", "stem_width": REDUCED[0] // 2, "channels": REDUCED}
        super().__init__(*args, in_chans=in_chans, zero_init_last=False, **sizes, **kwargs)
        factory = {"device": self.bn1.weight.device, "dtype": self.bn1.weight.dtype}
        self.conv1 = nn.Conv2d(in_chans, REDUCED[0], 3, padding=1, bias=False, **factory)
        self.maxpool = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4, 8), strict=True):
            info["reduction"] = reduction


default_cfgs = generate_default_cfgs(
    {
        f"seit_resnet{name}.untrained": {"input_size": (32, side, side), "first_conv": "conv1", "classifier": "fc"}
        for name, side in (("18", 28), ("50", 28), ("18_reduced", 32))
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


@register_model
def seit_resnet18_reduced(pretrained: bool = False, **kwargs) -> ReducedResNet:
    """ResNet-18 of GEM on maps or images: two basic blocks per stage, 20 to 160 wide."""
    sizes = {"block": BasicBlock, "layers": (2, 2, 2, 2), "kwargs_filter": ("img_size",)}
    return build_model_with_cfg(ReducedResNet, "seit_resnet18_reduced", pretrained, **sizes, **kwargs)
