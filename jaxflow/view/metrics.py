"""metrics.jsonl, read as it grows, as curves of a bounded number of points."""

import json
import math
from collections.abc import Sequence
from typing import Any

CLOCKS = "seconds", "total_evaluations"  # beside a run's own axis
MOST_POINTS = 1024  # of a curve
MOST_CURVES = 200
MOST_DAMAGED = 5  # lines that are told

Point = tuple[float, ...]  # a value, where it was measured on the own axis, and on the clocks


class Curve:
    """A metric, thinned: of each bucket of rows, the least and the greatest value.

    Buckets double where there are too many of them, so that all are of one size and no peak is
    lost.
    """

    def __init__(self):
        self.size = 2
        self.whole: list[Point] = []  # two points a bucket
        self.bucket: list[Point] = []

    def add(self, point: Point):
        self.bucket.append(point)
        if len(self.bucket) == self.size:
            self.whole += _extremes(self.bucket)
            self.bucket = []
        if len(self.whole) == MOST_POINTS:
            fours = (self.whole[k : k + 4] for k in range(0, MOST_POINTS, 4))
            self.whole = [point for four in fours for point in _extremes(four)]
            self.size *= 2

    def points(self) -> list[Point]:
        """Those of whole buckets, and the last ones."""
        rest = self.bucket if len(self.bucket) <= 2 else [*_extremes(self.bucket), self.bucket[-1]]
        return self.whole + rest


def _extremes(points: Sequence[Point]) -> tuple[Point, Point]:
    """The two points of least and of greatest value, in their order; the ends of a constant."""
    values = [point[0] for point in points]
    low, high = values.index(min(values)), values.index(max(values))
    if low == high:
        return points[0], points[-1]
    return points[min(low, high)], points[max(low, high)]


class Table:
    """The curves of lines, each a JSON object, and what was wrong with lines."""

    def __init__(self):
        self.axis: str | None = None  # the first entry of the first line: t, beta or step
        self.lines, self.damaged = 0, 0
        self.told: list[str] = []
        self.curves: dict[str, Curve] = {}
        self.last: dict[str, Any] = {}

    def add(self, line: bytes):
        self.lines += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return self._refuse("is not JSON")
        if not isinstance(row, dict) or not row:
            return self._refuse("is no JSON object with entries")
        axis = self.axis or next(iter(row))
        if (at := _number(row.get(axis))) is None:
            return self._refuse(f"has no number {axis!r:.60}")
        self.axis = axis
        place = at, *(math.nan if (t := _number(row.get(c))) is None else t for c in CLOCKS)
        for name, value in row.items():
            self._measure(name, value, place)

    def _measure(self, name: str, value: Any, place: tuple[float, ...]):
        if not isinstance(value, int | float) or isinstance(value, bool):
            return
        if name not in self.last and len(self.last) == MOST_CURVES:
            return
        number = _number(value)
        self.last[name] = str(value)[:40] if number is None else number
        if number is not None and name != self.axis:
            self.curves.setdefault(name, Curve()).add((number, *place))

    def _refuse(self, why: str):
        self.damaged += 1
        if len(self.told) < MOST_DAMAGED:
            self.told.append(f"line {self.lines} {why}")

    def to_json(self) -> dict[str, Any]:
        """What the page draws: columns of each curve, with None where a clock was not told."""
        return {
            "axis": self.axis,
            "lines": self.lines,
            "damaged": self.damaged,
            "told": self.told,
            "last": self.last,
            "curves": {name: _columns(curve.points()) for name, curve in self.curves.items()},
        }


def _columns(points: list[Point]) -> dict[str, list[float | None]]:
    known = lambda column: [value if math.isfinite(value) else None for value in column]
    names, columns = ("y", "own", *CLOCKS), zip(*points, strict=True)
    return {name: known(column) for name, column in zip(names, columns, strict=True)}


def _number(value: Any) -> float | None:
    """A finite number as a float; None for all else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # of an integer
        return None
