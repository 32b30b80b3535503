"""File names, `tokens.json` and checksums of a store; docs/format.md is the normative description."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float32, Integer

from seitpp.books import Books, is_digits
from seitpp.codec import MAX_CODES, MAX_TOKENS
from seitpp.codec.base import MAX_COUNT_SUM
from seitpp.errors import UserError
from seitpp.files import sha256, write_file

FORMAT = "seitpp-token-store"
# Versions 2 and 3 are written only where a store needs them: older versions of seitpp read all other stores.
VERSIONS = (1, 2, 3)

DOCUMENT = "tokens.json"
CODEBOOK = "codebook.safetensors"
TABLE = "codec.table"
CARD = "README.md"
DATASET_DICT = "dataset_dict.json"
DATASET_INFO = "dataset_info.json"
STATE = "state.json"
# The key of state.json with the number of images of each of several shards.
SHARD_ROWS = "_shard_rows"
# Rewritten whenever a split is added.
DERIVED = (CARD, DATASET_DICT)

MAX_CODE_DIM = 2**16
MAX_ROWS = 2**32
MAX_DOCUMENT_BYTES = 2**26
MAX_VALUES = 2**21
MAX_SPLITS = 2**10
MAX_CODEBOOK_NUMBERS = 2**26
MAX_TABLE_BYTES = 2**28
MAX_SHARD_BYTES = 2**34
MAX_INVENTORY_BYTES = 2**20
# A split, and images that are decoded at once, have so many tokens, or so many for each byte of their payloads: a
# payload of two bytes can be an image of 2^24 equal tokens.
FREE_TOKENS = 2**28
TOKENS_PER_BYTE = 2**12
# An image of lists of classes, and a classifier, take memory for each class.
MAX_CLASSES = 2**20
# The header of the codebook's file, which has one tensor.
HEADER_BYTES = 2**16

# In the order of tokens.json, where the checksum follows them.
KEYS = (
    "format",
    "version",
    "grid",
    "num_codes",
    "code_dim",
    "codec",
    "tokenizer",
    "class_names",
    "splits",
    "files",
)
# In version 3 perhaps also these, after code_dim.
ADDED_KEYS = ("digits", "layout")
SEQUENCE = "sequence"
SPLIT_LIMITS = {"rows": (1, MAX_ROWS), "payload_bytes": (0, 2**63), "num_classes": (0, 2**63)}
SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+")
FILE_NAME = re.compile(r"([A-Za-z0-9_]+/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")


class StoreError(UserError):
    """Raised for a folder that is not a store, for a damaged store, and for data that do not fit the store."""


def shard_name(split: str, index: int, total: int) -> str:
    """Return the path of a shard relative to its store, named as `datasets` does."""
    return f"{split}/data-{index:05d}-of-{total:05d}.arrow"


def shard_names(document: dict[str, Any], split: str) -> list[str]:
    """List the shards of a split in order. Raises StoreError if a shard number is missing."""
    names = sorted(name for name in document["files"] if name.startswith(f"{split}/data-"))
    if not names or names != [shard_name(split, index, len(names)) for index in range(len(names))]:
        raise StoreError(
            f"{DOCUMENT}: the shards of split {split!r} have gaps: got {_short(names)}, expected all numbers from "
            "0; copy the store again"
        )
    return names


def split_entry(
    rows: int, payload_bytes: int, num_classes: int, *, num_labeled: int, multi_label: bool, inventory: Any
) -> dict[str, Any]:
    """Return the entry of a split in tokens.json; what every split of version 1 is like is left out."""
    entry: dict[str, Any] = {"rows": rows, "payload_bytes": payload_bytes, "num_classes": num_classes}
    if num_labeled < rows:
        entry["num_labeled"] = num_labeled
    if multi_label:
        entry["multi_label"] = True
    if inventory is not None:
        entry["inventory"] = inventory
    return entry


def version_of(document: dict[str, Any]) -> int:
    """Return the version of a store, the smallest that can hold its tokens and splits."""
    if set(ADDED_KEYS) & set(document):
        return 3
    return 1 if all(set(entry) == SPLIT_LIMITS.keys() for entry in document["splits"].values()) else 2


def is_multi_label(document: dict[str, Any]) -> bool:
    """Return whether the images of a store have lists of classes; all splits are alike."""
    return any(entry.get("multi_label", False) for entry in document["splits"].values())


def write_document(root: Path, document: dict[str, Any]) -> None:
    """Write tokens.json with its checksum into the folder `root`."""
    first = KEYS.index("code_dim") + 1
    keys = [*KEYS[:first], *(key for key in ADDED_KEYS if key in document), *KEYS[first:]]
    lines = (f"{json.dumps(key)}: {json.dumps(document[key])},\n" for key in keys)
    write_file(root / DOCUMENT, _sealed(("{\n" + "".join(lines)).encode()))


def read_document(root: Path) -> dict[str, Any]:
    """Read tokens.json of the store `root` and check every field; the result includes "checksum".

    Raises StoreError if the file is missing, damaged, of a newer version, or has a value out of range.
    """
    path = root / DOCUMENT
    if not path.is_file() or path.is_symlink():
        raise StoreError(f"{root}: no token store, it has no file {DOCUMENT}; give the folder of a store")
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise StoreError(
            f"{path}: {path.stat().st_size} bytes, expected at most {MAX_DOCUMENT_BYTES}; copy it again"
        )
    return parse_document(path.read_bytes(), path)


def parse_document(raw: bytes, path: object) -> dict[str, Any]:
    """Return the content of tokens.json as `read_document` does; `path` is for the messages."""
    # Counted before they are made: "{}," is 3 bytes of JSON and 72 of memory.
    if (values := sum(map(raw.count, (b"[", b"{", b",")))) > MAX_VALUES:
        raise StoreError(f"{path}: {values} values, expected at most {MAX_VALUES}; copy it again")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: damaged, no JSON ({error}); copy it again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise StoreError(f'{path}: no token store, expected "format": "{FORMAT}"; give the folder of a store')
    if document.get("version") not in VERSIONS:
        expected = f"1 .. {VERSIONS[-1]}"
        raise StoreError(f"{path}: version {_short(document.get('version'))}, expected {expected}; upgrade seitpp")
    if raw != _sealed(raw[: -len(_sealed(b""))]):
        raise StoreError(f"{path}: checksum does not match, the file is damaged or edited; copy it again")
    for problem in _problems(document):
        raise StoreError(f"{path}: {problem}; copy it again")
    return document


def _sealed(body: bytes) -> bytes:
    """Append to `body`, the bytes of tokens.json before its checksum, their checksum."""
    return body + b'"checksum": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


def _problems(document: dict[str, Any]) -> Iterator[str]:
    """Describe what is wrong with tokens.json; later checks rely on earlier ones."""
    added = set(ADDED_KEYS) if document["version"] > 2 else set()
    if not {*KEYS, "checksum"} <= set(document) <= {*KEYS, "checksum"} | added:
        yield f"keys {_short(sorted(document))}, expected {sorted([*KEYS, 'checksum'])}"
    if document["grid"] is not None and not is_grid(document["grid"]):
        yield f"grid {_short(document['grid'])}, expected null or [height, width] of 1 .. {MAX_TOKENS} tokens"
    most = MAX_CODEBOOK_NUMBERS if "digits" in document else MAX_CODES
    if not _is_int(document["num_codes"], 1, most):
        yield f"num_codes {_short(document['num_codes'])}, expected 1 .. {most}"
    if not _is_int(document["code_dim"], 1, MAX_CODE_DIM):
        yield f"code_dim {_short(document['code_dim'])}, expected 1 .. {MAX_CODE_DIM}"
    yield from _problems_of_tokens(document)
    codec = document["codec"]
    if not isinstance(codec, dict) or set(codec) != {"name", "counts"} or not isinstance(codec["name"], str):
        yield f"codec: got {type(codec).__name__}, expected an object with a name and counts"
    if not _is_counts(codec["counts"], document):
        values = " and ".join(map(str, sizes_of(document)))
        yield f"codec: got other counts, expected {values} integers of 0 .. {MAX_COUNT_SUM - 1}"
    names = document["class_names"]
    if names is not None and not is_class_names(names):
        yield "class_names: expected a list of distinct strings, or null"
    if not isinstance(document["files"], dict) or not isinstance(document["splits"], dict):
        yield "files and splits: expected objects"
    if CODEBOOK not in document["files"]:
        yield f"files: no entry {CODEBOOK}, expected one"
    for name, entry in document["files"].items():
        if not FILE_NAME.fullmatch(name):
            yield f"file name {_short(name)}: expected NAME or SPLIT/NAME inside of the store"
        if not _is_file_entry(entry):
            yield f"file {_short(name)}: expected its size in bytes and its SHA-256, got {_short(entry)}"
        if entry["bytes"] > (limit := _most_bytes(document, name)):
            yield f"file {_short(name)}: {entry['bytes']} bytes, expected at most {limit}"
    if len(document["splits"]) > MAX_SPLITS:
        yield f"{len(document['splits'])} splits, expected at most {MAX_SPLITS}"
    for split, entry in document["splits"].items():
        if not SPLIT_NAME.fullmatch(split) or not _is_split_entry(entry, document["version"]):
            yield f"split {_short(split)}: expected its rows, payload_bytes and num_classes, got {_short(entry)}"
    if len({entry.get("multi_label", False) for entry in document["splits"].values()}) > 1:
        yield "splits: some with one class an image and some with lists, expected all alike"


def _problems_of_tokens(document: dict[str, Any]) -> Iterator[str]:
    """Describe what is wrong with the tables of the digits and with the layout."""
    rows, dim = document["num_codes"], document["code_dim"]
    if "digits" in document and not is_digits(document["digits"], rows=rows, dim=dim):
        yield f"digits {_short(document['digits'])}, expected those of {rows} rows and vectors of {dim}"
    if (numbers := codebook_numbers(document)) > MAX_CODEBOOK_NUMBERS:
        yield f"num_codes and code_dim: a codebook of {numbers} numbers, expected at most {MAX_CODEBOOK_NUMBERS}"
    if document.get("layout", SEQUENCE) != SEQUENCE:
        yield f"layout {_short(document['layout'])}, expected {SEQUENCE!r}, or none for rows and columns"
    grid, digits = document["grid"], len(sizes_of(document))
    if "layout" in document and (grid is None or grid[0] != 1):
        yield f"grid {_short(grid)} of a sequence, expected [1, length]"
    if grid is not None and grid[0] * grid[1] * digits > MAX_TOKENS:
        yield f"grid {_short(grid)} of {digits} digits, expected at most {MAX_TOKENS} in all"


def sizes_of(document: dict[str, Any]) -> list[int]:
    """Return the number of values of each digit of a token."""
    return document["digits"]["sizes"] if "digits" in document else [document["num_codes"]]


def codebook_numbers(document: dict[str, Any]) -> int:
    """Return how many numbers all tables of a codebook have."""
    return sum(rows * dim for rows, dim in _table_shapes(document))


def _table_shapes(document: dict[str, Any]) -> list[list[int]]:
    plain = [[document["num_codes"], document["code_dim"]]]
    return document["digits"]["tables"] if "digits" in document else plain


def counts_of(document: dict[str, Any]) -> list[list[int]]:
    """Return how often each value of each digit occurs."""
    counts = document["codec"]["counts"]
    return counts if "digits" in document else [counts]


def _short(value: Any) -> str:
    """Return a value as it is shown in a message: a stranger's may have megabytes."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}.."


