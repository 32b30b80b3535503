"""Inspect, verify, recode, grow and convert token stores, share them and models on the hub, and test a machine."""

import argparse
import math
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
from tqdm import tqdm

from seitpp.codec import CODECS
from seitpp.errors import (
    UserError,
    fail,
    fail_by_system,
    flush_output,
    keeping_interrupts,
    prepare_text,
    reason,
    suggest,
)
from seitpp.files import replace_file
from seitpp.store import TokenStore, grow, hub, layout, outgoing, release, remote
from seitpp.store.bucket import Bucket, is_bucket
from seitpp.store.fingerprint import store_fingerprint
from seitpp.store.labels import Label
from seitpp.store.recode import recode as recode_store

if TYPE_CHECKING:
    from torch import Tensor

    from seitpp.tokenizers import Tokenizer

# Images of a split that `info` decodes at most, so that it takes seconds.
SAMPLE = 10_000
SOURCE_BYTES = "source_bytes"  # column with the size of the image file that the tokens come from
SHOWN, AUGMENTED = 25, 8  # images that `show` draws at most, and with --augment
SHOWN_CLASSES = 10  # class names that `info` prints at most
UNREAD = 141  # the exit status where nobody reads the output any more, as shells say it


class CliError(UserError):
    """Raised for a command line that cannot be run."""


class Figures(NamedTuple):
    """Figures of some images of a split. `counts` says for each digit how often each value occurs in them."""

    images: int
    tokens: int
    counts: list[np.ndarray]


def info(store: Path) -> None:
    """Print what a store holds, and how close its size is to the entropy of its ids."""
    document = layout.read_document(store)
    splits = [TokenStore(store, split) for split in document["splits"]]
    print(store)
    _print_store(splits[0], document)
    figures = [_measure(split, _spread(len(split), SAMPLE)) for split in splits]
    _print_splits(splits, figures)
    if any(measured.images < len(split) for split, measured in zip(splits, figures, strict=True)):
        print(f"\ncodes used and entropy: estimated from {SAMPLE:,} images spread over each larger split")


def verify(store: Path) -> None:
    """Compare the checksum of every file and decode every image; exit status 2 if one is damaged."""
    document = layout.read_document(store)
    files = document["files"]
    layout.check_files(store, files, tqdm(files, "files", disable=None), checksums=True)
    splits = [TokenStore(store, split, verify=False) for split in document["splits"]]
    figures = [_measure(split, range(len(split))) for split in splits]
    size = sum(entry["bytes"] for entry in files.values())
    print(f"{store}: {len(files)} files of {size:,} bytes have the checksums of {layout.DOCUMENT}")
    print(f"every image decodes to ids below {' and '.join(map(str, layout.sizes_of(document)))}\n")
    _print_splits(splits, figures)


def show(
    store: Path,
    *,
    tokenizer: Path | None,
    tokenizer_kind: str | None,
    out: Path,
    count: int | None,
    split: str | None,
    augment: bool,
    tokenadapt: str | None,
) -> None:
    """Draw images of a split, spread evenly over it, decoded by their tokenizer or with one color per code."""
    if out.exists() or out.suffix != ".png":
        raise CliError(f"--out {out}: expected a new file whose name ends in .png, since nothing is overwritten")
    if count is not None and count < 1:
        raise CliError(f"--count {count}: expected 1 or more")
    source = _open(store, split)
    if augment:
        _show_augmented(
            source, tokenizer, tokenizer_kind, out=out, count=count or AUGMENTED, tokenadapt=tokenadapt
        )
        return
    if tokenadapt:
        raise CliError(f"--tokenadapt {tokenadapt}: flips and crops tokens; add --augment")
    decode = _decoder(source, tokenizer, tokenizer_kind)
    positions = _spread(len(source), count or SHOWN)
    images = [decode(source[position][0]) for position in positions]
    titles = [_title(source, source[position][1]) for position in positions]
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, partial(_draw, images, titles))
    print(f"{out}: {len(images)} of {len(source):,} images of split {source.split!r}")
    if tokenizer is None:
        print("each code is drawn in its own color; --tokenizer FILE decodes the images")


def recode(store: Path, out: Path, codec: str) -> None:
    """Write a new store with the same images in the same order, encoded by another codec."""
    recode_store(store, out, codec)
    splits = [TokenStore(store, split, verify=False) for split in layout.read_document(store)["splits"]]
    rows = []
    for source in splits:
        written = TokenStore(out, source.split, verify=False)
        sizes = [source.payload_bytes, written.payload_bytes]
        rows.append([source.split, f"{len(source):,}", *(f"{size / len(source):.1f}" for size in sizes)])
    _print_table(["bytes per image", "images", splits[0].codec.name, codec], rows)
    print(f"\non disk, with all tables: {_disk_bytes(store):,} bytes before, {_disk_bytes(out):,} after")


