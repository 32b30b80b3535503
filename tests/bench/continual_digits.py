"""Measure continual learning on the digits, 5 tasks: accuracy against the bytes of the memory, tokens and pixels.

    python tests/bench/continual_digits.py --out RUNS [--seeds 5]

Each run is recipes/continual.py, preset digits, with one of SIZES as the memory by the paper's count; runs that
RUNS has already are not repeated. The table has the average accuracy over the tasks after the last one and the
forgetting, mean +- standard deviation over the seeds, in percent. What a memory does depends only on the number of
its images, so the table says how many bytes so many images are by the other counts. The script only reports; no
result makes it fail. RUNS/figure/memory.png is the figure of all runs.
"""

import argparse
import contextlib
import io
import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np

from downstream.continual.sizes import COUNTS, pixel_bytes, token_bytes
from seitpp import TokenStore
from seitpp.data.digits import DigitsSource, digits

RECIPE = Path(__file__).parents[2] / "recipes/continual.py"
SIZES = ("24.6kB", "123kB", "614.4kB")
NOTHING, JOINT = {"memory": "0"}, {"memory": "0", "tasks": 1}


def settings() -> dict[str, dict]:
    """Return the settings of all runs by name."""
    found = {}
    for kind in ("pixels", "tokens"):
        found |= {f"{kind}-{size}": {"input": kind, "memory": size} for size in SIZES}
        found |= {f"{kind}-none": {"input": kind, **NOTHING}, f"{kind}-joint": {"input": kind, **JOINT}}
    return found


def other_counts(side: int) -> dict[str, dict[str, float]]:
    """Return the bytes of an image of the digits by the counts that are not the paper's."""
    pixels = {count: pixel_bytes((3, side, side), DigitsSource("train"), count) for count in COUNTS["pixels"][1:]}
    return {"tokens": {"stored": token_bytes(TokenStore(digits().store), "stored")}, "pixels": pixels}


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
    runs = [str(arguments.out / f"{name}-{seed}") for name in results for seed in range(arguments.seeds)]
    run(arguments.out / "figure", figure=tuple(runs))
    other = other_counts(recipe["PRESETS"]["digits"].size)
    columns = ("run", "images", "by the other counts", "average accuracy", "forgetting", "seconds")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, found in results.items():
        means = [spread([result[key] for result in found]) for key in ("average_accuracy", "forgetting")]
        images, seconds = sum(found[0]["held_by_task"]), np.mean([result["seconds"] for result in found])
        sizes = [f"{count} {images * size / 1000:.1f} kB" for count, size in other[found[0]["input"]].items()]
        print(f"| {name} | {images:,} | {', '.join(sizes)} | {' | '.join(means)} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
