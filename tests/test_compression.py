"""Compressed measures against the measures themselves, in float64 unless said."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxflow as jf
from jaxflow.measure import Box, compress
from jaxflow.measure.compression import grid_of

KEY = jax.random.key(0)
x64 = pytest.mark.usefixtures("x64")
SPACES = {
    "circle": (jf.Sphere(), 2),
    "large circle": (jf.Sphere(3.0), 2),
    "sphere": (jf.Sphere(), 3),
    "interval": (Box([-1.0], [2.0]), 1),
    "square": (Box([-1.0, 0.0], [1.0, 1.0]), 2),
    "cube": (Box([0.0] * 3, [1.0] * 3), 3),
}


def draw(space, d, n, rng):
    if isinstance(space, Box):
        return np.array(space.low) + rng.random((n, d)) * np.subtract(space.high, space.low)
    return unit(rng.standard_normal((n, d))) * space.radius


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_z(q, points, weights):
    """log sum_j w_j exp(<q, y_j>), of signed weights too."""
    s = q @ np.asarray(points, float).T
    top = s.max(axis=1, keepdims=True)
    return np.log(np.exp(s - top) @ np.asarray(weights, float)) + top[:, 0]


@x64
@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
@pytest.mark.parametrize("name", SPACES)
def test_integrals_of_every_query_are_right_to_the_tolerance(name, tolerance):
    """Also where one token alone has mass, at the reach and below it."""
    space, d = SPACES[name]
    rng = np.random.default_rng(1)
    reach = 4.0
    q = unit(rng.standard_normal((400, d))) * reach * np.linspace(0, 1, 400)[:, None] ** 0.5
    few = grid_of(space, d, reach, tolerance, np.float64).points
    tokens = draw(space, d, few + 1, rng)
    for mass in ([0.0], rng.standard_normal(few + 1)):
        logs = np.full(few + 1, -np.inf)
        logs[: len(mass)] = mass
        mu = jf.Measure(tokens, logs)
        signed = compress(mu, space, reach=reach, tolerance=tolerance)
        assert signed.n == few
        error = log_z(q, signed.points, signed.weights) - log_z(q, tokens, mu.weights)
        assert np.abs(error).max() < tolerance


@pytest.mark.parametrize("d", [2, 3])
def test_a_token_far_from_all_mass_is_seen_in_single_precision(d):
    """Its weight is 1e-6 and the others are at the opposite point, e^{-2 beta} away."""
    beta, n = 9.0, 4000
    rng = np.random.default_rng(2)
    tokens = unit(np.eye(d)[0] + 1e-3 * rng.standard_normal((n, d)))
    tokens[0] = -np.eye(d)[0]
    logs = np.zeros(n)
    logs[0] = np.log(1e-6 * n)
    mu = jf.Measure(jnp.asarray(tokens, jnp.float32), jnp.asarray(logs, jnp.float32))
    signed = compress(mu, jf.Sphere(), reach=beta, tolerance=1e-5)
    q = beta * unit(np.concatenate([-np.eye(d)[:1], rng.standard_normal((500, d))]))
    error = log_z(q, signed.points, signed.weights) - log_z(q, mu.points, mu.weights)
    assert np.abs(error).max() < 1e-5


@x64
def test_the_law_itself_is_kept():
    mu = jf.measure.von_mises_fisher(2000, [1.0, 2.0, 2.0], 3.0, key=KEY)
    signed = compress(mu, reach=1.0, tolerance=1e-8)
    assert isinstance(signed, jf.Measure) and signed.n < 500
    assert abs(signed.weights.sum() - 1) < 1e-8
    assert jnp.abs(signed.mean - mu.mean).max() < 1e-7
    assert jnp.abs(signed.covariance - mu.covariance).max() < 1e-6
    energies = [jf.observables.interaction_energy(m, 1.0) for m in (mu, signed)]
    assert abs(energies[0] / energies[1] - 1) < 2e-8


def matrices(d):
    return [jax.random.normal(k, (d, d)) for k in jax.random.split(jax.random.key(3), 3)]


def fields(d):
    q, k, v = matrices(d)
    softmax = jf.SelfAttention(q, k, v, beta=0.7)
    usa = jf.SelfAttention(value=v, beta=2.0, interaction=jf.Unnormalised())
    linear = jf.SelfAttention(q, value=v, interaction=jf.Linear())
    heads = jf.MultiHeadAttention(d, 1, key=KEY, geometry=jf.Sphere())
    drift = jf.LinearDrift(q, geometry=jf.Sphere())
    return {"softmax": softmax, "sum": usa + 0.5 * linear + drift, "heads": heads}


@x64
@pytest.mark.parametrize("name", ["softmax", "sum", "heads"])
def test_fields_divergences_and_derivatives_go_on_with_it(name):
    exact = fields(2)[name]
    tolerance = 1e-9
    field = jf.Compressed(exact, tolerance)
    mu = jf.measure.uniform_sphere(200, 2, key=KEY)
    x = jf.measure.uniform_sphere(7, 2, key=jax.random.key(1)).points
    assert field.points(2, jnp.float64) < mu.n
    along = jax.random.normal(jax.random.key(2), mu.points.shape)
    along = field.geometry.project(mu.points, along)

    @eqx.filter_jit
    def asked(field, x, points):
        """Value, divergence, gradients in queries and tokens, and a jvp."""

        def value(x, points):
            v = field(0.0, x, jf.Measure(points))
            return (v * jnp.arange(1.0, 15.0).reshape(7, 2)).sum()

        gx, gy = jax.grad(value, (0, 1))(x, points)
        gy = jf.Sphere().project(points, gy)
        moved = jax.jvp(lambda y: value(x, y), (points,), (along,))[1]
        of_gradient = jax.jvp(lambda y: jax.grad(value)(x, y), (points,), (along,))[1]
        divergence = jf.divergence(field, 0.0, x, jf.Measure(points))
        return field(0.0, x, jf.Measure(points)), divergence, gx, gy, moved, of_gradient

    for a, b in zip(asked(field, x, mu.points), asked(exact, x, mu.points), strict=True):
        assert jnp.abs(a - b).max() < 100 * tolerance * jnp.maximum(1, jnp.abs(b).max())


@x64
def test_gradients_in_the_parameters_pass():
    exact = fields(2)["softmax"]
    field = jf.Compressed(exact, 1e-9, reach=1.5 * jf.Compressed(exact).reach)
    mu = jf.measure.uniform_sphere(200, 2, key=KEY)
    loss = eqx.filter_jit(eqx.filter_grad(lambda f: (f(0.0, mu.points, mu)[:, 0] ** 3).sum()))
    ours, theirs = loss(field).field, loss(exact)
    for name in ("query", "key", "value", "beta"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert jnp.abs(a - b).max() < 1e-6 * jnp.abs(b).max()


@x64
def test_a_flow_of_the_compressed_field_is_the_flow():
    """Systems of a batch are compressed each on its own."""
    points = jf.measure.uniform_sphere(2 * 150, 2, key=KEY).points.reshape(2, 150, 2)
    exact = jf.SelfAttention(beta=4.0)
    field = jf.Compressed(exact, 1e-8)
    flows = [jf.flow(f, jf.Measure(points), t1=3.0).last.points for f in (exact, field)]
    assert jnp.abs(flows[0] - flows[1]).max() < 1e-6


def test_few_tokens_are_left_as_they_are():
    mu = jf.measure.circle(8)
    exact = jf.SelfAttention(beta=9.0)
    assert (jf.Compressed(exact)(0.0, mu.points, mu) == exact(0.0, mu.points, mu)).all()
    signed = compress(mu, reach=9.0)
    assert (signed.points == mu.points).all() and jnp.allclose(signed.weights, 1 / 8)


@settings(max_examples=25, deadline=None)
@given(
    clusters=st.lists(st.floats(0, 6.28), min_size=1, max_size=4),
    width=st.sampled_from([0.0, 1e-4, 0.1]),
    spread=st.sampled_from([0.0, 5.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_no_law_on_the_circle_breaks_the_tolerance(clusters, width, spread, seed):
    """In single precision: weights over many orders of magnitude, clusters and single points."""
    rng = np.random.default_rng(seed)
    angles = rng.choice(clusters, 300) + width * rng.standard_normal(300)
    tokens = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    mu = jf.Measure(tokens, (-spread * rng.random(300)).astype(np.float32))
    signed = compress(mu, reach=25.0, tolerance=1e-4)
    q = 25 * unit(rng.standard_normal((200, 2))) * rng.random((200, 1))
    error = log_z(q, signed.points, signed.weights) - log_z(q, mu.points, mu.weights)
    assert np.abs(error).max() < 1e-4


def test_many_equal_tokens():
    """The same number added many times: a running sum would be wrong by ten tolerances."""
    n, x = 300_000, np.array([[np.cos(0.3), np.sin(0.3)]], np.float32)
    signed = compress(jf.Measure(np.tile(x, (n, 1))), reach=9.0, tolerance=1e-5)
    angles = np.linspace(0, 2 * np.pi, 200)
    q = 9 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    error = log_z(q, signed.points, signed.weights) - log_z(q, unit(x.astype(float)), np.ones(1))
    assert np.abs(error).max() < 1e-5


def test_derivatives_next_to_the_points_and_opposite():
    """In single precision: there the kernels are quotients of small numbers."""
    grid = compress(jf.measure.circle(500), reach=9.0, tolerance=1e-5).points
    angles = np.arctan2(grid[:, 1], grid[:, 0]).astype(float)
    near = [angles + away for away in (0.0, 7e-7, 1e-5, 1e-3)]
    x = np.stack([np.cos(near).ravel(), np.sin(near).ravel()], axis=1).astype(np.float32)
    q = np.array([4.0, -3.0], np.float32)

    def integral(x):
        few = compress(jf.Measure(x), reach=9.0, tolerance=1e-5)
        return (few.weights * jnp.exp(few.points @ q)).sum()

    points = jnp.asarray(x)
    found = jf.Sphere().project(points, jax.grad(integral)(points))
    wide = x.astype(float)
    exact = np.exp(wide @ q)[:, None] * (q[None] - (wide @ q)[:, None] * wide) / len(x)
    assert np.abs(found - exact).max() < 1e-4 * np.abs(exact).max()


def test_what_is_beyond_the_reach_is_not_answered():
    mu = jf.measure.circle(500)
    field = jf.Compressed(jf.SelfAttention(beta=4.0), 1e-4)
    with pytest.raises(ValueError, match="longest has length 8"):
        field(0.0, 2 * mu.points, mu)
    with pytest.raises(Exception, match="within the reach"):
        jax.block_until_ready(jax.jit(lambda x: field(0.0, x, mu))(2 * mu.points))
    with pytest.raises(ValueError, match="must lie in the space"):
        field(0.0, mu.points, jf.Measure(1.1 * mu.points))


def test_what_needs_positive_weights_refuses_signs():
    signed = compress(jf.measure.circle(500), reach=4.0)
    with pytest.raises(TypeError, match="positive weights"):
        jf.observables.cluster_count(signed)
    with pytest.raises(TypeError, match="positive weights"):
        jf.flow(jf.SelfAttention(), signed, t1=1.0)
    with pytest.raises(ValueError, match="no order"):
        jf.SelfAttention(causal=True)(0.0, signed.points, signed)
    for interaction in (jf.Hardmax(), jf.Sinkhorn(iterations=1)):
        with pytest.raises(ValueError, match="needs weights that are positive"):
            jf.SelfAttention(interaction=interaction)(0.0, signed.points, signed)