def finish(store: str) -> None:
    """Publish the splits that the tasks of tokenize_images --tasks have written, when all tasks have ended."""
    from seitpp.tokenizers import finishing

    splits = finishing.finish(store)
    print(f"{store}: {_sizes(store)}" if splits else f"{store}: nothing is left to finish; {_sizes(store)}")


def append(store: Path, others: list[Path], split: str) -> None:
    """Append the images of other stores to a split; what is there stays as it is, byte by byte."""
    grow.append(store, others, split=split)
    print(f"{store}: {_sizes(store)}")


def merge(out: Path, stores: list[Path]) -> None:
    """Write a new store with the images of all stores, their classes joined by name."""
    grow.merge(out, stores)
    written = TokenStore(out, next(iter(layout.read_document(out)["splits"])), verify=False)
    print(f"{out}: {_sizes(out)}, {written.num_classes:,} classes")


def subset(
    store: Path,
    out: Path,
    *,
    fraction: float | None,
    classes: list[str] | None,
    seed: int | None,
    split: str | None,
) -> None:
    """Write a new store with a fraction of the images of one split, or with the images of some classes."""
    positions = None
    if fraction is not None:
        from seitpp.data.dataset import fraction_of

        images = len(TokenStore(store, split or "train", verify=False))
        positions = {split or "train": fraction_of(images, fraction, seed or 0)}
    elif seed is not None or split is not None:
        raise CliError("--seed and --split: got --classes, which takes all of its images; leave them out")
    grow.subset(store, out, positions=positions, class_names=classes)
    print(f"{out}: {_sizes(out)}")


def reshuffle(store: Path, out: Path, *, seed: int, split: str) -> None:
    """Write a new store with the images of a split in random order, so that each shard is a sample of them all."""
    from seitpp.data.order import Permutation

    images = len(TokenStore(store, split, verify=False))
    grow.reshuffle(store, out, {split: Permutation(images, seed)})
    print(f"{out}: {_sizes(out)}")


def import_release(sources: list[Path], *, out: Path, grid: list[int] | None, codec: str) -> None:
    """Create a store from SeiT's released files."""
    release.import_release(sources, out, grid=tuple(grid) if grid else None, codec=codec)
    folder = sources[0] if sources[0].is_dir() else sources[0].parent
    for name in release.LEFT_OUT:
        if (folder / name).exists():
            print(f"{folder / name}: not read, since a store does not hold it")
    print(f"{out}: {_sizes(out)}")


def export_release(store: Path, out: Path) -> None:
    """Write a store in the format of SeiT's released files, without class names, tokenizer and other columns."""
    release.export_release(store, out)
    print(f"{out}: {_sizes(store)}")


def export_model(folder: Path, out: Path, ema: bool) -> None:
    """Write the model of a finished run for publication: weights and configuration for timm, and a model card."""
    from seitpp import export

    root = export.export_model(folder, out, ema)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    print(f"{out}: {', '.join(names)}\nREADME.md names no license yet: edit the line that begins with # license")


def push(folder: Path, repo_id: str, private: bool) -> None:
    """Upload a store (as a dataset) or an exported model to the Hugging Face hub, or a store to a bucket."""
    if is_bucket(repo_id):
        if private:
            raise CliError(f"--private is for the hub, {repo_id} is as private as its bucket: leave it out")
        outgoing.send(folder.resolve(), repo_id)
        print(repo_id)
    elif (folder / layout.DOCUMENT).is_file():
        print(hub.push(folder, repo_id, private=private))
    elif (folder / "config.json").is_file():
        from seitpp import export

        print(export.push_model(folder, repo_id, private=private))
    else:
        raise CliError(f"{folder}: neither a token store nor a folder of export-model; name one of them")


def pull(repo_id: str, folder: Path | None) -> None:
    """Download a store from the Hugging Face hub or from a bucket, and verify it."""
    if is_bucket(repo_id):
        if folder is None:
            raise CliError(f"{repo_id}: name the folder to create")
        root = remote.pull(repo_id, folder)
        print(f"{root}: {_sizes(root)}")
        return
    if folder is None and hub.cache_folder(repo_id).exists():
        print(f"already downloaded: remove {hub.cache_folder(repo_id)} to download it again")
    root = hub.pull(repo_id, folder)
    print(f"{root}: {_sizes(root)}")


