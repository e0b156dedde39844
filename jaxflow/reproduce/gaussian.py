"""Gaussian tokens stay Gaussian, and V = I blows their covariance up (arXiv 2501.18322).

In R^d, with A = beta K^T Q and V = v I,

    S(t) = (S(0)^{-1} - v t (A + A^T))^{-1}

which for v > 0 is infinite at 1 / (v |S(0) (A + A^T)|) and for v < 0 falls like 1 / t. Measured on
tokens with Gauss-Hermite weights, exact for Gaussian integrals, and by the equations of m and S.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np

from ..density.closures import Moments, SoftmaxGaussian, evolve, gaussian, until_blow_up
from ..fields import SelfAttention
from ..geometry import Euclidean
from ..measure import Measure
from .base import TIGHT, Outcome, Result, Row, Seconds, exact, panels

BETA, T1 = 0.3, 4.0
QUERY = np.array([[0.9, 0.2], [-0.1, 1.1]])
KEY = np.array([[1.0, -0.3], [0.2, 0.8]])
A = BETA * KEY.T @ QUERY
START = np.array([[0.8, 0.2], [0.2, 0.5]])
BLOW_UP = float(1 / np.linalg.eigvals(START @ (A + A.T)).real.max())


def run(quick: bool) -> Outcome:
    spans = {1.0: np.linspace(0, BLOW_UP / 2, 9), -1.0: np.linspace(0, T1, 9)}
    moved = {v: tokens(v, ts) for v, ts in spans.items()}
    rows = [
        Row(
            f"largest error of S(t) of tokens, V = {v:+g} I, in units of S",
            float(np.abs(moved[v] - law(v, ts)).max() / law(v, ts).max()),
            0.0,
            1e-7,
            "the tolerance of the solver",
        )
        for v, ts in spans.items()
    ]
    rows.append(
        Row(
            "t of blow-up, V = I",
            blow_up(),
            BLOW_UP,
            1e-6,
            "1 / tr S at the last step, and the solver",
        )
    )
    return Outcome(rows, partial(draw, spans, moved))


def attention(v: float) -> SelfAttention:
    return SelfAttention(QUERY, KEY, v * np.eye(2), beta=BETA, geometry=Euclidean())


def law(v: float, ts: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.linalg.inv(START)[None] - v * ts[:, None, None] * (A + A.T)[None])


def tokens(v: float, ts: np.ndarray) -> np.ndarray:
    """The covariance of tokens that start as N(0, START)."""
    z, w = np.polynomial.hermite_e.hermegauss(24)
    grid = np.stack(np.meshgrid(z, z, indexing="ij"), axis=-1).reshape(-1, 2)
    points = grid @ np.linalg.cholesky(START).T
    mu0 = Measure(jnp.asarray(points), jnp.asarray(np.log(np.outer(w, w)).reshape(-1)))
    return np.asarray(exact(attention(v), mu0, ts).measures.covariance)


def blow_up() -> float:
    """When tr S passes 7e7 by its equation."""
    closure = gaussian(attention(1.0), 2)
    assert isinstance(closure, SoftmaxGaussian)
    z0 = Moments(jnp.zeros(2), jnp.asarray(START))
    options = {"stepsize_controller": TIGHT, "event": until_blow_up(), "max_steps": 100_000}
    return float(evolve(closure, z0, t1=2 * BLOW_UP, **options).ts[-1])


def draw(spans, moved):
    figure, axes = panels(2)
    for axis, (v, ts) in zip(axes, spans.items(), strict=True):
        fine = np.linspace(0, 0.97 * BLOW_UP if v > 0 else T1, 200)
        values = np.linalg.eigvalsh(law(v, fine))
        for k, label in enumerate(("theory", None)):
            axis.plot(fine, values[:, k], color="C0", label=label)
        dots = np.linalg.eigvalsh(moved[v])
        for k, label in enumerate(("tokens", None)):
            axis.plot(ts, dots[:, k], "o", color="C1", label=label)
        axis.set(xlabel="$t$", ylabel="variances, eigenvalues of $S$", title=f"V = {v:+g} I")
        axis.legend()
    axes[0].axvline(BLOW_UP, color="grey", lw=0.8)
    axes[0].set(yscale="log")
    return figure


RESULT = Result(
    "gaussian",
    "2501.18322",
    "Gaussian tokens in R^d: their covariance in closed form, and the time of its blow-up",
    Seconds(8, 8),
    run,
)
