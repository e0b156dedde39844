"""Optimal transport against assignments, linear programs, and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, linprog
from scipy.stats import norm

import jaxflow as jf
from jaxflow.observables import sinkhorn_divergence, wasserstein

CIRCLE = jf.Sphere()
pytestmark = pytest.mark.usefixtures("x64")


def weighted(points, rng):
    """Random weights, the second token without mass."""
    logs = rng.normal(size=len(points))
    logs[1] = -np.inf
    return jf.Measure(jnp.asarray(points), jnp.asarray(logs))


def squared_costs(mu, nu, geometry):
    x, y = (jnp.asarray(m.points) for m in (mu, nu))
    pair = lambda a, b: jnp.broadcast_to(a[:, None] if b else a[None], (len(x), len(y), x.shape[1]))
    return np.asarray(geometry.distance(pair(x, True), pair(y, False))) ** 2


def by_program(mu, nu, geometry):
    """W_2 by linear programming over couplings."""
    costs = squared_costs(mu, nu, geometry)
    n, m = costs.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    marginals = np.concatenate([mu.weights, nu.weights])
    out = linprog(costs.ravel(), A_eq=np.vstack([rows, columns])[:-1], b_eq=marginals[:-1])
    assert out.status == 0
    return np.sqrt(out.fun)


@pytest.mark.parametrize(
    "geometry", [jf.Euclidean(), CIRCLE, pytest.param(jf.Sphere(3.0), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("seed", range(3))
def test_wasserstein_is_the_least_cost(geometry, seed):
    """Equal weights: an assignment. Other weights and numbers of tokens: a linear program."""
    rng = np.random.default_rng(seed)
    if isinstance(geometry, jf.Euclidean):
        place = lambda n: jf.Measure(jnp.asarray(rng.normal(size=(n, 1))))
    else:
        place = lambda n: jf.Measure(
            geometry.radius * jf.measure.from_angles(rng.normal(scale=1 + seed, size=n)).points
        )
    mu, nu = place(12), place(12)
    costs = squared_costs(mu, nu, geometry)
    expected = np.sqrt(costs[linear_sum_assignment(costs)].mean())
    np.testing.assert_allclose(wasserstein(mu, nu, geometry=geometry), expected, rtol=1e-10)
    mu, nu = (weighted(place(n).points, rng) for n in (7, 9))
    # HiGHS solves to 1e-7.
    expected = by_program(mu, nu, geometry)
    np.testing.assert_allclose(wasserstein(mu, nu, geometry=geometry), expected, rtol=1e-6)
    np.testing.assert_allclose(wasserstein(nu, mu, geometry=geometry), expected, rtol=1e-6)


def test_wasserstein_of_gaussian_quantiles():
    """W_2(N(m, s^2), N(m', s'^2))^2 = (m - m')^2 + (s - s')^2, for their quantiles at midpoints."""
    n = 4000
    z = norm.ppf((np.arange(n) + 0.5) / n)
    mu, nu = (jf.Measure(jnp.asarray(m + s * z)[:, None]) for m, s in ((0.0, 1.0), (3.0, 0.5)))
    expected = np.sqrt(9 + 0.25 * (z**2).mean())
    np.testing.assert_allclose(wasserstein(mu, nu), expected, rtol=1e-13)
    np.testing.assert_allclose(expected**2, 9.25, rtol=1e-4)
    # A subdivision of the tokens of nu changes nothing.
    double = jf.Measure(jnp.repeat(nu.points, 3, axis=0))
    np.testing.assert_allclose(wasserstein(mu, double), expected, rtol=1e-12)


def test_wasserstein_on_the_circle_in_closed_form():
    """Rotations by less than half a step, antipodes, and a cut through the branch of the angle."""
    mu = jf.measure.circle(7)
    for phase in (0.1, -0.3, 0.4):
        turned = jf.measure.circle(7, phase=phase)
        np.testing.assert_allclose(wasserstein(mu, turned, geometry=CIRCLE), abs(phase), rtol=1e-12)
    point = lambda a: jf.measure.from_angles([a])
    across = wasserstein(point(np.pi - 0.1), point(-np.pi + 0.2), geometry=CIRCLE)
    np.testing.assert_allclose(across, 0.3, rtol=1e-12)
    far = wasserstein(point(0.0), point(np.pi), geometry=jf.Sphere(2.0))
    np.testing.assert_allclose(far, 2 * np.pi, rtol=1e-12)
    # One point against the uniform measure: the mean of a^2 over [-pi, pi] is pi^2 / 3, and over
    # n equispaced points, n odd, (2 pi / n)^2 (n^2 - 1) / 12.
    n = 101
    expected = 2 * np.pi / n * np.sqrt((n**2 - 1) / 12)
    spread = wasserstein(point(0.0), jf.measure.circle(n), geometry=CIRCLE)
    np.testing.assert_allclose(spread, expected, rtol=1e-12)


@pytest.mark.parametrize("geometry", [jf.Euclidean(), CIRCLE])
def test_wasserstein_derivative_and_zero(geometry, key):
    """Against central differences, whose error is O(h^2); 0 with derivative 0 at mu = nu."""
    a, b = jax.random.normal(key, (2, 9))
    if isinstance(geometry, jf.Euclidean):
        place = lambda s: jf.Measure(s[:, None])
    else:
        place = jf.measure.from_angles
    distance = lambda s: wasserstein(place(s), place(b), geometry=geometry)
    h = 1e-6
    numeric = [(distance(a + h * e) - distance(a - h * e)) / (2 * h) for e in np.eye(9)]
    np.testing.assert_allclose(jax.grad(distance)(a), numeric, atol=1e-8)
    assert float(distance(b)) == 0
    np.testing.assert_array_equal(jax.grad(distance)(b), 0)


def test_wasserstein_maps_over_leading_axes(key):
    points = jax.random.normal(key, (3, 5, 1))
    mu, nu = jf.Measure(points), jf.Measure(points[0, :4])
    distances = wasserstein(mu, nu)
    assert distances.shape == (3,)
    np.testing.assert_allclose(distances[2], wasserstein(mu[2], nu), rtol=1e-14)


def test_wasserstein_has_its_dimensions():
    line, plane = jf.Measure(jnp.ones((3, 1))), jf.measure.circle(3)
    with pytest.raises(ValueError, match="d = 1 with Euclidean.*sinkhorn_divergence"):
        wasserstein(plane, plane)
    with pytest.raises(ValueError, match="got d = 1 and 1 with Sphere"):
        wasserstein(line, line, geometry=CIRCLE)


# ------------------------------------------------------------------ Sinkhorn divergence


def reference(mu, nu, geometry, epsilon):
    """S from its definition, by plain iterations with whole matrices."""

    def cost(mu, nu):
        costs = squared_costs(mu, nu, geometry)
        a, b = np.asarray(mu.weights), np.asarray(nu.weights)
        kernel, u, v = np.exp(-costs / epsilon), np.ones(len(a)), np.ones(len(b))
        for _ in range(20_000):
            u = 1 / (kernel @ (b * v))
            v = 1 / (kernel.T @ (a * u))
        plan = a[:, None] * b[None] * u[:, None] * v[None] * kernel
        return (plan * costs).sum() + epsilon * (plan * np.log(u[:, None] * v[None] * kernel)).sum()

    return cost(mu, nu) - cost(mu, mu) / 2 - cost(nu, nu) / 2


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [jf.Euclidean(), CIRCLE])
def test_sinkhorn_divergence_is_its_definition(geometry, key):
    rng = np.random.default_rng(0)
    mu = weighted(jf.measure.uniform_sphere(9, 3, key=key).points, rng)
    nu = weighted(jf.measure.von_mises_fisher(7, [1.0, 1.0, 0.0], 4.0, key=key).points, rng)
    divergence = partial(sinkhorn_divergence, epsilon=0.3, geometry=geometry, max_iterations=20_000)
    value = divergence(mu, nu, tolerance=1e-12)
    np.testing.assert_allclose(value, reference(mu, nu, geometry, 0.3), rtol=1e-9)
    # The value is stationary in the potentials, so its error is that of the coupling squared.
    itself = divergence(mu, mu, tolerance=1e-6)
    np.testing.assert_allclose(itself, 0, atol=1e-9)


def test_sinkhorn_divergence_has_its_limits(key):
    """W_2^2 for a small epsilon, the distance of the means for a large one."""
    x, y = jax.random.normal(key, (2, 8, 1))
    mu, nu = jf.Measure(x), jf.Measure(3 + 2 * y)
    small = sinkhorn_divergence(mu, nu, epsilon=1e-2, max_iterations=20_000)
    np.testing.assert_allclose(small, wasserstein(mu, nu) ** 2, rtol=1e-3)
    large = sinkhorn_divergence(mu, nu, epsilon=1e6, tolerance=1e-12)
    np.testing.assert_allclose(large, (x.mean() - 3 - 2 * y.mean()) ** 2, rtol=1e-4)


@pytest.mark.slow
def test_sinkhorn_divergence_is_that_of_ott(key):
    sd = pytest.importorskip("ott.tools.sinkhorn_divergence", reason="ott-jax is not installed")
    from ott.geometry import pointcloud

    x, y = jax.random.normal(key, (2, 30, 3))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = sd.sinkhorn_divergence(
            pointcloud.PointCloud, x, y + 1, epsilon=0.5, solve_kwargs={"threshold": 1e-10}
        )[0]
    actual = sinkhorn_divergence(jf.Measure(x), jf.Measure(y + 1), epsilon=0.5, tolerance=1e-10)
    np.testing.assert_allclose(actual, expected, rtol=1e-8)


@pytest.mark.parametrize("geometry", [jf.Euclidean(), CIRCLE])
def test_sinkhorn_divergence_derivative(geometry, key):
    """In points and log-weights, against central differences of converged values."""
    x, y = (jf.measure.uniform_sphere(6, 3, key=k).points for k in jax.random.split(key))
    direction, shift = jax.random.normal(key, (6, 3)), jnp.linspace(-1.0, 1.0, 6)
    place = geometry.retract if isinstance(geometry, jf.Sphere) else lambda x: x

    def value(s):
        mu = jf.Measure(place(x + s * direction), s * shift)
        return sinkhorn_divergence(
            mu, jf.Measure(y), epsilon=0.5, geometry=geometry, tolerance=1e-13
        )

    h = 1e-5
    numeric = (value(h) - value(-h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(value)(0.0), numeric, rtol=1e-7)


def test_sinkhorn_divergence_refuses():
    mu = jf.measure.circle(5)
    with pytest.raises(ValueError, match="epsilon must be positive and finite, got -1"):
        sinkhorn_divergence(mu, mu, epsilon=-1.0)
    with pytest.raises(ValueError, match="the same dimension d, got 2 and 3"):
        sinkhorn_divergence(mu, jf.measure.simplex(3, 3), epsilon=1.0)
    nu = jf.measure.circle(5, phase=0.3)
    with pytest.raises(Exception, match="raise max_iterations or epsilon"):
        sinkhorn_divergence(mu, nu, epsilon=1e-3, max_iterations=3)


@pytest.mark.slow
def test_float32_agrees_with_float64(key):
    """To sums of 300 weights in float32; 0 stays 0."""
    a, b = 2 * jax.random.normal(key, (2, 300))
    for geometry, place in (
        (jf.Euclidean(), lambda s: jf.Measure(s[:, None])),
        (CIRCLE, jf.measure.from_angles),
    ):
        mu, nu = place(a), place(b)
        expected = wasserstein(mu, nu, geometry=geometry)
        single = jf.Measure(mu.points.astype(jnp.float32))
        value = wasserstein(single, jf.Measure(nu.points.astype(jnp.float32)), geometry=geometry)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=2e-4)
        assert float(wasserstein(single, single, geometry=geometry)) == 0
        np.testing.assert_allclose(wasserstein(single, nu, geometry=geometry), expected, rtol=1e-6)