def doctor() -> None:
    """Print versions, devices, cache and environment, and test the installation; exit status 1 if a test fails."""
    try:
        from seitpp.doctor import examine
    except Exception as problem:  # builds of torch and torchvision that do not fit raise any
        print(f"import: {reason(problem)}; reinstall both: pip install --force-reinstall torch torchvision")
        well = False
    else:
        well = examine()
    if not well:
        flush_output()
        sys.exit(1)


def main() -> None:
    """Run the command line. An error of the user is printed as one line on stderr, with exit status 2."""
    try:
        with keeping_interrupts():
            prepare_text()
            options = vars(_parse(sys.argv[1:]))
            options.pop("run")(**options)
            flush_output()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # quietly, in `seitpp info STORE | head`
        with suppress(OSError):
            flush_output()
        sys.exit(UNREAD)
    except OSError as error:
        fail_by_system(error)


# Reading


def _open(store: Path, split: str | None) -> TokenStore:
    return TokenStore(store, split or next(iter(layout.read_document(store)["splits"])))


def _title(store: TokenStore, label: Label) -> str:
    if label is None:
        return "no label"
    classes = label if isinstance(label, tuple) else (label,)
    return ", ".join(store.class_names[one] if store.class_names else str(one) for one in classes) or "no class"


def _spread(total: int, count: int) -> list[int]:
    """Return at most `count` of `total` positions, evenly spread from the first to the last."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def _measure(store: TokenStore, positions: Sequence[int]) -> Figures:
    tokens, counts = 0, [np.zeros(size, np.int64) for size in store.books.sizes]
    for position in tqdm(positions, store.split, unit=" images", disable=None):
        ids, _ = store[position]
        planes = ids.reshape(store.books.digits, -1)
        tokens += planes.shape[1]
        for digit, plane in zip(counts, planes, strict=True):
            digit += np.bincount(plane, minlength=len(digit))
    return Figures(len(positions), tokens, counts)


def _disk_bytes(store: Path) -> int:
    entries = layout.read_document(store)["files"].values()
    return (store / layout.DOCUMENT).stat().st_size + sum(entry["bytes"] for entry in entries)


def _source_bytes(store: TokenStore) -> int | None:
    """Return the total size of the image files of a split, or None if the store does not record it."""
    if store.columns.get(SOURCE_BYTES) != "int64":
        return None
    return int(store.column(SOURCE_BYTES)[range(len(store))].sum())


def _decoder(store: TokenStore, path: Path | None, kind: str | None) -> Callable[[np.ndarray], "Tensor"]:
    """Return a function from ids (H, W) to an image (C, height, width) in [0, 1], by the tokenizer at `path`.

    Without a path each code has its own color. Raises CliError as `_tokenizer`, or for a kind without a path.
    """
    import torch

    from seitpp import plots

    if path is None:
        if kind:
            raise CliError(f"--tokenizer-kind {kind}: name its file or folder with --tokenizer")
        decode = partial(plots.paint_codes, books=store.books)
    else:
        decode = _tokenizer(store, path, kind).decode
    return lambda ids: decode(torch.from_numpy(ids[None].astype(np.int64)))[0]


def _tokenizer(store: TokenStore, path: Path, kind: str | None) -> "Tokenizer":
    """Load the tokenizer at `path`. Raises CliError if it is not that of the store."""
    from seitpp import tokenizers
    from seitpp.codebook import codebook_fingerprint

    tokenizer = tokenizers.load(path, kind)
    recorded = (store.tokenizer or {}).get("fingerprint", tokenizer.fingerprint)
    if recorded != tokenizer.fingerprint:
        raise CliError(
            f"{path}: got tokenizer {tokenizer.fingerprint[:16]}, expected {recorded[:16]}, with which "
            f"{store.path} was tokenized: name the tokenizer of this store"
        )
    if codebook_fingerprint(tokenizer.books.to_books()) != codebook_fingerprint(store.books):
        raise CliError(f"{path}: has another codebook than {store.path}: name the tokenizer of this store")
    return tokenizer


def _show_augmented(
    store: TokenStore, path: Path | None, kind: str | None, *, out: Path, count: int, tokenadapt: str | None
) -> None:
    """Draw decoded images, flipped and cropped as images, as tokens, and by TokenAdapt where one is named."""
    import torch

    from seitpp import plots
    from seitpp.engine.inputs import open_tokenadapt
    from seitpp.engine.reconstruction import naive_pictures

    if path is None:
        raise CliError("--augment: flipped images have to be tokenized: name the tokenizer with --tokenizer")
    if store.layout == layout.SEQUENCE or store.grid is None or store.grid[0] != store.grid[1]:
        grid = "sequences of tokens" if store.layout == layout.SEQUENCE else f"the grid {store.grid}"
        raise CliError(f"--augment: got {grid} in {store.path}, expected one square grid; leave it out")
    tokenizer = _tokenizer(store, path, kind)
    adapt = open_tokenadapt(tokenadapt, store.books, str(store.path))
    if adapt and adapt.grid != store.grid:
        raise CliError(
            f"{tokenadapt}: a TokenAdapt for the grid {adapt.grid}, expected {store.grid}, that of {store.path}: "
            "name one that was trained on it"
        )
    positions = _spread(len(store), count)
    ids = torch.from_numpy(store.ids(positions).astype(np.int64))
    rows, accuracies = naive_pictures(ids, tokenizer, adapt)
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.picture_grid(rows, out)
    print(f"{out}: {len(positions)} of {len(store):,} images of split {store.split!r}")
    _print_table(
        ["tokens that are right", "percent"], [[name, f"{value:.1f}"] for name, value in accuracies.items()]
    )


def _print_store(store: TokenStore, document: dict) -> None:
    grid = "one for each image" if store.grid is None else f"{store.grid[0]} x {store.grid[1]}"
    grid = f"a sequence of {store.grid[1]}" if store.layout == layout.SEQUENCE else grid
    print(f"format       {document['version']}, fingerprint {store_fingerprint(store.path, document)[:16]}")
    print(f"grid         {grid}")
    books, values = store.books, " x ".join(map(str, store.books.sizes))
    if books.combine == "index":
        print(f"codebook     {store.num_codes} codes of dimension {books.dim}")
    else:
        print(f"codebook     {books.digits} tables, {books.combine} to vectors of dimension {books.dim}")
    if books.digits > 1:
        print(f"digits       {values} values")
    print(f"codec        {store.codec.name}")
    size, images = _disk_bytes(store.path), sum(split["rows"] for split in document["splits"].values())
    print(f"on disk      {size:,} bytes, {size / images:.1f} per image")
    spec = (store.tokenizer or {}).get("spec") or {}
    fingerprint = (store.tokenizer or {}).get("fingerprint", "not recorded")
    print(f"tokenizer    {' '.join([*([spec['kind']] if 'kind' in spec else []), fingerprint[:16]])}")
    names = store.class_names or []
    shown = ", ".join(names[:SHOWN_CLASSES]) + (", .." if len(names) > SHOWN_CLASSES else "")
    several = ", several an image" if store.multi_label else ""
    print(f"classes      {store.num_classes}{several}{': ' + shown if names else ''}")
    for split, entry in document["splits"].items():
        if "num_labeled" in entry:
            print(f"no label     {entry['rows'] - entry['num_labeled']:,} of {entry['rows']:,} images of {split}")
    print()


def _print_splits(splits: Iterable[TokenStore], figures: Iterable[Figures]) -> None:
    header = [
        "split",
        "images",
        "codes used",
        "entropy, bits per token",
        "bytes per image",
        "at the entropy",
        "ratio",
    ]
    rows, sources = [], []
    for store, measured in zip(splits, figures, strict=True):
        bits = sum(map(layout.entropy, measured.counts)) + 0.0  # turns the -0.0 of a single code into 0.0
        bound, size = bits * measured.tokens / measured.images / 8, store.payload_bytes / len(store)
        used = f"{sum(map(np.count_nonzero, measured.counts))} of {sum(store.books.sizes)}"
        numbers = [f"{bits:.3f}", f"{size:.1f}", f"{bound:.1f}", f"{size / bound:.3f}" if bound else "-"]
        rows.append([store.split, f"{len(store):,}", used, *numbers])
        source_bytes = _source_bytes(store)
        if source_bytes is not None:
            average = source_bytes / len(store)
            sources.append(f"{store.split}: {average:,.1f} bytes per image, {average / size:.1f} times as many")
    _print_table(header, rows)
    if sources:
        print("\nimage files that the tokens come from")
        print("\n".join(sources))


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table with its first column aligned to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for first, *rest in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def _sizes(store: str | Path) -> str:
    if is_bucket(store):
        document = layout.parse_document(Bucket(str(store)).read(layout.DOCUMENT), store)
    else:
        document = layout.read_document(Path(store))
    splits = document["splits"]
    return ", ".join(f"{split} {entry['rows']:,} images" for split, entry in splits.items())


def _draw(images: "list[Tensor]", titles: list[str], path: Path) -> None:
    """Draw images (3, height, width) in [0, 1] with their titles on a square grid."""
    from matplotlib import pyplot as plt

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.7 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title if len(title) <= 20 else f"{title[:19]}..", fontsize=8, parse_math=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message}; {self.prog} --help explains the arguments")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is not None and name not in commands:
        raise CliError(f"unknown command {name!r}, expected one of {', '.join(commands)}{suggest(name, commands)}")
    flags = set(re.findall(r"--[a-z-]+", commands.get(name, parser).format_help()))
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and flag not in flags:
            raise CliError(
                f"unknown flag {flag}{suggest(flag, flags)}; {commands.get(name, parser).prog} --help lists them"
            )
    return parser.parse_args(arguments or ["--help"])


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser, and the parser of each command by its name."""
    parser = _Parser("seitpp", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(run: Callable[..., None], *positional: tuple[str, str, dict]) -> _Parser:
        name, text = run.__name__.replace("_", "-"), " ".join((run.__doc__ or "").split())
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        for argument, help_text, more in positional:
            command.add_argument(argument, metavar=argument.upper(), help=help_text, **more)
        return command

    store = ("store", "folder of the store", {"type": Path})
    out = ("out", "folder to create; it must not exist yet", {"type": Path})
    repo_id = ("repo_id", "OWNER/NAME on the hub, or the URL of a bucket (s3://, gs://, az://)", {})
    codec = {"choices": list(CODECS), "metavar": "NAME", "help": f"codec to write with: {', '.join(CODECS)}"}
    add(info, store)
    add(verify, store)
    command = add(show, store)
    command.add_argument("--tokenizer", type=Path, metavar="FILE", help="decodes the ids (default: draw colors)")
    command.add_argument("--tokenizer-kind", metavar="KIND", help="where the files do not show it (cosmos)")
    command.add_argument("--out", type=Path, required=True, metavar="PICTURE.png", help="a new file")
    command.add_argument(
        "--count", type=int, metavar="N", help=f"images (default: {SHOWN}, with --augment {AUGMENTED})"
    )
    command.add_argument("--split", metavar="NAME", help="split to show (default: the first)")
    flipped = "draw the images flipped and cropped, as images and as tokens"
    command.add_argument("--augment", action="store_true", help=flipped)
    command.add_argument("--tokenadapt", metavar="RUN", help="also by this TokenAdapt")
    add(recode, store, out).add_argument("--codec", required=True, **codec)
    add(finish, ("store", "folder or URL of the store, as given to tokenize_images --out", {}))
    others = ("others", "folders of the stores to append", {"type": Path, "nargs": "+"})
    command = add(append, store, others)
    command.add_argument("--split", default="train", metavar="NAME", help="split to append to (default: train)")
    add(merge, out, ("stores", "folders of the stores to join", {"type": Path, "nargs": "+"}))
    command = add(subset, store, out)
    chosen = command.add_mutually_exclusive_group(required=True)
    share = "fraction of the images, chosen as --fraction of a training recipe; other splits stay whole"
    chosen.add_argument("--fraction", type=float, metavar="F", help=share)
    chosen.add_argument("--classes", nargs="+", metavar="NAME", help="images of these classes, of all splits")
    command.add_argument("--seed", type=int, metavar="N", help="of --fraction, as of a recipe (default: 0)")
    command.add_argument("--split", metavar="NAME", help="split of --fraction (default: train)")
    command = add(reshuffle, store, out)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the order (default: 0)")
    command.add_argument("--split", default="train", metavar="NAME", help="split to reorder (default: train)")
    files = "folder of the released files, or single NAME-token.data.bin.gz files"
    command = add(import_release, ("sources", files, {"type": Path, "nargs": "+"}), out)
    command.add_argument("--grid", type=int, nargs=2, metavar=("H", "W"), help="token grid (default: square)")
    command.add_argument("--codec", default="ans", **codec)
    add(export_release, store, out)
    run_folder = ("folder", "folder of a run of seit_train, finetune or mtm_pretrain", {"type": Path})
    average = "export the trained weights even if the run has their moving average"
    add(export_model, run_folder, out).add_argument("--no-ema", dest="ema", action="store_false", help=average)
    pushed = ("folder", "a store, or a folder that export-model wrote", {"type": Path})
    add(push, pushed, repo_id).add_argument("--private", action="store_true", help="make a new repository private")
    add(pull, repo_id, ("folder", "folder to create (default: in the user's cache)", {"type": Path, "nargs": "?"}))
    add(doctor)
    return parser, dict(commands.choices)
