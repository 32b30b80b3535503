"""Training on pixels: images and label maps augmented by mmsegmentation's own pipeline."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from downstream.segmentation.data import IGNORED, decode_labels
from downstream.segmentation.mmseg import load_mmseg
from seitpp.data.dataset import MicroBatch
from seitpp.images.annotated import AnnotatedSource
from seitpp.images.decode import decode_image
from seitpp.tensors import to_device

LONG_SIDE = 4  # the long side after the resize is at most 4 times the short side (mmsegmentation: 2048 x 512)


class PixelBatch(NamedTuple):
    """A batch of augmented crops.

    `indices` (B,) int64 are positions in the data set; `images` (B, 3, h, w) are uint8 BGR; `labels` (B, h, w)
    uint8 hold classes, and 255 where a pixel is ignored.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "PixelBatch":
        """Return the batch on `device`; the copy is asynchronous."""
        return PixelBatch(*(to_device(tensor, device) for tensor in self))


class PixelPipeline(Dataset):
    """A data set of images with masks, augmented by mmsegmentation's usual training pipeline: RandomResize of
    (4 short_side, short_side) by a factor in `scale`, RandomCrop, RandomFlip, PhotoMetricDistortion, Pad.

    `crop` and `short_side` are in pixels; `max_share` is RandomCrop's `cat_max_ratio`. The random numbers for an
    image depend only on the seed, the epoch and the index of the image. Raises ExtraError without mmsegmentation.
    """

    def __init__(
        self,
        source: AnnotatedSource,
        *,
        seed: int,
        crop: int,
        short_side: int,
        scale: tuple[float, float],
        max_share: float,
    ):
        load_mmseg()
        # Imported here, since mmcv belongs to the optional extra and this module is imported without it, too.
        from mmcv.transforms import Compose

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

    def __getitems__(self, batch: MicroBatch) -> PixelBatch:
        crops = [self._augmented(batch.epoch, index) for index in batch]
        images, labels = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*crops, strict=True))
        return PixelBatch(torch.tensor(batch), images.permute(0, 3, 1, 2), labels)

    def _augmented(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a crop (crop, crop, 3) BGR and its labels (crop, crop), both uint8."""
        sample = self.source.read(index)
        pixels = np.ascontiguousarray(decode_image(sample, lambda size: size)[::-1].transpose(1, 2, 0))
        labels = decode_labels(sample.annotation, sample.name)
        results = {"img": pixels, "img_shape": labels.shape, "gt_seg_map": labels, "seg_fields": ["gt_seg_map"]}
        np.random.seed([self.seed, epoch, index])  # noqa: NPY002 (the pipeline draws from the global generator)
        results = self.pipeline(results)
        return results["img"], results["gt_seg_map"]

    def __repr__(self) -> str:
        return f"PixelPipeline of mmsegmentation: {self.pipeline}"
