"""The segmenter: mmsegmentation's UPerNet on a token backbone, its loss, its optimizer's groups, its file."""

import warnings
from collections.abc import Sequence
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
from downstream.segmentation.mmseg import load_mmseg
from seitpp.models.weights.classifiers import classifier_spec, read_model, write_model

RESCALES = [4, 2, 1, 0.5]  # of the four levels, each of one cell a patch (Feature2Pyramid)
AUXILIARY_LEVEL, AUXILIARY_CHANNELS, AUXILIARY_WEIGHT = 2, 256, 0.4


class PixelLoss:
    """What both heads report of a batch: the loss as mmsegmentation has it, the accuracy of labelled pixels by
    sums.

    mmsegmentation's own accuracy selects those pixels, for which a step would wait for the device four times.
    """

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        labels = self._stack_batch_gt(batch_data_samples)
        logits = resize(seg_logits, labels.shape[2:], mode="bilinear", align_corners=self.align_corners)
        labels = labels.squeeze(1)
        loss = self.loss_decode(logits, labels, ignore_index=self.ignore_index)
        known = labels != self.ignore_index
        correct = (logits.argmax(dim=1) == labels) & known
        return {self.loss_decode.loss_name: loss, "acc_seg": 100 * correct.sum() / known.sum().clamp(min=1)}


@MODELS.register_module()
class TokenUPerHead(PixelLoss, UPerHead):
    """UPerHead that reports without waiting for the device."""


@MODELS.register_module()
class TokenFCNHead(PixelLoss, FCNHead):
    """FCNHead that reports without waiting for the device."""


@MODELS.register_module()
class TokenSegmenter(EncoderDecoder):
    """An EncoderDecoder whose `backbone` is a TokenViT, or the config of one, with the layers that timm groups."""

    def __init__(self, backbone: TokenViT | dict, **settings: Any):
        config = {"type": lambda: backbone} if isinstance(backbone, nn.Module) else backbone
        super().__init__(backbone=config, **settings)

    def group_matcher(self, coarse: bool = False) -> dict:
        """As timm's ViT has it; neck and heads lie above the last block."""
        stem = r"^backbone\.vit\.(?:cls_token|pos_embed|patch_embed)"
        return {"stem": stem, "blocks": r"^backbone\.vit\.blocks\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Besides one-dimensional parameters: the ViT's positions and cls token."""
        return {f"backbone.vit.{name}" for name in self.backbone.vit.no_weight_decay()}


def build_segmenter(
    backbone: TokenViT, num_classes: int, channels: int | None = None, sync_norm: bool = False
) -> TokenSegmenter:
    """UPerNet as MAE and BEiT use it: a feature pyramid, UPerHead, and an auxiliary FCNHead while it trains.

    `channels` are those of UPerHead (None: the width of the ViT, 768 for ViT-B). `sync_norm`: batch norms that
    share their statistics in a group of processes, which GPUs alone can. A backbone of pixels is given what
    mmsegmentation loads, 8-bit BGR; one of tokens its tokens as they are.
    """
    load_mmseg()
    with warnings.catch_warnings():  # that ignored pixels count in the mean of its loss
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
        "data_preprocessor": _pixels() if isinstance(backbone, PixelTokenViT) else None,
    }


def _pixels() -> dict:
    """8-bit BGR, as mmsegmentation's pipeline loads it -> RGB in [0, 1]."""
    scale = {"mean": [0.0] * 3, "std": [255.0] * 3, "bgr_to_rgb": True}
    return {"type": "SegDataPreProcessor", **scale, "size_divisor": 1, "seg_pad_val": 255}


def segmentation_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of both heads, averaged over all pixels, ignored ones included, and mmsegmentation's figures.

    `model` is the segmenter as Accelerate wraps it; `inputs` what its backbone takes; `labels` (B, h, w) int64 in
    [0, num_classes), 255 where a pixel is ignored. Returns the loss () and its parts and accuracies in percent,
    by name, each () and without gradient.
    """
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label.unsqueeze(0))) for label in labels]
    losses = model(inputs, samples, mode="loss")
    loss, parts = extract_model_from_parallel(model).parse_losses(losses)
    return loss, {name: part.detach() for name, part in parts.items() if name != "loss"}


def broadcast_statistics(model: nn.Module) -> None:
    """Give every process the running statistics of rank 0; without `sync_norm`, before every evaluation."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            broadcast(list(module.buffers()))


class SavedSegmenter(NamedTuple):
    """A segmenter of tokens in eval mode; the fingerprint of its codebook (None: not known), the names of its
    classes, the pixels along one side of a token that its labels had, and the window (height, width) of tokens
    that it was trained with."""

    model: TokenSegmenter
    codebook: str | None
    class_names: list[str]
    patch: int
    window: tuple[int, int]


def save_segmenter(
    path: Path, model: TokenSegmenter, codebook: str | None, class_names: Sequence[str], patch: int
) -> None:
    """Write a segmenter as one safetensors file; of one that takes pixels, what takes the tokens."""
    spec = classifier_spec(model.backbone.vit)
    sizes = {key: value for key, value in spec.arguments.items() if key not in ("num_classes", "global_pool")}
    header = {
        "backbone": {"vit": spec.name, **sizes},
        "channels": model.decode_head.channels,
        "codebook": codebook,
        "class_names": list(class_names),
        "patch": patch,
    }
    write_model(path, model, kind="segmenter", header=header)


def load_segmenter(path: Path) -> SavedSegmenter:
    """A segmenter that `save_segmenter` wrote, without drop-path and with batch norms of its own.

    A folder is that of a run: its model.safetensors. Raises ModelError naming the file if it is missing, damaged
    or of another kind.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    header, tensors = read_model(path, "segmenter", "the model.safetensors of a segmentation run")
    backbone, names = TokenViT(**header["backbone"]), header["class_names"]
    model = build_segmenter(backbone, len(names), header["channels"])
    model.load_state_dict(tensors)
    return SavedSegmenter(model.eval(), header["codebook"], names, header["patch"], backbone.window)
