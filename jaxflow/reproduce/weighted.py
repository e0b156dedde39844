"""Attention with a symmetric matrix D climbs or descends an energy (arXiv 2501.03096).

    X[mu](x) = +-P_x ( D E_{mu_x}[y] ),    E[mu] = 1/(2 beta) int int e^{beta <x, D y>}

Unnormalised, dE/dt = +-E|x'|^2. E is at most e^{beta l} / (2 beta), l the largest eigenvalue of
D >= 0, for all tokens at one eigenvector of it; tokens on one side of it go there. Down the energy
for D = I, d + 1 tokens end with all <x_i, x_j> = -1/d, the vertices of a regular simplex.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..fields import Softmax, Unnormalised, weighted_attention
from ..measure import Measure, uniform_sphere
from ..observables import InteractionEnergy, KineticEnergy, inner_products
from .base import Outcome, Result, Row, Scheme, Seconds, exact, panels, published

BETA, D = 1.0, 3
SPECTRUM = (2.0, 1.2, 0.5)
MATRIX = np.diag(SPECTRUM)
TOP = float(np.exp(BETA * SPECTRUM[0]) / (2 * BETA))


def run(quick: bool) -> Outcome:
    x = uniform_sphere(32, D, key=jax.random.key(0)).points
    side = Measure(x * jnp.where(x[:, :1] < 0, -1.0, 1.0))
    ts = np.linspace(0, 4, 401)
    kinds = {"unnormalised": Unnormalised(), "softmax": Softmax()}
    curves, spent = {}, 0.0
    energy = InteractionEnergy(BETA, key=MATRIX)
    for name, interaction in kinds.items():
        up = weighted_attention(MATRIX, beta=BETA, interaction=interaction)
        observe = {"energy": energy, "speed": KineticEnergy(up)}
        sol = exact(up, side, ts, observe=observe)
        curves[name] = np.asarray(sol.observed["energy"])
        if name == "unnormalised":
            spent = simpson(np.asarray(sol.observed["speed"]), ts)
    grown = float(curves["unnormalised"][-1] - curves["unnormalised"][0])
    end = exact(weighted_attention(MATRIX, beta=BETA), side, [40.0]).last
    down = -1.0 * weighted_attention(np.eye(D), beta=BETA)
    apart = exact(down, Measure(x[: D + 1]), np.linspace(0, 60, 121)).measures
    products = np.asarray(inner_products(apart))[:, *np.triu_indices(D + 1, 1)]
    rows = [
        Row("int E|x'|^2 dt, unnormalised", spent, grown, 1e-6, "Simpson's rule, and the solver"),
        Row("energy at t = 40, softmax", float(energy(0.0, end)), TOP, 1e-7, "the solver"),
        Row(
            "<x_i, x_j> farthest from -1/d, descent, t = 60",
            float(np.abs(products[-1] + 1 / D).max()),
            0.0,
            1e-6,
            "the solver, and e^{-rate t} of what is left",
        ),
    ]
    loop = published(weighted_attention(MATRIX, beta=BETA), side, 20)[1][-1]
    reached = float(energy(2.0, Measure(jnp.asarray(loop))))
    schemes = [Scheme("energy at t = 2, softmax", reached, float(curves["softmax"][200]))]
    return Outcome(rows, partial(draw, ts, curves, products), schemes)


def simpson(values: np.ndarray, ts: np.ndarray) -> float:
    """Simpson's rule, on an even number of equal intervals."""
    ends, odd, even = values[[0, -1]].sum(), values[1::2].sum(), values[2:-1:2].sum()
    return float((ts[1] - ts[0]) / 3 * (ends + 4 * odd + 2 * even))


def draw(ts, curves, products):
    figure, (left, right) = panels(2)
    for name, values in curves.items():
        left.plot(ts, values, label=name)
    left.axhline(TOP, color="grey", ls="--", label=r"$e^{\beta \lambda} / (2 \beta)$")
    left.set(xlabel="$t$", ylabel="energy", title="ascent, D = diag" + str(SPECTRUM))
    left.legend()
    right.plot(np.linspace(0, 60, 121), products, color="C0", lw=0.9)
    right.axhline(-1 / D, color="C1", ls="--", label="$-1/d$")
    right.set(xlabel="$t$", ylabel=r"$\langle x_i, x_j \rangle$", title="descent, D = I")
    right.legend()
    return figure


RESULT = Result(
    "weighted",
    "2501.03096",
    "attention with a symmetric D climbs its energy to an eigenvector, or descends to a simplex",
    Seconds(25, 25),
    run,
)
