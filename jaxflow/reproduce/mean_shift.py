"""Mean shift: probes climb to the modes of a smoothed density, and blurred data contract.

Attention with scores of distances moves x to the mean of its neighbours (arXiv 2512.01868 names the
connection). Of data at -1 and 1, x' = tanh(beta x) - x: the modes are x = tanh(beta x), two from
beta = 1 on and one below. One step x <- E_{mu_x}[y] takes N(0, s) to N(0, s^3 / (s + 1/beta)^2).
Both are derived here, from the Gaussian kernel.
"""

from functools import partial

import diffrax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq

from ..fields import AbstractField, MeanShift
from ..flow import flow
from ..geometry import Euclidean
from ..measure import Measure
from .base import Outcome, Result, Row, Seconds, panels

BETA, BELOW = 2.0, 0.5
DATA = np.array([[-1.0], [1.0]])


def run(quick: bool) -> Outcome:
    mode = float(np.asarray(brentq(lambda x: np.tanh(BETA * x) - x, 0.5, 1.0)))
    starts = np.linspace(-1.8, 1.8, 24)
    ts = np.linspace(0, 60, 241)
    paths = {beta: climb(beta, starts, ts) for beta in (BETA, BELOW)}
    away = np.abs(np.abs(paths[BETA][-1]) - mode).max()
    variances = blurred(BETA, 3)
    rows = [
        Row(f"farthest probe from a mode +-{mode:.6f}, beta = {BETA:g}", float(away), 0.0, 1e-7,
            "the solver"),
        Row(f"farthest probe from 0, beta = {BELOW:g}", float(np.abs(paths[BELOW][-1]).max()), 0.0,
            1e-7, "the solver, and e^{-t/2}"),
        *(
            Row(f"variance after step {k + 1} of blurring mean shift", float(found), float(theory),
                1e-9, "Gauss-Hermite nodes, exact for Gaussian laws")
            for k, (found, theory) in enumerate(zip(variances, shrunk(BETA, 3), strict=True))
        ),
    ]  # fmt: skip
    return Outcome(rows, partial(draw, ts, paths, mode))


def climb(beta: float, starts: np.ndarray, ts: np.ndarray) -> np.ndarray:
    """The paths of probes, while the data stay where they are."""
    data = Measure(jnp.asarray(DATA))
    tight = diffrax.PIDController(rtol=1e-10, atol=1e-10)
    sol = flow(
        _Frozen(MeanShift(beta), data),
        Measure(jnp.asarray(starts)[:, None]),
        t1=ts[-1],
        saveat=diffrax.SaveAt(ts=jnp.asarray(ts)),
        stepsize_controller=tight,
    )
    return np.asarray(sol.measures.points)[..., 0]


class _Frozen(AbstractField):
    """(t, x, mu) -> X[data](x)."""

    shift: MeanShift
    data: Measure

    def __init__(self, shift: MeanShift, data: Measure):
        self.shift, self.data = shift, data

    def __call__(self, t, x, mu):
        return self.shift(t, x, self.data)

    @property
    def geometry(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return Euclidean()


def blurred(beta: float, steps: int) -> np.ndarray:
    """The variances of N(0, 1) after each step of length 1."""
    z, w = np.polynomial.hermite_e.hermegauss(64)
    sol = flow(
        MeanShift(beta),
        Measure(jnp.asarray(z)[:, None], jnp.asarray(np.log(w))),
        t1=float(steps),
        dt0=1.0,
        solver=diffrax.Euler(),
        saveat=diffrax.SaveAt(ts=jnp.arange(1.0, steps + 1)),
    )
    return np.asarray(sol.measures.covariance)[:, 0, 0]


def shrunk(beta: float, steps: int) -> list[float]:
    found, s = [], 1.0
    for _ in range(steps):
        s = s**3 / (s + 1 / beta) ** 2
        found.append(s)
    return found


def draw(ts, paths, mode):
    figure, axes = panels(2)
    for axis, (beta, x) in zip(axes, paths.items(), strict=True):
        axis.plot(ts, x, color="C0", lw=0.8)
        for place in (mode, -mode) if beta > 1 else (0.0,):
            axis.axhline(place, color="C1", ls="--")
        axis.set(xlabel="$t$", ylabel="probe $x$", xlim=(0, 12))
        axis.set_title(rf"$\beta$ = {beta:g}; dashed: $x = \tanh \beta x$")
    return figure


RESULT = Result(
    "mean-shift",
    "2512.01868",
    "probes climb to the modes of a smoothed density; blurred Gaussian data contract",
    Seconds(8, 8),
    run,
)
