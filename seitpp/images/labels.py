"""Labels of images: what a source says of each image becomes a class, several classes, or None for unknown."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from seitpp.errors import UserError, refusing
from seitpp.files import parse_json
from seitpp.images.class_lists import LARGEST, read_classes
from seitpp.store.labels import Label
from seitpp.store.layout import read_document

# What a source says: a number or a name, several of them, or None.
RawLabel = int | str | list[int | str] | None
KINDS = (int, bool, str)

NAMES = ("name", "file_name", "filename", "file", "image", "image_id", "imageid", "path", "img", "id")
LABELS = ("label", "labels", "class", "cls", "class_name", "classname", "category", "target", "predictionstring")
NUMBER = re.compile(r"-?[0-9]{1,18}")
SEVERAL = ("|", ";")  # between the labels in one cell of a table
ANNOTATION_FILES = ("metadata.csv", "metadata.jsonl", "labels.csv", "labels.txt", "labels.json")


class LabelError(UserError):
    """Raised for labels that are missing, unknown or ambiguous."""


@dataclass(frozen=True)
class LabelRules:
    """Where labels are found, for data that does not say so itself.

    `file` has the label of every image by name; `column` is the label's column in a table, `key` its key in the
    JSON of a tar. `classes` lists the class names in their order. Where only some images have a label, they are
    refused unless `unlabeled` is "keep".
    """

    file: str | None = None
    column: str | None = None
    key: str | None = None
    classes: tuple[str, ...] | None = None
    unlabeled: Literal["refuse", "keep"] = "refuse"


class Labels(NamedTuple):
    """The labels of all images of a source, the class names (None: classes are numbers), and where they are from.

    With `multi_label`, all are tuples or None; else none is a tuple.
    """

    values: Sequence[Label]
    class_names: list[str] | None
    origin: str  # for people, for example "classes by folder names"
    multi_label: bool = False


NO_LABELS = "no labels"


def unlabeled(names: Sequence[str]) -> Labels:
    """Return the labels of images that have none."""
    return Labels([None] * len(names), None, NO_LABELS)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Read class names in their order, from a file of `seitpp.images.class_lists` or from a store.

    Raises UserError if there is no such file, or if the store has no class names.
    """
    if not Path(path).is_dir():
        return read_classes(path).names
    names = read_document(Path(path))["class_names"]
    if names is None:
        raise LabelError(f"--classes {path}: a store without class names; name a file with one class a line")
    return tuple(names)


def resolve(
    raw: Sequence[RawLabel],
    names: Sequence[str],
    rules: LabelRules,
    *,
    origin: str,
    class_names: Sequence[str] | None = None,
) -> Labels:
    """Turn what a source says of its images, called `names` in messages, into labels.

    Numbers are indices of `class_names`, the source's own classes; -1 means no label. Words are class names, which
    become classes in sorted order. With `rules.classes` these are the classes, and all are found by name. Raises
    LabelError for an unknown or negative class, for words beside numbers, and for images without a label among
    others unless they are to be kept.
    """
    _check_kinds(raw, names, origin)
    several = any(type(value) is list for value in raw)
    items = {item for value in raw for item in _items(value)} if several else set(raw)
    items.discard(None)
    kinds = {int if type(item) is bool else type(item) for item in items}
    if not kinds and not several:
        _check_unused(rules, origin)
        return Labels([None] * len(raw), list(rules.classes or class_names or ()) or None, NO_LABELS)
    if kinds == {int, str}:
        index = next(
            index for index, value in enumerate(raw) if any(isinstance(item, str) for item in _items(value))
        )
        raise LabelError(
            f"{names[index]}: the label is a name, those of other images are numbers: use one of both"
        )
    own = list(class_names) if class_names else None
    if kinds == {str} and own is None:
        own = sorted(items)
    final = list(rules.classes) if rules.classes else own
    # Computed once for each class, not for each image.
    table = _table(own, final, kinds, origin)
    numbers = {None: None, **{item: item if table is None else table.get(item, -2) for item in items}, -1: None}
    if bad := {item for item in items if not _is_class(numbers[item], final)}:
        index = next(index for index, value in enumerate(raw) if not bad.isdisjoint(_items(value)))
        raise _wrong(names[index], next(item for item in _items(raw[index]) if item in bad), final)
    if several:
        if any(isinstance(value, list) and -1 in value for value in raw):
            raise LabelError(f"-1 is among several labels of an image ({origin}), expected classes: leave it out")
        values = [
            None if value in (None, -1) else tuple(sorted({numbers[item] for item in _items(value)}))
            for value in raw
        ]
    else:
        values = [numbers[value] for value in raw]
    if rules.unlabeled == "refuse" and None in values:
        raise LabelError(
            f"{names[values.index(None)]}: has no label ({origin}), but other images have: give it one, or pass "
            "--unlabeled keep"
        )
    return Labels(values, final, origin, several)


