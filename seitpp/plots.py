"""Pictures of a run: the loss, reconstructions, and one page that shows them."""

import html
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import log
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seitpp import files, tokenizers
from seitpp.augment import EvalView, Keys
from seitpp.models import MTM, MaskPlan
from seitpp.models.masking import fill_hidden, hidden_tokens
from seitpp.objectives import mask_plan
from seitpp.store import TokenStore

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import hsv_to_rgb, to_hex

PAINTED_PIXELS = 8  # side of a token that is painted, not decoded
GRAY = 0.5
IGNORED = 255  # the class of a pixel that counts nowhere
GOLDEN_SECTION, FIRST_HUE = 0.618034, 0.58
VERDICTS = ((0.88, 0.88, 0.88), (0.8, 0.1, 0.1), (0.0, 0.0, 0.0))  # a right pixel, a wrong one, one without label
SEGMENTED_SIDE = 2.0  # inches of a segmented image
LOG_SPAN = 30
NAMED_CLASSES = 50  # more names than these would be unreadable
RATIO_BINS = 20  # of mask ratios from 0 to 1
PROBES = {"linear_probe_top1": "linear probe", "knn_top1": "k-NN"}
# The pictures of a report, with their headings.
REPORT = {
    "loss.png": ("Loss", "Of every update, with the level of a uniform guess."),
    "loss_by_ratio.png": ("Loss by mask ratio", "An update hides the same share in all its images."),
    "probes.png": ("Frozen encoder", "Step 0 is the untrained one."),
    "reconstructions.png": (
        "Validation images",
        "Gray tokens are hidden from the model; the last row fills them with its most likely codes.",
    ),
}
SEGMENTATION_REPORT = {
    "pictures.png": (
        "Images",
        "Red pixels are wrong; black ones have no label. The colors of the classes are in the table below.",
    ),
}


def picture_decoder(tokenizer: str | Path | None, codebook: np.ndarray) -> Callable[[Tensor], Tensor]:
    """Ids (B, H, W) -> images (B, 3, h, w) in [0, 1]: by the tokenizer of this file, or, where none is named, each
    code in a color of its own.
    """
    if tokenizer:
        return tokenizers.load(tokenizer).decode
    return partial(paint_codes, codebook=torch.from_numpy(codebook))


def paint_codes(ids: Tensor, codebook: Tensor) -> Tensor:
    """Ids (B, H, W) -> images (B, 3, 8 H, 8 W) in [0, 1]: each code in a color from its first three principal
    components, so that codes near to each other look alike. For stores whose tokenizer is not at hand.
    """
    centerd = codebook - codebook.mean(dim=0)
    _, _, components = torch.linalg.svd(centerd, full_matrices=False)
    values = F.pad(centerd @ components[:3].T, (0, 3 - min(3, len(components))))
    ranks = values.argsort(dim=0).argsort(dim=0).float() / max(1, len(values) - 1)
    colors = ranks[ids].permute(0, 3, 1, 2)
    return F.interpolate(colors, scale_factor=PAINTED_PIXELS, mode="nearest")


def gray_out(images: Tensor, hidden: Tensor) -> Tensor:
    """Images (B, 3, h, w) with the hidden tokens (B, H, W) bool painted gray."""
    mask = F.interpolate(hidden.float().unsqueeze(1), images.shape[-2:], mode="nearest") > 0
    return torch.where(mask, GRAY, images)


