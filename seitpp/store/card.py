"""The dataset card (README.md) of a store."""

import json
from typing import Any

import numpy as np

from seitpp.store.layout import entropy


def card(document: dict[str, Any]) -> str:
    """Return the text of README.md, which depends only on `document`, the content of tokens.json."""
    configs = "".join(f'  - split: "{name}"\n    path: "{name}/*.arrow"\n' for name in document["splits"])
    table = "".join(_row(name, **split) for name, split in document["splits"].items())
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

Each image is a grid of {_sides(document["grid"])} ids of a codebook with {document["num_codes"]} codes \
of dimension {document["code_dim"]}.
The ids are entropy-coded with the codec "{document["codec"]["name"]}". {_entropy(document)}
{_usage(document)}
{_tokenizer(document["tokenizer"])}
| split | images | classes | bytes | bytes an image |
|---|---|---|---|---|
{table}
```python
from seitpp import TokenStore

store = TokenStore("PATH", split="{next(iter(document["splits"]))}")
ids, label = store[0]  # (height, width) uint16, int
vectors = store.codebook[ids]  # (height, width, dimension) float32
```

`datasets.load_from_disk("PATH")` reads the encoded images (`tokens`) and the labels without seitpp.
"""


def _usage(document: dict[str, Any]) -> str:
    counts = np.asarray(document["codec"]["counts"])
    used, perplexity = int((counts > 0).sum()), 2 ** entropy(counts)
    return f"{used:,} of the {len(counts):,} codes are used; their perplexity is {perplexity:.1f}."


def _tokenizer(tokenizer: dict[str, Any] | None) -> str:
    """Return the description of the tokenizer exactly as it was given to the writer."""
    if tokenizer is None:
        return "What tokenizer made the ids is not recorded.\n"
    return f"\nThe tokenizer that made the ids:\n\n```json\n{json.dumps(tokenizer, indent=2)}\n```\n"


def _row(name: str, rows: int, payload_bytes: int, num_classes: int) -> str:
    return f"| {name} | {rows:,} | {num_classes:,} | {payload_bytes:,} | {payload_bytes / rows:.1f} |\n"


def _sides(grid: list[int] | None) -> str:
    return "its own height x width" if grid is None else f"{grid[0]} x {grid[1]}"


def _entropy(document: dict[str, Any]) -> str:
    bits = entropy(np.asarray(document["codec"]["counts"]))
    text = f"The entropy of the codec's table is {bits:.3f} bits a token"
    if document["grid"] is None:
        return f"{text}."
    height, width = document["grid"]
    return f"{text},\nwhich is {bits * height * width / 8:.1f} bytes an image."
