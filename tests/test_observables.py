"""Observables against their definitions, scipy, and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

import jaxflow as jf
from jaxflow import observables


def canonical(labels):
    """Clusters numbered by their first member."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97, 0.9999])
def test_clusters_are_scipys_connected_components(threshold):
    """Thresholds from one giant component, through long chains, to single tokens."""
    mu = jf.measure.uniform_sphere(300, 3, key=jax.random.key(5))
    x = np.asarray(mu.points, np.float64)
    count, labels = connected_components(x @ x.T >= threshold)
    actual = jax.jit(observables.cluster_labels)(mu, threshold)
    np.testing.assert_array_equal(actual, canonical(labels))
    assert int(observables.cluster_count(mu, threshold)) == count


def test_a_long_chain_is_one_cluster():
    """Single linkage follows a chain of 500 tokens on the circle, in any order of the tokens."""
    order = np.random.default_rng(0).permutation(500)
    mu = jf.Measure(jf.measure.circle(500).points[order])
    step = np.cos(2 * np.pi / 500)
    assert int(observables.cluster_count(mu, step - 1e-5)) == 1
    assert int(observables.cluster_count(mu, step + 1e-5)) == 500


def test_clusters_ignore_length_and_tokens_without_mass():
    x = jnp.array([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    mu = jf.Measure(x, jnp.array([0.0, -jnp.inf, 0.0, 0.0, 0.0]))
    np.testing.assert_array_equal(observables.cluster_labels(mu), [0, -1, 0, 1, 2])
    assert int(observables.cluster_count(mu)) == 3


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
    with pytest.raises(ValueError, match="finite beta other than 0, got 0"):
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
