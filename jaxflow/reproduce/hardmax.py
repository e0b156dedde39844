"""Leaders of hardmax attention, and those who go to them (arXiv 2407.01602).

    x_i <- x_i + a/(1+a) (y_i - x_i),    y_i = the mean over C_i = argmax_j <x_i, x_j>

A leader has C_i = {i} and does not move; nor does it cease to lead, as the hull of the tokens can
only shrink. Who follows it comes nearer by the factor 1/(1+a) a step, and like e^{-t} in
x' = y - x, which is solved exactly between changes of leaders.
"""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from ..fields import AbstractField, Hardmax, LinearDrift, SelfAttention
from ..flow import flow
from ..geometry import Euclidean
from ..hardmax import HardmaxFlow, hardmax_flow
from ..measure import Measure, circle, gaussian
from .base import Outcome, Result, Row, Seconds, panels

RATIO, STEPS, T1 = 0.5, 10, 24.0


def run(quick: bool) -> Outcome:
    gaps, moved = iterate()
    factors = gaps[1:] / gaps[:-1]
    sol = hardmax_flow(
        field(), gaussian(40, 2, key=jax.random.key(3)), t1=T1, ts=np.linspace(0, T1, 121)
    )
    x, leaders, first = np.asarray(sol.measures.points), leading(sol, -1), leading(sol, 0)
    away = np.linalg.norm(x[:, :, None] - x[-1:, None, leaders], axis=-1).min(axis=-1)
    followers = np.setdiff1d(np.arange(x.shape[1]), leaders)
    rate = np.log(away[90, followers] / away[60, followers]) / (sol.ts[90] - sol.ts[60])
    rounding = "rounding"
    rows = [
        Row("largest move of a leader, 10 steps", moved, 0.0, 1e-13, rounding),
        Row("least factor of a step", float(factors.min()), 1 / (1 + RATIO), 1e-11, rounding),
        Row("largest factor of a step", float(factors.max()), 1 / (1 + RATIO), 1e-11, rounding),
        Row(
            f"largest move of a leader of 40 Gaussian tokens, t = {T1:g}",
            float(np.abs(x[-1, first] - x[0, first]).max()),
            0.0,
            1e-11,
            "rounding, over some hundred exponentials",
        ),
        Row(
            f"farthest token from its leader, t = {T1:g}",
            float(away[-1].max()),
            0.0,
            1e-6,
            "e^{-t} with a power of t for each leader in between",
        ),
        Row(
            "median rate of approach, t from 12 to 18",
            float(np.median(rate)),
            -1.0,
            1e-6,
            "those who follow one that itself is on its way are slower",
        ),
    ]
    return Outcome(rows, partial(draw, sol, away, leaders, gaps))


def field() -> AbstractField:
    """y - x."""
    return SelfAttention(interaction=Hardmax(), geometry=Euclidean()) + LinearDrift(-1.0)


def iterate() -> tuple[np.ndarray, float]:
    """The distances of 59 Gaussian tokens to their leaders on a pentagon, (steps + 1, 59), and how
    far a leader moves."""
    mu0 = Measure(
        jnp.concatenate([4 * circle(5).points, gaussian(59, 2, key=jax.random.key(0)).points])
    )
    sol = flow(
        RATIO / (1 + RATIO) * field(),
        mu0,
        t1=float(STEPS),
        dt0=1.0,
        solver=diffrax.Euler(),
        saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, STEPS, STEPS + 1)),
    )
    x = np.asarray(sol.measures.points)
    leader = (x[0] @ x[0, :5].T).argmax(axis=1)
    gaps = np.linalg.norm(x - x[:, leader], axis=-1)[:, 5:]
    return gaps, float(np.abs(x[:, :5] - x[:1, :5]).max())


def leading(sol: HardmaxFlow, piece: int) -> np.ndarray:
    """The tokens that follow themselves alone, between two events."""
    return np.flatnonzero(np.diag(sol.leaders[piece]) == 1)


def draw(sol: HardmaxFlow, away, leaders, gaps):
    figure, (left, middle, right) = panels(3)
    x = np.asarray(sol.measures.points)
    left.plot(*x.transpose(2, 0, 1), color="#B0B0B0", lw=0.7)
    left.plot(*x[0].T, "o", ms=4, label="start")
    left.plot(*x[-1, leaders].T, "*", ms=12, label="leaders")
    left.set(xlabel="$x_1$", ylabel="$x_2$", title="40 Gaussian tokens")
    middle.semilogy(sol.ts, np.maximum(away, 1e-16), color="#B0B0B0", lw=0.7)
    middle.semilogy(sol.ts, np.exp(-sol.ts), "--", label="$e^{-t}$")
    middle.set(xlabel="$t$", ylabel="distance to the nearest leader", ylim=(1e-12, 10))
    steps = np.arange(STEPS + 1)
    right.semilogy(steps, gaps, color="#B0B0B0", lw=0.7)
    right.semilogy(steps, (1 + RATIO) ** -steps.astype(float), "--", label="$(1+a)^{-k}$")
    right.set(xlabel="step", ylabel="distance to the leader", title="leaders on a pentagon")
    for axes in (left, middle, right):
        axes.legend()
    return figure


RESULT = Result(
    "hardmax",
    "2407.01602",
    "leaders of hardmax attention do not move, and others approach them at known rates",
    Seconds(7, 7),
    run,
)
