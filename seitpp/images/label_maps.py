"""Label maps of ReLabel (arXiv 2101.05022): the classes of each place of an image, pooled over a crop of it."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import roi_align

from seitpp.images.decode import Box, ImageError
from seitpp.tensors import load_checkpoint

MOST = 2, 16, 32, 32  # of the shape of a map: pooling takes memory for each class and cell


class LabelMaps:
    """The label maps in a folder, with classes below `num_classes`.

    That of the image CLASS/NAME.JPEG is CLASS/NAME.pt, a file of `torch.save` with one tensor (2, k, rows,
    columns): the k largest scores of each cell of the image, then their classes (ReLabel: k = 5, 15 x 15 cells).
    """

    def __init__(self, folder: str | Path, num_classes: int):
        self.folder, self.num_classes = Path(folder), num_classes
        if not self.folder.is_dir():
            raise ImageError(f"{folder}: no such folder of label maps; check the path")

    def label(self, name: str, box: Box, size: tuple[int, int]) -> int:
        """Return the class of the box of the image `name`, whose (height, width) is `size`; see `pooled_class`.

        Raises ImageError if the image has no map, or a map of another form.
        """
        path = self.folder / Path(name).with_suffix(".pt")
        inside = path.is_relative_to(self.folder) and ".." not in Path(name).parts
        if not inside or not path.is_file():
            raise ImageError(f"{name}: no label map {path}; name the folder that has CLASS/NAME.pt")
        return pooled_class(self._checked(load_checkpoint(path, ImageError), path), box, size)

    def _checked(self, found: object, path: Path) -> Tensor:
        shape = tuple(found.shape) if torch.is_tensor(found) else ()
        fits = len(shape) == 4 and all(1 <= n <= most for n, most in zip(shape, MOST, strict=True))
        if not fits or shape[0] != 2:
            got = shape if torch.is_tensor(found) else type(found).__name__
            raise ImageError(
                f"{path}: got {got}, expected a tensor (2, k, rows, columns) of scores and classes, at most {MOST}"
            )
        values = found.float()
        scores, classes = values
        if not scores.isfinite().all() or not ((classes >= 0) & (classes == classes.trunc())).all():
            raise ImageError(f"{path}: scores that are not finite, or classes that are no numbers; copy it again")
        if classes.max() >= self.num_classes:
            raise ImageError(
                f"{path}: class {classes.max():.0f}, expected below {self.num_classes}, the number of classes: "
                "name all classes of the maps in their order with --classes"
            )
        return values


def pooled_class(label_map: Float[Tensor, "2 k rows columns"], box: Box, size: tuple[int, int]) -> int:
    """Return the class with the largest mean score in a box of an image of `size` (height, width).

    The scores of each class, 0 in the cells that do not list it, are pooled by RoIAlign into one cell: the mean of
    bilinear samples, at most one cell apart. Of equal classes it is the first.
    """
    scores, classes = label_map[0], label_map[1].long()
    found, channels = classes.unique(return_inverse=True)
    maps = scores.new_zeros(len(found), *scores.shape[1:]).scatter_(0, channels, scores)
    down, across = (cells / side for cells, side in zip(scores.shape[1:], size, strict=True))
    top, left, height, width = box
    corners = [0, left * across, top * down, (left + width) * across, (top + height) * down]
    pooled = roi_align(maps[None], torch.tensor([corners]), output_size=(1, 1), aligned=True)
    return int(found[pooled.flatten().argmax()])
