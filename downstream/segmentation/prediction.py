"""Label maps of new pictures: a segmenter with its windows and views, and PNG files that show its classes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor

from downstream.segmentation.evaluation import mirror_whole, stride_of
from downstream.segmentation.inference import predict_labels, slide_logits, view_scores
from downstream.segmentation.model import SavedSegmenter, TokenSegmenter
from downstream.segmentation.view import TokenAdaptMirror
from seitpp import files, plots
from seitpp.engine.inputs import check_codebook, open_tokenadapt
from seitpp.engine.waiting import progress
from seitpp.images.annotated import SHORT_SIDE
from seitpp.images.decode import RGB, ImageError, Reading, Sample, decode_image, fit_short_side
from seitpp.images.sources import ImageSource
from seitpp.images.walk import SUFFIXES
from seitpp.tokenizers import Tokenizer

LEGEND_ROWS = 25  # classes in a column of the legend


@dataclass(frozen=True)
class Predictor:
    """Predicts the class of every pixel from token ids, see `open_predictor`.

    `window` and `stride` are in tokens. `mirror` mirrors the map of an image, for flip testing.
    """

    model: TokenSegmenter
    codebook: Float[Tensor, "codes dim"]
    pixels_per_token: int
    window: int
    stride: int
    class_names: list[str]
    lookup: str
    scales: tuple[float, ...] = (1.0,)
    mirror: Callable[[Tensor], Tensor] | None = None

    def __call__(
        self, ids: Integer[Tensor, "batch height width"], size: tuple[int, int]
    ) -> UInt8[Tensor, "batch {size[0]} {size[1]}"]:
        """Return the most likely class of every pixel of images of `size` (height, width)."""
        windows = {"window": self.window, "stride": self.stride, "pixels_per_token": self.pixels_per_token}
        if self.scales == (1.0,) and self.mirror is None:
            scores = slide_logits(self.model, self.model.backbone.from_ids(ids, self.codebook), **windows)
        else:
            views = {"scales": self.scales, "mirror": self.mirror, "lookup": self.lookup}
            scores = view_scores(self.model, ids, self.codebook, **windows, **views)
        return predict_labels(scores, size)


def open_predictor(
    saved: SavedSegmenter,
    codebook: Float[np.ndarray, "codes dim"],
    *,
    lookup: str,
    names: tuple[str, str],
    device: torch.device,
    window: int | None = None,
    stride: int | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: str | None = None,
) -> Predictor:
    """Put a segmenter on `device`, for ids of `codebook`, float32.

    `names` are those of the segmenter and of what the ids come from, for messages. `window` and `stride` are in
    tokens (None: the training crop, and two thirds of the window). With several `scales`, and with `flip`, a
    TokenAdapt's run or file, the views are averaged. Raises UserError if segmenter or TokenAdapt were trained on
    another codebook.
    """
    checkpoint, source = names
    if saved.codebook:
        check_codebook(codebook, source=source, expected=saved.codebook, checkpoint=checkpoint)
    window, mirror, vectors = window or saved.window[0], None, torch.from_numpy(codebook).to(device)
    if flip:
        boxes = TokenAdaptMirror(vectors, window, open_tokenadapt(flip, codebook, source)).to(device)
        mirror = mirror_whole(boxes, codebook=vectors, window=window, lookup=lookup)
    return Predictor(
        model=saved.model.to(device),
        codebook=vectors,
        pixels_per_token=saved.pixels_per_token,
        window=window,
        stride=stride_of(window, stride),
        class_names=saved.class_names,
        lookup=lookup,
        scales=scales,
        mirror=mirror,
    )


@torch.no_grad()
def predict_picture(
    predictor: Predictor, sample: Sample, *, tokenizer: Tokenizer, short_side: int, reading: Reading = RGB
) -> UInt8[np.ndarray, "height width"]:
    """Return the class of every pixel of an encoded image at its own size, as a viewer shows it.

    The image is tokenized at `short_side` pixels on its short side, a multiple of `tokenizer.side_multiple`.
    Raises ImageError if it cannot be read.
    """
    sizes: list[tuple[int, int]] = []

    def resized(size: tuple[int, int]) -> tuple[int, int]:
        sizes.append(size)  # decoding alone knows how the image is turned
        return fit_short_side(size, short_side, tokenizer.side_multiple)

    pixels = (
        torch.from_numpy(decode_image(sample, resized, reading=reading)).unsqueeze(0).to(predictor.codebook.device)
    )
    with tokenizer.at_size(tuple(pixels.shape[2:])):
        ids = tokenizer.encode(pixels.float() / 255)
    return predictor(ids, sizes[0])[0].cpu().numpy()


def write_label_maps(
    predictor: Predictor,
    pictures: ImageSource,
    out: Path,
    *,
    tokenizer: Tokenizer,
    short_side: int = SHORT_SIDE,
    reading: Reading = RGB,
    skip_errors: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> list[str]:
    """Write the label map of every `ranks`-th picture, from number `rank` on, to out/labels/NAME.png.

    A label map is a PNG with a palette, at the picture's own size, whose value v is class v. Folders in the
    name of a picture stay. The first process also writes out/legend.png and out/classes.txt, a name a line.
    Returns a line for each picture that cannot be read, or whose label map exists already; raises ImageError
    for the first of them unless `skip_errors`.
    """
    palette = (plots.class_colors(len(predictor.class_names)) * 255).round().byte().numpy()
    if rank == 0:
        files.make_folder(out)
        files.replace_text(out / "classes.txt", "".join(f"{name}\n" for name in predictor.class_names))
        files.replace_file(out / "legend.png", partial(_draw_legend, predictor.class_names, palette))
    errors = []
    for index in progress(range(rank, len(pictures), ranks), "label maps", "picture"):
        try:
            sample = pictures.read(index)
            labels = predict_picture(
                predictor, sample, tokenizer=tokenizer, short_side=short_side, reading=reading
            )
            _write_map(out / "labels" / label_name(sample.name), labels, palette=palette, picture=sample.name)
        except ImageError as error:
            if not skip_errors:
                raise
            errors.append(str(error))
    return errors


def label_name(picture: str) -> PurePosixPath:
    """Return the relative path of a picture's label map: a known suffix is replaced, folders above are dropped."""
    path = PurePosixPath(*(part for part in PurePosixPath(picture).parts if part not in ("/", "..")))
    stem = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    return stem.with_name(f"{stem.name}.png")


