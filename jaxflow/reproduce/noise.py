"""Noise against attention: below a critical strength of it the uniform law gives way (2606.05140).

    dX_i = X[mu](X_i) dt + sqrt(2 / kappa) dW_i    on the circle, unnormalised attention

Mode 1 of the uniform law grows at I_1(beta) / beta - 1 / kappa, so that it is stable up to
kappa_c = beta / I_1(beta): the threshold for d = 2, derived here. At beta = 0 the law settles on
exp(kappa r cos theta) with r = I_1(kappa r) / I_0(kappa r), which is 0 up to kappa = 2.
"""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.special import iv

from ..density import FourierCircle, solve
from ..fields import Compressed, SelfAttention, Unnormalised
from ..flow import flow
from ..measure import von_mises_fisher
from ..noise import Noise
from ..observables import order_parameter
from .base import Outcome, Result, Row, Seconds, panels

GRID = FourierCircle(64)
BETAS = (1.0, 2.0)
KAPPA = 4.0  # of the stationary law
SHOWN = (1.0, 1.6, 2.4, 3.0, KAPPA, 6.0)


def run(quick: bool) -> Outcome:
    n, dt, shown = (1000, 0.1, SHOWN[::2]) if quick else (10_000, 0.05, SHOWN)
    rows = []
    for beta in BETAS:
        why = "what is not linear in a mode of size 1e-4, and the solver's tolerance"
        what = f"critical kappa, beta = {beta:g}"
        rows.append(Row(what, critical(beta), float(beta / iv(1, beta)), 1e-5, why))
    expected = stationary(KAPPA)
    rows.append(
        Row(
            f"order at kappa = {KAPPA:g}, the equation of the density",
            settled(KAPPA),
            expected,
            1e-5,
            "what is left of a decaying mode at t = 30",
        )
    )
    found = {kappa: sampled(kappa, n, dt) for kappa in shown}
    rows.append(
        Row(
            f"order at kappa = {KAPPA:g}, {n} tokens with noise",
            found[KAPPA],
            expected,
            float(2 / np.sqrt(n)),
            "fluctuations of n^{-1/2}, twice",
        )
    )
    return Outcome(rows, partial(draw, found))


def critical(beta: float) -> float:
    """Where the rate of mode 1, affine in 1 / kappa, is 0; from two strengths."""
    inverse = np.array([0.3, 0.9])
    rates = [growth(beta, 1 / s) for s in inverse]
    slope = (rates[1] - rates[0]) / (inverse[1] - inverse[0])
    return float(1 / (inverse[0] - rates[0] / slope))


def growth(beta: float, kappa: float) -> float:
    """The rate of mode 1, over t = 1, from 1 + 1e-4 cos(theta)."""
    field = SelfAttention(beta=beta, interaction=Unnormalised())
    start = lambda x: 1 + 1e-4 * x[0]
    sol = solve(field, start, GRID, t1=1.0, kappa=kappa, stepsize_controller=_TIGHT)
    return float(jnp.log(2 * sol.mean[-1, 0] / 1e-4))


def settled(kappa: float) -> float:
    """|E x| at t = 30, by the Fokker-Planck equation at beta = 0."""
    sol = solve(SelfAttention(beta=0.0), lambda x: 1 + 0.5 * x[0], GRID, t1=30.0, kappa=kappa)
    return float(jnp.linalg.norm(sol.mean[-1]))


def sampled(kappa: float, n: int, dt: float) -> float:
    """|E x| of n tokens at beta = 0, a mean over t from 12 to 20."""
    mu0 = von_mises_fisher(n, jnp.array([1.0, 0.0]), 1.0, key=jax.random.key(1))
    observe = {"order": lambda t, mu: order_parameter(mu)}
    sol = flow(
        Compressed(SelfAttention(beta=0.0), tolerance=1e-6),
        mu0,
        t1=20.0,
        dt0=dt,
        noise=Noise(kappa, key=jax.random.key(2)),
        saveat=diffrax.SaveAt(ts=jnp.arange(12.0, 20.5, 0.5)),
        observe=observe,
    )
    return float(sol.observed["order"].mean())


def stationary(kappa: float) -> float:
    """The positive r = I_1(kappa r) / I_0(kappa r), or 0."""
    gap = lambda r: iv(1, kappa * r) / iv(0, kappa * r) - r
    return float(np.asarray(brentq(gap, 1e-3, 1))) if kappa > 2.001 else 0.0


_TIGHT = diffrax.PIDController(rtol=1e-10, atol=1e-14)


def draw(found: dict[float, float]):
    figure, (left, right) = panels(2)
    for beta in BETAS:
        inverse = np.linspace(0.2, 1.2, 6)
        (line,) = left.plot(inverse, iv(1, beta) / beta - inverse, label=rf"$\beta$ = {beta:g}")
        rates = [growth(beta, 1 / s) for s in inverse]
        left.plot(inverse, rates, "o", color=line.get_color())
    left.axhline(0, color="grey", lw=0.8)
    left.set(xlabel=r"$1/\kappa$", ylabel="rate of mode 1", title="uniform law")
    kappas = np.linspace(0.5, 6.5, 121)
    right.plot(kappas, [stationary(k) for k in kappas], label="theory")
    right.plot(list(found), list(found.values()), "o", label="tokens with noise")
    right.set(xlabel=r"$\kappa$", ylabel="order $r$", title=r"stationary law, $\beta$ = 0")
    for axes in (left, right):
        axes.legend()
    return figure


RESULT = Result(
    "noise",
    "2606.05140",
    "the critical strength of noise, at which the uniform law of tokens loses stability",
    Seconds(25, 100),
    run,
)
