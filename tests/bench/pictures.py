"""Make folders of real pictures with fixed splits, from sets that npm and Debian ship; none of them is committed.

    python tests/bench/pictures.py
    python tests/bench/pictures.py --out pictures

Needs `npm`, and `apt-get` with `dpkg-deb` for the clip art; a set whose registry is not reached is left out, and
said so. With `pip install resvg-py` the drawings of OpenMoji are rendered, too. Prints the folder, by default in
the user's cache, and what is in it: pictures of 64 x 64 pixels, white under what is transparent.

| folder | pictures | classes |
|---|---|---|
| emoji | Noto emoji of emoji-datasource-google | 9 categories |
| kinds | the same | subcategories of at least 20 pictures |
| twitter, openmoji, outlines | those of `validation` by other artists, the last as black lines | 9 categories |
| masks | images/ and annotations/: emoji, and where they are drawn | background and 9 categories |
| clipart | Open Clip Art | topics of at least 50 pictures |

Variants of an emoji, as those of skin or sex, lie in one split. Noto emoji: Apache-2.0; Twemoji and OpenMoji: CC
BY 4.0 and CC BY-SA 4.0; Open Clip Art: public domain.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from seitpp.files import cache_root, new_folder

SIDE = 64
PACKAGES = {
    "google": (
        "emoji-datasource-google@16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twitter": (
        "emoji-datasource-twitter@16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "openmoji": ("openmoji@17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
}
CLIPART = "openclipart-png"
KINDS, TOPICS = 20, 50  # fewest pictures of a subcategory, and of a topic


class Emoji(NamedTuple):
    """An emoji: the code points of its file, its category, its subcategory and its split."""

    code: str
    category: str
    kind: str
    split: str


def fetched(package: str, digest: str, folder: Path) -> Path | None:
    """Download a package of npm and check its content. None where that is not possible."""
    done = run(["npm", "pack", "--silent", package], folder)
    if done is None:
        return None
    path = folder / done.decode().split()[-1]
    if (got := hashlib.sha256(path.read_bytes()).hexdigest()) != digest:
        raise SystemExit(f"{package}: got the SHA-256 {got}, expected {digest}: the splits would be others")
    return path


def run(line: list[str], folder: Path) -> bytes | None:
    """Run a program; return what it prints, None if it is not there or fails."""
    try:
        return subprocess.run(
            line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def on_white(data: bytes) -> tuple[Image.Image, np.ndarray]:
    """Return a picture of SIDE x SIDE pixels with white under it, and how opaque each pixel is, 0 .. 255."""
    with Image.open(io.BytesIO(data)) as picture:
        whole = picture.convert("RGBA")
    whole.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    canvas.paste(whole, ((SIDE - whole.width) // 2, (SIDE - whole.height) // 2))
    return Image.alpha_composite(Image.new("RGBA", canvas.size, "white"), canvas).convert("RGB"), np.array(canvas)[
        ..., 3
    ]


def split_of(key: str) -> str:
    """Return the split of everything with this key: a fifth is for validation."""
    return "validation" if hashlib.sha256(key.encode()).digest()[0] % 5 == 0 else "train"


def listed(tar: tarfile.TarFile) -> list[Emoji]:
    """List the emoji that both artists have, without those that are parts of others."""
    found = []
    for one in json.load(tar.extractfile("package/emoji.json")):
        if one["has_img_google"] and one["has_img_twitter"] and one["category"] != "Component":
            code, points = one["image"].removesuffix(".png"), one["unified"].split("-")
            key = "-".join(points) if one["category"] == "Flags" else points[0]
            category = one["category"].lower().replace(" & ", "-").replace(" ", "-")
            found.append(Emoji(code, category, one["subcategory"], split_of(key)))
    return found


def write(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def write_emoji(root: Path, google: tarfile.TarFile, emoji: list[Emoji]) -> None:
    """Write the emoji of one artist: with their categories, with their kinds, and with masks."""
    kinds, categories = Counter(one.kind for one in emoji), sorted({one.category for one in emoji})
    for one in emoji:
        picture, opaque = on_white(google.extractfile(f"package/img/google/64/{one.code}.png").read())
        write(root / "emoji" / one.split / one.category / f"{one.code}.png", picture)
        if kinds[one.kind] >= KINDS:
            write(root / "kinds" / one.split / one.kind / f"{one.code}.png", picture)
        value = 1 + categories.index(one.category)
        mask = Image.fromarray(np.where(opaque > 127, value, 0).astype(np.uint8))
        write(root / "masks/images" / one.split / f"{one.code}.png", picture)
        write(root / "masks/annotations" / one.split / f"{one.code}.png", mask)
    (root / "masks/classes.txt").write_text("\n".join(["background", *categories]) + "\n")


def write_others(root: Path, folder: str, emoji: list[Emoji], read: Callable[[Emoji], bytes | None]) -> None:
    """Write the emoji of the validation split as another artist draws them."""
    for one in emoji:
        if one.split == "validation" and (data := read(one)) is not None:
            write(root / folder / "validation" / one.category / f"{one.code}.png", on_white(data)[0])


def openmoji(tar: tarfile.TarFile, color: str) -> Callable[[Emoji], bytes | None] | None:
    """Return what renders an emoji of OpenMoji, in "color" or "black"; None without a renderer."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        return None
    drawings = {Path(name).stem: name for name in tar.getnames() if f"/{color}/svg/" in name}

    def read(one: Emoji) -> bytes | None:
        code = one.code.upper()
        name = drawings.get(code) or drawings.get(code.replace("-FE0F", ""))
        return name and bytes(
            svg_to_bytes(svg_string=tar.extractfile(name).read().decode(), width=SIDE, height=SIDE)
        )

    return read


