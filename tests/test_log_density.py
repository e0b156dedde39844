"""log rho along the flow against laws whose density is known.

Solves run at rtol 1e-10, atol 1e-12; over some tens of steps the local errors add up to a few
1e-10, which TRUTH allows for.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

import jaxflow as jf

pytestmark = pytest.mark.usefixtures("x64")

TRUTH = 1e-9
CONTROLLER = diffrax.PIDController(rtol=1e-10, atol=1e-12)
ANGLES = 2 * np.pi * np.arange(128) / 128


def log_density(*args, **options):
    return jf.log_density(*args, **{"stepsize_controller": CONTROLLER, **options})


def log_poisson(r, x):
    """Log of the Poisson kernel with order parameter r along the first axis."""
    return jnp.log((1 - r**2) / (2 * np.pi * (1 - 2 * r * x[..., 0] + r**2)))


def test_poisson_kernels_stay_poisson_kernels():
    """F5 at t = 2: r = r0 e^{t/2} / sqrt(1 - r0^2 + r0^2 e^t). 400 quantiles have the order
    parameter of the law to r0^400."""
    x0 = jf.measure.from_angles(ANGLES).points
    mu0, field = jf.measure.kuramoto(400, 0.2), jf.SelfAttention(beta=0.0)
    x, logs = log_density(field, mu0, x0, lambda x: log_poisson(0.2, x), t1=2.0)
    r = 0.2 * np.e / np.sqrt(1 - 0.04 + 0.04 * np.e**2)
    np.testing.assert_allclose(logs, log_poisson(r, x), rtol=0, atol=TRUTH)


def test_linear_drift():
    """X = A x: x = e^{tA} x_0, and log rho falls by t tr A; no mass stays none."""
    A = np.array([[0.3, 1.0], [-0.4, -0.8]])
    x0, logs0 = np.array([[1.0, 0.0], [0.5, -2.0]]), np.array([0.7, -np.inf])
    mu0 = jf.Measure(x0)
    x, logs = log_density(jf.LinearDrift(A), mu0, x0, logs0, t1=1.5)
    np.testing.assert_allclose(x, x0 @ expm(1.5 * A).T, rtol=0, atol=TRUTH)
    np.testing.assert_allclose(logs, logs0 + 1.5 * 0.5, rtol=0, atol=TRUTH)


def test_linear_attention_keeps_gaussian_laws():
    """X[mu](x) = b V E[y y^T] x is linear in x, so that N(m, S) with the mean and covariance of the
    tokens stays one with theirs."""
    V = jnp.array([[0.3, -0.2], [0.5, -0.6]])
    field = jf.SelfAttention(value=V, beta=0.4, interaction=jf.Linear(), geometry=jf.Euclidean())
    mu0 = jf.measure.gaussian(12, 2, key=jax.random.key(0), mean=[0.5, -0.3])
    law = lambda mu: jax.vmap(jf.density.closures.Moments.of(mu).log_density)
    x0 = jax.random.normal(jax.random.key(1), (5, 2))
    both = jnp.concatenate([x0, mu0.points])
    x, logs = log_density(field, mu0, both, law(mu0)(both), t1=1.0)
    np.testing.assert_allclose(logs, law(jf.Measure(x[5:]))(x), rtol=0, atol=TRUTH)


def test_the_integral_on_the_circle():
    """rho_t(x_t) dx_t = rho_0 dx_0 at each point of a grid, dx_t/dx_0 by FFT."""
    mu0, field = jf.measure.kuramoto(7, 0.3), jf.SelfAttention(beta=2.0)
    x0 = jf.measure.from_angles(ANGLES).points
    x, logs = log_density(field, mu0, x0, jnp.zeros(128), t1=0.5)
    moved = np.unwrap(np.arctan2(x[:, 1], x[:, 0]) - ANGLES)
    stretch = 1 + np.fft.irfft(1j * np.arange(65) * np.fft.rfft(moved))
    assert stretch.max() > 1.5 * stretch.min()
    np.testing.assert_allclose(np.exp(logs) * stretch, 1, rtol=1e-8)


def test_the_integral_on_the_sphere():
    """The same on S^2, where two tangents give the area; by Gauss-Legendre and the trapezoidal rule
    the whole is 1."""
    mu0 = jf.measure.uniform_sphere(7, 3, key=jax.random.key(0))
    field = jf.SelfAttention(value=jnp.diag(jnp.array([1.0, 0.5, -1.0])), beta=2.0)
    nodes, weights = np.polynomial.legendre.leggauss(6)
    u, phi = (a.ravel() for a in np.meshgrid(nodes, 2 * np.pi * np.arange(12) / 12, indexing="ij"))
    s = np.sqrt(1 - u**2)
    x0 = jnp.asarray(np.stack([s * np.cos(phi), s * np.sin(phi), u], axis=1))
    east = jnp.asarray(np.stack([-np.sin(phi), np.cos(phi), 0 * phi], axis=1))
    north = jnp.cross(x0, east)

    def push(x0):
        logs0 = jnp.full(72, -np.log(4 * np.pi))
        return log_density(field, mu0, x0, logs0, t1=0.5, adjoint=diffrax.ForwardMode())

    (_, logs), moved = jax.vmap(lambda v: jax.jvp(push, (x0,), (v,)))(jnp.stack([east, north]))
    areas = jnp.linalg.norm(jnp.cross(*moved[0]), axis=1)
    np.testing.assert_allclose(jnp.exp(logs[0]) * areas, 1 / (4 * np.pi), rtol=1e-8)
    whole = np.repeat(weights, 12) * 2 * np.pi / 12 * np.exp(logs[0]) * areas
    np.testing.assert_allclose(whole.sum(), 1, rtol=1e-8)


def three():
    points = np.array([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]])
    return jf.Measure(points, np.array([0.0, 0.3, -0.2]))


@eqx.filter_jit
def total(beta, x0, t1, adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint()):
    field = jf.SelfAttention(beta=beta)
    x0 = jf.Sphere().retract(x0)
    return log_density(field, three(), x0, jnp.zeros(2), t1=t1, adjoint=adjoint)[1].sum()


@pytest.mark.slow
def test_derivatives():
    """In both modes as by central differences, whose error is 1e-10 / 1e-3 + 1e-6."""
    x0 = jnp.array([[0.0, 1.0], [0.8, 0.6]])
    reverse = jax.grad(total, argnums=(0, 1))(1.0, x0, 0.7)
    h = 1e-3
    beta = (total(1 + h, x0, 0.7) - total(1 - h, x0, 0.7)) / (2 * h)
    np.testing.assert_allclose(reverse[0], beta, rtol=0, atol=2e-6)
    step = h * jnp.array([[0.3, 0.4], [-0.2, 0.1]])
    points = (total(1.0, x0 + step, 0.7) - total(1.0, x0 - step, 0.7)) / (2 * h)
    np.testing.assert_allclose((reverse[1] * step / h).sum(), points, rtol=0, atol=2e-6)
    forward = jax.jvp(
        lambda beta: total(beta, x0, 0.7, diffrax.ForwardMode()), (jnp.asarray(1.0),), (1.0,)
    )[1]
    np.testing.assert_allclose(forward, reverse[0], rtol=1e-7)


def test_one_program_under_jit_and_vmap():
    mu, traces = three(), 0

    @jax.jit
    def push(beta, t1):
        nonlocal traces
        traces += 1
        options = {"throw": False, "adjoint": diffrax.ForwardMode()}
        field = jf.SelfAttention(beta=beta)
        return jf.log_density(field, mu, mu.points, jnp.zeros(3), t1=t1, **options)[1]

    one = [push(beta, t1) for beta, t1 in ((1.0, 0.5), (2.0, 1.0))]
    assert traces == 1
    both = jax.vmap(push)(jnp.array([1.0, 2.0]), jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(both, one, rtol=0, atol=1e-9)


def test_hutchinson():
    """Of a diagonal matrix one probe knows the trace; of any other the mean over probes is near."""
    x0 = jnp.array([[1.0, 0.0], [0.5, -2.0]])
    push = lambda A, key, samples: jf.log_density(
        jf.LinearDrift(A), jf.Measure(x0), x0, jnp.zeros(2), t1=1.0, key=key, samples=samples
    )[1]
    exact = push(jnp.diag(jnp.array([0.3, -0.7])), jax.random.key(0), 1)
    np.testing.assert_allclose(exact, 0.4, atol=1e-12)
    # z^T A z = tr A + 2 a z_1 z_2, of standard deviation 2 a / 16.
    rough = push(jnp.array([[0.3, 0.5], [0.5, -0.7]]), jax.random.key(1), 256)
    assert (abs(rough - 0.4) < 4 / 16).all() and not np.allclose(rough, 0.4, atol=1e-9)


def test_a_failed_solve_is_nan():
    mu = three()
    push = lambda throw: jf.log_density(
        jf.LinearDrift(-50.0), mu, mu.points, jnp.zeros(3), t1=9.0, max_steps=3, throw=throw
    )
    assert all(jnp.isnan(part).all() for part in push(False))
    with pytest.raises(jf.FlowError, match="max_steps = 3 was reached"):
        push(True)
