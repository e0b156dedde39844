"""What holds for every interaction, measure and temperature: symmetries, weights, divergences.

Tokens are drawn from a lattice of step 1/8, so that zeros, repeated tokens and ties are frequent
and every difference that is not zero is far above rounding. Scores stay below about 10, and each
value is a mean or a sum of at most 7 terms: its rounding error is about 10 x 7 eps = 2e-14 of its
size, for which `close` allows 1e-12.
"""

import diffrax
import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.extra.numpy import arrays

import jaxflow as jf
from jaxflow.fields import AbstractField
from jaxflow.geometry import AbstractGeometry

pytestmark = pytest.mark.usefixtures("x64")

N, M, D, P = 7, 4, 3, 2  # tokens, queries, dimension, dimension of queries and keys

examples = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    # The fixture x64 is a setting, the same for every example.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def lattice(*shape, bound=8):
    return arrays(np.float64, shape, elements=st.integers(-bound, bound).map(lambda i: i / 8))


tokens, queries, log_weights = lattice(N, D), lattice(M, D), lattice(N, bound=16)
temperatures = st.integers(0, 16).map(lambda i: i / 8)
seeds = st.integers(0, 2**32 - 1)

INTERACTIONS = {
    "softmax": jf.Softmax(),
    "unnormalised": jf.Unnormalised(),
    "linear": jf.Linear(),
    "hardmax": jf.Hardmax(),
    "three sinkhorn sweeps": jf.Sinkhorn(iterations=3),
    "sinkhorn": jf.Sinkhorn(),
}
every_interaction = pytest.mark.parametrize("name", INTERACTIONS)
velocity = eqx.filter_jit(lambda field, x, mu: field(0.0, x, mu))
divergence = eqx.filter_jit(jf.divergence)


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def orthogonal(seed):
    """A uniform element of O(d), reflections included."""
    q, r = np.linalg.qr(gaussian(seed, D, D))
    return q * np.sign(np.diag(r))[None]


Q, K, V = gaussian(1, P, D), gaussian(2, P, D), gaussian(3, D, D)


def attention(name, beta, **options):
    return jf.SelfAttention(Q, K, V, beta=beta, interaction=INTERACTIONS[name], **options)


def measure(points, log_weights=None):
    return jf.Measure(
        jnp.asarray(points), None if log_weights is None else jnp.asarray(log_weights)
    )


def close(actual, expected, tolerance=1e-12):
    """Within a tolerance relative to the largest entry."""
    expected = np.asarray(expected)
    atol = tolerance * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# ------------------------------------------------------------------ symmetries


@every_interaction
@examples
@given(tokens, log_weights, queries, temperatures, seeds)
def test_the_order_of_tokens_does_not_matter(name, y, w, x, beta, seed):
    """X[mu](x) depends on the law mu alone, and maps each query by itself."""
    rng = np.random.default_rng(seed)
    order, rows = rng.permutation(N), rng.permutation(M)
    field = attention(name, beta)
    expected = velocity(field, jnp.asarray(x), measure(y, w))
    actual = velocity(field, jnp.asarray(x[rows]), measure(y[order], w[order]))
    close(actual, np.asarray(expected)[rows])


@every_interaction
@examples
@given(tokens, log_weights, queries, temperatures, seeds)
def test_rotations_carry_the_field_along(name, y, w, x, beta, seed):
    """X[R mu](R x) = R X[mu](x) for R in O(d), if Q, K, V become Q R^T, K R^T, R V R^T."""
    R = orthogonal(seed)
    moved = jf.SelfAttention(
        Q @ R.T, K @ R.T, R @ V @ R.T, beta=beta, interaction=INTERACTIONS[name]
    )
    expected = velocity(attention(name, beta), jnp.asarray(x), measure(y, w))
    actual = velocity(moved, jnp.asarray(x @ R.T), measure(y @ R.T, w))
    close(actual, np.asarray(expected) @ R.T)


@pytest.mark.slow
@examples
@given(tokens, queries, seeds)
def test_rotations_carry_other_fields_along(y, x, seed):
    """The same for multi-head attention, for a perceptron and for a linear drift."""
    R, key = orthogonal(seed), jax.random.key(0)
    heads = jf.MultiHeadAttention(D, 3, key=key)
    perceptron = jf.FeedForward(D, 5, key=key)
    field = heads + perceptron + jf.LinearDrift(V)
    where = lambda f: (f.query, f.key, f.value, f.output)
    matrices = [*(m @ R.T for m in where(heads)[:3]), R @ heads.output]
    heads = eqx.tree_at(where, heads, matrices)
    where = lambda f: (f.weight_in, f.weight_out)
    matrices = (perceptron.weight_in @ R.T, R @ perceptron.weight_out)
    perceptron = eqx.tree_at(where, perceptron, matrices)
    moved = heads + perceptron + jf.LinearDrift(R @ V @ R.T)
    expected = velocity(field, jnp.asarray(x), measure(y))
    actual = velocity(moved, jnp.asarray(x @ R.T), measure(y @ R.T))
    close(actual, np.asarray(expected) @ R.T)


