"""Measure continual learning on the digits, 5 tasks: accuracy against the bytes of the memory, tokens and pixels.

    python tests/bench/continual_digits.py --out RUNS [--seeds 5]

Each run is recipes/continual.py, preset digits, with the flags of a row of ROWS and a size of the memory; runs
that RUNS has already are not repeated. The table has the average accuracy over the tasks after the last one and
the forgetting, mean +- standard deviation over the seeds, in percent. The script only reports; no result makes it
fail. RUNS/figure/memory.png shows the rows of the paper's count.
"""

import argparse
import contextlib
import io
import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np

RECIPE = Path(__file__).parents[2] / "recipes/continual.py"
SIZES = ("24.6kB", "123kB", "614.4kB")
# Input, count, and sizes of the memory; tokens as stored are all in one of 123 kB.
ROWS = (
    ("tokens", "paper", SIZES),
    ("tokens", "stored", SIZES[:1]),
    ("pixels", "paper", SIZES),
    ("pixels", "uint8", SIZES[:1]),
    ("pixels", "jpeg", SIZES[:1]),
)
NOTHING, JOINT = {"memory": "0"}, {"memory": "0", "tasks": 1}


def settings() -> dict[str, dict]:
    """Return the settings of all runs by name."""
    found = {}
    for kind, count, sizes in ROWS:
        for size in sizes:
            found[f"{kind}-{count}-{size}"] = {"input": kind, "count": count, "memory": size}
    for kind in ("tokens", "pixels"):
        found |= {f"{kind}-none": {"input": kind, **NOTHING}, f"{kind}-joint": {"input": kind, **JOINT}}
    return found


def spread(values: list[float | None]) -> str:
    """Format the mean and the standard deviation, nothing for a figure that does not exist."""
    return "" if None in values else f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = runpy.run_path(str(RECIPE))

    def run(out: Path, **changes: object) -> dict:
        if not (out / "result.json").exists():
            config = replace(recipe["PRESETS"]["digits"], out=str(out), overwrite=True, **changes)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                recipe["main"](config)
        return json.loads((out / "result.json").read_text())

    results = {name: [] for name in settings()}
    for seed in range(arguments.seeds):
        for name, changes in settings().items():
            results[name].append(run(arguments.out / f"{name}-{seed}", seed=seed, **changes))
            print(f"seed {seed}, {name}: {results[name][-1]['average_accuracy']:.1f}", flush=True)
    shown = [name for name in results if "paper" in name or "none" in name or "joint" in name]
    runs = [str(arguments.out / f"{name}-{seed}") for name in shown for seed in range(arguments.seeds)]
    run(arguments.out / "figure", figure=tuple(runs))
    print("| run | bytes an image | images in the memory | average accuracy | forgetting | seconds |")
    print("|---|---|---|---|---|---|")
    for name, found in results.items():
        means = [spread([result[key] for result in found]) for key in ("average_accuracy", "forgetting")]
        images, size = sum(found[0]["held_by_task"]), found[0]["bytes_per_image"]
        print(f"| {name} | {size:,.1f} | {images:,} | {' | '.join(means)} | {found[0]['seconds']:.0f} |")


if __name__ == "__main__":
    main()
