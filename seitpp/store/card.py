"""The dataset card (README.md) of a store."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from seitpp.store.layout import counts_of, entropy, is_multi_label

SHOWN = 20  # entries of a list or object of an inventory that the card shows


def card(document: dict[str, Any]) -> str:
    """Return the text of README.md, which depends only on `document`, the content of tokens.json."""
    configs = "".join(f'  - split: "{name}"\n    path: "{name}/*.arrow"\n' for name in document["splits"])
    table = "".join(_row(name, split) for name, split in document["splits"].items())
    label = "tuple of int, or None" if is_multi_label(document) else "int, or None"
    label = label if document["version"] > 1 else "int"
    return f"""---
task_categories:
- image-classification
tags:
- image-tokens
- seitpp
configs:
- config_name: default
  data_files:
{configs}---

# Images as tokens

{_tokens(document)}
The ids are entropy-coded with the codec "{document["codec"]["name"]}". {_entropy(document)}
{_usage(document)}
{_tokenizer(document["tokenizer"])}
| split | images | classes | bytes | bytes an image |
|---|---|---|---|---|
{table}
```python
from seitpp import TokenStore

store = TokenStore("PATH", split="{next(iter(document["splits"]))}")
ids, label = store[0]  # {_shape(document)} uint16, {label}
{_vectors(document)}
```

`datasets.load_from_disk("PATH")` reads the encoded images (`tokens`) and the labels without seitpp.
{_labels(document)}{_inventories(document)}"""


def _tokens(document: dict[str, Any]) -> str:
    """Say what the tokens of an image are."""
    rows, dim = document["num_codes"], document["code_dim"]
    if "layout" in document:
        what = f"a sequence of {document['grid'][1]}"
    else:
        what = f"a grid of {_sides(document['grid'])}"
    if "digits" not in document:
        return f"Each image is {what} ids of a codebook with {rows} codes of dimension {dim}."
    combine, sizes = document["digits"]["combine"], document["digits"]["sizes"]
    values = " x ".join(map(str, sizes))
    if combine == "index":
        codes = f"ids of a codebook with {rows} codes of dimension {dim}"
        return f"Each image is {what} {codes}, in two digits ({values} values)."
    return (
        f"Each image is {what} tokens of {len(sizes)} digits ({values} values), each the row of a table;\n"
        f"their {'sum' if combine == 'sum' else 'concatenation'} is a vector of dimension {dim}."
    )


def _shape(document: dict[str, Any]) -> str:
    return "(digits, height, width)" if "digits" in document else "(height, width)"


def _vectors(document: dict[str, Any]) -> str:
    """Return the line of the example that looks the vectors up."""
    if "digits" not in document:
        return "vectors = store.codebook[ids]  # (height, width, dimension) float32"
    if document["digits"]["combine"] == "index":
        return "vectors = store.codebook[store.books.joined(ids)]  # (height, width, dimension) float32"
    return (
        "rows = [table[digit] for table, digit in zip(store.books.tables, ids)]  # (height, width, dimension) each"
    )


def _usage(document: dict[str, Any]) -> str:
    lines = []
    for number, values in enumerate(counts_of(document)):
        counts = np.asarray(values)
        used, perplexity = int((counts > 0).sum()), 2 ** entropy(counts)
        what = f"values of digit {number}" if "digits" in document else "codes"
        lines.append(f"{used:,} of the {len(counts):,} {what} are used; their perplexity is {perplexity:.1f}.")
    return "\n".join(lines)


def _tokenizer(tokenizer: dict[str, Any] | None) -> str:
    """Return the description of the tokenizer exactly as it was given to the writer."""
    if tokenizer is None:
        return "What tokenizer made the ids is not recorded.\n"
    return f"\nThe tokenizer that made the ids:\n\n```json\n{json.dumps(tokenizer, indent=2)}\n```\n"


def _row(name: str, split: dict[str, Any]) -> str:
    rows, payload_bytes = split["rows"], split["payload_bytes"]
    images, classes = f"{rows:,}", f"{split['num_classes']:,}"
    if "num_labeled" in split:
        images += f" ({rows - split['num_labeled']:,} without a label)"
    return f"| {name} | {images} | {classes} | {payload_bytes:,} | {payload_bytes / rows:.1f} |\n"


def _labels(document: dict[str, Any]) -> str:
    """Say how a missing label is stored, where labels can be missing or are lists."""
    if is_multi_label(document):
        return "`label` is a list of classes, null where they are not known.\n"
    missing = any("num_labeled" in split for split in document["splits"].values())
    return "`label` is -1 where it is not known.\n" if missing else ""


def _inventories(document: dict[str, Any]) -> str:
    """Return a table of what was read for each split and what was left out, long lists shortened."""
    texts = (
        f"\nWhat was read for the split {name}, and what was left out:\n\n| what | count |\n|---|---|\n"
        + "".join(f"| {_cell(what)} | {_cell(count)} |\n" for what, count in _flat(_brief(split["inventory"])))
        for name, split in document["splits"].items()
        if "inventory" in split
    )
    return "".join(texts)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the scalars of a JSON value, each with the names that lead to it; an empty list or object is none."""
    if isinstance(value, Mapping | list) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value, start=1)
        for name, part in items:
            yield from _flat(part, f"{path}, {name}" if path else str(name))
    else:
        missing = "not recorded" if value is None else "none"
        yield path, f"{value:,}" if isinstance(value, int) else str(value or missing)


def _cell(text: str) -> str:
    """Return text as it is shown in one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def _brief(value: Any) -> Any:
    """Shorten the lists and objects of a JSON value to `SHOWN` entries."""
    if isinstance(value, Mapping):
        shown = {key: _brief(one) for key, one in list(value.items())[:SHOWN]}
        return shown if len(value) <= SHOWN else {**shown, "..": f"{len(value) - SHOWN:,} more"}
    if isinstance(value, list):
        shown = [_brief(one) for one in value[:SHOWN]]
        return shown if len(value) <= SHOWN else [*shown, f".. {len(value) - SHOWN:,} more"]
    return value


def _sides(grid: list[int] | None) -> str:
    return "its own height x width" if grid is None else f"{grid[0]} x {grid[1]}"


def _entropy(document: dict[str, Any]) -> str:
    bits = sum(entropy(np.asarray(counts)) for counts in counts_of(document))
    text = f"The entropy of the codec's table is {bits:.3f} bits a token"
    if document["grid"] is None:
        return f"{text}."
    height, width = document["grid"]
    return f"{text},\nwhich is {bits * height * width / 8:.1f} bytes an image."