def _is_counts(value: Any, document: dict[str, Any]) -> bool:
    sizes, counts = sizes_of(document), value if "digits" in document else [value]
    if not isinstance(counts, list) or not all(isinstance(one, list) for one in counts):
        return False
    if list(map(len, counts)) != sizes:
        return False
    return all(_is_int(count, 0, MAX_COUNT_SUM - 1) for one in counts for count in one)


def _most_bytes(document: dict[str, Any], name: str) -> int:
    """Return the largest size of a listed file: what is not a shard is read as a whole."""
    if name == CODEBOOK:
        return 4 * codebook_numbers(document) + HEADER_BYTES
    if name == TABLE:
        return MAX_TABLE_BYTES
    return MAX_SHARD_BYTES if name.endswith(".arrow") else MAX_DOCUMENT_BYTES


def check_tokens(where: Any, tokens: int, payload_bytes: int) -> None:
    """Raise StoreError for too many tokens in so few bytes of payloads; `where` is for messages."""
    most = FREE_TOKENS + TOKENS_PER_BYTE * payload_bytes
    if tokens > most:
        raise StoreError(
            f"{where}: {tokens} tokens in {payload_bytes} bytes of payloads, expected at most {most}; read fewer "
            "images at once, or copy the split again"
        )


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def is_grid(value: Any) -> bool:
    """Return whether `value` is a list [height, width] with at most 2^24 tokens in total."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(_is_int(side, 1, MAX_TOKENS) for side in value) and value[0] * value[1] <= MAX_TOKENS


def is_shard_rows(value: Any, shards: int, rows: int) -> bool:
    """Return whether `value` is a list of the numbers of images of `shards` shards with `rows` images in all."""
    if not isinstance(value, list) or len(value) != shards or not all(_is_int(one, 1, rows) for one in value):
        return False
    return sum(value) == rows


def is_class_names(value: Any) -> bool:
    """Return whether `value` is a list of one or more distinct strings."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return False
    return len(set(value)) == len(value) > 0


