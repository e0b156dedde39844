"""Five tokens at beta = 4: a staircase in time (arXiv 2410.06833, its authors' published start).

Two clusters of weights p and q at the angle phi follow, from the softmax of two atoms,

    phi' = -sin(phi) g(phi),    g = q e / (p + q e) + p e / (q + p e),    e = e^{beta (cos phi - 1)}

so that they meet after int du / g(phi(u)), u = log tan(phi / 2). This is derived here; it starts
from the angle of the flow at t = 60, where the other tokens are within e^{-30} of their clusters.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np

from ..events import until_above
from ..fields import SelfAttention
from ..measure import Measure
from ..observables import ClusterCount, InteractionEnergy, inner_products
from .base import (
    Outcome,
    Result,
    Row,
    Scheme,
    Seconds,
    exact,
    first_time,
    panels,
    published,
    time_of,
)

BETA, MET, T1, REDUCED = 4.0, 0.999, 400.0, 60.0
START = np.array(
    [
        [0.99806638, 0.06215705],
        [0.97712061, 0.21268594],
        [-0.24578194, 0.96932515],
        [-0.97354734, 0.2284854],
        [-0.99892629, -0.04632772],
    ]
)
WEIGHTS = 2 / 5, 3 / 5


def run(quick: bool) -> Outcome:
    field = SelfAttention(beta=BETA)
    mu0 = Measure(jnp.asarray(START / np.linalg.norm(START, axis=1, keepdims=True)))
    ts = np.linspace(0, T1, 801)
    observe = {"energy": InteractionEnergy(BETA), "clusters": ClusterCount(MET)}
    sol = exact(field, mu0, ts, observe=observe)
    met = time_of(until_above(lambda t, mu: least(mu), MET), field, mu0, T1)
    steps, loop = published(field, mu0, int(10 * T1))
    late = first_time(steps, np.einsum("tid,tjd->tij", loop, loop).min(axis=(1, 2)), MET)
    angle = float(jnp.arccos(least(sol.measures[int(np.searchsorted(ts, REDUCED))])))
    at_100 = int(np.searchsorted(ts, 100))
    share = np.asarray(sol.observed["energy"]) * 2 * BETA * np.exp(-BETA)
    rows = [
        Row(
            "t at which one cluster is left",
            met,
            REDUCED + meeting_time(angle),
            1e-3,
            "the solver's 1e-9, which the unstable direction amplifies",
        ),
        Row("clusters at t = 100", float(sol.observed["clusters"][at_100]), 2, 0, "a whole number"),
        Row(
            "energy at t = 100, of that of one cluster",
            float(share[at_100]),
            sum(w**2 for w in WEIGHTS),
            1e-3,
            "what two clusters see of each other, 2 p q e^{beta (cos phi - 1)}",
        ),
    ]
    picture = partial(draw, ts, share, sol.observed["clusters"], Measure(jnp.asarray(loop)), steps)
    return Outcome(rows, picture, [Scheme(rows[0].what, late, met)])


def least(mu: Measure):
    """The least inner product of two tokens."""
    return inner_products(mu).min()


def meeting_time(angle: float) -> float:
    """The time from an angle of the two clusters to the inner product MET."""
    p, q = WEIGHTS
    nodes, weights = np.polynomial.legendre.leggauss(200)
    low, high = (np.log(np.tan(a / 2)) for a in (np.arccos(MET), angle))
    u = (low + high) / 2 + (high - low) / 2 * nodes
    e = np.exp(BETA * (np.cos(2 * np.arctan(np.exp(u))) - 1))
    rate = q * e / (p + q * e) + p * e / (q + p * e)
    return float((high - low) / 2 * (weights / rate).sum())


def draw(ts, share, clusters, loop: Measure, steps):
    figure, (left, right) = panels(2)
    energy = np.asarray(InteractionEnergy(BETA)(0.0, loop)) * 2 * BETA * np.exp(-BETA)
    left.plot(ts, share, label="flow")
    left.plot(steps, energy, "--", label="published step, h = 0.1")
    left.axhline(sum(w**2 for w in WEIGHTS), color="grey", lw=0.8, label="$p^2 + q^2$")
    left.set(xlabel="$t$", ylabel="energy, of that of one cluster")
    right.step(ts, clusters, where="post", label="flow")
    right.step(steps, ClusterCount(MET)(0.0, loop), "--", where="post", label="published step")
    right.set(xlabel="$t$", ylabel="clusters", xscale="log", xlim=(0.5, T1))
    for axes in (left, right):
        axes.legend()
    return figure


RESULT = Result(
    "staircase",
    "2410.06833",
    "five tokens at beta = 4: one cluster at t = 328, and at t = 364 by the published step",
    Seconds(15, 15),
    run,
    "of the paper",
)
