"""The table of a comparison, a mapping for each row: its bytes and accuracies, as points and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from downstream.storage.front import Score, pareto


def points_of(table: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float, bool]]]:
    """Return for each family its points (bytes, top-1, deviation, whether it is on the family's Pareto front)."""
    families: dict[str, list[tuple[float, float, float]]] = {}
    for line in table:
        point = line["bytes"], line["top1"], line["top1_std"]
        families.setdefault(line["family"], []).append(point)
    return {
        family: [(*point, at in pareto([other[:2] for other in points])) for at, point in enumerate(points)]
        for family, points in families.items()
    }


def best_within(table: Sequence[Mapping[str, Any]], budget: float) -> str | None:
    """Return the row with the highest top-1 of those with at most `budget` bytes an image, or None."""
    fitting = [line for line in table if line["bytes_per_image"] <= budget]
    found = max(fitting, key=lambda line: line["top1"], default=None)
    return found and f"{found['family']} {found['setting']}"


def in_words(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as plain text, by rising bytes; * is on the Pareto front of all rows."""
    front = {*pareto([(line["bytes"], line["top1"]) for line in table])}
    head = ["kept", "images", "bytes", "B/image", "framing", "GB", "GiB", "top-1", "matched test", ""]
    lines = [head]
    for at, line in sorted(enumerate(table), key=lambda entry: entry[1]["bytes"]):
        scores = [
            "" if line[name] is None else str(Score(line[name], line[f"{name}_std"]))
            for name in ("top1", "top1_matched")
        ]
        sizes = [f"{line['bytes']:,}", f"{line['bytes_per_image']:.1f}", f"{line['framing']:,}"]
        units = [f"{line[unit]:.3g}" for unit in ("GB", "GiB")]
        name = f"{line['family']} {line['setting']}"
        lines.append([name, f"{line['images']:,}", *sizes, *units, *scores, "*" if at in front else ""])
    return aligned(lines)


def summary(
    table: Sequence[Mapping[str, Any]], within: Mapping[str, str | None], unmet: Sequence[str]
) -> list[str]:
    """Return a line for each budget, with the best row in it, and for each that a format does not meet."""
    least = min(table, key=lambda line: line["bytes_per_image"])
    smallest = f"the smallest is {least['family']} {least['setting']} with {least['bytes_per_image']:.1f} B"
    fitting = [f"{text} an image: {best or f'no family meets it, {smallest}'}" for text, best in within.items()]
    return [*fitting, *unmet]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a plain table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
