"""Rows of a comparison: their means over seeds, and the Pareto front."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple


class Score(NamedTuple):
    """A mean over seeds and its standard deviation, which is 0 for one seed; in percent."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        """Return the score of the values of all seeds."""
        return cls(mean(values), stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.1f} +- {self.deviation:.1f}"


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the positions of the points (cost, value) that no other point beats, by rising cost.

    A point is beaten by one that costs no more and is worth no less, and is not its equal; of equal points the
    first is kept.
    """
    order = sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1], at))
    front: list[int] = []
    for at in order:
        if not front or points[at][1] > points[front[-1]][1]:
            front.append(at)
    return front
