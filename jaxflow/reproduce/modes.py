"""How many clusters the uniform law on the circle breaks into, and where (arXiv 2410.23228).

Off the uniform law the mode k grows at the rate k^2 I_k(beta) / (beta I_0(beta)), the fastest near
k = sqrt(2 beta). From all modes alike, as many clusters form; from random noise the next mode can
win, its rate being near. Where the fastest one leads, cos(k theta - phase), clusters form at its
maxima, and stay: theta -> theta + 2 pi / k keeps that mode.
"""

from functools import partial

import diffrax
import jax.numpy as jnp
import numpy as np
from scipy.special import iv

from ..density import Circle, FourierCircle, solve
from ..fields import SelfAttention
from ..measure import from_angles
from .base import Outcome, Result, Row, Scheme, Seconds, panels, published

BETAS, GRID, T1 = (5.0, 7.0), Circle(256), 12.0
PHASE = 0.7


def run(quick: bool) -> Outcome:
    rows, pictures, rates = [], {}, {}
    for beta in BETAS:
        k = np.arange(1, 9)
        exact = k**2 * iv(k, beta) / (beta * iv(0, beta))
        rates[beta] = k, exact, found = k, exact, np.array([growth(beta, int(j)) for j in k])
        fastest = int(k[exact.argmax()])
        rows.append(
            Row(
                f"fastest rate, beta = {beta:g}, k = {fastest}",
                float(found.max()),
                float(exact.max()),
                1e-5,
                "what is not linear in a mode of size 1e-4",
            )
        )
        pictures[beta] = together = settle(beta, alike)
        rows.append(
            Row(
                f"clusters from all modes alike, beta = {beta:g}",
                len(peaks(together[-1])),
                fastest,
                0,
                "a whole number",
            )
        )
        led = settle(beta, lambda x, k=fastest: 1 + 1e-2 * jnp.cos(k * _angle(x) - PHASE))
        rows.append(
            Row(
                f"farthest peak from its place, beta = {beta:g}, in radians",
                misplaced(peaks(led[-1]), fastest),
                0.0,
                2 * np.pi / 256,
                "a cell of the grid",
            )
        )
    return Outcome(rows, partial(draw, rates, pictures), [_published(beta) for beta in BETAS])


def growth(beta: float, k: int, grid: FourierCircle = FourierCircle(64)) -> float:
    """The rate of mode k, over t = 1, from 1 + 1e-4 cos(k theta)."""
    start = lambda x: 1 + 1e-4 * jnp.cos(k * _angle(x))
    tight = diffrax.PIDController(rtol=1e-10, atol=1e-14)
    sol = solve(SelfAttention(beta=beta), start, grid, t1=1.0, stepsize_controller=tight)
    modes = np.abs(np.fft.rfft(np.asarray(sol.densities[-1])))
    return float(np.log(2 * modes[k] / modes[0] / 1e-4))


def _published(beta: float) -> Scheme:
    """The rate of the fastest mode over t = 1, of tokens by the published step."""
    k = int(np.sqrt(2 * beta).round())
    u = np.linspace(0, 2 * np.pi, 512, endpoint=False)
    x = published(SelfAttention(beta=beta), from_angles(u - 1e-4 / k * np.sin(k * u)), 10)[1]
    modes = np.abs(np.exp(1j * k * np.arctan2(x[[0, -1], :, 1], x[[0, -1], :, 0])).mean(axis=1))
    rate = k**2 * iv(k, beta) / (beta * iv(0, beta))
    return Scheme(
        f"rate of mode {k}, beta = {beta:g}", float(np.log(modes[1] / modes[0])), float(rate)
    )


def alike(x):
    """1 + one part in 1000 of each of the first 8 modes, with phases of their own."""
    k = jnp.arange(1.0, 9.0)
    return 1 + 1e-3 * jnp.cos(k * _angle(x) + k**2).sum()


def settle(beta: float, start) -> np.ndarray:
    """The densities until T1."""
    ts = jnp.linspace(0.0, T1, 61)
    sol = solve(SelfAttention(beta=beta), start, GRID, t1=T1, saveat=diffrax.SaveAt(ts=ts))
    return np.asarray(sol.densities)


def peaks(rho: np.ndarray) -> np.ndarray:
    """The angles of the maxima above the uniform density."""
    top = (rho > np.roll(rho, 1)) & (rho >= np.roll(rho, -1)) & (rho > 1 / (2 * np.pi))
    return np.asarray(GRID.axes[0])[top]


def misplaced(angles: np.ndarray, k: int) -> float:
    """The largest distance to the maxima of cos(k theta - PHASE); inf where there are not k."""
    off = (k * angles - PHASE + np.pi) % (2 * np.pi) - np.pi
    return float(np.abs(off).max() / k) if len(angles) == k else float("inf")


def _angle(x):
    return jnp.arctan2(x[1], x[0])


def draw(rates, pictures):
    figure, axes = panels(1 + len(BETAS))
    for beta, (k, exact, found) in rates.items():
        (line,) = axes[0].plot(k, exact, label=rf"theory, $\beta$ = {beta:g}")
        axes[0].plot(k, found, "o", color=line.get_color())
    axes[0].set(xlabel="mode $k$", ylabel="rate of growth")
    axes[0].legend()
    for axis, (beta, rho) in zip(axes[1:], pictures.items(), strict=True):
        axis.pcolormesh(
            np.asarray(GRID.axes[0]),
            np.linspace(0, T1, 61),
            np.log10(rho + 1e-3),
            cmap="magma",
            rasterized=True,
        )
        axis.set(xlabel="angle", ylabel="$t$", title=rf"log density, $\beta$ = {beta:g}")
    return figure


RESULT = Result(
    "modes",
    "2410.23228",
    "the uniform law breaks into as many clusters as its fastest mode has maxima: 3 and 4",
    Seconds(15, 15),
    run,
    "of the paper",
)
