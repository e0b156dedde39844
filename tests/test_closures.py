"""Closures against the flow of tokens whose law they describe.

A Gaussian law is 12^2 Gauss-Hermite nodes: an affine field leaves them Gauss-Hermite nodes of
the law that has moved, and their integrals of e^{<a, y>} are exact to (|a|^2 / 2)^12 / 12!, below
1e-10 here. Both solves have rtol = 1e-10 a step.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

import jaxflow as jf
from jaxflow.density import closures

pytestmark = pytest.mark.usefixtures("x64")

TRUTH = 1e-9
CONTROLLER = diffrax.PIDController(rtol=1e-10, atol=1e-12)
QUERY = np.array([[0.5, 0.1], [-0.2, 0.4]])
KEY = np.array([[0.4, -0.1], [0.2, 0.3]])
VALUE = np.array([[0.6, -0.3], [0.2, -0.5]])
MEAN, ROOT = np.array([0.4, -0.2]), np.array([[0.9, 0.0], [0.3, 0.7]])


def evolve(closure, z0, **options):
    options = {"stepsize_controller": CONTROLLER, "adjoint": diffrax.ForwardMode(), **options}
    return closures.evolve(closure, z0, **options)


def flow(field, mu0, **options):
    options = {"stepsize_controller": CONTROLLER, "adjoint": diffrax.ForwardMode(), **options}
    return jf.flow(field, mu0, **options)


def gauss_hermite(n=12):
    """N(m, L L^T) in d = 2 by n^2 nodes."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    z = np.stack([a.ravel() for a in np.meshgrid(x, x)], axis=1)
    return jf.Measure(MEAN + z @ ROOT.T, np.log(np.outer(w, w).ravel()))


def attention(interaction):
    return jf.SelfAttention(QUERY, KEY, VALUE, interaction=interaction, geometry=jf.Euclidean())


@pytest.mark.parametrize("interaction", [jf.Softmax(), jf.Linear(), jf.Sinkhorn(), jf.L2()])
def test_gaussian_laws(interaction):
    field = attention(interaction)
    closure = closures.gaussian(field, 2)
    mu0 = gauss_hermite()
    law = closures.Moments.of(mu0)
    np.testing.assert_allclose(law.covariance, ROOT @ ROOT.T, atol=1e-12)
    moved = closures.Moments.of(flow(field, mu0, t1=1.0).last)
    z = evolve(closure, law, t1=1.0).states
    # Far from where it began: no formula of a wrong sign or order agrees.
    assert np.abs(z.covariance[-1] - law.covariance).max() > 0.01
    np.testing.assert_allclose(z.mean[-1], moved.mean, rtol=0, atol=1e-8)
    np.testing.assert_allclose(z.covariance[-1], moved.covariance, rtol=0, atol=1e-8)


def test_the_mean_under_sinkhorn():
    """F13: m = e^{tV} m_0."""
    law = closures.Moments(jnp.asarray(MEAN), jnp.asarray(ROOT @ ROOT.T))
    z = evolve(closures.gaussian(attention(jf.Sinkhorn()), 2), law, t1=1.0).states
    np.testing.assert_allclose(z.mean[-1], expm(VALUE) @ MEAN, rtol=0, atol=TRUTH)


def test_many_independent_tokens_are_near():
    """4000 tokens of N(m, S): moments to some standard errors, 4 / sqrt(4000)."""
    key = jax.random.key(0)
    mu0 = jf.measure.gaussian(4000, 2, key=key, mean=MEAN, covariance=ROOT @ ROOT.T)
    moved = jf.flow(attention(jf.Softmax()), mu0, t1=1.0, adjoint=diffrax.ForwardMode()).last
    law = closures.Moments(jnp.asarray(MEAN), jnp.asarray(ROOT @ ROOT.T))
    z = evolve(closures.gaussian(attention(jf.Softmax()), 2), law, t1=1.0).states
    np.testing.assert_allclose(moved.mean, z.mean[-1], rtol=0, atol=0.063)
    np.testing.assert_allclose(moved.covariance, z.covariance[-1], rtol=0, atol=0.063)


def test_softmax_in_closed_form():
    """F12, A = a I, V = v I: S = (S_0^{-1} - 2 v a t)^{-1}, here v a = -0.3."""
    S = ROOT @ ROOT.T
    closure = closures.SoftmaxGaussian(0.5 * np.eye(2), -0.6 * np.eye(2))
    z = evolve(closure, closures.Moments(jnp.zeros(2), jnp.asarray(S)), t1=2.0).states
    exact = np.linalg.inv(np.linalg.inv(S) + 1.2 * np.eye(2))
    np.testing.assert_allclose(z.covariance[-1], exact, rtol=0, atol=TRUTH)


def test_the_time_of_a_blow_up():
    """At t = 1 / (2 v a |S_0|), up to 1 / (2 v a bound) and the error of the solve."""
    S = ROOT @ ROOT.T
    closure = closures.SoftmaxGaussian(0.5 * np.eye(2), 0.6 * np.eye(2))
    law = closures.Moments(jnp.asarray(MEAN), jnp.asarray(S))
    sol = evolve(closure, law, t1=99.0, event=closures.until_blow_up(), throw=False)
    assert bool(sol.event_mask)
    np.testing.assert_allclose(sol.ts[-1], 1 / (0.6 * np.linalg.eigvalsh(S)[-1]), rtol=1e-7)
    with pytest.raises(jf.FlowError, match="the solve stopped after"):
        evolve(closure, law, t1=99.0)


