"""The page that a run leaves behind, report.html: what was done, what came out of it, and how to repeat it.

One file without scripts and without anything from elsewhere, for a reader on a phone or on a screen, in light or
dark. Every text that is not ours (names of files, classes, settings) is escaped.
"""

import base64
import platform
import struct
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seitpp.engine.config import Choice

DPI = 144  # of the pictures of a run
READABLE, COMFORTABLE = 70, 112  # CSS pixels for an inch of a plot: the fewest, and where there is room
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f3f5f7; --text: #1b1e23; --quiet: #59616b;
  --line: #d4d9df; --accent: #0a56a3; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181c; --panel: #20242a; --text: #e5e8ec; --quiet: #a4acb6; --line: #3a414a;
    --accent: #8dbcf2; }
}
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--ground); margin: 0;
  overflow-wrap: break-word; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
p { margin: 0.25rem 0 0.75rem; max-width: 44rem; }
.quiet, figcaption, dd small { color: var(--quiet); }
code, pre { font: 0.875rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
.words { border-left: 3px solid var(--accent); margin: 1.25rem 0; padding: 0.1rem 0 0.1rem 1rem;
  list-style: none; }
.words li { margin: 0.4rem 0; max-width: 44rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); gap: 0.6rem;
  margin: 1.25rem 0; }