def _is_file_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
        return False
    sha256 = entry["sha256"]
    return _is_int(entry["bytes"], 0, 2**63) and isinstance(sha256, str) and bool(SHA256.fullmatch(sha256))


def _is_split_entry(entry: Any, version: int) -> bool:
    added = {"num_labeled", "multi_label", "inventory"} if version > 1 else set()
    if not isinstance(entry, dict) or not SPLIT_LIMITS.keys() <= set(entry) <= SPLIT_LIMITS.keys() | added:
        return False
    if not all(_is_int(entry[key], *limit) for key, limit in SPLIT_LIMITS.items()):
        return False
    if entry["num_classes"] == 0 and version == 1:
        return False
    labeled, inventory = entry.get("num_labeled", entry["rows"]), entry.get("inventory", {})
    return (
        _is_int(labeled, 0, entry["rows"])
        and type(entry.get("multi_label", False)) is bool
        and isinstance(inventory, dict)
    )


def file_entry(path: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file as an entry of tokens.json."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def check_files(root: Path, files: dict[str, Any], names: Iterable[str], *, checksums: bool) -> None:
    """Compare the sizes of the files `names` in `root`, and their `checksums` if True, with the entries `files`.

    Raises StoreError for the first file that is missing, a symbolic link, or different.
    """
    for name in names:
        path = root / name
        if path.is_symlink() or path.parent.is_symlink():
            raise StoreError(f"{path}: a symbolic link, which could lead outside; copy the file itself there")
        if not path.is_file():
            raise StoreError(f"{path}: missing; copy it again")
        if path.stat().st_size != files[name]["bytes"]:
            raise StoreError(
                f"{path}: {path.stat().st_size} bytes, expected {files[name]['bytes']}; copy it again"
            )
        if checksums and (got := file_entry(path)["sha256"]) != files[name]["sha256"]:
            raise StoreError(
                f"{path}: SHA-256 {got[:12]}.., expected {files[name]['sha256'][:12]}..: damaged or from "
                "another store; copy it again"
            )


def read_books(root: Path, document: dict[str, Any]) -> Books:
    """Read the tables of the store `root`. Raises StoreError if their shapes differ from tokens.json."""
    path, shapes = root / CODEBOOK, [tuple(shape) for shape in _table_shapes(document)]
    names = table_names(len(shapes))
    tables = tuple(load_codebook(path, name) for name in names)
    for name, table, shape in zip(names, tables, shapes, strict=True):
        if table.shape != shape:
            raise StoreError(f"{path}: {name} float32 {table.shape}, expected float32 {shape}; copy it again")
    combine = document["digits"]["combine"] if "digits" in document else "index"
    return Books(tables, combine, tuple(sizes_of(document)))


def table_names(tables: int) -> list[str]:
    """Return the names of the tables in the file of the codebook."""
    return ["codebook"] if tables == 1 else [f"codebook.{number}" for number in range(tables)]


def load_codebook(path: Path, name: str = "codebook") -> Float32[np.ndarray, "codes dim"]:
    """Read a table of a codebook from a store's file. Raises StoreError if the file holds anything else."""
    try:
        codebook = safetensors.numpy.load_file(path)[name]
    except (safetensors.SafetensorError, KeyError) as error:
        raise StoreError(f"{path}: no codebook ({error}); copy it again") from error
    if codebook.ndim != 2 or codebook.dtype != np.float32:
        raise StoreError(f"{path}: {codebook.dtype} {codebook.shape}, expected float32 rows; copy it again")
    return codebook


def read_tables(root: Path, document: dict[str, Any]) -> list[bytes] | None:
    """Read the learned tables of the codec of the store `root`, one for each digit; None if it has none.

    Raises StoreError if they do not fill their file.
    """
    if TABLE not in document["files"]:
        return None
    data = (root / TABLE).read_bytes()
    if "digits" not in document:
        return [data]
    tables = []
    for _ in sizes_of(document):
        size = int.from_bytes(data[:4], "little")
        tables.append(data[4 : 4 + size])
        data = data[4 + size :]
    if data or joined_tables(tables) != (root / TABLE).read_bytes():
        raise StoreError(f"{root / TABLE}: not the tables of {len(tables)} digits; copy it again")
    return tables


def joined_tables(tables: list[bytes]) -> bytes:
    """Return the file of the learned tables of all digits."""
    if len(tables) == 1:
        return tables[0]
    return b"".join(len(table).to_bytes(4, "little") + table for table in tables)


def entropy(counts: Integer[np.ndarray, " codes"]) -> float:
    """Return the entropy in bits per token, the lower bound of every code with one fixed table."""
    probability = counts[counts > 0] / counts.sum()
    return float(-(probability * np.log2(probability)).sum())