def _write_map(path: Path, labels: np.ndarray, *, palette: np.ndarray, picture: str) -> None:
    image = Image.fromarray(labels)
    image.putpalette(palette.tobytes())
    files.make_folder(path.parent)
    if path.exists():
        raise ImageError(
            f"{picture}: {path} exists already, of a picture of the same name or of an earlier run; rename one or "
            "choose another folder"
        )
    with files.new_file(path) as file:
        image.save(file, "PNG")


def _draw_legend(names: list[str], palette: np.ndarray, path: Path) -> None:
    """Draw a square of each class's color with its number, which is readable in every script, and its name."""
    columns = -(-len(names) // LEGEND_ROWS)
    figure, axis = plt.subplots(figsize=(3 * columns, 0.25 * min(len(names), LEGEND_ROWS) + 0.2))
    for number, name in enumerate(names):
        column, row = divmod(number, LEGEND_ROWS)
        axis.add_patch(plt.Rectangle((column, -row), 0.06, 0.8, color=palette[number] / 255))
        axis.text(column + 0.08, 0.4 - row, f"{number} {name[:30]}", va="center", fontsize=8, parse_math=False)
    axis.set(xlim=(0, columns), ylim=(-min(len(names), LEGEND_ROWS) + 0.9, 1))
    axis.axis("off")
    with warnings.catch_warnings():  # of a name in a script that the font does not have
        warnings.simplefilter("ignore")
        figure.savefig(path, format="png", dpi=100, bbox_inches="tight")
    plt.close(figure)