def _check_kinds(raw: Sequence[Any], names: Sequence[str], origin: str) -> None:
    """Raise LabelError unless each label is a number or a name, a list of them, or None."""
    if set(map(type, raw)) <= {*KINDS, type(None)}:
        return
    for index, value in enumerate(raw):
        for item in _items(value):
            if type(item) not in KINDS and value is not None:
                raise LabelError(
                    f"{names[index]}: a label of type {type(item).__name__} ({origin}), expected a number or a "
                    "name, or a list of them: mend it, or name another column or key"
                )


def _items(value: RawLabel) -> list[int | str | None]:
    return value if isinstance(value, list) else [value]


def _check_unused(rules: LabelRules, origin: str) -> None:
    for flag, value in (("--label-column", rules.column), ("--label-key", rules.key), ("--labels", rules.file)):
        if value is not None:
            raise LabelError(f"{flag} {value}: no image has a label there ({origin}): check the name")


def _table(
    own: list[str] | None, final: list[str] | None, kinds: set[type], origin: str
) -> dict[int | str, int] | None:
    """Return {number or name in the source: class}; None where numbers are the classes themselves."""
    if own is None or own == final:
        return {name: index for index, name in enumerate(final or ())} if kinds == {str} else None
    places = {name: index for index, name in enumerate(final or ())}
    if unknown := [name for name in own if name not in places]:
        raise LabelError(
            f"{len(unknown)} of {len(own)} classes ({origin}) are not in --classes, the first is {unknown[0]!r}: "
            "add them to the list, or leave their images out"
        )
    return dict(places) if kinds == {str} else {number: places[name] for number, name in enumerate(own)}


def _is_class(number: int | None, final: list[str] | None) -> bool:
    return number is None or 0 <= number < (LARGEST if final is None else len(final))


def _wrong(name: str, item: int | str, final: list[str] | None) -> LabelError:
    expected = f"0 to {len(final) - 1}" if final and isinstance(item, int) else "a class of the list"
    expected = expected if final else f"0 or more, or -1 for none, and less than {LARGEST:,}"
    return LabelError(f"{name}: label {item!r}, expected {expected}: mend the label, or name the classes")


def read_label_file(path: str | Path) -> dict[str, RawLabel]:
    """Read {name of an image: label} from a file in one of the forms that data sets come with.

    JSON {name: label} or a list of objects; JSON lines; CSV, TSV or words separated by spaces, with a header or
    without: the name, then the label. Of a cell "class x y w h ..", as in LOC_val_solution.csv of ImageNet, the
    first word is the label; "a|b" or "a;b" are several labels, and an empty cell is none. If all labels are
    numbers, they are classes; else they are class names. Raises LabelError for a file in another form, or with two
    labels for a name.
    """
    file = Path(path)
    with refusing(LabelError, f"--labels {path}: cannot be read", "names of images with labels"):
        text, suffix = file.read_text(encoding="utf-8-sig"), file.suffix.lower()
        rows = _json_rows(text, suffix) if suffix in (".json", ".jsonl", ".ndjson") else _table_rows(text)
    labels: dict[str, RawLabel] = {}
    for name, label in rows:
        if labels.setdefault(name, label) != label:
            raise LabelError(f"--labels {path}: {name!r} has two labels, {labels[name]!r} and {label!r}: keep one")
    _check_kinds(list(labels.values()), list(labels), f"--labels {path}")
    if not labels:
        raise LabelError(f"--labels {path}: no names in it; expected a name and a label on each line")
    return _numbers_or_names(labels)