def test_the_density_of_moments():
    law = closures.Moments(jnp.asarray(MEAN), jnp.asarray(ROOT @ ROOT.T))
    expected = (
        -np.log(2 * np.pi * np.linalg.det(ROOT)) - np.sum(np.linalg.solve(ROOT, MEAN) ** 2) / 2
    )
    np.testing.assert_allclose(law.log_density(jnp.zeros(2)), expected, rtol=1e-12)


@pytest.mark.parametrize("interaction", [jf.Softmax(), jf.Unnormalised()])
def test_equiangular_tokens(interaction):
    mu0 = jf.measure.simplex(5, 5, 0.1)
    points = flow(jf.SelfAttention(beta=2.0, interaction=interaction), mu0, t1=0.5).last.points
    rho = evolve(closures.Equiangular(5, 2.0, interaction), 0.1, t1=0.5).states[-1]
    cosines = np.asarray(points @ points.T)[~np.eye(5, dtype=bool)]
    np.testing.assert_allclose(cosines, rho, rtol=0, atol=TRUTH)


def test_published_equiangular_numbers():
    """F1: n = 32, rho_0 = 0, b = 4 at t = 1, 2, 5."""
    ts = jnp.array([1.0, 2.0, 5.0])
    closure = closures.Equiangular(32, 4.0)
    rho = evolve(closure, 0.0, t1=5.0, saveat=diffrax.SaveAt(ts=ts)).states
    np.testing.assert_allclose(rho, [0.035441, 0.118066, 0.952775], rtol=0, atol=5e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_two_tokens(causal):
    """F3 at b = 0 and the flow at b = 3."""
    rate = 0.5 if causal else 1.0
    rho = evolve(closures.TwoTokens(0.0, causal), 0.3, t1=1.0).states[-1]
    np.testing.assert_allclose(rho, np.tanh(rate + np.arctanh(0.3)), rtol=0, atol=TRUTH)
    mu0 = jf.measure.simplex(2, 2, 0.3)
    x, y = flow(jf.SelfAttention(beta=3.0, causal=causal), mu0, t1=1.0).last.points
    rho = evolve(closures.TwoTokens(3.0, causal), 0.3, t1=1.0).states[-1]
    np.testing.assert_allclose(x @ y, rho, rtol=0, atol=TRUTH)


def rotation(angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s], [s, c]])


def test_poisson_kernels():
    """F5 at t = 1, 2, 4; with V a rotation the flow of 400 quantiles, exact to 0.4^400."""
    ts = jnp.array([1.0, 2.0, 4.0])
    saveat = diffrax.SaveAt(ts=ts)
    z = evolve(closures.OttAntonsen(), jnp.array([0.0, 0.2]), t1=4.0, saveat=saveat).states
    np.testing.assert_allclose(z[:, 0], 0, atol=TRUTH)
    np.testing.assert_allclose(z[:, 1], [0.318965, 0.485183, 0.833456], rtol=0, atol=5e-7)
    field = jf.SelfAttention(value=rotation(0.7), beta=0.0)
    mean = flow(field, jf.measure.kuramoto(400, 0.2), t1=4.0, saveat=saveat).measures.mean
    closure = closures.OttAntonsen(angle=0.7)
    z = evolve(closure, jnp.array([0.2, 0.0]), t1=4.0, saveat=saveat).states
    np.testing.assert_allclose(z, mean, rtol=0, atol=TRUTH)


def test_poisson_kernels_of_linear_attention():
    """E[e^{2ia}], for tokens at half the angles of a Poisson kernel."""
    angles = np.arctan2(*jf.measure.kuramoto(400, 0.2).points.T[::-1]) / 2
    field = jf.SelfAttention(beta=1.5, interaction=jf.Linear())
    last = flow(field, jf.measure.from_angles(angles), t1=1.0).last
    closure = closures.OttAntonsen(0.75, harmonic=2)
    z = evolve(closure, jnp.array([0.2, 0.0]), t1=1.0).states[-1]
    np.testing.assert_allclose(jf.observables.fourier_modes(last, 2), z[0], rtol=0, atol=TRUTH)
    x = np.array([0.6, 0.8])
    density = (1 - 0.04) / abs(1 - 0.2 * (0.6 + 0.8j) ** 2) ** 2 / (2 * np.pi)
    logs = closure.log_density(jnp.array([0.2, 0.0]), jnp.asarray(x))
    np.testing.assert_allclose(logs, np.log(density), rtol=1e-12)


def test_derivatives_and_one_program():
    """F4: drho/drho_0 = (1 - R^2) / (1 - rho_0^2); new numbers are no new program."""
    traces = 0

    @jax.jit
    def end(beta, rho, t1):
        nonlocal traces
        traces += 1
        return closures.evolve(closures.TwoTokens(beta), rho, t1=t1, throw=False).states[-1]

    rho = end(0.0, 0.3, 1.0), end(1.0, 0.2, 2.0)
    assert traces == 1
    slope = jax.grad(end, argnums=1)(0.0, 0.3, 1.0)
    np.testing.assert_allclose(slope, 0.2782837305, rtol=1e-7)
    np.testing.assert_allclose(rho[0], 0.8641538088, rtol=1e-7)
