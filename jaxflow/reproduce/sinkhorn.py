"""Doubly stochastic attention moves the mean of the tokens linearly (arXiv 2110.11773).

    dx_i/dt = V sum_j p_ij x_j    in R^2,    V the rotation by 90 degrees

Where the columns of p sum to 1 as its rows do, the mean m obeys m' = V m exactly and is back at
t = 2 pi; under softmax it is not, whose column sums are off.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..fields import SelfAttention, Sinkhorn
from ..geometry import Euclidean
from ..measure import gaussian
from ..observables import column_defect
from .base import Outcome, Result, Row, Seconds, exact, panels

V = np.array([[0.0, -1.0], [1.0, 0.0]])
KINDS = {"softmax": 0, "4 iterations": 4, "to convergence": None}
START = np.array([1.0, 0.0])


def run(quick: bool) -> Outcome:
    mu0 = gaussian(64, 2, key=jax.random.key(0), mean=START, covariance=0.5)
    ts = np.linspace(0, 2 * np.pi, 65)
    field = attention(None)
    means = {
        name: np.asarray(exact(attention(k), mu0, ts).measures.mean) for name, k in KINDS.items()
    }
    rate = field(0.0, mu0.points, mu0).mean(axis=0) - V @ mu0.mean
    balanced = means["to convergence"]
    turned = np.stack([np.cos(ts), np.sin(ts)], axis=1), np.stack([-np.sin(ts), np.cos(ts)], axis=1)
    circle = balanced[0, :1] * turned[0] + balanced[0, 1:] * turned[1]
    rows = [
        Row(
            "largest column sum off 1", float(column_defect(field, mu0)), 0.0, 1e-12, "of Sinkhorn"
        ),
        Row("|m' - V m|", float(jnp.linalg.norm(rate)), 0.0, 1e-12, "of Sinkhorn's iterations"),
        Row(
            "largest distance of m(t) to its circle",
            float(np.linalg.norm(balanced - circle, axis=1).max()),
            0.0,
            1e-7,
            "the solver",
        ),
    ]
    return Outcome(rows, partial(draw, means, circle))


def attention(iterations: int | None) -> SelfAttention:
    return SelfAttention(value=V, interaction=Sinkhorn(iterations=iterations), geometry=Euclidean())


def draw(means, circle):
    figure, (axes,) = panels(1)
    axes.plot(*circle.T, "k:", label="theory, $m' = V m$")
    for name, mean in means.items():
        axes.plot(*mean.T, "-o", ms=2.5, lw=1, label=name)
    axes.plot(*means["softmax"][0], "k*", ms=10)
    axes.set(xlabel="$m_1$", ylabel="$m_2$", title="mean of the tokens, t to 2 pi", aspect="equal")
    axes.legend()
    return figure


RESULT = Result(
    "sinkhorn",
    "2110.11773",
    "Sinkhorn attention moves the mean of the tokens linearly, softmax attention does not",
    Seconds(25, 25),
    run,
)
