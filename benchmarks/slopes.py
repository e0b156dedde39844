"""The exponent a of a power law, value ~ n^a, where measurements carry one.

By least squares on the logarithms over the largest sizes: the fewest that are `POINTS` and span
`SPAN`. Less, or points off the line by `SPREAD` in the mean square, are no power law yet, and no
exponent is given: three noisy points have a slope, too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

POINTS, SPAN, SPREAD = 4, 10.0, 0.15
LEAST_MIB = 1.0  # of memory in a fit: below it, pages of other origin show


class Slope(NamedTuple):
    """The exponent, or why there is none."""

    exponent: float | None = None
    reason: str | None = None


def largest(sizes: Iterable[int]) -> tuple[int, ...]:
    """The fewest of the largest sizes that a slope can be taken of; all, where they are too few."""
    ordered = sorted(sizes)
    for first in range(len(ordered) - POINTS, -1, -1):
        if ordered[-1] >= SPAN * ordered[first]:
            return tuple(ordered[first:])
    return tuple(ordered)


def slope(values: Mapping[int, float]) -> Slope:
    sizes = largest(values)
    if len(sizes) < POINTS:
        return Slope(reason=f"{len(sizes)} of {POINTS} sizes")
    if sizes[-1] < SPAN * sizes[0]:
        return Slope(reason=f"sizes span a factor {sizes[-1] / sizes[0]:.2g}, below {SPAN:g}")
    x, y = np.log(sizes), np.log([values[n] for n in sizes])
    line = np.polyfit(x, y, 1)
    off = float(np.sqrt(np.mean((y - np.polyval(line, x)) ** 2)))
    if not off <= SPREAD:
        return Slope(reason=f"points are {off:.0%} off the line, over {SPREAD:.0%}")
    return Slope(float(line[0]))


def fit(time: Mapping[int, float], memory: Mapping[int, float]) -> dict:
    """The columns of a row of exponents, of what was measured."""
    measured = {"time": time, "memory": memory}
    found = {name: slope(values) for name, values in measured.items() if values}
    columns = {f"{name}_exponent": s.exponent for name, s in found.items()}
    reasons = [f"no slope of {name}: {s.reason}" for name, s in found.items() if s.reason]
    about = {"from_n": largest(time or memory)[0]}
    return about | columns | ({"note": "; ".join(reasons)} if reasons else {})


def fits(rows: Sequence[Mapping]) -> list[dict]:
    """The exponents of each mode and rival, in n."""
    out = []
    for mode, rival in sorted({(row["mode"], row["rival"]) for row in rows}):
        some = [row for row in rows if (row["mode"], row["rival"]) == (mode, rival)]
        timed = {row["n"]: row["ms"] for row in some if "ms" in row}
        grown = {row["n"]: row["peak_mib"] for row in some if row.get("peak_mib", 0) > LEAST_MIB}
        if timed:
            out.append({"mode": mode, "rival": rival} | fit(timed, grown))
    return out
