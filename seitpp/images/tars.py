"""Images in uncompressed tar files, as WebDataset and others pack them; nothing is unpacked."""

import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from seitpp.errors import escaped, refusing
from seitpp.files import parse_json
from seitpp.images.decode import ImageError, Sample
from seitpp.images.inventory import LeftOut
from seitpp.images.labels import LabelRules, Labels, RawLabel, as_number, resolve, unlabeled
from seitpp.images.objects import ObjectPath, open_bounded, read_part, size_of
from seitpp.images.walk import SUFFIXES, is_hidden

BLOCK = 512
# Where makers of tars keep labels, the first that exists; files of a sample, and keys of its JSON.
LABEL_FILES = ("cls", "label", "class", "target")
JSON_KEYS = ("label", "labels", "cls", "class", "class_name", "category", "target")
MAX_LABEL_BYTES = 1 << 20
# Labels of so many bytes are read when their tar is listed, since it is read in sequence then.
AT_ONCE = 1 << 14
LISTED = 8  # tars that are listed at the same time


class Member(NamedTuple):
    """A file in a tar: its place in bytes, its name, and the last part of its name's suffix, in lower case.

    Of small files that can have labels, also the content.
    """

    start: int
    size: int
    name: str
    suffix: str
    content: bytes | None = None


class TarSource:
    """Images in tar files: the files whose names are equal up to the first dot are a sample.

    Its label is in a file KEY.cls, KEY.label, KEY.class or KEY.target (also KEY.ANY.cls), else in KEY.json under
    `rules.key` or one of `JSON_KEYS`; if no sample has one there, the folders in the tars are the classes, where
    there are several. Raises ImageError for a tar that is compressed, cut or damaged, and for samples of which it
    is not clear which picture is meant.
    """

    def __init__(self, paths: Sequence[Path] | Sequence[ObjectPath], rules: LabelRules | None):
        self._images: list[tuple[Path | ObjectPath, Member]] = []
        self.left_out = LeftOut()
        raw: list[RawLabel] = []
        with ThreadPoolExecutor(LISTED) as pool:
            listed = pool.map(partial(_samples, rules=rules), paths)
            bar = tqdm(listed, "listing tars", total=len(paths), unit="tar", delay=2.0, disable=None)
            for path, (samples, left_out) in zip(paths, bar, strict=True):
                self._images += ((path, image) for image, _ in samples)
                raw += (label for _, label in samples)
                self.left_out.extend(left_out)
        if not self._images:
            raise ImageError(f"{paths[0]}: no images in {len(paths)} tar file(s); check the path")
        self.names = [f"{path.name}/{image.name}" for path, image in self._images]
        self.labels = unlabeled(self.names) if rules is None else self._resolved(raw, rules)
        self.class_names = self.labels.class_names

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Sample:
        """Read image `index`. Raises ImageError if the tar has become shorter or cannot be opened."""
        path, image = self._images[index]
        return Sample(_bytes(path, image), self.names[index], self.labels.values[index])

    def _resolved(self, raw: list[RawLabel], rules: LabelRules) -> Labels:
        folders = [image.name.rpartition("/")[0] for _, image in self._images]
        if all(label is None for label in raw) and not rules.key and len(set(folders)) > 1 and all(folders):
            names = [escaped(folder.rpartition("/")[2]) for folder in folders]
            return resolve(names, self.names, rules, origin="classes by folder names in the tars")
        origin = f"labels by the JSON key {rules.key!r}" if rules.key else "labels beside the images in the tars"
        return resolve(raw, self.names, rules, origin=origin)


def _bytes(path: Path | ObjectPath, member: Member) -> bytes:
    if member.content is not None:
        return member.content
    try:
        data = read_part(path, member.start, member.size)
    except OSError as error:
        raise ImageError(f"{path}/{member.name}: cannot be read ({error.strerror})") from error
    if len(data) < member.size:
        raise ImageError(f"{path}/{member.name}: cut at byte {member.start + len(data):,}; copy the tar again")
    return data


def _samples(path: Path | ObjectPath, rules: LabelRules | None) -> tuple[list[tuple[Member, RawLabel]], LeftOut]:
    """List the images of a tar with their labels, in the order of the tar, and what is left out."""
    groups: dict[str, list[Member]] = {}
    left_out = LeftOut()
    for member in _members(path, left_out):
        folder, _, base = member.name.rpartition("/")
        groups.setdefault(f"{folder}/{base.partition('.')[0]}", []).append(member)
    parts = Counter(_extension(member) for members in groups.values() for member in members)
    samples = []
    for members in groups.values():
        images = [member for member in members if f".{member.suffix}" in SUFFIXES]
        for image in _chosen(path, images, parts, left_out):
            stem = image.name.rpartition(".")[0]
            own = (
                [member for member in members if member.name.rpartition(".")[0] == stem] if len(images) > 1 else []
            )
            label = rules and (_label(path, own, rules) if own else None)
            samples.append((image, _label(path, members, rules) if rules and label is None else label))
        for member in members:
            if f".{member.suffix}" not in SUFFIXES and not (images and member.suffix in (*LABEL_FILES, "json")):
                left_out.add(f".{member.suffix} file" if images else "file without an image", member.name)
    return samples, left_out