.figures div { background: var(--panel); border-radius: 0.5rem; padding: 0.6rem 0.8rem; }
.figures dt { font: 0.8rem/1.4 ui-monospace, monospace; color: var(--quiet); overflow-wrap: anywhere; }
.figures dd { margin: 0; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figures small { display: block; font-size: 0.8rem; line-height: 1.4; margin-top: 0.15rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 0 2rem; }
figure { margin: 0.75rem 0 1.25rem; }
figcaption { font-size: 0.875rem; }
.scroll { overflow-x: auto; max-width: 100%; }
img { display: block; width: 100%; height: auto; }
.plot img { mix-blend-mode: multiply; }
@media (prefers-color-scheme: dark) {
  .plot img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
}
.row img { margin: 0 0 0.75rem; }
.crisp img { image-rendering: pixelated; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { color: var(--quiet); font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
td { max-width: 24rem; overflow-wrap: anywhere; min-width: 6rem; }
td.number { min-width: 3rem; }
summary { cursor: pointer; color: var(--accent); margin: 0.75rem 0; }
.swatch { display: inline-block; width: 0.8rem; height: 0.8rem; border: 1px solid var(--line);
  margin-right: 0.5rem; }
pre { background: var(--panel); border-radius: 0.5rem; padding: 0.8rem 1rem; white-space: pre-wrap;
  margin: 0.5rem 0; user-select: all; }
"""
# What the figures of result.json are, and their unit.
MEANINGS = {
    "top1": ("images whose class is the likeliest one", "%"),
    "top5": ("images whose class is among the five likeliest", "%"),
    "balanced_accuracy": ("the mean of the accuracies of the classes", "%"),
    "mAP": ("average precision, the mean over the classes", "%"),
    "linear_probe_top1": ("images classified by a linear layer on the frozen encoder", "%"),
    "knn_top1": ("images classified by their neighbors in the frozen encoder", "%"),
    "masked_loss_train": ("loss of hidden tokens of training images, in nats", ""),
    "masked_loss_validation": ("loss of hidden tokens of held-out images, in nats", ""),
    "masked_accuracy_train": ("hidden tokens of training images that are predicted", "%"),
    "masked_accuracy_validation": ("hidden tokens of held-out images that are predicted", "%"),
    "loss": ("the last loss, in nats", ""),
    "accuracy_one_shot": ("hidden tokens predicted at once", "%"),
    "accuracy_iterative": ("hidden tokens predicted in rounds", "%"),
    "accuracy_one_code": ("hidden tokens that are the most frequent code", "%"),
    "mIoU": ("overlap of predicted and true regions, the mean over the classes", "%"),
    "aAcc": ("pixels of the right class", "%"),
    "mAcc": ("pixels of the right class, the mean over the classes", "%"),
    "codes_used": ("codes that held-out images use", ""),
    "perplexity": ("as many codes, equally often used, would say as much; of digits the product", ""),
    "psnr": ("decoded against original pixels", "dB"),
    "ssim": ("structural similarity of decoded and original images", ""),
    "variance_kept": ("fraction of the variance of the features that tokens keep", ""),
    "average_accuracy": ("the mean over the tasks after the last one", "%"),
    "forgetting": ("percentage points lost since a task was known best", ""),
    "backward_transfer": ("percentage points gained since a task was learned", ""),
    "memory_images": ("images that the memory holds", ""),
    "mean_top1": ("accuracy on corrupted images, the mean", "%"),
    "mCE": ("errors on corrupted images relative to AlexNet's, the mean", "%"),
}
SUFFIXES = {"_untrained": "before training", "_ema": "moving average of the weights"}


class Picture(NamedTuple):
    """A PNG, what it shows for who cannot see it, and its width: `inches` of a plot, None of a row of images."""

    png: bytes
    alt: str
    label: str = ""
    inches: float | None = None
    crisp: bool = False  # so small that its pixels are drawn as squares


class Shown(NamedTuple):
    """Pictures with a heading and a text; `file` in the folder of the run holds the same."""

    heading: str
    text: str
    pictures: Sequence[Picture]
    file: str


class Table(NamedTuple):
    """A table with a heading; `colors` are those of the rows, as #rrggbb. Empty cells are None."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    colors: Sequence[str] = ()
    text: str = ""


class Report(NamedTuple):
    """What a recipe says about its run; the run adds figures, settings and origin."""

    title: str
    findings: Sequence[str] = ()
    shown: Sequence[Shown] = ()
    tables: Sequence[Table] = ()


class Written(NamedTuple):
    """What a run knows about itself: parts of result.json, its settings with their reasons, and its command."""

    run: str  # recipe, preset and seed
    figures: Mapping[str, Any]
    data: Mapping[str, Any]
    origin: Mapping[str, Any]
    settings: Mapping[str, Choice]
    command: str


def plot(path: Path, heading: str, text: str) -> Shown:
    """Return a plot that lies in the folder of a run; `text` says what is drawn."""
    png = path.read_bytes()
    width = struct.unpack(">I", png[16:20])[0]
    return Shown(heading, text, [Picture(png, f"Plot: {text}", inches=width / DPI)], path.name)


def page(report: Report, written: Written) -> str:
    """Return the HTML of a report."""
    title = escape(report.title)
    facts = dict(written.data)
    facts = facts.pop("data", {}) | facts
    parts = [
        f"<h1>{title}</h1>\n<p class=quiet>{escape(written.run)}</p>",
        _figures(written.figures),
        _findings(report.findings),
        _all_shown(report.shown),
        *map(_table, report.tables),
        _table(Table("Data", ("what", "value"), _rows(facts))),
        _settings(written.settings),
        _command(written.command, written.origin.get("processes", 1)),
        _table(Table("Versions and duration", ("what", "value"), _rows({**written.origin, **versions()}))),
    ]
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def words(value: Any) -> str:
    """Write a value as a reader expects it: four digits of a fraction, lists and mappings without brackets."""
    if isinstance(value, bool | None):
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value))
    return str(value)


def _meaning(name: str) -> tuple[str, str]:
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    text, unit = MEANINGS.get(name.removesuffix(suffix), ("", ""))
    return (f"{text}; {SUFFIXES[suffix]}" if suffix and text else text), unit


def _figures(figures: Mapping[str, Any]) -> str:
    tiles = []
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        text, unit = _meaning(name)
        below = f"<small>{escape(text)}</small>" if text else ""
        number = f"{value:.2f}" if unit == "%" else words(value)
        tiles.append(f"<div><dt>{_text(name)}</dt><dd>{number} {unit}{below}</dd></div>".replace(" <", "<"))
    return "\n".join(["<dl class=figures>", *tiles, "</dl>"]) if tiles else ""


def _findings(findings: Sequence[str]) -> str:
    lines = [f"<li>{escape(sentence)}</li>" for sentence in findings]
    return "\n".join(["<ul class=words>", *lines, "</ul>"]) if lines else ""


def _all_shown(shown: Sequence[Shown]) -> str:
    """Show plots side by side where there is room, and rows of images below."""
    plots = [_shown(part) for part in shown if part.pictures[0].inches is not None]
    rows = [_shown(part) for part in shown if part.pictures[0].inches is None]
    return "\n".join([*(["<div class=plots>", *plots, "</div>"] if plots else []), *rows])


def _shown(shown: Shown) -> str:
    """Draw a plot in a box that scrolls where it would become too small to read, and rows of images one by one."""
    drawn = []
    for picture in shown.pictures:
        source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        image = f'<img src="{source}" alt="{escape(picture.alt)}"'
        if picture.inches is None:
            kind = "row crisp" if picture.crisp else "row"
            label = f"<figcaption>{escape(picture.label)}</figcaption>" if picture.label else ""
            drawn.append(f'<figure class="{kind}">{label}{image}></figure>')
        else:
            least, most = (round(picture.inches * size) for size in (READABLE, COMFORTABLE))
            style = f"min-width: {least}px; max-width: {most}px"
            drawn.append(f'<figure class=plot><div class=scroll>{image} style="{style}"></div></figure>')
    text = f"<p>{escape(shown.text)} <span class=quiet>({escape(shown.file)})</span></p>"
    return "\n".join([f"<section><h2>{escape(shown.heading)}</h2>", text, *drawn, "</section>"])


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    text = f"<p>{escape(table.text)}</p>\n" if table.text else ""
    return f"<h2>{escape(table.heading)}</h2>\n{text}{_box(table)}"


def _box(table: Table) -> str:
    """Return a table in a box that scrolls, so that a wide one does not widen the page."""
    lines = []
    for number, row in enumerate(table.rows):
        swatch = f'<span class=swatch style="background: {table.colors[number]}"></span>' if table.colors else ""
        first, *cells = row
        lines.append(f"<tr><td>{swatch}{_text(words(first))}</td>{''.join(map(_cell, cells))}</tr>")
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in table.columns)
    opening = f'<div class=scroll role=region tabindex=0 aria-label="{escape(table.heading)}"><table>'
    return "\n".join([f"{opening}\n<thead><tr>{head}</tr></thead>\n<tbody>", *lines, "</tbody></table></div>"])


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, float):
        return f"<td class=number>{value:.2f}</td>"
    number = isinstance(value, int) and not isinstance(value, bool)
    return f"<td class=number>{value:,}</td>" if number else f"<td>{_text(words(value))}</td>"


