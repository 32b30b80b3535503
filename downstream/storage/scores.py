"""A score for each training image, by which a part of them is kept."""

from pathlib import Path
from typing import Literal

import numpy as np

from seitpp import files
from seitpp.errors import UserError


def write_scores(path: Path, scores: np.ndarray) -> None:
    """Write scores (N,), one a line."""
    files.replace_text(path, "".join(f"{score:.6f}\n" for score in scores.tolist()))


def read_scores(path: Path, images: int) -> np.ndarray:
    """Read a file with one finite number a line, for each of the training images in their order -> (N,) float64.

    Raises UserError for any other file.
    """
    expected = f"expected {images:,} lines with one number each, in the order of the training images"
    try:
        scores = np.array([float(line) for line in path.read_text().splitlines()])
    except (OSError, ValueError) as error:
        raise UserError(f"--scores {path}: {expected} ({error})") from error
    if len(scores) != images or not np.isfinite(scores).all():
        raise UserError(
            f"--scores {path}: got {len(scores):,} lines, {np.isfinite(scores).sum():,} of them finite: {expected}"
        )
    return scores


def best(scores: np.ndarray, fraction: float, end: Literal["high", "low"]) -> np.ndarray:
    """Return the increasing indices (n,) int64 of the fraction of the images with the highest or lowest scores.

    Of equal scores, those of the first images count as better.
    """
    order = np.argsort(-scores if end == "high" else scores, kind="stable")
    return np.sort(order[: max(1, round(fraction * len(scores)))])
