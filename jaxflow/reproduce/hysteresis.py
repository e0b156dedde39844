"""Noise against attention: where order jumps, and where it grows from 0 (2606.05140).

    d_t rho + div(rho grad Phi[rho]) = (1/kappa) Lap rho,      K rho = int e^{beta <x, y>} rho(y) dy
    Phi = (1/beta) K rho, unnormalised attention;    Phi = (1/beta) log K rho, softmax attention

A law at rest is rho = exp(kappa Phi[rho]) / Z. For small order r = |E x| that is
kappa = kappa_c (1 + a r^2 + ...), and order grows from 0 where a > 0. Let mu_l be the eigenvalues
of K on harmonics of degree l over that of constants, mu_l = I_{d/2-1+l}(beta) / I_{d/2-1}(beta):

    unnormalised   a > 0  iff  mu_2 / mu_1 < 1/d,  which is so up to beta_*
    softmax        a > 0  iff  d (1 + mu_1) (1 - mu_2 / mu_1) > (d - 1) (1 - mu_2),  so for all beta

The paper proves the first, with K = kappa / 2; the second is derived here, from the orders r^2 and
r^3 of log rho = kappa Phi + c. Beyond beta_* there is a loop: swept up, order sets in at kappa_c;
swept down, it is lost at the fold of the ordered branch.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import gamma, hyp0f1, iv, roots_jacobi

from ..density import FourierCircle, SphereHarmonics, solve
from ..density.grids import AbstractGrid
from ..fields import SelfAttention, Softmax, Unnormalised
from .base import Outcome, Result, Row, Seconds, panels

TIME = 300.0  # over kappa, to rest
TILT = 0.02  # of a law, between two strengths of noise, so that none rests where it is unstable
NEAR_FOLD = 0.3873, 0.3877, 0.3882, 0.389


def run(quick: bool) -> Outcome:
    rows = [
        Row(
            f"beta at which the transition turns discontinuous, d = {d}",
            turning(d),
            brent(partial(_excess, d), 0.5, 5.0),
            1e-3,
            "an order of 0.02 in place of 0",
        )
        for d in (2, 3, 8)
    ]
    circle = FourierCircle(64)
    loop = Sweep(Attention(2, 4.0), circle, (0.37, *NEAR_FOLD, 0.40, 0.42, 0.43))
    smooth = Sweep(Attention(2, 4.0, softmax=True), circle, (4.2, 4.4, 4.8, 5.2, 6.0))
    rows += [*loop.rows(0.37), *loop.rows(0.40), *loop.rows(0.42), lost(loop), *smooth.rows(4.8)]
    swept = [loop, smooth]
    if not quick:
        swept.append(Sweep(Attention(3, 2.5), SphereHarmonics(8), (1.648,)))
        rows += swept[-1].rows(1.648)
    return Outcome(rows, partial(draw, swept))


def _excess(d: int, beta: float) -> float:
    return float(iv(d / 2 + 1, beta) / iv(d / 2, beta)) - 1 / d


def lost(loop: "Sweep") -> Row:
    """Where order is lost: the least kappa of a cubic through four ordered laws."""
    orders = [loop.down[loop.kappas.index(kappa)] for kappa in NEAR_FOLD]
    cubic = np.polynomial.Polynomial.fit(orders, NEAR_FOLD, 3)
    ends = cubic.deriv().roots()
    found = min(float(cubic(r)) for r in ends.real[np.isreal(ends)])
    why = "a cubic for the branch near its fold"
    return Row(f"kappa at which order is lost, {loop.law}", found, loop.law.fold[1], 1e-4, why)


def brent(fn, low: float, high: float) -> float:
    return float(np.asarray(brentq(fn, low, high)))


# ------------------------------------------------------------------ laws at rest


class Attention(NamedTuple):
    """Laws around an axis, by the height s = <x, e> at the nodes of a Gauss-Jacobi rule:

    the mean of e^{beta <x, y>} over the y of height s' is
    e^{beta s s'} 0F1(; (d-1)/2; (beta^2/4) (1-s^2) (1-s'^2))
    """

    d: int
    beta: float
    softmax: bool = False

    def __str__(self):
        kind = "softmax" if self.softmax else "unnormalised"
        return f"{kind}, d = {self.d}, beta = {self.beta:g}"

    def strength(self, order: float) -> float:
        """The kappa of the law at rest with |E x| = order."""
        s, w = roots_jacobi(64, (self.d - 3) / 2, (self.d - 3) / 2)
        off = np.outer(1 - s**2, 1 - s**2) * self.beta**2 / 4
        kernel = np.exp(self.beta * np.outer(s, s)) * hyp0f1((self.d - 1) / 2, off)
        law, kappa, last = w * np.exp(order * s), 1.0, 0.0
        while abs(kappa - last) > 1e-12 * kappa:
            felt = kernel @ law / law.sum()
            potential = (np.log(felt) if self.softmax else felt) / self.beta
            excess = partial(_order_above, w, s, potential, order)
            kappa, last = brent(excess, 0.0, 1e4), kappa
            law = _tilted(w, potential, kappa)
        return kappa

    @property
    def critical(self) -> float:
        """kappa_c, at which the uniform law loses stability."""
        d, beta = self.d, self.beta
        first = iv(d / 2, beta) / beta
        if self.softmax:
            return float(iv(d / 2 - 1, beta) / first)
        return float((beta / 2) ** (d / 2 - 1) / gamma(d / 2) / first)

    @property
    def fold(self) -> tuple[float, float]:
        """The order and the kappa where the ordered branch ends."""
        end = minimize_scalar(
            self.strength, bounds=(0.001, 0.95), method="bounded", options={"xatol": 1e-7}
        )
        return float(end.x), float(end.fun)

    def order(self, kappa: float) -> float:
        """|E x| of the stable ordered law; 0 where there is none."""
        r, least = self.fold
        return brent(lambda x: self.strength(x) - kappa, r, 0.99) if kappa > least else 0.0


def _tilted(w: np.ndarray, potential: np.ndarray, kappa: float) -> np.ndarray:
    return w * np.exp(kappa * (potential - potential.max()))


def _order_above(w, s, potential, order: float, kappa: float) -> float:
    law = _tilted(w, potential, kappa)
    return float(law @ s / law.sum()) - order


def turning(d: int) -> float:
    """The beta at which unnormalised attention sets in with an order of 0.02 at kappa_c."""
    excess = lambda beta: Attention(d, beta).strength(0.02) / Attention(d, beta).critical - 1
    return brent(excess, 0.8, 4.0)


# ------------------------------------------------------------------ the equation of the density


class Sweep:
    """|E x| at rest for one kappa after the other, each from where the last one came to rest: `up`
    from a law that is nearly uniform, and `down` from an ordered one."""

    def __init__(self, law: Attention, grid: AbstractGrid, kappas: tuple[float, ...]):
        self.law, self.grid, self.kappas = law, grid, kappas
        self.up = self._swept(kappas, 0.01)
        self.down = self._swept(kappas[::-1], 2.0)[::-1]

    def _swept(self, kappas: Sequence[float], tilt: float) -> list[float]:
        interaction = Softmax() if self.law.softmax else Unnormalised()
        field = SelfAttention(beta=self.law.beta, interaction=interaction)
        heights, orders = self.grid.points[:, 0], []
        rho = self.grid.sample(jnp.exp(tilt * heights))
        for kappa in kappas:
            rho = (1 - TILT) * rho + TILT * self.grid.sample(1 + heights)
            sol = solve(field, rho, self.grid, t1=TIME * kappa, kappa=kappa)
            rho = jnp.maximum(sol.densities[-1], 0)
            orders.append(float(jnp.linalg.norm(sol.mean[-1])))
        return orders

    def rows(self, kappa: float) -> list[Row]:
        """The order at one kappa of both sweeps."""
        k, ordered = self.kappas.index(kappa), self.law.order(kappa)
        expected = {"up": ordered if kappa > self.law.critical else 0.0, "down": ordered}
        return [
            Row(
                f"order at kappa = {kappa:g}, swept {way}, {self.law}",
                getattr(self, way)[k],
                order,
                1e-4,
                "what is left of a tilt of 0.02",
            )
            for way, order in expected.items()
        ]


def draw(sweeps: Sequence[Sweep]):
    figure, each = panels(len(sweeps))
    for axes, swept in zip(each, sweeps, strict=True):
        law, orders = swept.law, np.linspace(0.01, 0.9, 90)
        strengths = np.array([law.strength(r) for r in orders])
        stable = orders >= law.fold[0]
        axes.plot(strengths[stable], orders[stable], label="ordered law at rest")
        if law.fold[1] < law.critical - 1e-4:
            axes.plot(strengths[~stable], orders[~stable], "--", label="unstable")
        axes.plot(swept.kappas, swept.up, "^", label="swept up")
        axes.plot(swept.kappas, swept.down, "v", fillstyle="none", label="swept down")
        axes.axvline(law.critical, color="grey", lw=0.8)
        low, high = min(law.fold[1], *swept.kappas), max(law.critical, *swept.kappas)
        margin = 0.1 * (high - low)
        axes.set(xlim=(low - margin, high + margin), ylim=(-0.05, 1), title=str(law))
        axes.set(xlabel=r"$\kappa$", ylabel=r"order $|E x|$")
        axes.legend(fontsize="small")
    return figure


RESULT = Result(
    "hysteresis",
    "2606.05140",
    "noise against unnormalised attention: order sets in with a jump, and is lost elsewhere",
    Seconds(20, 35),
    run,
)