def _extension(member: Member) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _chosen(path: Path | ObjectPath, images: list[Member], parts: Counter[str], left_out: LeftOut) -> list[Member]:
    """Return the images of a sample: its only one, KEY.SUFFIX beside others, or all if their names have dots."""
    if len(images) < 2:
        return images
    plain = [image for image in images if "." not in _extension(image)]
    if len(plain) == 1:
        for image in images:
            if image is not plain[0]:
                left_out.add("further picture of a sample", image.name)
        return plain
    if plain or any(parts[_extension(image)] > 1 for image in images):
        names = ", ".join(image.name for image in images)
        raise ImageError(f"{path}: several pictures of one sample ({names}): keep the one to tokenize in the tar")
    return images  # such as photo.v2.001.jpg and photo.v2.002.jpg, whose names just have dots


def _label(path: Path | ObjectPath, members: Iterable[Member], rules: LabelRules) -> RawLabel:
    """Return the label of a sample from the first of its files that has one; None if there is none."""
    by_suffix = {member.suffix: member for member in members}
    if rules.key is None:
        for suffix in LABEL_FILES:
            if suffix in by_suffix:
                return _word(_text(path, by_suffix[suffix]))
    if (member := by_suffix.get("json")) is None:
        return None
    with refusing(ImageError, f"{path}/{member.name}: cannot be read", "JSON; mend the file"):
        content = parse_json(_text(path, member))
    keys = [rules.key] if rules.key else JSON_KEYS
    value = next((content[key] for key in keys if key in content), None) if isinstance(content, dict) else content
    words = value if isinstance(value, list) else [value]
    if not all(word is None or type(word) in (int, str) for word in words):
        raise ImageError(
            f"{path}/{member.name}: got the label {value!r}, expected a number or a name: choose with --label-key"
        )
    return value


def _text(path: Path | ObjectPath, member: Member) -> str:
    if member.size > MAX_LABEL_BYTES:
        raise ImageError(f"{path}/{member.name}: {member.size:,} bytes for a label; expected a number or a name")
    try:
        return _bytes(path, member).decode()
    except UnicodeDecodeError as error:
        raise ImageError(f"{path}/{member.name}: no UTF-8 text; expected a number or a name") from error


def _word(text: str) -> RawLabel:
    text = text.strip()
    return as_number(text) if text else None


def _members(path: Path | ObjectPath, left_out: LeftOut) -> list[Member]:
    """List the files of a tar from its headers. Raises ImageError if it is compressed, damaged or has no end."""
    size, members, place = size_of(path), [], -1
    complaint = f"{path}: cannot be read as an uncompressed tar"
    with (
        refusing(ImageError, complaint, "a whole one; unpack or copy it again"),
        open_bounded(path) as file,
        tarfile.open(fileobj=file, mode="r:") as tar,
    ):
        for member in tar:
            base = member.name.rpartition("/")[2]
            if member.size < 0 or tar.offset <= place:  # else it could be read in a circle for ever
                raise ImageError(f"{path}: damaged at byte {member.offset:,}; copy it again")
            place = tar.offset
            if member.offset_data + (member.size if member.isfile() else 0) > size:
                raise ImageError(f"{path}: cut in {member.name} at byte {size:,}; copy it again")
            if any(is_hidden(part) for part in member.name.split("/") if part not in (".", "..", "")):
                left_out.add("hidden", member.name)
            elif member.isfile() and not member.issparse():
                suffix = base.rpartition(".")[2].lower()
                of_label = suffix in (*LABEL_FILES, "json") and member.size <= AT_ONCE
                content = tar.extractfile(member).read() if of_label else None
                members.append(Member(member.offset_data, member.size, member.name, suffix, content))
            elif not member.isdir():
                left_out.add("link, device or sparse file in a tar", member.name)
        _check_end(path, tar.offset, size)
    return members


def _check_end(path: Path | ObjectPath, offset: int, size: int) -> None:
    """Raise ImageError unless reading stopped at the block of zeros that ends a tar; tarfile does not."""
    # tarfile has read the block, or the place where it should be.
    if any(read_part(path, max(place, 0), BLOCK) == bytes(BLOCK) for place in (offset, offset - BLOCK)):
        return
    where = "cut" if offset >= size else "damaged"
    raise ImageError(
        f"{path}: {where} at byte {min(offset, size):,}, where no file and no end mark is; copy it again"
    )
