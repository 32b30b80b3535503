"""Segmentation metrics from exact pixel counts: mmsegmentation's mIoU, pixel accuracy and class accuracy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Integer
from mmseg.evaluation.metrics import IoUMetric
from torch import Tensor

from downstream.segmentation.data import IGNORED
from seitpp import files


class SegmentationScore:
    """Accumulates pixel counts over many images.

    `counts` (4, classes) int64 are the pixels in the intersection, in the union, predicted and labeled, of each
    class; `images` is the number of images counted. The memory does not depend on the number of images.
    """

    def __init__(self, class_names: Sequence[str]):
        self.class_names = list(class_names)
        self.counts = torch.zeros(4, len(self.class_names), dtype=torch.int64)
        self.images = 0

    def add(
        self, predictions: Integer[Tensor, "*batch height width"], labels: Integer[Tensor, "*batch height width"]
    ) -> None:
        """Count the pixels of a batch or of one image; both tensors hold classes.

        Pixels with the label 255 are ignored.
        """
        self.images += len(labels) if labels.ndim == 3 else 1
        valid = labels != IGNORED
        predictions, labels = predictions[valid], labels[valid]
        intersection, predicted, labeled = (
            torch.bincount(classes.int(), minlength=len(self.class_names)).cpu()
            for classes in (predictions[predictions == labels], predictions, labels)
        )
        self.counts += torch.stack([intersection, predicted + labeled - intersection, predicted, labeled])

    def reduce(self, accelerator: Accelerator, images: int) -> None:
        """Sum the counts of all processes and assert that `images` images were counted, each by one process."""
        local = torch.cat([self.counts.flatten(), torch.tensor([self.images])]).to(accelerator.device)
        total = accelerator.reduce(local, reduction="sum").cpu()
        self.counts, self.images = total[:-1].view_as(self.counts), int(total[-1])
        assert self.images == images, f"{self.images} images were counted, not {images}"

    def per_class(self) -> dict[str, np.ndarray]:
        """Return `IoU` and `Acc` (classes,) in percent.

        IoU is NaN for a class that is neither labeled nor predicted; Acc is NaN for a class that is not labeled.
        """
        return {name: values for name, values in self._metrics().items() if name != "aAcc"}

    def summary(self) -> dict[str, float]:
        """Return `mIoU` and `mAcc`, the means over classes without NaN, and `aAcc` over all pixels; in percent."""
        metrics = self._metrics()
        return {
            "mIoU": float(np.nanmean(metrics["IoU"])),
            "aAcc": float(metrics["aAcc"]),
            "mAcc": float(np.nanmean(metrics["Acc"])),
        }

    def table(self) -> str:
        """Format a line per class (IoU, Acc and its fraction of the labeled pixels, in percent) and a summary."""
        width = max(5, *map(len, self.class_names))
        lines = [f"{'class':<{width}}     IoU     Acc   share"]
        lines += [f"{name:<{width}} {iou:7.2f} {acc:7.2f} {share:7.2f}" for name, iou, acc, share in self._rows()]
        summary = ", ".join(f"{name} {value:.2f}" for name, value in self.summary().items())
        return "\n".join([*lines, f"{summary} of {self.images:,} images"])

    def write_csv(self, path: Path) -> None:
        """Write the per-class rows as CSV, unrounded; NaN is written as an empty field."""
        rows = [["" if value != value else value for value in row] for row in self._rows()]
        files.replace_csv(path, ["class", "IoU", "Acc", "share"], rows)

    def _metrics(self) -> dict[str, np.ndarray]:
        metrics = IoUMetric.total_area_to_metrics(*self.counts.double(), metrics=["mIoU"])
        return {name: 100 * values for name, values in metrics.items()}

    def _rows(self) -> list[tuple[str, float, float, float]]:
        metrics, labeled = self.per_class(), self.counts[3].double()
        fractions = (100 * labeled / labeled.sum()).tolist()
        return list(zip(self.class_names, *map(np.ndarray.tolist, metrics.values()), fractions, strict=True))
