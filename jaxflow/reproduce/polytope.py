"""Tokens of R^d under V = I, V = -I and random V (arXiv 2305.05465).

V = I, z = e^{-t} x: hulls of z are nested, and the attention matrix tends to a Boolean one; on the
line to one of rank 2 at most. The limits of z are the leaders among the vertices of a polytope.

V = -I: tokens go to 0. Attention is then linear, X(x) = -(m + S x), m falls like e^{-t}, and
S' = -2 S^2 gives 2 t S(t) -> I for any law of full rank: derived here. What is left out of the
expansion is a share of order 1/t of S.

Random V whose eigenvalue of largest real part is simple and positive, made 1 here: with w its left
eigenvector, <w, z_i> of z = e^{-tV} x tends to one of three values at most, that is z_i to one of
three parallel hyperplanes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..fields import SelfAttention
from ..geometry import Euclidean
from ..measure import Measure, gaussian
from ..observables import attention_matrix
from .base import Outcome, Result, Row, Seconds, exact, panels

T1, LATE, FAR = 6.0, 2000.0, 12.0
RANDOM = (0, 2)  # seeds of V in R^3, one with complex eigenvalues beside the leading one


def run(quick: bool) -> Outcome:
    attracted = SelfAttention(geometry=Euclidean())
    repelled = SelfAttention(value=-np.eye(2), geometry=Euclidean())
    ts = np.linspace(0, T1, 61)
    mu0 = gaussian(16, 2, key=jax.random.key(1))
    sol = exact(attracted, mu0, ts)
    z = np.exp(-ts)[:, None, None] * np.asarray(sol.measures.points)
    line = Measure(mu0.points * jnp.array([[1.0, 0.0]]))
    boolean = {
        "plane": np.asarray(attention_matrix(attracted, sol.last)),
        "line": np.asarray(attention_matrix(attracted, exact(attracted, line, [T1]).last)),
    }
    # Until scores that differ little differ by much: e^{2 t} times their difference.
    small = "e^{-gap e^{2t}}, gap the least difference of two scores of z"
    rows = [
        Row("largest growth of a support function of z", growth(z), 0.0, 1e-8, "the solver"),
        *(
            Row(
                f"farthest weight from 0 and 1, {name}",
                float(np.abs(a - np.round(a)).max()),
                0.0,
                1e-6,
                small,
            )
            for name, a in boolean.items()
        ),
        Row(
            "rank of attention on the line",
            float(np.linalg.matrix_rank(boolean["line"].round())),
            2,
            0,
            "a whole number",
        ),
    ]
    late = np.geomspace(1, LATE, 40)
    covariance = np.asarray(exact(repelled, mu0, late).measures.covariance)
    scaled = 2 * late[:, None, None] * covariance
    rows.append(
        Row(
            f"|2 t S(t) - I| at t = {LATE:g}, V = -I",
            float(np.linalg.norm(scaled[-1] - np.eye(2), 2)),
            0.0,
            4 / LATE,
            "4 / t",
        )
    )
    heights = {seed: along_leading(seed) for seed in RANDOM}
    rows += [
        Row(
            f"farthest <w, z> from three values at t = {FAR:g}, random V ({seed})",
            float(np.abs(found[-1, :, None] - [found[-1].min(), 0, found[-1].max()]).min(1).max()),
            0.0,
            10 * np.exp(-FAR),
            "10 e^{-t}, as the leading eigenvalue is 1",
        )
        for seed, found in heights.items()
    ]
    return Outcome(rows, partial(draw, z, boolean["plane"], late, scaled, heights[RANDOM[0]]))


def along_leading(seed: int) -> np.ndarray:
    """<w, z_i(t)> at 49 times, (49, 16): as w^T e^{-tV} = e^{-t} w^T, that is e^{-t} <w, x_i>."""
    value = np.random.default_rng(seed).normal(size=(3, 3))
    rates, left = np.linalg.eig(value.T)
    leading = int(np.argmax(np.real(rates)))
    field = SelfAttention(value=value / np.real(rates[leading]), geometry=Euclidean())
    ts = np.linspace(0, FAR, 49)
    x = exact(field, gaussian(16, 3, key=jax.random.key(1)), ts).measures.points
    return np.exp(-ts)[:, None] * (np.asarray(x) @ np.real(left[:, leading]))


def growth(z: np.ndarray) -> float:
    """The largest increase of max_i <u, z_i> from one time to the next, over 64 directions u."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    support = np.einsum("tnd,ud->tun", z, directions).max(axis=-1)
    return float(np.maximum(np.diff(support, axis=0), 0).max())


def draw(z, matrix, late, scaled, heights):
    figure, (left, middle, right, last) = panels(4)
    left.plot(*z.transpose(2, 0, 1), color="#B0B0B0", lw=0.8)
    left.plot(*z[0].T, "o", ms=4, label="$t$ = 0")
    left.plot(*z[-1].T, "*", ms=10, label=f"$t$ = {T1:g}")
    left.set(xlabel="$z_1$", ylabel="$z_2$", title="V = I, $z = e^{-t} x$")
    left.legend()
    middle.imshow(matrix, cmap="cividis", vmin=0, vmax=1)
    middle.set(xlabel="token $j$", ylabel="token $i$", title=f"attention at $t$ = {T1:g}")
    right.semilogx(late, np.linalg.eigvalsh(scaled), "C0", label=None)
    right.plot([], [], "C0", label="tokens")
    right.axhline(1, color="C1", ls="--", label="theory, $t \\to \\infty$")
    right.set(xlabel="$t$", ylabel="eigenvalues of $2 t S(t)$", title="V = -I")
    right.legend()
    last.plot(np.linspace(0, FAR, len(heights)), heights, "C0", lw=0.8)
    last.set(xlabel="$t$", ylabel="$\\langle w, z_i \\rangle$", title="random V, $z = e^{-tV} x$")
    return figure


RESULT = Result(
    "polytope",
    "2305.05465",
    "V = I in R^d: nested hulls, Boolean attention, leaders; V = -I: 2 t S(t) -> I; random V",
    Seconds(20, 20),
    run,
)
