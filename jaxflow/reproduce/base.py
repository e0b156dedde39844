"""The contract of a result: what is measured, what is expected, and a figure of both.

    RESULT = Result("staircase", "2410.06833", "Five tokens at beta = 4 ...", Seconds(9, 9), run)
    run(quick) -> Outcome(rows, draw, schemes)

A row passes where |measured - expected| <= tolerance. Expected values are closed forms, quadratures
or numbers of the literature, and each tolerance says what it allows for. All is in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import jax.numpy as jnp
import numpy as np

from .._types import ArrayLike
from ..fields import AbstractField
from ..flow import FlowSolution, flow
from ..measure import Measure
from ..solvers import NormalisedEuler
from ..viz.style import require

STEP = 0.1  # of the published scripts
TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-9)


class Row(NamedTuple):
    """One number: measured with the library, expected by theory; `why`: the tolerance's reason."""

    what: str
    measured: float
    expected: float
    tolerance: float
    why: str

    @property
    def passed(self) -> bool:
        return bool(abs(self.measured - self.expected) <= self.tolerance)


class Scheme(NamedTuple):
    """What the published step, Euler and normalisation with h = 0.1, gives where it is off."""

    what: str
    published: float
    exact: float


class Outcome(NamedTuple):
    """What a result found: rows, what draws a figure of matplotlib, which need not be there, and
    what the published step gives."""

    rows: Sequence[Row]
    draw: Callable[[], Any]
    schemes: Sequence[Scheme] = ()


class Seconds(NamedTuple):
    """What a result costs on two cores, compilation included."""

    quick: float | int
    full: float | int


class Result(NamedTuple):
    """A published result: its name, arXiv number, one line, cost, how it is computed, and whose its
    numbers of tokens, temperatures and times are."""

    name: str
    arxiv: str
    line: str
    seconds: Seconds
    run: Callable[[bool], Outcome]
    parameters: str = "ours"

    def cost(self, quick: bool) -> float | int:
        return self.seconds.quick if quick else self.seconds.full


def panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with axes side by side."""
    figure = require("matplotlib.figure").Figure(figsize=(4.6 * count, 3.8), layout="constrained")
    return figure, list(np.ravel(figure.subplots(1, count)))


def exact(field: AbstractField, mu0: Measure, ts: ArrayLike, **options: Any) -> FlowSolution:
    """The flow, saved at ts, with rtol = atol = 1e-9 unless said."""
    ts = jnp.asarray(ts, float)
    saveat = diffrax.SaveAt(ts=ts)
    options = {"stepsize_controller": TIGHT, "max_steps": 100_000} | options
    return flow(field, mu0, t1=ts[-1], saveat=saveat, **options)


def time_of(event: diffrax.Event, field: AbstractField, mu0: Measure, t1: float) -> float:
    """When an event of `jaxflow.events` happens in the flow; t1 where it does not before."""
    options = {"stepsize_controller": TIGHT, "max_steps": 100_000}
    return float(flow(field, mu0, t1=t1, event=event, **options).ts[-1])


def published(field: AbstractField, mu0: Measure, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The times and the points (steps + 1, n, d) of the published scheme with h = 0.1."""
    sol = flow(
        field,
        mu0,
        t1=STEP * steps,
        dt0=STEP,
        solver=NormalisedEuler(),
        saveat=diffrax.SaveAt(t0=True, steps=True),
        max_steps=steps + 1,
    )
    points = np.asarray(sol.measures.points)[: steps + 1]
    return STEP * np.arange(steps + 1), points


def first_time(ts: np.ndarray, values: np.ndarray, level: float) -> float:
    """The first time at which the values are at the level or above; inf where none is."""
    above = np.asarray(values) >= level
    return float(ts[above.argmax()]) if above.any() else float("inf")
