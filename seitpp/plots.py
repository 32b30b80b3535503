"""Pictures of a run: loss curves, reconstructions, and the same for its report."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from math import log
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from PIL import Image
from torch import Tensor

from seitpp import files, tokenizers
from seitpp.augment import EvalView, Keys
from seitpp.books import Books
from seitpp.codebook import Codebook
from seitpp.engine.confusion import Confusions
from seitpp.engine.report import DPI, Picture, Shown, Table, plot
from seitpp.fonts import drawn_names
from seitpp.models import MTM, MaskPlan
from seitpp.models.masking import fill_hidden, hidden_tokens
from seitpp.objectives import mask_plan
from seitpp.store import TokenStore
from seitpp.store.layout import entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

matplotlib.use("Agg")

PLOT = 5.2, 3.2  # inches of a plot: so narrow that its letters can be read on a phone
PANEL = 1.9  # inches of height of one of several panels
PAINTED_PIXELS = 8  # side of a token whose code is drawn as a color
GRAY = 0.5
IGNORED = 255  # label of pixels that are not evaluated
GOLDEN_SECTION, FIRST_HUE = 0.618034, 0.58
VERDICTS = ((0.88, 0.88, 0.88), (0.8, 0.1, 0.1), (0.0, 0.0, 0.0))  # colors of a correct, wrong, ignored pixel
SEGMENTED_SIDE = 2.0  # inches of a segmented image
SHOWN_PIXELS = 256  # the most on the longer side of an image in a report; smaller ones stay as they are
CRISP_PIXELS = 96  # of the longer side of an image: up to here pixels are drawn as squares
GAP = 0.04  # between the images of a row, of their width
LOG_SPAN = 30  # ratio of the largest to the smallest value above which an axis is logarithmic
LEVEL_STYLES = (":", "--", "-.", "-")  # of horizontal lines
RATIO_BINS = 20  # bins of mask ratios from 0 to 1
PROBES = {"linear_probe_top1": "linear probe", "knn_top1": "k-NN"}
HELD_OUT = {"masked_loss_train": "training images", "masked_loss_validation": "held-out images"}
# The image files of a report, each with its heading and caption.
REPORT = {
    "loss.png": (
        "Loss",
        "The loss of every update, and the levels of a uniform guess and of one from how often each code occurs.",
    ),
    "loss_by_ratio.png": ("Loss by mask ratio", "In one update, all images have the same mask ratio."),
    "held_out.png": (
        "Training and held-out images",
        "The loss of images of both sets with half of their patches hidden. A growing gap is overfitting.",
    ),
    "probes.png": ("Frozen encoder", "Step 0 is the untrained encoder."),
    "reconstructions.png": (
        "Validation images",
        "Gray tokens are hidden from the model; in the last row they are its most likely codes.",
    ),
}


def picture_decoder(
    tokenizer: str | Path | None, books: Books, *, kind: str | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a function that maps ids (B, H, W) to images (B, C, height, width) in [0, 1].

    It decodes with the tokenizer at the path `tokenizer`, of the `kind` if the path does not show it, or is
    `paint_codes` if that is None. Raises TokenizerError for a tokenizer that cannot decode.
    """
    if tokenizer:
        loaded = tokenizers.load(tokenizer, kind)
        zeros = torch.zeros(1, *loaded.books.planes, *loaded.spec.grid, dtype=torch.long)
        loaded.decode(zeros)  # fails here, not after hours
        return loaded.decode
    return partial(paint_codes, books=books)


def paint_codes(ids: Tensor, books: Codebook | Books) -> Tensor:
    """Draw each id (B, H, W) as 8 x 8 pixels in the color of its code: images (B, 3, 8 H, 8 W) in [0, 1].

    The color comes from the first three principal components of the codebook (K, D), so that similar codes have
    similar colors; that of a token of several digits (B, Q, H, W) is the mean over its tables. A Codebook is on
    the device of the ids. For stores whose tokenizer is not available, and tokenizers that cannot decode.
    """
    codebook = Codebook.of(books)
    planes = [codebook.joined(ids)] if codebook.combine == "index" else ids.long().unbind(dim=1)
    colors = sum(_code_colors(table)[plane] for table, plane in zip(codebook.tables, planes, strict=True))
    colors = (colors / len(planes)).permute(0, 3, 1, 2)
    return F.interpolate(colors, scale_factor=PAINTED_PIXELS, mode="nearest")