# ------------------------------------------------------------------ weights


@every_interaction
@examples
@given(tokens, log_weights, queries, temperatures)
def test_twice_the_weight_is_two_copies(name, y, w, x, beta):
    """2 w delta_y = w delta_y + w delta_y."""
    field = attention(name, beta)
    copies, weights = np.concatenate([y[:-1], y[:1]]), np.concatenate([w[:-1], w[:1]])
    doubled = w[:-1].copy()
    doubled[0] += np.log(2)
    expected = velocity(field, jnp.asarray(x), measure(copies, weights))
    close(velocity(field, jnp.asarray(x), measure(y[:-1], doubled)), expected)


@every_interaction
@examples
@given(tokens, log_weights, queries, temperatures, st.integers(0, N - 1))
def test_a_token_without_weight_is_no_token(name, y, w, x, beta, index):
    """Log-weight -inf, wherever the token lies."""
    field = attention(name, beta)
    expected = velocity(
        field, jnp.asarray(x), measure(np.delete(y, index, 0), np.delete(w, index, 0))
    )
    w, y = w.copy(), y.copy()
    w[index], y[index] = -np.inf, 10 * y[index]
    close(velocity(field, jnp.asarray(x), measure(y, w)), expected)


@every_interaction
@examples
@given(tokens, log_weights, queries, temperatures, st.floats(-50, 50))
def test_weights_are_known_up_to_a_factor(name, y, w, x, beta, shift):
    """log w and log w + c are one measure. A shift by 50 rounds log w by 50 eps."""
    field = attention(name, beta)
    expected = velocity(field, jnp.asarray(x), measure(y, w))
    close(velocity(field, jnp.asarray(x), measure(y, w + shift)), expected)


MASKS = {
    "causal": ({"causal": True}, lambda i, j: j <= i),
    "window": ({"window": (1, 3)}, lambda i, j: (i - 1 <= j) & (j <= i + 3)),
}


@eqx.filter_jit
def one_by_one(field, x, points, log_weights):
    """Row i of x, with a measure of its own: row i of the log-weights."""
    row = lambda x, w: field(0.0, x[None], jf.Measure(points, w))[0]
    return jax.vmap(row)(x, log_weights)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["softmax", "unnormalised", "linear", "hardmax"])
@examples
@given(tokens, log_weights, lattice(N, D), temperatures)
def test_a_masked_token_is_one_without_weight(name, mask, y, w, x, beta):
    """Query i sees the measure restricted to its tokens.

    Softmax and hardmax normalise it. The other two do not, and have the mass of what is seen as a
    factor.
    """
    options, visible = MASKS[mask]
    seen = visible(np.arange(N)[:, None], np.arange(N)[None, :])
    actual = velocity(attention(name, beta, **options), jnp.asarray(x), measure(y, w))
    restricted = jnp.asarray(np.where(seen, w, -np.inf))
    expected = one_by_one(attention(name, beta), jnp.asarray(x), jnp.asarray(y), restricted)
    if name in ("unnormalised", "linear"):
        mass = (seen * np.exp(w)).sum(axis=1) / np.exp(w).sum()
        expected = mass[:, None] * expected
    close(actual, expected)


# ------------------------------------------------------------------ batches


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["shared", "separate"])
def test_a_batch_of_systems_flows_like_each_of_them(weights):
    """flow over a leading axis is a loop of flows: with fixed steps up to rounding."""
    points = gaussian(4, 3, N, D)
    points = points / np.linalg.norm(points, axis=-1, keepdims=True)
    mu = measure(points, gaussian(5, *{"shared": (N,), "separate": (3, N)}[weights]))
    field = jf.SelfAttention(Q, K, V, beta=1.5)
    options = {"t1": 1.0, "dt0": 0.125, "solver": diffrax.Euler(), "adjoint": diffrax.ForwardMode()}
    options["stepsize_controller"] = diffrax.ConstantStepSize()
    together = jf.flow(field, mu, **options).measures[-1]
    assert together.points.shape == (3, N, D)
    for i in range(3):
        alone = jf.flow(field, mu[i], **options).measures[-1]
        close(together[i].points, alone.points)
        assert jnp.array_equal(together[i].weights, alone.weights)


# ------------------------------------------------------------------ divergences


class Opaque(AbstractField):
    """A field whose closed form is hidden, so that its divergence goes by forward mode."""

    field: AbstractField

    @property
    def geometry(self) -> AbstractGeometry:
        return self.field.geometry

    def __call__(self, t, x, mu):
        return self.field(t, x, mu)


