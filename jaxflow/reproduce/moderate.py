"""Tokens where beta grows with n: a fast phase, then clusters (arXiv 2509.25040 has the phases).

The mean of e^{beta <x, y>} rho(y) dy is x + (1/beta) (grad log rho - (d-1)/2 x) + o(1/beta). So

    fast            x' = P_x V x: with V = diag(1, 1, 0), u = x_3 / |(x_1, x_2)| falls as e^{-t}
    intermediate    V = I: d_t rho = -(1/beta) Lap rho, heat backwards, which mode k makes grow at
                    k^2 / beta; softmax attention has k^2 I_k(beta) / (beta I_0(beta)), which is
                    k^2 / beta up to a share of k^2 / (2 beta)

Both are derived here, by Laplace's method; corrections to the fast phase are of order 1/beta.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.special import iv

from ..density import FourierCircle
from ..fields import SelfAttention
from ..measure import Measure, uniform_sphere
from .base import Outcome, Result, Row, Scheme, Seconds, exact, panels, published
from .modes import growth

BETA, GRID, SHOWN = 100.0, FourierCircle(256), (1, 2, 3, 4, 5, 6)
ASKED = 2


def run(quick: bool) -> Outcome:
    sizes = (64, 256, 1024) if quick else (64, 256, 1024, 4096)
    betas = np.sqrt(sizes)
    exponents = np.array([fast(n, float(beta)) for n, beta in zip(sizes, betas, strict=True)])
    rates = np.array([BETA * growth(BETA, k, GRID) for k in SHOWN])
    order = -np.polyfit(np.log(betas), np.log(np.abs(exponents + 1)), 1)[0]
    rows = [
        Row(
            f"exponent of u in the fast phase, n = {sizes[-1]}, beta = n^(1/2)",
            float(exponents[-1]),
            -1.0,
            float(1 / betas[-1]),
            "1 / beta, the order of what is left out",
        ),
        Row(
            "order in 1/beta of its distance from -1",
            float(order),
            1.0,
            0.5,
            "few tokens, whose law is not smooth on the scale beta^{-1/2}",
        ),
        Row(
            f"beta times the rate of mode {ASKED}, beta = {BETA:g}",
            float(rates[SHOWN.index(ASKED)]),
            ASKED**2,
            ASKED**4 / (2 * BETA),
            "k^4 / (2 beta), the next order",
        ),
    ]
    field, mu0 = start(sizes[0], float(betas[0]))
    loop = fallen(jnp.asarray(published(field, mu0, 10)[1][-1]), mu0.points)
    name = f"exponent of u in the fast phase, n = {sizes[0]}"
    schemes = [Scheme(name, loop, float(exponents[0]))]
    return Outcome(rows, partial(draw, betas, exponents, rates), schemes)


def fast(n: int, beta: float) -> float:
    field, mu0 = start(n, beta)
    return fallen(exact(field, mu0, [1.0]).last.points, mu0.points)


def start(n: int, beta: float) -> tuple[SelfAttention, Measure]:
    """V = diag(1, 1, 0), and n uniform tokens on S^2."""
    field = SelfAttention(value=np.diag([1.0, 1.0, 0.0]), beta=beta)
    return field, uniform_sphere(n, 3, key=jax.random.key(0))


def fallen(x: Array, before: Array) -> float:
    """The median of log(u(1) / u(0))."""
    slope = lambda x: jnp.abs(x[:, 2]) / jnp.linalg.norm(x[:, :2], axis=1)
    return float(jnp.median(jnp.log(slope(x) / slope(before))))


def draw(betas, exponents, rates):
    figure, (left, right) = panels(2)
    left.loglog(betas, np.abs(exponents + 1), "o", label="tokens, $n = \\beta^2$")
    left.loglog(betas, 1 / betas, "--", label="$1 / \\beta$")
    left.set(xlabel=r"$\beta$", ylabel="exponent of u, distance from -1", title="fast phase")
    k = np.array(SHOWN)
    right.plot(k, k**2, "--", label="heat backwards, $k^2$")
    right.plot(k, k**2 * iv(k, BETA) / iv(0, BETA), label="$k^2 I_k / I_0$")
    right.plot(k, rates, "o", label="equation of the density")
    right.set(xlabel="mode $k$", ylabel=r"$\beta$ x rate", title=rf"$\beta$ = {BETA:g}")
    for axes in (left, right):
        axes.legend()
    return figure


RESULT = Result(
    "moderate",
    "2509.25040",
    "where beta grows with n: a fast phase along V, then heat backwards into clusters",
    Seconds(20, 60),
    run,
)
