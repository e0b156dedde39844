"""With a causal mask all tokens go to the first, after long stops at others (arXiv 2411.04990).

V = I: every x_k tends to x_1(0), for arbitrary Q and K. Two tokens at beta = 0 have
rho = tanh(t/2 + artanh rho_0).

A token further than delta from all before it is a strong centre, as in Renyi's parking. It moves
slower than sum_{j<k} e^{beta (cos angle_jk - 1)}, since its weight of itself is in the sum of all:
derived here, and integrated along the flow.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..fields import GaussianMatrices, SelfAttention
from ..measure import Measure, from_angles, uniform_sphere
from ..observables import inner_products
from .base import Outcome, Result, Row, Scheme, Seconds, exact, panels, published

N, BETA, DELTA, T1 = 128, 64.0, 0.4, 20.0
LATE = 300.0


def run(quick: bool) -> Outcome:
    sphere = uniform_sphere(16, 3, key=jax.random.key(1))
    query, key, _ = GaussianMatrices()(3, key=jax.random.key(2))
    fields = {
        "V = Q = K = I": SelfAttention(beta=1.0, causal=True),
        "Q, K random": SelfAttention(query, key, beta=1.0, causal=True),
    }
    why = "1 - 1/k >= 1/2 pulls token k back once it is near: e^{-t/2}, from when it came near"
    rows = [
        Row(
            f"farthest from x_1(0) at t = {LATE:g}, beta = 1, {name}",
            float(distance(exact(field, sphere, [LATE]).last, sphere).max()),
            0.0,
            1e-8,
            why,
        )
        for name, field in fields.items()
    ]
    pair = from_angles([0.0, np.arccos(-0.4)])
    end = exact(SelfAttention(beta=0.0, causal=True), pair, [2.0]).last
    closed = float(np.tanh(1 + np.arctanh(-0.4)))
    rows.append(
        Row(
            "rho of two tokens at t = 2, beta = 0",
            float(inner_products(end)[0, 1]),
            closed,
            1e-7,
            "the solver",
        )
    )
    _, loop = published(SelfAttention(beta=0.0, causal=True), pair, 20)
    late = Scheme(rows[-1].what, float(loop[-1, 0] @ loop[-1, 1]), closed)
    ts = np.linspace(0, T1, 401)
    mu0 = uniform_sphere(N, 2, key=jax.random.key(0))
    x = np.asarray(exact(SelfAttention(beta=BETA, causal=True), mu0, ts).measures.points)
    centres = strong_centres(x[0])
    excess = [arc(x[:, k]).max() - allowed(ts, x, k) for k in centres]
    rows.append(
        Row(
            f"most that one of {len(centres)} strong centres moves beyond its bound, t = {T1:g}",
            max(0.0, float(max(excess))),
            0.0,
            1e-8,
            "the solver, as a centre moves by less than its bound",
        )
    )
    return Outcome(rows, partial(draw, ts, x, centres), [late])


def distance(mu: Measure, start: Measure):
    return jnp.linalg.norm(mu.points - start.points[:1], axis=-1)


def strong_centres(x: np.ndarray) -> list[int]:
    """The tokens further than DELTA from all before them."""
    angles = np.arccos(np.clip(x @ x.T, -1, 1))
    return [k for k in range(len(x)) if (angles[k, :k] > DELTA).all()]


def arc(path: np.ndarray) -> np.ndarray:
    """The angle from its start, at each time."""
    return 2 * np.arcsin(np.linalg.norm(path - path[:1], axis=1) / 2)


def allowed(ts: np.ndarray, x: np.ndarray, k: int) -> float:
    """The integral of the bound on the speed of token k."""
    before = np.einsum("tjd,td->tj", x[:, :k], x[:, k])
    return float(np.trapezoid(np.exp(BETA * (before - 1)).sum(axis=1), ts))


def draw(ts, x, centres):
    figure, (left, right) = panels(2)
    angles = np.unwrap(np.arctan2(x[..., 1], x[..., 0]), axis=0)
    left.plot(ts, angles, color="#B0B0B0", lw=0.6)
    left.plot(ts, angles[:, centres], color="C1", lw=1.6)
    left.plot([], [], color="C1", label="strong centres")
    left.set(xlabel="$t$", ylabel="angle", title=rf"$\beta$ = {BETA:g}, {N} tokens")
    moved = np.array([arc(x[:, k])[1:] for k in centres]).T
    right.loglog(ts[1:], np.maximum(moved, 1e-16), color="C1", lw=1)
    bounds = [[allowed(ts[: i + 1], x[: i + 1], k) for i in range(1, len(ts), 8)] for k in centres]
    right.loglog(ts[1::8], np.maximum(np.transpose(bounds), 1e-16), "k:", lw=0.8)
    right.plot([], [], "k:", label="bounds")
    right.set(xlabel="$t$", ylabel="how far strong centres move", ylim=(1e-12, 10))
    for axes in (left, right):
        axes.legend()
    return figure


RESULT = Result(
    "causal",
    "2411.04990",
    "with a causal mask all tokens go to the first; Renyi's strong centres wait",
    Seconds(18, 18),
    run,
)