def write_clipart(root: Path, folder: Path) -> None:
    """Write the clip art of the package of Debian, by topics, if it is reached."""
    if run(["apt-get", "download", "-o", "APT::Sandbox::User=root", CLIPART], folder) is None:
        print(f"{CLIPART}: not reached, its pictures are left out", file=sys.stderr)
        return
    files: dict[tuple[str, str], bytes] = {}
    with (
        subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", next(folder.glob("*.deb"))], stdout=subprocess.PIPE
        ) as program,
        tarfile.open(fileobj=program.stdout, mode="r|") as tar,
    ):
        for member in tar:
            inside = Path(member.name).as_posix().partition("/openclipart/png/")[2]
            if member.isfile() and inside.endswith(".png"):
                topic, _, name = inside.partition("/")
                files[topic, name.replace("/", "-")] = tar.extractfile(member).read()
    topics = Counter(topic for topic, _ in files)
    for (topic, name), data in files.items():
        if topics[topic] >= TOPICS:
            # Drawings of a series differ in the number at the end of their names.
            split = split_of(re.sub(r"[0-9_]*\.png$", "", name))
            with suppress(Image.DecompressionBombError):  # a few of hundreds of megapixels
                write(root / "clipart" / split / topic / name, on_white(data)[0])


def make(root: Path) -> None:
    """Write all folders into `root`."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        folder, tars = Path(name), {}
        for artist, (package, digest) in PACKAGES.items():
            if path := fetched(package, digest, folder):
                tars[artist] = opened.enter_context(tarfile.open(path))
            else:
                print(f"{package}: not reached, its pictures are left out", file=sys.stderr)
        if "google" in tars:
            emoji = listed(tars["google"])
            write_emoji(root, tars["google"], emoji)
            if tar := tars.get("twitter"):
                image = "package/img/twitter/64/{}.png".format
                write_others(root, "twitter", emoji, lambda one: tar.extractfile(image(one.code)).read())
            for color, to in (("color", "openmoji"), ("black", "outlines")) if "openmoji" in tars else ():
                if read := openmoji(tars["openmoji"], color):
                    write_others(root, to, emoji, read)
                else:
                    print(f"{to}: no renderer: pip install resvg-py", file=sys.stderr)
        write_clipart(root, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to make (default: in the user's cache)")
    arguments = parser.parse_args()
    root = arguments.out or cache_root() / "pictures"
    if not root.exists():
        with new_folder(root) as made:
            made.mkdir()
            make(made)
    print(root)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        splits = {part.name: part for part in (folder / "images" if folder.name == "masks" else folder).iterdir()}
        counts = ", ".join(f"{split} {len(list(part.rglob('*.png'))):,}" for split, part in sorted(splits.items()))
        print(f"{folder.name:10} {counts}")


if __name__ == "__main__":
    main()
