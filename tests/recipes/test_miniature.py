"""tests/long/papers_in_miniature.py: its rows are commands that recipes take, its intervals those of SciPy."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel
from support.paths import ROOT
from support.running import recipe

from seitpp import cli
from seitpp.engine.config import parse

SCRIPT = runpy.run_path(str(ROOT / "tests/long/papers_in_miniature.py"))
ROWS = {row.name: row for row in SCRIPT["ROWS"]}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_a_command_of_its_recipe(name: str) -> None:
    row = ROWS[name]
    places = {place: "3" if place == "seed" else f"made/{place}" for place in re.findall(r"{([\w-]+)}", row.words)}
    assert places.keys() <= {*ROWS, "seed", "pictures", "out"}
    words = re.sub(r"{([\w-]+)}", lambda place: places[place[1]], row.words).split()
    if row.recipe == "seitpp":
        cli._parse(words)
    else:
        config = parse(recipe(row.recipe).PRESETS, "digits", [*words, "--out", "made/row"])
        assert "seed" not in places or config.seed == 3


def test_claims_have_rows_and_names_of_their_own() -> None:
    claims = SCRIPT["CLAIMS"]
    assert {row for claim in claims for row in (claim.first, claim.than)} <= ROWS.keys()
    assert len({claim.name for claim in claims}) == len(claims) > 30


def test_a_difference_is_judged_by_students_t() -> None:
    pairs = np.random.default_rng(0).normal([60, 58], 1, size=(5, 2))
    interval = ttest_rel(*pairs.T).confidence_interval(0.95)
    cells = SCRIPT["judged"](pairs.tolist())
    low, high = map(float, re.findall(r"[+-][\d.]+", cells[2])[1:])
    assert (low, high) == (pytest.approx(interval.low, abs=0.05), pytest.approx(interval.high, abs=0.05))
    assert cells[-1] == ("holds" if interval.low > 0 else "not decided")
    assert SCRIPT["judged"](pairs[:, ::-1].tolist())[-1] == (
        "does not hold" if interval.low > 0 else "not decided"
    )


def test_what_is_known_is_not_run_again(tmp_path: Path) -> None:
    known = {claim.name: {str(seed): [2.0 + seed, 1.0] for seed in range(2)} for claim in SCRIPT["CLAIMS"]}
    miniature = SCRIPT["Miniature"](tmp_path, tmp_path, 2, known)
    miniature.run_all(SCRIPT["CLAIMS"], jobs=1)
    miniature.note()
    assert json.loads((tmp_path / "pairs.json").read_text()) == known
    assert len((tmp_path / "claims.md").read_text().splitlines()) == 2 + len(known)
