"""Lyapunov exponents against flows whose derivative is known."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import simpson

import jaxflow as jf

pytestmark = pytest.mark.usefixtures("x64")


def test_exponents_at_consensus():
    """Tokens at one point: x_i' = P (mean - x_i) to first order, so d - 1 exponents are 0, those
    of the mean, and all others -1; growth in the last interval alone, where the transient is
    e^{-15}."""
    mu = jf.Measure(jnp.tile(jnp.array([[0.0, 0.0, 1.0]]), (4, 1)))
    found = jf.lyapunov_exponents(jf.SelfAttention(beta=3.0), mu, t1=16.0, k=8, intervals=16)
    sums = found.running * found.ts[:, None]
    np.testing.assert_allclose(sums[-1] - sums[-2], [0] * 2 + [-1] * 6, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.exponents, found.running[-1])
    np.testing.assert_allclose(found.measure.points, mu.points, atol=1e-12)


def test_exponents_of_a_linear_drift():
    """x' = A x: the real parts of the eigenvalues, once a token."""
    drift = jf.LinearDrift(jnp.array([[0.3, 1.0], [0.0, -0.5]]))
    mu = jf.measure.gaussian(2, 2, key=jax.random.key(0))
    found = jf.lyapunov_exponents(drift, mu, t1=40.0, k=4)
    sums = found.running * found.ts[:, None]
    rates = (sums[-1] - sums[15]) / (found.ts[-1] - found.ts[15])
    np.testing.assert_allclose(rates, [0.3, 0.3, -0.5, -0.5], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_their_sum_is_the_divergence_of_the_particle_system():
    """Liouville: sum_k lambda_k = (1/T) int div, by Simpson's rule on 200 intervals."""
    field, mu = jf.SelfAttention(beta=2.0), jf.measure.uniform_sphere(4, 3, key=jax.random.key(1))
    found = jf.lyapunov_exponents(field, mu, t1=3.0, k=8, intervals=12)

    def trace(t, mu):
        on_sphere = lambda y: field.geometry.retract(y)
        move = lambda y: field(t, on_sphere(y), jf.Measure(on_sphere(y)))
        return jnp.einsum("iaia->", jax.jacfwd(move)(mu.points))

    ts = jnp.linspace(0.0, 3.0, 201)
    sol = jf.flow(field, mu, t1=3.0, saveat=diffrax.SaveAt(ts=ts), observe={"trace": trace})
    expected = simpson(sol.observed["trace"], x=ts) / 3
    # The tolerance of the flow, 1e-8 a step.
    np.testing.assert_allclose(found.exponents.sum(), expected, rtol=1e-7)
    np.testing.assert_allclose(found.measure.points, sol.measures.points[-1], atol=1e-6)


@pytest.mark.slow
def test_weights_count():
    field, mu = jf.SelfAttention(), jf.measure.uniform_sphere(3, 3, key=jax.random.key(1))
    heavy = jf.Measure(mu.points, jnp.array([0.0, 0.0, -jnp.inf]))
    light = jf.lyapunov_exponents(field, heavy, t1=1.0, k=2, intervals=2)
    assert not np.allclose(light.exponents, jf.lyapunov_exponents(
        field, mu, t1=1.0, k=2, intervals=2).exponents)  # fmt: skip


def test_bad_input():
    field, mu = jf.SelfAttention(), jf.measure.uniform_sphere(3, 3, key=jax.random.key(1))
    with pytest.raises(ValueError, match="have 6 exponents, got k=7"):
        jf.lyapunov_exponents(field, mu, t1=1.0, k=7)
    with pytest.raises(ValueError, match="intervals must be at least 1, got 0"):
        jf.lyapunov_exponents(field, mu, t1=1.0, intervals=0)
    with pytest.raises(ValueError, match="jax.vmap"):
        jf.lyapunov_exponents(field, jf.Measure(mu.points[None]), t1=1.0)
