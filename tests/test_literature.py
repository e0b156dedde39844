"""Maps of the literature against their exact results, or a direct formula in float64."""

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

import jaxflow as jf

pytestmark = pytest.mark.usefixtures("x64")

CONTROLLER = diffrax.PIDController(rtol=1e-10, atol=1e-12)
# Solves to the tolerances above, over some tens of steps.
TRUTH = 1e-9


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def spherical(seed, n, d):
    x = normal(seed, n, d)
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def softmax(s):
    weights = np.exp(s - s.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def solve(field, points, ts):
    return jf.flow(
        field,
        jf.Measure(points),
        t1=ts[-1],
        saveat=diffrax.SaveAt(ts=jnp.asarray(ts, float)),
        stepsize_controller=CONTROLLER,
        adjoint=diffrax.ForwardMode(),
    ).measures.points


# ------------------------------------------------------------------ the published step


def test_normalised_euler_is_the_published_loop():
    """x <- (x + h F) / |x + h F|, F = V softmax(beta x Q^T K x^T) x, written in NumPy."""
    beta, h, steps = 4.0, 0.1, 100
    Q, K, V = normal(1, 2, 3), normal(2, 2, 3), normal(3, 3, 3)
    x = np.asarray(spherical(0, 12, 3))
    sol = jf.flow(
        jf.SelfAttention(Q, K, V, beta=beta),
        jf.Measure(x),
        t1=h * steps,
        dt0=h,
        solver=jf.solvers.NormalisedEuler(),
        saveat=diffrax.SaveAt(t1=True, steps=True),
        max_steps=steps,
    )
    loop = []
    for _ in range(steps):
        x = x + h * softmax(beta * (x @ Q.T) @ (x @ K.T).T) @ x @ V.T
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        loop.append(x)
    assert int(sol.stats["num_steps"]) == int(sol.stats["num_evaluations"]) == steps
    # The times k h round, and with them the steps, by 1e-14; the flow is not chaotic to t = 10.
    np.testing.assert_allclose(sol.measures.points[:steps], loop, rtol=0, atol=1e-12)


def test_normalised_euler_is_late():
    """Two tokens at b = 4: rho goes from 0 to 0.9 by the exact time 8.390296; at that time the
    published step with h = 0.1 has come as far as the flow had some 8 % earlier."""
    mu0 = jf.measure.from_angles(np.array([0.0, np.pi / 2]))
    late = jf.flow(
        jf.SelfAttention(beta=4.0), mu0, t1=20.0, dt0=0.1, solver=jf.solvers.NormalisedEuler(),
        saveat=diffrax.SaveAt(steps=True, t1=True), max_steps=200,
    )  # fmt: skip
    x = np.asarray(late.measures.points)[:200]
    rho = (x[:, 0] * x[:, 1]).sum(axis=1)
    time = np.interp(0.9, rho, np.asarray(late.ts)[:200])
    assert 1.04 < time / 8.390296 < 1.11


def test_normalised_euler_in_time_sums_and_splittings():
    """F of a sum, of a multiple and of a field in time is that before their projection."""
    mu0 = jf.Measure(spherical(0, 5, 3))
    attention, drift = (
        jf.SelfAttention(beta=2.0),
        jf.LinearDrift(normal(1, 3, 3), geometry=jf.Sphere()),
    )
    field = jf.TimeDependent(jf.Constant(attention + 0.5 * drift))
    step = lambda solver: jf.flow(field, mu0, t1=0.2, dt0=0.2, solver=solver).last.points
    x = np.asarray(mu0.points)
    unit = lambda y: y / np.linalg.norm(y, axis=1, keepdims=True)
    pull = lambda x: softmax(2 * x @ x.T) @ x
    push = lambda x: 0.5 * x @ np.asarray(drift.matrix).T
    euler = jf.solvers.NormalisedEuler()
    np.testing.assert_allclose(step(euler), unit(x + 0.2 * (pull(x) + push(x))), rtol=0, atol=1e-14)
    half = unit(x + 0.2 * pull(x))
    split = unit(half + 0.2 * push(half))
    np.testing.assert_allclose(step(jf.solvers.LieTrotter(euler)), split, rtol=0, atol=1e-14)


# ------------------------------------------------------------------ rescaled tokens


@pytest.mark.parametrize("V", [None, [[0.8, 0.3], [-0.2, 0.5]]], ids=["V = I", "V"])
@pytest.mark.parametrize("interaction", [jf.Softmax(), jf.Unnormalised()], ids=["SA", "USA"])
def test_rescaled_tokens_are_those_of_the_plain_flow(V, interaction):
    """z = e^{-tV} x (arXiv 2305.05465)."""
    ts, scale = np.array([0.25, 0.5, 1.0]), 0.1
    Q, K = normal(1, 3, 2), normal(2, 3, 2)
    attention = jf.SelfAttention(
        Q, K, V, beta=scale, interaction=interaction, geometry=jf.Euclidean()
    )
    start = normal(3, 7, 2) / 2
    x = solve(attention, start, ts)
    z = solve(jf.TimeDependent(jf.Rescaled(attention)), start, ts)
    growth = np.stack([expm(-t * np.eye(2) if V is None else -t * np.asarray(V)) for t in ts])
    np.testing.assert_allclose(z, np.einsum("tij,tnj->tni", growth, x), rtol=0, atol=TRUTH)
    assert np.abs(z[-1] - start).max() > 0.05


def test_a_drift_is_no_change_of_variable_for_softmax():
    """Adding -V x to softmax attention gives other tokens than z; to hardmax attention, z."""
    start, ts = normal(3, 7, 2), np.array([1.0])
    for interaction, same in ((jf.Softmax(), False), (jf.Hardmax(), True)):
        attention = jf.SelfAttention(interaction=interaction, geometry=jf.Euclidean())
        drifted = solve(attention + jf.LinearDrift(-1.0), start, ts)
        z = np.exp(-1) * solve(attention, start, ts)
        assert (np.abs(drifted - z).max() < 1e-7) == same
