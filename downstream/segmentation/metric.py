"""How good a segmenter is: mIoU, pixel accuracy and class accuracy as mmsegmentation has them, of exact counts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from mmseg.evaluation.metrics import IoUMetric
from torch import Tensor

from downstream.segmentation.data import IGNORED
from seitpp import files


class SegmentationScore:
    """Pixels counted over many images: `counts` (4, classes) int64, intersection, union, predicted and labelled
    pixels of each class, and the number of `images`. Its size does not depend on how many there are.
    """

    def __init__(self, class_names: Sequence[str]):
        self.class_names = list(class_names)
        self.counts = torch.zeros(4, len(self.class_names), dtype=torch.int64)
        self.images = 0

    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Count some images: both (B, h, w) of any integer dtype, or one image (h, w); the class of each pixel.

        Labels are 255 where a pixel is ignored; it counts nowhere.
        """
        self.images += len(labels) if labels.ndim == 3 else 1
        known = labels != IGNORED
        predictions, labels = predictions[known], labels[known]
        intersection, predicted, labelled = (
            torch.bincount(classes.int(), minlength=len(self.class_names)).cpu()
            for classes in (predictions[predictions == labels], predictions, labels)
        )
        self.counts += torch.stack([intersection, predicted + labelled - intersection, predicted, labelled])

    def reduce(self, accelerator: Accelerator, images: int) -> None:
        """Sum over all processes, each of which has counted other images; there must be `images` in all."""
        share = torch.cat([self.counts.flatten(), torch.tensor([self.images])]).to(accelerator.device)
        total = accelerator.reduce(share, reduction="sum").cpu()
        self.counts, self.images = total[:-1].view_as(self.counts), int(total[-1])
        assert self.images == images, f"{self.images} images were counted, not {images}"

    def per_class(self) -> dict[str, np.ndarray]:
        """`IoU` and `Acc` (classes,) in percent; NaN where a class neither occurs nor was predicted (IoU), or
        does not occur (Acc)."""
        return {name: values for name, values in self._figures().items() if name != "aAcc"}

    def summary(self) -> dict[str, float]:
        """`mIoU` and `mAcc`, means over the classes that are not NaN, and `aAcc`, of all pixels; in percent."""
        figures = self._figures()
        return {
            "mIoU": float(np.nanmean(figures["IoU"])),
            "aAcc": float(figures["aAcc"]),
            "mAcc": float(np.nanmean(figures["Acc"])),
        }

    def table(self) -> str:
        """A line for each class and one for all: IoU, Acc, and the share of the labelled pixels, in percent."""
        width = max(5, *map(len, self.class_names))
        lines = [f"{'class':<{width}}     IoU     Acc   share"]
        lines += [f"{name:<{width}} {iou:7.2f} {acc:7.2f} {share:7.2f}" for name, iou, acc, share in self._rows()]
        summary = ", ".join(f"{name} {value:.2f}" for name, value in self.summary().items())
        return "\n".join([*lines, f"{summary} of {self.images:,} images"])

    def write_csv(self, path: Path) -> None:
        """The table as CSV, unrounded and without the last line; empty where a figure is NaN."""
        rows = [["" if value != value else value for value in row] for row in self._rows()]
        files.replace_csv(path, ["class", "IoU", "Acc", "share"], rows)

    def _figures(self) -> dict[str, np.ndarray]:
        figures = IoUMetric.total_area_to_metrics(*self.counts.double(), metrics=["mIoU"])
        return {name: 100 * values for name, values in figures.items()}

    def _rows(self) -> list[tuple[str, float, float, float]]:
        figures, labelled = self.per_class(), self.counts[3].double()
        share = 100 * labelled / labelled.sum()
        return list(zip(self.class_names, *map(np.ndarray.tolist, figures.values()), share.tolist(), strict=True))
