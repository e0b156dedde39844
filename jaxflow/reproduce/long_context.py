"""How beta must grow with the number of tokens: beta = gamma log n (arXiv 2512.01868).

For n equiangular tokens, rho' = 2 (1 - rho) ((n-1) rho + 1) / (e^{beta (1 - rho)} + n - 1). With
beta = gamma log n the exponential is n^{gamma (1 - rho)}: below gamma = 1 / (1 - rho) it is nothing
beside n, and tokens move as at beta = 0; above it they stand still, at n^{1 - gamma (1 - rho)} of
that rate. This is derived here from the equation. It is half where n^{gamma (1 - rho)} = n + 1.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq

from ..fields import SelfAttention
from ..measure import Measure, simplex
from .base import Outcome, Result, Row, Seconds, panels

RHO = 0.3
CRITICAL = 1 / (1 - RHO)
ABOVE = 1.5


def run(quick: bool) -> Outcome:
    sizes = (64, 256, 1024) if quick else (64, 256, 1024, 4096)
    tokens = {n: simplex(n, n, rho=RHO) for n in sizes}
    half = {n: halving(mu) for n, mu in tokens.items()}
    two = sizes[-2:]
    slow = [np.log(share(tokens[n], ABOVE * CRITICAL)) for n in two]
    rows = [
        Row(
            f"gamma at which the rate is half, n = {n}",
            found,
            CRITICAL,
            float(1.1 * CRITICAL / (n * np.log(n))),
            "log(n + 1) / log(n) - 1, a tenth more",
        )
        for n, found in half.items()
    ]
    rows.append(
        Row(
            f"exponent of the rate at gamma = {ABOVE} / (1 - rho), n = {two[0]} to {two[1]}",
            float((slow[1] - slow[0]) / np.log(two[1] / two[0])),
            1 - ABOVE,
            float(two[0] ** (1 - ABOVE)),
            "n^{-1/2} of the smaller n, which the limit leaves out",
        )
    )
    return Outcome(rows, partial(draw, tokens))


def rate(mu: Measure, gamma: float) -> float:
    """rho' = 2 <X(x_1), x_2>."""
    field = SelfAttention(beta=float(gamma * np.log(mu.n)))
    velocity = field(0.0, mu.points[:1], mu)
    return float(2 * jnp.dot(velocity[0], mu.points[1]))


def share(mu: Measure, gamma: float) -> float:
    """The rate, of that at beta = 0."""
    return rate(mu, gamma) / rate(mu, 0.0)


def halving(mu: Measure) -> float:
    """The gamma at which the share is 1/2."""
    return float(np.asarray(brentq(lambda gamma: share(mu, gamma) - 0.5, 0.5, 3.0)))


def draw(tokens):
    figure, (axes,) = panels(1)
    fine, dots = np.linspace(0, 3, 301), np.linspace(0, 3, 13)
    for k, (n, mu) in enumerate(tokens.items()):
        theory = n / (n ** (fine * (1 - RHO)) + n - 1)
        axes.plot(fine, theory, color=f"C{k}", label=f"n = {n}")
        axes.plot(dots, [share(mu, g) for g in dots], "o", color=f"C{k}", ms=4)
    axes.axvline(CRITICAL, color="grey", ls="--", label=r"$1 / (1 - \rho)$")
    axes.set(xlabel=r"$\gamma = \beta / \log n$", ylabel="rate, of that at beta = 0")
    axes.set_title(rf"lines: theory; dots: tokens, $\rho$ = {RHO}")
    axes.legend()
    return figure


RESULT = Result(
    "long-context",
    "2512.01868",
    "beta = gamma log n: above gamma = 1 / (1 - rho) long contexts stand still",
    Seconds(8, 25),
    run,
)