def _json_rows(text: str, suffix: str) -> list[tuple[str, Any]]:
    if suffix != ".json":
        return [_pair(parse_json(line)) for line in text.splitlines() if line.strip()]
    content = parse_json(text)
    if isinstance(content, dict) and isinstance(content.get("labels"), list):  # as StyleGAN's dataset.json
        content = content["labels"]
    return list(content.items()) if isinstance(content, dict) else [_pair(row) for row in content]


def _pair(row: Any) -> tuple[str, Any]:
    if isinstance(row, dict):
        lower = {key.lower(): value for key, value in row.items()}
        return str(lower[_key(lower, NAMES)]), lower[_key(lower, LABELS)]
    name, label = row
    return str(name), label


def _key(row: Mapping[str, Any], known: Iterable[str]) -> str:
    found = next((key for key in known if key in row), None)
    if found is None:
        raise ValueError(f"columns {', '.join(row)}, of which none is called {' or '.join(list(known)[:4])}")
    return found


def _table_rows(text: str) -> list[tuple[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    delimiter = next((mark for mark in ("\t", ",") if lines and mark in lines[0]), None)
    if delimiter:
        rows = [
            [cell.strip() for cell in row]
            for row in csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter)
        ]
    else:
        rows = [line.strip().rsplit(None, 1) for line in lines]
    header = [cell.lower() for cell in rows[0]] if rows else []
    if any(cell in LABELS for cell in header):
        columns = (
            header.index(_key(dict.fromkeys(header), NAMES)),
            header.index(_key(dict.fromkeys(header), LABELS)),
        )
        rows = rows[1:]
    else:
        columns = 0, 1
    if short := next((row for row in rows if len(row) <= max(columns)), None):
        raise ValueError(f"the line {' '.join(short)!r} has no label")
    return [(row[columns[0]], _cell(row[columns[1]])) for row in rows]


def _cell(text: str) -> RawLabel:
    for mark in SEVERAL:
        if mark in text:
            return [part.strip() for part in text.split(mark) if part.strip()]
    words = text.split()
    if len(words) >= 5 and all(_is_number(word) for word in words[1:5]):  # a class and its box
        return words[0]
    return text or None


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace(".", "", 1).isdigit()


def as_number(text: str) -> int | str:
    """Return the integer of at most 18 digits that a text is, else the text."""
    return int(text) if NUMBER.fullmatch(text) else text


def _numbers_or_names(labels: dict[str, Any]) -> dict[str, RawLabel]:
    """Make all labels numbers if all are, else all names."""
    flat = [item for value in labels.values() for item in (value if isinstance(value, list) else [value])]
    numbers = all(item is None or isinstance(item, int) or isinstance(as_number(str(item)), int) for item in flat)
    make = (lambda item: int(item)) if numbers else str

    def made(value: Any) -> RawLabel:
        if value is None:
            return None
        return [make(item) for item in value] if isinstance(value, list) else make(value)

    return {name: made(value) for name, value in labels.items()}


def by_name(names: Sequence[str], table: Mapping[str, RawLabel], file: str) -> tuple[list[RawLabel], int]:
    """Find the label of each image of a source: by its path in the source, its file name, or that without suffix.

    Returns the labels, None where there is none, and the number of entries of the `file` that belong to no image.
    Raises LabelError if an entry fits several images.
    """
    forms = [lambda name: name, lambda name: name.rpartition("/")[2], _stem]
    found: list[RawLabel] = [None] * len(names)
    used: dict[str, int] = {}
    for index, name in enumerate(names):
        key = next((key for form in forms if (key := form(name)) in table), None)
        if key is None:
            continue
        if key in used:
            raise LabelError(
                f"--labels {file}: {key!r} fits {names[used[key]]} and {name}: write their paths in the file"
            )
        used[key], found[index] = index, table[key]
    if not used:
        raise LabelError(
            f"--labels {file}: none of its {len(table):,} names is that of an image, such as {names[0]!r}; the "
            f"first is {next(iter(table))!r}: check the file"
        )
    return found, len(table) - len(used)


def _stem(name: str) -> str:
    base = name.rpartition("/")[2]
    return base.rpartition(".")[0] or base