def _text(value: str) -> str:
    """Escape a text whose lines may break after underscores, as names are long and screens small."""
    return escape(value).replace("_", "_<wbr>")


def _rows(facts: Mapping[str, Any], inside: str = "") -> list[tuple[str, str]]:
    """Return names and values; a mapping has a row for each value in it, with a name for each of its levels."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _rows(value, f"{inside}{name}: ")
        else:
            rows.append((f"{inside}{name}", words(value)))
    return rows


def _settings(settings: Mapping[str, Choice]) -> str:
    """Show first what the preset does not say, with reasons, and the rest folded."""
    rows, rest = [], []
    for name, (value, why) in settings.items():
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        (rows if why else rest).append((name, text, why) if why else (name, text))
    text = "Named by the user, or chosen for the data or the machine:" if rows else "All are those of the preset:"
    folded = _box(Table("Settings of the preset", ("setting", "value"), rest))
    parts = [
        f"<h2>Settings</h2>\n<p>{text}</p>",
        _box(Table("Settings", ("setting", "value", "why"), rows)) if rows else "",
        f"<details><summary>{len(rest)} of the preset</summary>\n{folded}\n</details>" if rest else "",
    ]
    return "\n".join(filter(None, parts))


def _command(command: str, processes: int) -> str:
    text = "In a checkout of the version below. Relative paths are those of this run; the output is a new folder."
    if processes > 1:
        text += f" The run had {processes} processes: launch as many, with the same launcher."
    return f"<h2>Repeat this run</h2>\n<p>{text}</p>\n<pre><code>{escape(command)}</code></pre>"