def _code_colors(table: Tensor) -> Tensor:
    """The color (3,) in [0, 1] of each row of a table (K, D)."""
    table = table.float()
    centered = table - table.mean(dim=0)
    _, _, components = torch.linalg.svd(centered, full_matrices=False)
    values = F.pad(centered @ components[:3].T, (0, 3 - min(3, len(components))))
    return values.argsort(dim=0).argsort(dim=0).float() / max(1, len(values) - 1)


def gray_out(images: Tensor, hidden: Tensor) -> Tensor:
    """Paint the hidden tokens (B, H, W) bool of images (B, 3, height, width) gray."""
    mask = F.interpolate(hidden.float().unsqueeze(1), images.shape[-2:], mode="nearest") > 0
    return torch.where(mask, GRAY, images)


@torch.no_grad()
def reconstructions(
    model: MTM,
    validation: TokenStore,
    *,
    grid: tuple[int, int],
    seed: int,
    decode: Callable[[torch.Tensor], torch.Tensor],
    originals: torch.Tensor | None,
    shown: int = 8,
) -> dict[str, torch.Tensor]:
    """Reconstruct `shown` validation images, evenly spread, with half of their patches hidden from the model.

    Returns rows of images (n, 3, height, width) by name; `decode` maps ids to images, and `originals` are shown
    beside them.
    """
    device = model.mask_token.device
    indices = torch.linspace(0, len(validation) - 1, min(shown, len(validation))).round().long()
    ids = EvalView(grid)(torch.from_numpy(validation.ids(indices.numpy()))).to(device)
    patches = model.encoder.patch_embed.num_patches
    noise = Keys(seed, 0, indices.to(device)).uniform("report", patches)
    plan = mask_plan(noise, patches // 2, patches // 2)
    # One image at a time: with 65,536 codes, the logits of one image take 200 MB.
    images = [(ids[i : i + 1], MaskPlan(*(part[i : i + 1] for part in plan))) for i in range(len(ids))]
    filled = torch.cat([fill_hidden(model(*image), *image, sizes=model.sizes) for image in images]).cpu()
    tokens = decode(ids.cpu())
    rows = {} if originals is None else {"original": originals[indices]}
    return rows | {
        "decoded tokens": tokens,
        "masked input": gray_out(tokens, hidden_tokens(plan, grid).cpu()),
        "reconstruction": decode(filled),
    }


def paint_classes(labels: Tensor, colors: Tensor) -> Tensor:
    """Color labels (height, width) of any integer dtype by their row of `colors` (classes, 3); 255 becomes black.

    Returns an image (3, height, width).
    """
    ignored = labels == IGNORED
    return colors[labels.long().masked_fill(ignored, 0)].masked_fill(ignored.unsqueeze(2), 0.0).permute(2, 0, 1)


def paint_errors(predictions: Tensor, labels: Tensor) -> Tensor:
    """Color pixels (height, width) light where correct, red where wrong, and black where the label is 255.

    Returns an image (3, height, width).
    """
    verdicts = torch.where(labels == IGNORED, 2, (predictions != labels).long())
    return torch.tensor(VERDICTS)[verdicts].permute(2, 0, 1)


def class_colors(classes: int) -> Tensor:
    """Return distinct RGB colors (classes, 3) in [0, 1].

    Hues are a golden section apart and alternate between three saturations and values, so that classes with
    consecutive numbers look different.
    """
    labels = np.arange(classes)
    saturation_value = np.array([(0.75, 0.85), (0.45, 0.95), (0.9, 0.55)])[labels % 3]
    hues = ((FIRST_HUE + labels * GOLDEN_SECTION) % 1)[:, None]
    return torch.from_numpy(hsv_to_rgb(np.concatenate([hues, saturation_value], axis=1))).float()


def picture_grid(rows: Mapping[str, Sequence[Tensor]], path: Path, side: float = 1.3) -> None:
    """Draw each entry of `rows`, images (C, height, width) in [0, 1], as one row with its name on the left.

    Each image is `side` inches wide. Of more than three channels the first three are drawn, of fewer the first.
    """
    columns = max(len(images) for images in rows.values())
    size = side * columns + 1.5, (side + 0.05) * len(rows)
    figure, axes = _subplots(len(rows), columns, figsize=size, squeeze=False)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(_rgb(image).permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    _save(figure, path)


def loss_curve(records: Sequence[dict], counts: Sequence[np.ndarray], path: Path) -> None:
    """Plot the loss of every update, its running mean, and the losses of two guesses.

    A uniform guess has ln K, one from the `counts` (K,) of the codes has their entropy; with several digits, both
    are means over these.
    """
    steps, losses = (np.array([record[name] for record in records]) for name in ("step", "loss"))
    window = max(1, len(losses) // 50)
    figure, axis = _subplots(figsize=PLOT)
    axis.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8, label="every update")
    if 1 < window <= len(losses):
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axis.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} updates")
    uniform = "uniform guess, ln " + " and ".join(str(size) for size in dict.fromkeys(map(len, counts)))
    axis.axhline(mean(log(len(digit)) for digit in counts), color="gray", linestyle=":", label=uniform)
    level = log(2) * mean(map(entropy, counts))
    axis.axhline(level, color="gray", linestyle="--", label="guess from code frequencies")
    axis.set(xlabel="step", ylabel="loss (nats per hidden token)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def loss_by_ratio(records: Sequence[dict], path: Path) -> None:
    """Plot the loss of the last third of the updates over their `mask_ratio`, and its mean in bins."""
    records = records[2 * len(records) // 3 :]
    ratios, losses = (np.array([record[name] for record in records]) for name in ("mask_ratio", "loss"))
    bins = (ratios * RATIO_BINS).astype(int)
    counts = np.bincount(bins)
    filled = counts > 0
    means = [np.bincount(bins, weights=values)[filled] / counts[filled] for values in (ratios, losses)]
    figure, axis = _subplots(figsize=PLOT)
    axis.plot(ratios, losses, ".", color="C0", alpha=0.25, markersize=3, label="updates of the last third")
    axis.plot(*means, "o-", color="C0", label=f"mean in bins of {1 / RATIO_BINS:.2f}")
    axis.set(xlabel="mask ratio", ylabel="loss (nats per hidden token)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def probe_curve(evaluations: Sequence[dict], result: dict, *, steps: int, path: Path) -> None:
    """Plot linear probe and k-NN accuracy of the encoder: untrained, during training, and after `steps` steps.

    `evaluations` has the accuracies during training; `result` those before and after.
    """
    figure, axis = _subplots(figsize=PLOT)
    for name, label in PROBES.items():
        points = {0: result[f"{name}_untrained"]} | {scores["step"]: scores[name] for scores in evaluations}
        points[steps] = result[name]
        axis.plot(points.keys(), points.values(), "o-", label=label)
    axis.set(xlabel="step", ylabel="top-1 accuracy (%)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def held_out_curve(evaluations: Sequence[dict], result: dict, *, steps: int, path: Path) -> None:
    """Plot the losses of training and held-out images during training, and of the `result` after `steps` steps."""
    figure, axis = _subplots(figsize=PLOT)
    for name, label in HELD_OUT.items():
        points = {scores["step"]: scores[name] for scores in evaluations if name in scores} | {steps: result[name]}
        axis.plot(points.keys(), points.values(), "o-", label=label)
    axis.set(xlabel="step", ylabel="loss (nats per hidden token)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def curves(records: Sequence[dict], names: Sequence[str], path: Path) -> None:
    """Plot each named value over the steps, one below the other; logarithmic if it spans a factor above 30."""
    size = PLOT[0], PANEL * len(names) + 0.4
    figure, axes = _subplots(len(names), 1, figsize=size, squeeze=False, sharex=True)
    steps = [record["step"] for record in records]
    for axis, name in zip(axes[:, 0], names, strict=True):
        values = [record[name] for record in records]
        axis.plot(steps, values, color="C0", linewidth=0.8, marker="." if len(values) < 50 else None)
        wide = 0 < LOG_SPAN * min(values) < max(values)
        axis.set(title=name, yscale="log" if wide else "linear")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("step")
    _save(figure, path)


def training_curves(
    out: Path, *, records: Sequence[dict], names: Sequence[str], evaluations: Sequence[dict], scores: Sequence[str]
) -> list[Shown]:
    """Plot `names` of every update to curves.png, and `scores` of every evaluation to validation.png.

    Both are returned for a report.
    """
    curves(records, names, out / "curves.png")
    curves(evaluations, scores, out / "validation.png")
    return [
        plot(out / "curves.png", "Training", f"Of every update: {', '.join(names)}."),
        plot(out / "validation.png", "Held-out images", f"Of every evaluation: {', '.join(scores)}, in percent."),
    ]


def confusion(found: Confusions, class_names: Sequence[str], path: Path) -> None:
    """Draw how often each class is taken for each, as fractions of the label's images.

    Of more than 50 classes, those with most wrong images are drawn. A name that no installed font can draw is
    replaced by the number of its class.
    """
    shown = found.most_confused()
    texts, families = drawn_names([class_names[number] for number in shown], shown.tolist())
    side = 3.5 + 0.22 * len(shown)
    figure, axis = _subplots(figsize=(side + 1, side))
    image = axis.imshow(found.fractions(shown), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axis.set(xlabel="predicted", ylabel="label")
    if len(shown) < found.num_classes:
        axis.set_title(f"the {len(shown)} of {found.num_classes:,} classes with most wrong images")
    as_written = {"family": families, "parse_math": False}
    axis.set_xticks(range(len(shown)), texts, rotation=90, **as_written)
    axis.set_yticks(range(len(shown)), texts, **as_written)
    figure.colorbar(image, label="fraction of the label's images", fraction=0.046)
    _save(figure, path)


def accuracy_matrix(accuracies: Sequence[Sequence[float]], path: Path) -> None:
    """Draw the accuracies in percent of continual learning: row t has those on the tasks 0 .. t after task t."""
    tasks = len(accuracies)
    values = np.full((tasks, tasks), np.nan)
    for row, known in zip(values, accuracies, strict=True):
        row[: len(known)] = known
    side = 2.2 + 0.55 * tasks
    figure, axis = _subplots(figsize=(side + 1, side))
    image = axis.imshow(values, vmin=0, vmax=100, cmap="Blues", interpolation="nearest")
    for (after, task), value in np.ndenumerate(values):
        if not np.isnan(value):
            axis.text(task, after, f"{value:.0f}", ha="center", va="center", color="w" if value > 60 else "k")
    numbers = range(1, tasks + 1)
    axis.set_xticks(range(tasks), numbers)
    axis.set_yticks(range(tasks), numbers)
    axis.set(xlabel="accuracy on task", ylabel="after task")
    axis.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, label="top-1 accuracy (%)", fraction=0.046)
    _save(figure, path)


def accuracy_over_memory(
    lines: Mapping[str, Mapping[int, Sequence[float]]], levels: Mapping[str, Sequence[float]], path: Path
) -> None:
    """Plot accuracies in percent over the bytes of a memory.

    `lines` maps names to the accuracies of the runs with a memory of so many bytes: a point is their mean, a bar
    their standard deviation. `levels` maps names to the accuracies of runs without memory: horizontal lines.
    """
    figure, axis = _subplots(figsize=(PLOT[0], 4.2))
    for name, points in lines.items():
        sizes, values = zip(*sorted(points.items()), strict=True)
        bars = [np.std(runs, ddof=1) if len(runs) > 1 else 0.0 for runs in values]
        axis.errorbar(sizes, list(map(np.mean, values)), bars, fmt="o-", capsize=3, label=name)
    for number, (name, values) in enumerate(levels.items()):
        axis.axhline(np.mean(values), color="gray", linestyle=LEVEL_STYLES[number % len(LEVEL_STYLES)], label=name)
    axis.set(xlabel="memory", ylabel="average accuracy (%)", xscale="log", ylim=(0, 100))
    axis.minorticks_off()
    axis.set_xticks(sorted({size for points in lines.values() for size in points}))
    axis.xaxis.set_major_formatter(EngFormatter("B"))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18))
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def tradeoff(families: Mapping[str, Sequence[tuple[float, float, float, bool]]], path: Path) -> None:
    """Plot accuracy over stored bytes, on a logarithmic axis, with one line a family: its Pareto front.

    The points of a family are (bytes, mean, standard deviation, whether it is on the front); the others are pale.
    """
    figure, axis = _subplots(figsize=(PLOT[0], 6))
    markers = "os^vD<>Ph*X"
    for number, (family, points) in enumerate(families.items()):
        look = {"color": f"C{number % 10}", "marker": markers[number % len(markers)]}
        front = sorted(point[:3] for point in points if point[3])
        sizes, means, deviations = zip(*front, strict=True)
        axis.errorbar(sizes, means, deviations, **look, linewidth=1, capsize=2, label=family)
        beaten = [point for point in points if not point[3]]
        axis.errorbar(
            [point[0] for point in beaten],
            [point[1] for point in beaten],
            [point[2] for point in beaten],
            **look,
            linestyle="",
            alpha=0.35,
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="size of the stored training set", ylabel="top-1 accuracy (%)")
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(-0.1, -0.14), ncols=2, fontsize=9)
    _save(figure, path)


def shown_rows(rows: Mapping[str, Sequence[Tensor]], path: Path, heading: str, *, text: str) -> Shown:
    """Return the rows of `picture_grid` for a report: each row of images is a picture of its own."""
    pictures = []
    for name, images in rows.items():
        number = f"{len(images)} images" if len(images) > 1 else "1 image"
        side = max(max(image.shape[1:]) for image in images)
        alt, crisp = f"{name}: {number} side by side", side <= CRISP_PIXELS
        pictures.append(Picture(_side_by_side(images), alt, name, crisp=crisp))
    return Shown(heading, text, pictures, path.name)


def _side_by_side(images: Sequence[Tensor]) -> bytes:
    """Return images (C, height, width) in [0, 1] in one row as a PNG, each in a transparent cell of equal size."""
    drawn = []
    for image in images:
        pixels = (_rgb(image).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
        drawn.append(Image.fromarray(pixels))
        drawn[-1].thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    width, height = (max(image.size[axis] for image in drawn) for axis in (0, 1))
    step = width + max(1, round(GAP * width))
    row = Image.new("RGBA", (step * len(drawn), height))
    for number, image in enumerate(drawn):
        row.paste(image, (step * number + (width - image.width) // 2, (height - image.height) // 2))
    png = BytesIO()
    row.save(png, "PNG", optimize=True)
    return png.getvalue()


def _rgb(image: Tensor) -> Tensor:
    """Return the first three channels of an image, or its first as gray where it has fewer."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def pretraining_plots(
    folder: Path,
    *,
    result: dict,
    records: Sequence[dict],
    evaluations: Sequence[dict],
    counts: Sequence[np.ndarray],
    pictures: dict[str, Tensor],
) -> list[Shown]:
    """Draw the images of `REPORT` into `folder` and return them for a report.

    `records` are the lines of metrics.jsonl, `evaluations` those of evaluations.jsonl, `counts` for each digit of
    a token how often each value occurs, and `pictures` the rows of `reconstructions`. Without probes, their curve
    is left out.
    """
    steps, shown = records[-1]["step"], dict(REPORT)
    loss_curve(records, counts, folder / "loss.png")
    loss_by_ratio(records, folder / "loss_by_ratio.png")
    held_out_curve(evaluations, result, steps=steps, path=folder / "held_out.png")
    if result.keys() >= PROBES.keys():
        probe_curve(evaluations, result, steps=steps, path=folder / "probes.png")
    else:
        del shown["probes.png"]
    picture_grid(pictures, folder / "reconstructions.png")
    heading, text = shown.pop("reconstructions.png")
    return [
        *(plot(folder / name, *said) for name, said in shown.items()),
        shown_rows(pictures, folder / "reconstructions.png", heading, text=text),
    ]


def segmented_pictures(folder: Path, pictures: Mapping[str, Sequence[Tensor]]) -> Shown:
    """Draw pictures.png into `folder` and return its rows for a report."""
    picture_grid(pictures, folder / "pictures.png", SEGMENTED_SIDE)
    return shown_rows(
        pictures,
        folder / "pictures.png",
        "Images",
        text="Red pixels are wrong; black ones have no label. The colors of the classes are in the table below.",
    )


def class_table(class_names: Sequence[str], per_class: Mapping[str, np.ndarray]) -> Table:
    """Return a table of the classes with their colors; `per_class` maps columns to percentages (classes,).

    NaN leaves a cell empty.
    """
    colors = [to_hex(color) for color in class_colors(len(class_names)).tolist()]
    rows = [
        [name, *(None if np.isnan(value) else float(value) for value in values)]
        for name, *values in zip(class_names, *per_class.values(), strict=True)
    ]
    return Table("Classes", ("class", *(f"{name} (%)" for name in per_class)), rows, colors)


def _subplots(*rows_and_columns: int, **options: Any) -> tuple["Figure", Any]:
    """Return a figure and its axes. To import pyplot takes half a second, which --help should not wait for."""
    from matplotlib import pyplot as plt

    return plt.subplots(*rows_and_columns, **options)


def _save(figure: "Figure", path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    files.replace_file(path, lambda temporary: figure.savefig(temporary, dpi=DPI, format="png"))
    plt.close(figure)
