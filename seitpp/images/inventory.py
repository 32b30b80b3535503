"""What a source took and what it left out, for the terminal and for the card of a store."""

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any

from seitpp.errors import UserError
from seitpp.store.labels import Label

if TYPE_CHECKING:
    from seitpp.images.sources import ImageSource

SHOWN = 8  # classes or reasons on one line


class LeftOut:
    """Counts of what a source left out, by reason, each with the first name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count one more name for a reason, or `count` of which `name` is the first."""
        self.counts[reason] += count
        self.first.setdefault(reason, name)

    def extend(self, other: "LeftOut") -> None:
        """Add the counts of `other`."""
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}

    def __str__(self) -> str:
        reasons = sorted(self.counts.items())
        text = ", ".join(
            f"{count:,} {reason} ({self.first[reason]}{', ..' * (count > 1)})" for reason, count in reasons
        )
        return text or "nothing"


def inventory(source: "ImageSource") -> dict[str, Any]:
    """Return what a store keeps of its source: images by class, those without a label, what was left out and why.

    How many of them are unreadable is not known before they are read.
    """
    values, names = source.labels.values, source.class_names
    counts = Counter(label for value in values if value is not None for label in _classes(value))
    classes = range(len(names)) if names and counts else sorted(counts)
    return {
        "found": len(source),
        "unreadable": 0,
        "without_label": sum(value is None for value in values),
        "classes": {names[index] if names else str(index): counts[index] for index in classes},
        "left_out": dict(sorted(source.left_out.counts.items())),
    }


def digest(source: "ImageSource", images: range) -> str:
    """Return the SHA-256 of names and labels of some images, and of the content of the first and the last file.

    Of crops it has also the boxes and the labels of these two.
    """
    found, values = hashlib.sha256(), source.labels.values or {}
    for index in images:
        label = values[index] if values else None
        found.update(f"{source.names[index]}\0{label}\n".encode(errors="surrogateescape"))
    for index in (images[0], images[-1]):
        try:
            sample = source.read(index)
            found.update(sample.data + getattr(sample, "annotation", b""))
            if sample.box:
                found.update(f"{sample.box}\0{sample.label}\n".encode())
        except UserError as error:  # of an image that cannot be read
            found.update(str(error).encode(errors="surrogateescape"))
    return found.hexdigest()


def describe(source: "ImageSource") -> str:
    """Say in a few lines what a source has, where its labels are from, and what was left out."""
    record, origin = inventory(source), source.labels.origin
    classes = record["classes"]
    lines = [f"{record['found']:,} images, {origin}"]
    if classes:
        ranked = sorted(classes.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{title} {count:,}" for title, count in ranked[:SHOWN])
        last = f", .., {ranked[-1][0]} {ranked[-1][1]:,}" if len(ranked) > SHOWN else ""
        lines.append(f"{len(classes):,} classes: {shown}{last}")
    if record["without_label"] and classes:
        lines.append(f"{record['without_label']:,} images without a label")
    return "\n".join([*lines, f"left out: {source.left_out}"])


def _classes(value: Label) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)