@torch.no_grad()
def reconstructions(
    model: MTM,
    validation: TokenStore,
    grid: tuple[int, int],
    seed: int,
    decode: Callable[[torch.Tensor], torch.Tensor],
    originals: torch.Tensor | None,
    shown: int = 8,
) -> dict[str, torch.Tensor]:
    """Rows of pictures (n, 3, h, w) of the first validation images, half of each hidden from the model."""
    device = model.mask_token.device
    indices = torch.arange(min(shown, len(validation)))
    ids = EvalView(grid)(torch.from_numpy(validation.ids(indices.numpy()))).to(device)
    patches = model.encoder.patch_embed.num_patches
    noise = Keys(seed, 0, indices.to(device)).uniform("report", patches)
    plan = mask_plan(noise, patches // 2, patches // 2)
    # One image at a time: with 65,536 codes its logits take 200 MB.
    images = [(ids[at : at + 1], MaskPlan(*(part[at : at + 1] for part in plan))) for at in range(len(ids))]
    filled = torch.cat([fill_hidden(model(*image), *image) for image in images]).cpu()
    tokens = decode(ids.cpu())
    rows = {} if originals is None else {"original": originals[: len(ids)]}
    return rows | {
        "decoded tokens": tokens,
        "masked input": gray_out(tokens, hidden_tokens(plan, grid).cpu()),
        "reconstruction": decode(filled),
    }


def paint_classes(labels: Tensor, colors: Tensor) -> Tensor:
    """Classes (h, w) of any integer dtype -> image (3, h, w), each class in its row of `colors` (classes, 3), 255
    black.
    """
    black = labels == IGNORED
    return colors[labels.long().masked_fill(black, 0)].masked_fill(black.unsqueeze(2), 0.0).permute(2, 0, 1)


def paint_errors(predictions: Tensor, labels: Tensor) -> Tensor:
    """Classes (h, w) -> image (3, h, w): light where they agree, red where not, black where the label is 255."""
    wrong = torch.where(labels == IGNORED, 2, (predictions != labels).long())
    return torch.tensor(VERDICTS)[wrong].permute(2, 0, 1)


def class_colors(classes: int) -> Tensor:
    """(classes, 3) in [0, 1]: hues a golden section apart, in three strengths, so that neighbors differ."""
    number = np.arange(classes)
    strength = np.array([(0.75, 0.85), (0.45, 0.95), (0.9, 0.55)])[number % 3]
    hues = ((FIRST_HUE + number * GOLDEN_SECTION) % 1)[:, None]
    return torch.from_numpy(hsv_to_rgb(np.concatenate([hues, strength], axis=1))).float()


def picture_grid(rows: Mapping[str, Sequence[Tensor]], path: Path, side: float = 1.3) -> None:
    """Draw each entry, images (3, h, w) in [0, 1], as a row of pictures, `side` inches wide, with its name at the
    left.
    """
    columns = max(len(images) for images in rows.values())
    size = side * columns + 1.5, (side + 0.05) * len(rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    _save(figure, path)


def loss_curve(records: Sequence[dict], num_codes: int, path: Path) -> None:
    """Loss of every update, its running mean, and the level ln K of a uniform guess."""
    steps, losses = (np.array([record[name] for record in records]) for name in ("step", "loss"))
    window = max(1, len(losses) // 50)
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8, label="every update")
    if len(losses) >= window:
        mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axis.plot(steps[window - 1 :], mean, color="C0", label=f"mean of {window} updates")
    axis.axhline(log(num_codes), color="gray", linestyle=":", label=f"uniform guess, ln {num_codes}")
    axis.set(xlabel="step", ylabel="loss (nats a hidden token)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def loss_by_ratio(records: Sequence[dict], path: Path) -> None:
    """Loss of the last third of the updates against their `mask_ratio`, and means of it."""
    records = records[2 * len(records) // 3 :]
    ratios, losses = (np.array([record[name] for record in records]) for name in ("mask_ratio", "loss"))
    bins = (ratios * RATIO_BINS).astype(int)
    counts = np.bincount(bins)
    filled = counts > 0
    means = [np.bincount(bins, weights=values)[filled] / counts[filled] for values in (ratios, losses)]
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.plot(ratios, losses, ".", color="C0", alpha=0.25, markersize=3, label="an update of the last third")
    axis.plot(*means, "o-", color="C0", label=f"means over {1 / RATIO_BINS:.2f}")
    axis.set(xlabel="share of hidden patches", ylabel="loss (nats a hidden token)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def probe_curve(evaluations: Sequence[dict], result: dict, steps: int, path: Path) -> None:
    """Linear probe and k-NN of the encoder: untrained, in training (`evaluations`), and after its `steps`."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for name, label in PROBES.items():
        points = {0: result[f"{name}_untrained"]} | {at["step"]: at[name] for at in evaluations}
        points[steps] = result[name]
        axis.plot(points.keys(), points.values(), "o-", label=label)
    axis.set(xlabel="step", ylabel="top-1 of the frozen encoder (%)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def curves(records: Sequence[dict], names: Sequence[str], path: Path) -> None:
    """One panel for each named value over the steps; logarithmic where it spans more than a factor of 30."""
    figure, axes = plt.subplots(1, len(names), figsize=(3.5 * len(names), 3), squeeze=False)
    steps = [record["step"] for record in records]
    for axis, name in zip(axes[0], names, strict=True):
        values = [record[name] for record in records]
        axis.plot(steps, values, color="C0", linewidth=0.8, marker="." if len(values) < 50 else None)
        wide = 0 < LOG_SPAN * min(values) < max(values)
        axis.set(xlabel="step", title=name, yscale="log" if wide else "linear")
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def training_curves(
    out: Path, records: Sequence[dict], names: Sequence[str], evaluations: Sequence[dict], scores: Sequence[str]
) -> None:
    """curves.png, the values `names` of every update, and validation.png, the `scores` of every evaluation."""
    curves(records, names, out / "curves.png")
    curves(evaluations, scores, out / "validation.png")


def confusion(counts: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draw (classes, classes) counts, row = label, column = prediction, as shares of each row."""
    classes = len(class_names)
    shares = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(12.0, 3.5 + 0.22 * classes)
    figure, axis = plt.subplots(figsize=(side + 1, side))
    image = axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axis.set(xlabel="predicted", ylabel="label")
    if classes <= NAMED_CLASSES:
        axis.set_xticks(range(classes), class_names, rotation=90)
        axis.set_yticks(range(classes), class_names)
    figure.colorbar(image, label="share of the label's images", fraction=0.046)
    _save(figure, path)


def write_report(
    folder: Path,
    title: str,
    result: dict,
    records: Sequence[dict],
    evaluations: Sequence[dict],
    num_codes: int,
    pictures: dict[str, Tensor],
) -> None:
    """report.html in `folder`: the result as a table, and the pictures of `REPORT`.

    `records` are the lines of metrics.jsonl, `evaluations` those of evaluations.jsonl.
    """
    loss_curve(records, num_codes, folder / "loss.png")
    loss_by_ratio(records, folder / "loss_by_ratio.png")
    probe_curve(evaluations, result, records[-1]["step"], folder / "probes.png")
    picture_grid(pictures, folder / "reconstructions.png")
    _write_page(folder, title, result, REPORT)


def write_segmentation_report(
    folder: Path,
    result: dict,
    class_names: Sequence[str],
    per_class: Mapping[str, np.ndarray],
    pictures: Mapping[str, Sequence[Tensor]],
) -> None:
    """report.html in `folder`: the result, the pictures, and a table of the classes, which is their legend too.

    `per_class` has columns of numbers (classes,) in percent, NaN where there is none.
    """
    picture_grid(pictures, folder / "pictures.png", SEGMENTED_SIDE)
    colors = [to_hex(color) for color in class_colors(len(class_names)).tolist()]
    lines = [
        f'<tr><td><span style="color: {color}">&#9632;</span> {html.escape(name)}</td>'
        + "".join(f"<td>{'' if value != value else f'{value:.2f}'}</td>" for value in values)
        + "</tr>"
        for color, name, *values in zip(colors, class_names, *per_class.values(), strict=True)
    ]
    head = "".join(f"<td>{name}</td>" for name in per_class)
    table = "\n".join(["<h2>Classes</h2>\n<table>", f"<tr><td></td>{head}</tr>", *lines, "</table>"])
    _write_page(folder, "Semantic segmentation", result, SEGMENTATION_REPORT, table)


def _write_page(
    folder: Path, title: str, result: dict, pictures: dict[str, tuple[str, str]], rest: str = ""
) -> None:
    """report.html: the result as a table, `pictures` {file: (heading, text)}, and more HTML."""
    rows = "\n".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.4g}</td></tr>" for name, value in result.items()
    )
    sections = "\n".join(
        f'<h2>{heading}</h2>\n<p>{text}</p>\n<img src="{picture}" alt="{heading}">'
        for picture, (heading, text) in pictures.items()
    )
    files.replace_text(
        folder / "report.html",
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
td {{ padding: 0.1rem 1.5rem 0.1rem 0; }} td + td {{ text-align: right; font-variant-numeric: tabular-nums; }}
img {{ max-width: 100%; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<table>
{rows}
</table>
{sections}
{rest}
</body></html>
""",
    )


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    files.replace_file(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)
