"""The segmenter: mmsegmentation's UPerNet on a token backbone, with its loss, parameter groups and model file."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import broadcast, extract_model_from_parallel
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder, FCNHead, UPerHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from downstream.segmentation.backbone import PixelTokenViT, TokenViT
from downstream.segmentation.data import IGNORED
from downstream.segmentation.mmseg import load_mmseg
from seitpp.errors import refusing
from seitpp.models import ModelError
from seitpp.models.vit import SIZES
from seitpp.models.weights.classifiers import ARGUMENTS, classifier_spec, read_model, write_model
from seitpp.models.weights.rebuild import (
    check_tensors,
    checked,
    is_object,
    is_size,
    is_text,
    is_texts,
    one_of,
    optional,
)

RESCALES = [4, 2, 1, 0.5]  # Feature2Pyramid's factors for the four levels, which have one cell per ViT patch
# What the header of a segmenter may hold.
HEADER = {
    "backbone": is_object,
    "class_names": lambda value: is_texts(value) and len(value) > 0,
    "channels": is_size,
    "codebook": optional(is_text),
    "patch": is_size,
    "short_side": optional(is_size),
}
BACKBONE = {"vit": one_of(*(f"{kind}_vit_{size}" for kind in ("seit", "mtm") for size in SIZES)), **ARGUMENTS}
AUXILIARY_LEVEL, AUXILIARY_CHANNELS, AUXILIARY_WEIGHT = 2, 256, 0.4


class PixelLoss:
    """Mixin of both heads: mmsegmentation's loss, and the pixel accuracy without a GPU synchronization.

    mmsegmentation's own accuracy selects the labeled pixels by a mask, which makes the host wait for the device
    four times per step. Here it is computed from sums.
    """

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        labels = self._stack_batch_gt(batch_data_samples)
        logits = resize(seg_logits, labels.shape[2:], mode="bilinear", align_corners=self.align_corners)
        labels = labels.squeeze(1)
        loss = self.loss_decode(logits, labels, ignore_index=self.ignore_index)
        valid = labels != self.ignore_index
        correct = (logits.argmax(dim=1) == labels) & valid
        return {self.loss_decode.loss_name: loss, "acc_seg": 100 * correct.sum() / valid.sum().clamp(min=1)}


@MODELS.register_module()
class TokenUPerHead(PixelLoss, UPerHead):
    """UPerHead whose loss and accuracy do not wait for the device."""


@MODELS.register_module()
class TokenFCNHead(PixelLoss, FCNHead):
    """FCNHead whose loss and accuracy do not wait for the device."""


@MODELS.register_module()
class TokenSegmenter(EncoderDecoder):
    """An EncoderDecoder on a TokenViT (or its config) with timm's hooks for layer decay and weight decay."""

    def __init__(self, backbone: TokenViT | dict, **settings: Any):
        config = {"type": lambda: backbone} if isinstance(backbone, nn.Module) else backbone
        super().__init__(backbone=config, **settings)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the layer groups of timm's ViT; neck and heads belong to the group above the last block."""
        stem = r"^backbone\.vit\.(?:cls_token|pos_embed|patch_embed)"
        return {"stem": stem, "blocks": r"^backbone\.vit\.blocks\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay besides one-dimensional ones: positions and cls token."""
        return {f"backbone.vit.{name}" for name in self.backbone.vit.no_weight_decay()}


def build_segmenter(
    backbone: TokenViT, num_classes: int, *, channels: int | None = None, sync_norm: bool = False
) -> TokenSegmenter:
    """Create UPerNet as MAE and BEiT use it: a feature pyramid, UPerHead, and an auxiliary FCNHead for training.

    `channels` is the width of UPerHead (None: the width of the ViT, 768 for ViT-B). `sync_norm` synchronizes the
    batch norm statistics over the processes, which is possible on GPUs only. A pixel backbone gets a preprocessor
    for mmsegmentation's 8-bit BGR images; a token backbone takes its inputs unchanged.
    """
    load_mmseg()
    with warnings.catch_warnings():  # mmsegmentation warns that its mean loss includes ignored pixels
        warnings.simplefilter("ignore")
        model = MODELS.build(_config(backbone, num_classes, channels or backbone.width, sync_norm))
    for head in (model.decode_head, model.auxiliary_head):
        head.init_weights()
    return model


def _config(backbone: TokenViT, num_classes: int, channels: int, sync_norm: bool) -> dict:
    width, norm = backbone.width, {"type": "SyncBN" if sync_norm else "BN", "requires_grad": True}
    head = {"num_classes": num_classes, "dropout_ratio": 0.1, "norm_cfg": norm, "align_corners": False}
    return {
        "type": "TokenSegmenter",
        "backbone": backbone,
        "neck": {"type": "Feature2Pyramid", "embed_dim": width, "rescales": RESCALES, "norm_cfg": norm},
        "decode_head": {
            "type": "TokenUPerHead",
            "in_channels": [width] * 4,
            "in_index": [0, 1, 2, 3],
            "pool_scales": (1, 2, 3, 6),
            "channels": channels,
            **head,
        },
        "auxiliary_head": {
            "type": "TokenFCNHead",
            "in_channels": width,
            "in_index": AUXILIARY_LEVEL,
            "channels": AUXILIARY_CHANNELS,
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": AUXILIARY_WEIGHT},
            **head,
        },
        "data_preprocessor": _pixel_preprocessor() if isinstance(backbone, PixelTokenViT) else None,
    }


def _pixel_preprocessor() -> dict:
    """Return the config that converts 8-bit BGR, as mmsegmentation's pipeline loads it, to RGB in [0, 1]."""
    scale = {"mean": [0.0] * 3, "std": [255.0] * 3, "bgr_to_rgb": True}
    return {"type": "SegDataPreProcessor", **scale, "size_divisor": 1, "seg_pad_val": IGNORED}


def segmentation_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum of the cross-entropies of both heads, and mmsegmentation's log values.

    Ignored pixels add nothing to a cross-entropy, but count in the denominator of its mean. `model` is the
    segmenter as Accelerate wraps it; `inputs` are what its backbone takes; `labels` (B, h, w) int64 are in [0,
    num_classes), or 255 where a pixel is ignored. Returns the loss () and a dict with each head's loss and
    accuracy in percent, each () and detached.
    """
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label.unsqueeze(0))) for label in labels]
    losses = model(inputs, samples, mode="loss")
    loss, parts = extract_model_from_parallel(model).parse_losses(losses)
    return loss, {name: part.detach() for name, part in parts.items() if name != "loss"}


def broadcast_statistics(model: nn.Module) -> None:
    """Copy the running batch norm statistics of rank 0 to all processes; without `sync_norm` they differ."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            broadcast(list(module.buffers()))


class SavedSegmenter(NamedTuple):
    """A token segmenter loaded from a file, in eval mode, with its metadata.

    `codebook` is the fingerprint of the codebook (None: unknown); `pixels_per_token` is the number of label pixels
    along one side of a token; `window` is the training crop's (height, width) in tokens; `short_side` is that of
    the training images in pixels (None: unknown).
    """

    model: TokenSegmenter
    codebook: str | None
    class_names: list[str]
    pixels_per_token: int
    window: tuple[int, int]
    short_side: int | None


def save_segmenter(
    path: Path,
    model: TokenSegmenter,
    *,
    codebook: str | None,
    class_names: Sequence[str],
    pixels_per_token: int,
    short_side: int | None,
) -> None:
    """Write a segmenter as one safetensors file; the tokenizer of one that takes pixels is not written."""
    spec = classifier_spec(model.backbone.vit)
    sizes = {key: value for key, value in spec.arguments.items() if key not in ("num_classes", "global_pool")}
    header = {
        "backbone": {"vit": spec.name, **sizes},
        "channels": model.decode_head.channels,
        "codebook": codebook,
        "class_names": list(class_names),
        "patch": pixels_per_token,
        "short_side": short_side,
    }
    write_model(path, model, kind="segmenter", header=header)


def load_segmenter(path: Path) -> SavedSegmenter:
    """Load a segmenter that `save_segmenter` wrote, without drop-path and without synchronized batch norms.

    For the folder of a run, its model.safetensors is loaded. Raises ModelError naming the file if it is missing,
    damaged or of another kind.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    header, tensors = read_model(path, "segmenter", "the model.safetensors of a segmentation run")
    checked(path, header, HEADER, needs=("backbone", "class_names", "channels", "codebook", "patch"))
    settings, names = checked(path, header["backbone"], BACKBONE, needs=("vit",)), header["class_names"]

    # mmsegmentation's heads cannot be built without memory: the sizes that others follow are compared first.
    parts = {
        name.removeprefix("backbone."): part for name, part in tensors.items() if name.startswith("backbone.")
    }
    check_tensors(path, partial(TokenViT, **settings), parts, depth=settings.get("depth", 0))
    channels = header["channels"]
    for layer, expected in (
        ("decode_head.conv_seg", (len(names), channels, 1, 1)),
        ("decode_head.fpn_bottleneck.conv", (channels, 4 * channels, 3, 3)),
    ):
        weight = tensors.get(f"{layer}.weight")
        if weight is None or tuple(weight.shape) != expected:
            got = "none" if weight is None else tuple(weight.shape)
            raise ModelError(f"{path}: its {layer} is {got}, expected {expected} by its header; save it again")
    with refusing(ModelError, f"{path} is not a whole segmenter", "the tensors of its header; save it again"):
        backbone = TokenViT(**settings)
        model = build_segmenter(backbone, len(names), channels=channels)
        model.load_state_dict(tensors)
    return SavedSegmenter(
        model.eval(), header["codebook"], names, header["patch"], backbone.window, header.get("short_side")
    )