HEADS = {"heads": 3, "beta": 2.0}
DIVERGENCES = {
    **{name: (lambda beta, name=name: attention(name, beta)) for name in INTERACTIONS},
    "causal": lambda beta: attention("softmax", beta, causal=True),
    "causal linear": lambda beta: attention("linear", beta, causal=True),
    "window": lambda beta: attention("unnormalised", beta, window=(1, 2)),
    "heads": lambda beta: jf.MultiHeadAttention(
        D, 3, beta=beta, geometry=jf.Sphere(2.0), key=jax.random.key(0)
    ),
    "sum": lambda beta: (
        attention("softmax", beta)
        - 0.5 * (attention("linear", beta) + jf.LinearDrift(V, geometry=jf.Sphere()))
    ),
}


@eqx.filter_jit
def both_divergences(field, x, mu):
    return jf.divergence(field, 0.0, x, mu), jf.divergence(Opaque(field), 0.0, x, mu)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", DIVERGENCES)
@examples
@given(tokens, log_weights, temperatures, seeds)
def test_the_closed_form_of_the_divergence_is_that_of_forward_mode(name, y, w, beta, seed):
    field = DIVERGENCES[name](beta)
    x = field.geometry.retract(jnp.asarray(gaussian(seed, N, D)))
    closed, forward = both_divergences(field, x, measure(y, w))
    # An entry is a difference of sums of second moments: up to D^2 = 9 times as many terms.
    close(closed, forward, 1e-11)


@pytest.mark.parametrize("geometry", [jf.Euclidean(), jf.Sphere(1.5)], ids=str)
@examples
@given(tokens, log_weights, temperatures, seeds)
def test_the_divergence_is_the_trace_of_the_jacobian(geometry, y, w, beta, seed):
    """tr(P DX P), also for a field without a closed form."""
    mu = measure(y, w)
    perceptron = jf.FeedForward(D, 5, jnp.tanh, geometry=geometry, key=jax.random.key(0))
    field = attention("softmax", beta, geometry=geometry) + perceptron
    x = geometry.retract(jnp.asarray(gaussian(seed, M, D)))
    close(divergence(field, 0.0, x, mu), jacobian_trace(field, x, mu), 1e-11)


@eqx.filter_jit
def jacobian_trace(field, x, mu):
    def one(x):
        jacobian = jax.jacrev(lambda x: field(0.0, x[None], mu)[0])(x)
        P = jax.vmap(lambda e: field.geometry.project(x, e))(jnp.eye(D))
        return jnp.trace(P @ jacobian @ P)

    return jax.vmap(one)(x)


@eqx.filter_jit
def hutchinson(field, x, mu, keys):
    return jax.vmap(lambda key: jf.divergence(field, 0.0, x, mu, key=key))(keys)


def test_hutchinsons_estimate_is_unbiased():
    """Its mean over 4000 keys is the divergence, within 5 standard errors."""
    field = attention("softmax", 0.5)
    mu = measure(gaussian(4, N, D))
    x = field.geometry.retract(jnp.asarray(gaussian(5, M, D)))
    samples = hutchinson(field, x, mu, jax.random.split(jax.random.key(0), 4000))
    error = samples.std(axis=0) / np.sqrt(4000)
    exact = divergence(field, 0.0, x, mu)
    assert (error < 0.02 * jnp.abs(exact)).all()  # the test resolves a bias of ten percent
    assert (jnp.abs(samples.mean(axis=0) - exact) <= 5 * error).all()


def test_hutchinsons_estimate_is_exact_for_a_diagonal_matrix():
    """z^T A z = tr A for every vector z of signs, so also for the mean of three."""
    diagonal = np.array([1.0, -2.0, 4.0])
    field = jf.LinearDrift(np.diag(diagonal))
    mu = measure(gaussian(4, N, D))
    estimate = jf.divergence(field, 0.0, mu.points, mu, key=jax.random.key(0), samples=3)
    close(estimate, np.full(N, diagonal.sum()), 1e-14)


@pytest.mark.parametrize("samples", [0, -1])
def test_hutchinsons_estimate_needs_a_sample(samples):
    mu = measure(gaussian(4, N, D))
    with pytest.raises(ValueError, match=f"samples must be at least 1, got {samples}"):
        jf.divergence(jf.LinearDrift(1.0), 0.0, mu.points, mu, key=jax.random.key(0),
                      samples=samples)  # fmt: skip


def test_the_divergence_needs_points_of_the_right_dimension():
    mu = measure(gaussian(4, N, D))
    with pytest.raises(ValueError, match=r"x must have shape \(m, 3\).* got \(4, 2\)"):
        jf.divergence(jf.LinearDrift(1.0), 0.0, jnp.ones((4, 2)), mu)
