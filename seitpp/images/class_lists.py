"""Files of class names, with the value or the color of each class in a mask where they have it."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from seitpp.errors import refusing
from seitpp.files import parse_json
from seitpp.images.decode import ImageError

Color = tuple[int, int, int]
LARGEST = 1 << 24  # values of masks are smaller, as the 24 bits of a color are
MAX_BYTES, MAX_LINE = 1 << 26, 1000  # of a file of class names, and characters of a line in it

# A line of a file of classes: `cat 250 50 83`, `cat,250,50,83`, `cat:250,50,83::` (CVAT), `250 50 83 cat`.
COLOR_LAST = re.compile(r"(?P<name>\S.*?)[\s,;:]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})\s*(?::.*)?")
COLOR_FIRST = re.compile(r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;:]+(?P<name>\S.*)")
NUMBERED = re.compile(r"(-?\d{1,18})[\s,;:]+(?P<name>\S.*)")  # `1 cat`, `1: cat`
HEADER = re.compile(r"name\W+(r|red)\W+(g|green)\W+(b|blue)\W*", re.IGNORECASE)


class ClassList(NamedTuple):
    """Class names of `file` in order, and the value or the color of each in a mask if the file says it."""

    names: tuple[str, ...]
    file: str
    values: tuple[int, ...] | None = None
    colors: tuple[Color, ...] | None = None


def read_classes(path: str | Path) -> ClassList:
    """Read class names, with the value or the color of each if the file has them.

    Text files have one class a line: `NAME`, `VALUE NAME`, `NAME R G B` or `R G B NAME`, separated by spaces,
    commas, colons or tabs (also CVAT's labelmap.txt); a file called objectInfo*.txt is one of ADE-20k. JSON files
    have a list of names, {value: name}, {name: value}, or objects with id and name, also as COCO's `categories`.
    Raises ImageError for a file that cannot be read and for names, values or colors that occur twice.
    """
    path = Path(path)
    with refusing(ImageError, f"{path}: cannot be read as a file of class names", "text; check --classes"):
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        listed = _from_json(text, path)
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        listed = _from_table(text, path) if path.name.startswith("objectInfo") else _from_lines(lines, path)
    for kind, entries in (("name", listed.names), ("value", listed.values), ("color", listed.colors)):
        twice = [entry for entry, times in Counter(entries or ()).items() if times > 1]
        if twice:
            raise ImageError(f"{path}: the {kind} {twice[0]} occurs twice, expected each once; correct the file")
    if not listed.names or max(map(abs, listed.values or (0,))) >= LARGEST:
        raise ImageError(f"{path}: expected names of classes, with values below {LARGEST:,}; correct the file")
    return listed


def _from_table(text: str, path: Path) -> ClassList:
    """Read an objectInfo*.txt of ADE-20k; its numbers 1, 2, .. only count the rows."""
    with refusing(ImageError, f"{path}: cannot be read", "a header and rows with Idx and Name, separated by tabs"):
        header, *rows = ([cell.strip() for cell in line.split("\t")] for line in text.splitlines() if line.strip())
        number, name = header.index("Idx"), header.index("Name")
        numbers, names = [int(row[number]) for row in rows], tuple(row[name] for row in rows)
    if numbers != list(range(1, len(rows) + 1)):
        raise ImageError(f"{path}: expected classes numbered 1, 2, .. in order in the column Idx; correct it")
    return ClassList(names, str(path))


def _from_lines(lines: list[str], path: Path) -> ClassList:
    if any(len(line) > MAX_LINE for line in lines):  # searching for colors in it could take hours
        raise ImageError(f"{path}: a line of more than {MAX_LINE:,} characters, expected the name of a class")
    if lines and HEADER.fullmatch(lines[0]):
        lines = lines[1:]
    for kind in (COLOR_LAST, COLOR_FIRST, NUMBERED) if lines else ():
        matches = [kind.fullmatch(line) for line in lines]
        if not all(matches):
            continue
        names = tuple(match["name"].strip() for match in matches)
        groups = [number for number in range(1, kind.groups + 1) if number != kind.groupindex["name"]]
        numbers = [tuple(int(match[group]) for group in groups) for match in matches]
        if kind is NUMBERED:
            return ClassList(names, str(path), values=tuple(value for (value,) in numbers))
        if max(map(max, numbers)) > 255:
            raise ImageError(f"{path}: a color above 255, expected red, green and blue of 0 to 255; correct it")
        return ClassList(names, str(path), colors=tuple(numbers))
    return ClassList(tuple(lines), str(path))


def _from_json(text: str, path: Path) -> ClassList:
    with refusing(ImageError, f"{path}: cannot be read", "JSON with a list of names, {value: name}, [{id, name}]"):
        content = parse_json(text)
        if isinstance(content, dict) and isinstance(content.get("categories"), list):
            content = content["categories"]
        if isinstance(content, list) and all(isinstance(entry, str) for entry in content):
            return ClassList(tuple(content), str(path))
        if isinstance(content, list):
            pairs = [(int(entry["id"]), entry["name"]) for entry in content]
        elif all(isinstance(entry, int) for entry in content.values()):
            pairs = [(value, name) for name, value in content.items()]
        else:
            pairs = [(int(value), name) for value, name in content.items()]
        if not all(isinstance(name, str) for _, name in pairs):
            raise TypeError("a name that is no text")
    values, names = zip(*sorted(pairs), strict=True) if pairs else ((), ())
    return ClassList(names, str(path), values=values)
