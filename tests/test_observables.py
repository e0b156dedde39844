"""Observables against their definitions, scipy, and brute force."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist
from scipy.special import ive

import jaxflow as jf
from jaxflow import observables


def test_observables_map_over_leading_axes(key):
    points = jax.random.normal(key, (2, 3, 7, 3))
    mu = jf.Measure(points / jnp.linalg.norm(points, axis=-1, keepdims=True))
    energy, labels = observables.interaction_energy(mu, 2.0), observables.cluster_labels(mu, 0.5)
    assert energy.shape == (2, 3) and labels.shape == (2, 3, 7)
    assert observables.inner_products(mu).shape == (2, 3, 7, 7)
    one = mu[1][2]
    np.testing.assert_allclose(energy[1, 2], observables.interaction_energy(one, 2.0), rtol=1e-6)
    np.testing.assert_array_equal(labels[1, 2], observables.cluster_labels(one, 0.5))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", [-1.0, 0.3, 5.0])
def test_energy_is_its_definition(beta, key):
    mu = jf.measure.uniform_sphere(20, 3, key=key)
    weights = jnp.linspace(1.0, 2.0, 20)
    weighted = jf.Measure(mu.points, jnp.log(weights))
    w = weights / weights.sum()
    expected = (jnp.outer(w, w) * jnp.exp(beta * mu.points @ mu.points.T)).sum() / (2 * beta)
    np.testing.assert_allclose(observables.interaction_energy(weighted, beta), expected, rtol=1e-13)
    observable = observables.InteractionEnergy(beta)
    np.testing.assert_allclose(observable(0.0, weighted), expected, rtol=1e-13)


def test_energy_needs_a_temperature():
    with pytest.raises(ValueError, match="beta must be finite and other than 0, got 0"):
        observables.interaction_energy(jf.measure.circle(3), 0)


INTERACTIONS = [jf.Softmax(), jf.Unnormalised(), jf.Linear(), jf.Hardmax(), jf.Sinkhorn()]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("interaction", INTERACTIONS, ids=lambda i: type(i).__name__)
def test_attention_matrix_gives_the_field(interaction, key):
    """V A y is the field on R^d, whatever the interaction."""
    mu = jf.measure.gaussian(9, 2, key=key)
    matrices = jax.random.normal(key, (3, 2, 2))
    options = {"interaction": interaction, "geometry": jf.Euclidean()}
    field = jf.SelfAttention(*matrices, beta=0.7, **options)
    a = observables.attention_matrix(field, mu)
    np.testing.assert_allclose(a @ mu.points @ matrices[2].T, field(0.0, mu.points, mu), rtol=1e-10)
    if not isinstance(interaction, jf.Unnormalised | jf.Linear):
        np.testing.assert_allclose(a.sum(axis=1), 1, rtol=1e-12)
    if isinstance(interaction, jf.Sinkhorn):
        np.testing.assert_allclose(a.sum(axis=0), 1, rtol=1e-10)
    defect = observables.column_defect(field, mu)
    np.testing.assert_allclose(defect, np.abs(a.sum(axis=0) - 1).max(), atol=1e-12)
    stacked = jf.Measure(jnp.stack([mu.points, 2 * mu.points]))
    np.testing.assert_allclose(observables.attention_matrix(field, stacked)[0], a, rtol=1e-10)
    probes = observables.attention_matrix(field, mu, mu.points[:4])
    np.testing.assert_allclose(probes, a[:4], rtol=1e-10)


# ------------------------------------------------------------------ attention


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("interaction", INTERACTIONS, ids=lambda i: type(i).__name__)
def test_spectrum_is_that_of_the_matrix_on_l2(interaction, key):
    """sqrt(w_i) A_ij / sqrt(w_j), a token without mass left out."""
    points = jf.measure.uniform_sphere(12, 3, key=key).points
    logs = jnp.linspace(-1.0, 1.0, 12).at[4].set(-jnp.inf)
    mu, field = jf.Measure(points, logs), jf.SelfAttention(beta=3.0, interaction=interaction)
    seen = np.delete(np.arange(12), 4)
    root = np.sqrt(np.asarray(mu.weights)[seen])
    matrix = np.asarray(observables.attention_matrix(field, mu))[np.ix_(seen, seen)]
    expected = np.linalg.svd(root[:, None] * matrix / root[None], compute_uv=False)
    spectrum = observables.attention_spectrum(field, mu)
    np.testing.assert_allclose(spectrum[:11], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(spectrum[11:], 0, atol=1e-12)
    rank = observables.attention_rank(field, mu, tolerance=0.3)
    assert int(rank) == (expected > 0.3 * expected[0]).sum()
    p = expected / expected.sum()
    p = p[p > 1e-14]
    np.testing.assert_allclose(
        observables.effective_rank(field, mu), np.exp(-(p * np.log(p)).sum()), rtol=1e-9
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_spectrum_of_many_tokens_is_that_of_the_matrix(key):
    """On the circle, attention of the uniform measure has the eigenvalues I_k(beta) / I_0(beta).

    (Each for k and -k.) Equispaced tokens alias modes k + n: nothing, at n = 600. The range finder
    has the leading values to rounding where those beyond the probes are below it.
    """
    beta, field = 4.0, jf.SelfAttention(beta=4.0)
    modes = np.sort(np.abs(np.arange(-15, 16)))
    expected = ive(modes, beta) / ive(0, beta)
    spectrum = observables.attention_spectrum(field, jf.measure.circle(600))
    assert spectrum.shape == (32,)
    np.testing.assert_allclose(spectrum[:25], expected[:25], rtol=1e-6, atol=1e-13)
    rank = observables.attention_rank(field, jf.measure.circle(600), tolerance=1e-3)
    assert int(rank) == (expected > 1e-3).sum()
    # Few probes saturate; leading axes and a vmap change nothing.
    twice = jf.Measure(jnp.stack([jf.measure.circle(600).points] * 2))
    np.testing.assert_array_equal(observables.attention_rank(field, twice, probes=4), [4, 4])
    mapped = jax.vmap(lambda x: observables.attention_rank(field, jf.Measure(x)))(twice.points)
    np.testing.assert_array_equal(mapped, [rank, rank])


@pytest.mark.usefixtures("x64")
def test_entropy_of_attention_is_that_of_its_rows(key):
    mu = jf.Measure(jax.random.normal(key, (2, 9, 3)), jnp.linspace(0.0, 1.0, 9))
    field = jf.SelfAttention(beta=2.0)
    a = np.asarray(observables.attention_matrix(field, mu))
    expected = (-(a * np.log(a)).sum(axis=-1) * np.asarray(mu.weights)).sum(axis=-1)
    np.testing.assert_allclose(observables.attention_entropy(field, mu), expected, rtol=1e-12)
    observable = observables.AttentionEntropy(field)
    np.testing.assert_allclose(observable(0.0, mu[1]), expected[1], rtol=1e-12)
    with pytest.raises(TypeError, match="no attention whose entropy"):
        observables.attention_entropy(jf.LinearDrift(1.0), mu)


# ------------------------------------------------------------------ correlations


def histogram(values, weights, edges):
    """Density of the values of pairs i != j, by NumPy."""
    off = ~np.eye(len(weights), dtype=bool)
    w = np.outer(weights, weights)[off]
    return np.histogram(values[off], edges, weights=w)[0] / w.sum() / np.diff(edges)


def distances(x):
    return np.linalg.norm(x[:, None] - x[None], axis=-1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "n, weighted", [(2, True), (50, False), pytest.param(700, True, marks=pytest.mark.slow)]
)
def test_pair_densities_are_numpys_histogram(n, weighted, key):
    """Products on the sphere and distances in space, of one tile and of four, some without mass."""
    logs = jnp.where(jnp.arange(n) % 5 == 3, -jnp.inf, jnp.sin(jnp.arange(n, dtype=float)))
    logs = logs if weighted else None
    mu = jf.Measure(jf.measure.uniform_sphere(n, 3, key=key).points, logs)
    edges = np.linspace(-1, 1, 41) ** 3
    x, w = np.asarray(mu.points), np.asarray(mu.weights)
    density = observables.pair_correlations(mu, edges)
    np.testing.assert_allclose(density, histogram(x @ x.T, w, edges), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose((density * np.diff(edges)).sum(), 1, rtol=1e-12)
    cloud = jf.Measure(jf.measure.gaussian(n, 2, key=key).points, logs)
    edges = np.array([0.0, 0.1, 0.5, 1.0, 2.5])  # some pairs lie beyond
    expected = histogram(distances(np.asarray(cloud.points)), w, edges)
    density = observables.pair_distances(cloud, edges)
    np.testing.assert_allclose(density, expected, rtol=1e-11, atol=1e-13)


def test_pair_density_of_one_point_is_in_the_last_bin():
    """Products of unit vectors that rounding puts above 1 count in the last bin."""
    x = jf.measure.uniform_sphere(1, 5, key=jax.random.key(3)).points * (1 + 1e-7)
    mu = jf.Measure(jnp.tile(x, (600, 1)))
    density = observables.pair_correlations(mu, jnp.linspace(-1, 1, 5))
    np.testing.assert_allclose(density, [0, 0, 0, 2], rtol=1e-6)


@pytest.mark.slow
def test_pair_density_from_queries_is_within_its_error(key):
    """On S^2 the products of independent uniform points are uniform on [-1, 1]."""
    mu = jf.measure.uniform_sphere(4000, 3, key=key)
    edges = np.linspace(-1, 1, 11)
    exact = observables.pair_correlations(mu, edges)
    some = observables.pair_correlations(mu, edges, queries=500)
    error = np.sqrt(0.1 * 0.9 / 500) / 0.2
    assert 0 < np.abs(some - exact).max() < 4 * error
    assert np.abs(exact - 0.5).max() < 0.02
    np.testing.assert_allclose((some * np.diff(edges)).sum(), 1, rtol=1e-5)


def test_pair_densities_map_over_leading_axes(key):
    mu = jf.Measure(jax.random.normal(key, (3, 20, 2)))
    edges = np.linspace(-2, 2, 6)
    density = observables.pair_correlations(mu, edges)
    assert density.shape == (3, 5)
    np.testing.assert_array_equal(density[1], observables.pair_correlations(mu[1], edges))


@pytest.mark.parametrize(
    "edges, queries, message",
    [([0.0], None, "with a bin"), ([1.0, 0.0], None, "ascend"), ([0.0, 1.0], 0, "at least 1")],
)
def test_pair_densities_refuse(edges, queries, message):
    with pytest.raises(ValueError, match=message):
        observables.pair_correlations(jf.measure.circle(4), edges, queries=queries)
    with pytest.raises(ValueError, match="at least two tokens"):
        observables.pair_correlations(jf.measure.circle(1), [0.0, 1.0])


# ------------------------------------------------------------------ shape


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "n, d",
    [(1, 3), (2, 1), (40, 1), (40, 16), pytest.param(1500, 3, marks=pytest.mark.slow), (1500, 16)],
)
def test_diameter_is_the_largest_distance(n, d, key):
    x = jax.random.normal(key, (n, d)) + 100
    logs = jnp.where(jnp.arange(n) % 3 == 1, -jnp.inf, 0.0)
    for mu, seen in ((jf.Measure(x), x), (jf.Measure(x, logs), x[logs == 0])):
        expected = max(pdist(np.asarray(seen)), default=0)
        np.testing.assert_allclose(observables.diameter(mu), expected, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_diameter_derivative_and_leading_axes(key):
    """The unit vector between the two ends, and 0 for the others and for a single place."""
    x = jnp.array([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    slope = jax.grad(lambda x: observables.diameter(jf.Measure(x)))(x)
    np.testing.assert_allclose(slope, [[-0.6, -0.8], [0.6, 0.8], [0, 0]], rtol=1e-14)
    slope = jax.grad(lambda x: observables.diameter(jf.Measure(x)))(jnp.ones((3, 2)))
    np.testing.assert_array_equal(slope, 0)
    mu = jf.Measure(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(observables.diameter(mu), [5, 10], rtol=1e-14)
    mapped = jax.vmap(lambda x: observables.diameter(jf.Measure(x)))(mu.points)
    np.testing.assert_allclose(mapped, [5, 10], rtol=1e-14)


def planar(name, n, rng):
    angles = 2 * np.pi * rng.random(n)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return {
        "gaussian": rng.normal(size=(n, 2)),
        "ring": ring,
        "two rings": ring + np.array([3.0, 0.4]) * (rng.random(n) < 0.5)[:, None],
        "grid": np.stack(np.divmod(np.arange(n), 10), axis=1) - 4.0,
        "repeated": np.repeat(rng.normal(size=(n // 4, 2)), 4, axis=0),
    }[name]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["gaussian", "ring", "two rings", "grid", "repeated"])
def test_hull_area_is_scipys(name):
    """In general position, all on the hull, hidden arcs, collinear, and equal points."""
    x = jnp.asarray(planar(name, 400, np.random.default_rng(0)))
    expected = ConvexHull(np.asarray(x)).volume  # in the plane, the area
    np.testing.assert_allclose(observables.hull_area(jf.Measure(x)), expected, rtol=1e-12)
    # A far token without mass changes nothing.
    far = jf.Measure(jnp.concatenate([x, x[:1] + 50]), jnp.zeros(401).at[400].set(-jnp.inf))
    np.testing.assert_allclose(observables.hull_area(far), expected, rtol=1e-12)
    both = jf.Measure(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(observables.hull_area(both), [expected, 4 * expected], rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_hull_area_derivative_and_degenerate_hulls(key):
    """Against central differences (exact for a quadratic); 0 for points on a line."""
    x, h = jax.random.normal(key, (8, 2)), 1e-4
    area = lambda x: observables.hull_area(jf.Measure(x))
    slope = jax.grad(area)(x)
    for i, k in np.ndindex(8, 2):
        step = jnp.zeros((8, 2)).at[i, k].set(h)
        numeric = (area(x + step) - area(x - step)) / (2 * h)
        np.testing.assert_allclose(slope[i, k], numeric, atol=1e-10)
    for n in (1, 2, 9):
        line = jnp.arange(n, dtype=float)[:, None] * jnp.ones((1, 2))
        np.testing.assert_allclose(area(line), 0, atol=1e-13)
    with pytest.raises(ValueError, match="d = 2; got d = 3"):
        area(jnp.ones((4, 3)))


# ------------------------------------------------------------------ circle


@pytest.mark.usefixtures("x64")
def test_fourier_modes_in_closed_form():
    """Equispaced tokens have the modes that n divides; the Poisson kernel r^|k| e^{ik phase}."""
    k = np.array([[0, 3, 7], [14, -7, 8]])
    modes = observables.fourier_modes(jf.measure.circle(7, phase=0.2), k)
    expected = np.where(k % 7 == 0, np.exp(0.2j * k), 0)
    np.testing.assert_allclose(modes, expected, atol=1e-13)
    mu = jf.measure.kuramoto(2000, 0.6, phase=-0.5)
    k = np.array([1, -2, 5])
    np.testing.assert_allclose(
        observables.fourier_modes(mu, k), 0.6 ** np.abs(k) * np.exp(-0.5j * k), atol=1e-12
    )
    np.testing.assert_allclose(observables.order_parameter(mu), 0.6, rtol=1e-12)
    pair = jf.measure.from_angles([[0.0, 1.0, 9.0], [0.0, 2.0, 9.0]])
    pair = jf.Measure(3 * pair.points, jnp.log(jnp.array([0.25, 0.75, 0.0])))
    expected = 0.25 + 0.75 * np.exp(1j * np.array([1, 2]))
    np.testing.assert_allclose(observables.fourier_modes(pair, 1), expected, rtol=1e-14)
    np.testing.assert_allclose(observables.order_parameter(pair), np.abs(expected), rtol=1e-14)


def test_fourier_modes_refuse():
    with pytest.raises(ValueError, match="d = 2; got d = 3"):
        observables.fourier_modes(jf.measure.simplex(3, 3), 1)
    with pytest.raises(TypeError, match="integers, the modes on the circle; got float32"):
        observables.fourier_modes(jf.measure.circle(3), [1.5])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_order_parameter_follows_kuramoto():
    """FACTS F5: r(t) = r0 e^{t/2} / sqrt(1 - r0^2 + r0^2 e^t) for beta = 0 on the circle."""
    sol = jf.flow(
        jf.SelfAttention(beta=0.0), jf.measure.kuramoto(400, 0.2), t1=4.0,
        saveat=diffrax.SaveAt(ts=jnp.array([1.0, 2.0, 4.0])),
        observe={"order": lambda t, mu: observables.order_parameter(mu)},
    )  # fmt: skip
    np.testing.assert_allclose(sol.observed["order"], [0.318965, 0.485183, 0.833456], atol=1e-6)
    np.testing.assert_allclose(
        observables.order_parameter(sol.measures), sol.observed["order"], rtol=1e-13
    )


def test_order_parameter_counts_a_token_at_zero_as_no_direction():
    x = jnp.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    order = lambda x: observables.order_parameter(jf.Measure(x))
    np.testing.assert_allclose(order(x), 0.5)
    assert np.isfinite(jax.grad(order)(x)).all()


def test_matrices_that_do_not_fit_are_refused():
    """A million tokens: 4 TB, which is said, and what does without."""
    mu = jf.Measure(jnp.zeros((1_000_000, 1)))
    with pytest.raises(MemoryError, match=r"4000\.0 GB .*pair_correlations"):
        observables.inner_products(mu)
    with pytest.raises(MemoryError, match="attention matrix .*attention_spectrum"):
        observables.attention_matrix(jf.SelfAttention(), mu)
