"""The second data source: images and label maps through mmsegmentation's own pipeline."""

from typing import NamedTuple

import numpy as np
import torch
from mmcv.transforms import Compose
from torch import Tensor
from torch.utils.data import Dataset

from downstream.segmentation.data import IGNORED
from downstream.segmentation.mmseg import load_mmseg
from seitpp.data.dataset import MicroBatch
from seitpp.images.annotated import AnnotatedSource, decode_annotation
from seitpp.images.decode import open_image

LONG_SIDE = 4  # times the short one: the largest an image is resized to (mmsegmentation: 2048 x 512)


class PixelBatch(NamedTuple):
    """Augmented crops: `indices` (B,) int64 of the images, `images` (B, 3, h, w) uint8 BGR, `labels`
    (B, h, w) uint8, 255 where a pixel is ignored."""

    indices: Tensor
    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "PixelBatch":
        """The same batch on another device; the copy does not wait for it."""
        return PixelBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class PixelPipeline(Dataset):
    """Images in the layout of ADE-20k as mmsegmentation's usual pipeline for it makes them: RandomResize of
    (4 short_side, short_side) by `scale`, RandomCrop, RandomFlip, PhotoMetricDistortion, Pad.

    `crop` and `short_side` count pixels. What is drawn for an image follows from seed, epoch and image.
    """

    def __init__(
        self,
        source: AnnotatedSource,
        seed: int,
        crop: int,
        short_side: int,
        scale: tuple[float, float],
        max_share: float,
    ):
        load_mmseg()
        self.source, self.seed = source, seed
        size = LONG_SIDE * short_side, short_side
        self.pipeline = Compose(
            [
                {"type": "RandomResize", "scale": size, "ratio_range": scale, "keep_ratio": True},
                {"type": "RandomCrop", "crop_size": (crop, crop), "cat_max_ratio": max_share},
                {"type": "RandomFlip", "prob": 0.5},
                {"type": "PhotoMetricDistortion"},
                {"type": "Pad", "size": (crop, crop), "pad_val": {"img": 0, "seg": IGNORED}},
            ]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, share: MicroBatch) -> PixelBatch:
        crops = [self._augmented(share.epoch, index) for index in share]
        images, labels = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*crops, strict=True))
        return PixelBatch(torch.tensor(share), images.permute(0, 3, 1, 2), labels)

    def _augmented(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(crop, crop, 3) BGR and (crop, crop), both uint8."""
        sample = self.source.read(index)
        with open_image(sample.data, sample.name) as image:
            pixels = np.asarray(image.convert("RGB"))[..., ::-1]
        labels = decode_annotation(sample.annotation, sample.name).astype(np.uint8) - np.uint8(1)
        results = {"img": pixels, "img_shape": labels.shape, "gt_seg_map": labels, "seg_fields": ["gt_seg_map"]}
        np.random.seed([self.seed, epoch, index])  # noqa: NPY002 (the pipeline draws from the global generator)
        results = self.pipeline(results)
        return results["img"], results["gt_seg_map"]

    def __repr__(self) -> str:
        return f"PixelPipeline of mmsegmentation: {self.pipeline}"
