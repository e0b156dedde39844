"""Clusters and their mergers against scipy's connected components and dendrograms."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, is_valid_linkage, linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist

import jaxflow as jf
from jaxflow import observables
from jaxflow.observables import MergeTree, tiles


def canonical(labels):
    """Clusters numbered by their first member."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def components(links):
    return canonical(connected_components(links)[1])


def cosines(points):
    x = np.asarray(points, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def caps(n, d, count, concentration, key):
    """n tokens, shuffled, of `count` von Mises-Fisher laws."""
    centres, *keys = jax.random.split(key, count + 1)
    means = jf.measure.uniform_sphere(count, d, key=centres).points
    sample = lambda m, k: jf.measure.von_mises_fisher(n // count, m, concentration, key=k).points
    points = jnp.concatenate([sample(m, k) for m, k in zip(means, keys, strict=True)])
    return jf.Measure(jax.random.permutation(key, points))


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97, 0.9999])
def test_clusters_are_scipys_connected_components(threshold):
    """Thresholds from one giant component, through long chains, to single tokens."""
    mu = jf.measure.uniform_sphere(300, 3, key=jax.random.key(5))
    expected = components(cosines(mu.points) >= threshold)
    actual = jax.jit(observables.cluster_labels)(mu, threshold)
    np.testing.assert_array_equal(actual, expected)
    assert int(observables.cluster_count(mu, threshold)) == expected.max() + 1


# 16 tiles of 157 tokens, of which the last are partly empty. Others below have 2400, by copies: one
# program serves them.
N = 2500


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("d", [2, 16])
def test_clusters_of_many_tokens_are_scipys(d, key):
    """Tokens in tiles, uniform and in caps, from all linked to none linked; d = 3 is below."""
    uniform = jf.measure.uniform_sphere(N, d, key=key)
    clustered = caps(N, d, 20, 300.0, key)
    several = 0
    for mu in (uniform, clustered):
        products = cosines(mu.points)
        for threshold in (0.5, 0.7, 0.85, 0.95, 0.99, 0.999, 0.9999):
            expected = components(products >= threshold)
            actual = observables.cluster_labels(mu, threshold)
            np.testing.assert_array_equal(actual, expected, err_msg=f"{threshold}")
            several += 1 < expected.max() < N - 1
    assert several >= 3


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [400, N])
def test_clusters_in_space_are_scipys(n, key):
    """|x_i - x_j| <= radius, far from the origin too; half of the tokens without mass."""
    offset = jnp.array([1e3, 0.0, 0.0])
    mu = jf.measure.gaussian(n, 3, key=key).push_forward(lambda x: x + offset)
    logs = jnp.where(jax.random.bernoulli(key, 0.5, (n,)), 0.0, -jnp.inf)
    distances = cdist(mu.points, mu.points)
    massive = np.isfinite(logs)
    several = 0
    for radius in (0.0, 0.05, 0.15, 0.3, 0.6, 10.0):
        labels = components(distances <= radius)
        np.testing.assert_array_equal(observables.cluster_labels(mu, radius=radius), labels)
        expected = np.full(n, -1)
        expected[massive] = components(distances[np.ix_(massive, massive)] <= radius)
        weighted = jf.Measure(mu.points, logs)
        np.testing.assert_array_equal(observables.cluster_labels(weighted, radius=radius), expected)
        assert int(observables.cluster_count(weighted, radius=radius)) == expected.max() + 1
        several += 1 < expected.max() < massive.sum() - 1
    assert several >= 2


@pytest.mark.slow
@pytest.mark.parametrize("n", [500, 2400])
def test_a_long_chain_is_one_cluster(n):
    """Single linkage follows a chain on the circle, in any order of the tokens."""
    order = np.random.default_rng(0).permutation(n)
    mu = jf.Measure(jf.measure.circle(n).points[order])
    # The middle between this step and none, and between this step and the next.
    one, two = (np.cos(2 * np.pi * k / n) for k in (1, 2))
    assert int(observables.cluster_count(mu, (one + two) / 2)) == 1
    assert int(observables.cluster_count(mu, (one + 1) / 2)) == n
    length = 2 * np.sin(np.pi / n)
    assert int(observables.cluster_count(mu, radius=1.1 * length)) == 1
    assert int(observables.cluster_count(mu, radius=0.9 * length)) == n


def test_tokens_at_one_point_are_one_cluster():
    """All pairs of tiles are within reach, and one visit each settles them."""
    mu = jf.Measure(jnp.ones((3000, 3)))
    assert int(observables.cluster_count(mu)) == 1
    assert int(observables.cluster_count(mu, radius=0.0)) == 1


@pytest.mark.parametrize("copies", [1, pytest.param(480, marks=pytest.mark.slow)])
def test_clusters_ignore_length_and_tokens_without_mass(copies):
    x = jnp.array([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    logs = jnp.array([0.0, -jnp.inf, 0.0, 0.0, 0.0])
    mu = jf.Measure(jnp.tile(x, (copies, 1)), jnp.tile(logs, copies))
    expected = np.tile([0, -1, 0, 1, 2], copies)
    np.testing.assert_array_equal(observables.cluster_labels(mu), expected)
    assert int(observables.cluster_count(mu)) == 3


@pytest.mark.parametrize("copies", [1, pytest.param(600, marks=pytest.mark.slow)])
def test_a_token_without_direction_is_alone(copies):
    x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0], [2.0, 0.0]])
    mu = jf.Measure(jnp.tile(x, (copies, 1)))
    labels = np.asarray(observables.cluster_labels(mu))
    assert len(set(labels.tolist())) == copies + 2
    assert (labels[1::4] == 1).all() and (labels[3::4] == 1).all()
    # In space, the origin is a place like any other.
    labels = np.asarray(observables.cluster_labels(mu, radius=0.5))
    assert (labels[0::4] == 0).all()


@pytest.mark.parametrize("copies", [1, pytest.param(800, marks=pytest.mark.slow)])
def test_points_that_are_not_finite_have_no_clusters(copies):
    """Without mass they do not matter; the systems beside them have theirs."""
    x = jnp.tile(jnp.array([[0.0, 1.0], [jnp.nan, 1.0], [1.0, 0.0]]), (copies, 1))
    logs = jnp.tile(jnp.array([0.0, -jnp.inf, 0.0]), copies)
    bad = jf.Measure(jnp.stack([x, x]), jnp.stack([jnp.zeros(len(x)), logs]))
    assert observables.cluster_count(bad).tolist() == [-1, 2]
    assert observables.cluster_labels(bad)[0].max() == -1
    counts = observables.ClusterCount()(0.0, bad)
    assert jnp.isnan(counts).tolist() == [True, False]
    with pytest.raises(ValueError, match="t = 3 has points that are not finite"):
        observables.merge_tree([3.0], bad[:1])


@pytest.mark.parametrize("copies", [1, pytest.param(240, marks=pytest.mark.slow)])
def test_light_components_are_no_clusters_from_a_least_mass_on(copies):
    """Masses 0.6, 0.3 and 0.1, exactly at the level too; numbered among those that count."""
    angles = jnp.array([2.0] + [0.0] * 3 + [1.0] * 6)
    mu = jf.measure.from_angles(jnp.repeat(angles, copies))
    for least, count in ((0.0, 3), (0.1, 3), (0.11, 2), (0.3, 2), (0.31, 1), (0.6, 1), (0.7, 0)):
        assert int(observables.cluster_count(mu, min_mass=least)) == count, least
    labels = observables.cluster_labels(mu, min_mass=0.2)[::copies]
    assert labels.tolist() == [-1] + [0] * 3 + [1] * 6
    assert float(observables.ClusterCount(min_mass=0.5)(0.0, mu)) == 1
    # Weights, not numbers of tokens.
    heavy = jf.Measure(mu.points, jnp.where(jnp.arange(mu.n) < copies, 3.0, 0.0))
    assert int(observables.cluster_count(heavy, min_mass=0.5)) == 1
    with pytest.raises(ValueError, match="min_mass must be a share of all mass"):
        observables.cluster_count(mu, min_mass=1.5)


@pytest.mark.parametrize("n", [7, pytest.param(1500, marks=pytest.mark.slow)])
def test_clusters_map_over_leading_axes_and_vmap(n, key):
    """Few tokens run together, many one by one; the results are those of each alone."""
    points = jax.random.normal(key, (2, 2, n, 3))
    mu = jf.Measure(points)
    labels = observables.cluster_labels(mu, 0.99)
    assert labels.shape == (2, 2, n)
    np.testing.assert_array_equal(observables.cluster_count(mu, 0.99), labels.max(axis=-1) + 1)
    alone = observables.cluster_labels(mu[1][0], 0.99)
    np.testing.assert_array_equal(labels[1, 0], alone)
    mapped = jax.vmap(lambda x: observables.cluster_labels(jf.Measure(x), 0.99))(points)
    np.testing.assert_array_equal(mapped, labels)
    levels = jnp.array([0.9, 0.99])
    counts = jax.vmap(lambda level: observables.cluster_count(mu[1][0], level))(levels)
    assert int(counts[1]) == alone.max() + 1 and int(counts[0]) < int(counts[1])


@pytest.mark.slow
def test_clusters_in_a_solve_stop_it(key):
    """ClusterCount is observed inside a solve, differentiated around, and ends it as an event."""
    field, mu = jf.SelfAttention(), jf.measure.uniform_sphere(1100, 3, key=key)
    options = {"dt0": 0.5, "solver": diffrax.Euler()}

    def run(beta):
        return jf.flow(
            jf.SelfAttention(beta=beta), mu, t1=1.0,
            observe={"clusters": observables.ClusterCount(0.999)}, **options,
        )  # fmt: skip

    first = lambda sol: (sol.measures.points[-1, 0, 0], sol)
    slope, sol = jax.grad(lambda beta: first(run(beta)), has_aux=True)(1.0)
    expected = observables.cluster_count(sol.measures, 0.999)
    np.testing.assert_array_equal(sol.observed["clusters"], expected)
    assert np.isfinite(slope) and slope != 0
    few = lambda t, y, args, **_: observables.cluster_count(jf.Measure(y), 0.9) < 50
    stopped = jf.flow(field, mu, t1=20.0, event=diffrax.Event(few), **options)
    assert float(stopped.ts[-1]) < 20
    assert int(observables.cluster_count(stopped.measures[-1], 0.9)) < 50


@pytest.mark.parametrize(
    "options", [{"threshold": 1.5}, {"threshold": np.nan}, {"radius": -1.0}, {"radius": np.nan}]
)
def test_a_link_needs_a_cosine_or_a_distance(options):
    with pytest.raises(ValueError, match="threshold must be a cosine|radius must be a distance"):
        observables.cluster_labels(jf.measure.circle(3), **options)


@pytest.mark.parametrize("n", [1, 100, 257, 3000])
def test_tiles_hold_each_token_once_in_its_box(n, key):
    x = jax.random.normal(key, (n, 3))
    there = jnp.arange(n) % 7 != 3
    cut = tiles.split(x, there)
    tokens = np.asarray(cut.tokens)
    held = tokens < n
    np.testing.assert_array_equal(np.sort(tokens[held]), np.flatnonzero(there))
    np.testing.assert_array_equal(np.asarray(cut.points)[held], np.asarray(x)[tokens[held]])
    assert np.isnan(np.asarray(cut.points)[~held]).all()
    inside = (cut.points >= cut.low[:, None]) & (cut.points <= cut.high[:, None])
    assert np.asarray(inside.all(axis=-1))[held].all()
    if n == 3000:  # 16 boxes of a Gaussian: each well below the whole in volume
        volume = np.prod(np.asarray(cut.high - cut.low), axis=1)
        assert np.median(volume) < np.prod(np.ptp(np.asarray(x), axis=0)) / 16


# ------------------------------------------------------------------ mergers


def shrinking(n, d, key, steps=12):
    """Points that contract to their mean: distances shrink by a half at each saved time."""
    x = jax.random.normal(key, (n, d))
    ts = np.arange(steps, dtype=float)
    return ts, jf.Measure(x[None] * (2.0 ** -jnp.asarray(ts, x.dtype))[:, None, None])


def test_merge_tree_is_scipys_single_linkage(key):
    """Of points that contract by 2^{-t}, the link of length l forms at the first t >= log2(l/r)."""
    ts, measures = shrinking(40, 3, key)
    tree = observables.merge_tree(ts, measures, radius=0.02)
    x = np.asarray(measures.points[0], np.float64)
    single = linkage(pdist(x), "single")
    np.testing.assert_array_equal(tree.times, np.sort(np.ceil(np.log2(single[:, 2] / 0.02))))
    np.testing.assert_array_equal(tree.counts(ts), observables.cluster_count(measures, radius=0.02))
    z = tree.linkage(np.log1p)
    assert is_valid_linkage(z) and z.shape == (39, 4)
    for t in ts:
        partition = fcluster(z, np.log1p(t), "distance")
        labels = observables.cluster_labels(measures[int(t)], radius=0.02)
        np.testing.assert_array_equal(canonical(partition), labels)
    # The pairs are the first tokens, the sizes those of the merged clusters.
    assert (tree.pairs[:, 0] < tree.pairs[:, 1]).all() and tree.sizes[-1] == 40


def test_merged_clusters_stay_merged():
    """Two tokens meet and part, then a third joins the second: one cluster of three."""
    x = jnp.array([[[0.0], [5.0], [9.0]], [[0.0], [0.5], [9.0]], [[0.0], [8.0], [8.5]]])
    tree = observables.merge_tree(jnp.array([0.0, 1.0, 2.0]), jf.Measure(x), radius=1.0)
    np.testing.assert_array_equal(tree.times, [1, 2])
    np.testing.assert_array_equal(tree.pairs, [[0, 1], [0, 2]])
    np.testing.assert_array_equal(tree.sizes, [2, 3])
    np.testing.assert_array_equal(tree.counts([0.0, 0.9, 1.0, 3.0]), [3, 3, 2, 1])
    np.testing.assert_array_equal(tree.linkage(), [[0, 1, 1, 2], [2, 3, 2, 3]])


def test_merge_tree_leaves_out_tokens_without_mass_and_times_not_reached():
    x = jnp.array([[0.0], [0.1], [0.2], [7.0]])
    points = jnp.stack([x, jnp.full_like(x, jnp.inf)])
    logs = jnp.array([0.0, -jnp.inf, 0.0, 0.0])
    tree = observables.merge_tree([1.0, jnp.inf], jf.Measure(points, logs), radius=1.0)
    np.testing.assert_array_equal(tree.tokens, [0, 2, 3])
    np.testing.assert_array_equal(tree.pairs, [[0, 2]])
    np.testing.assert_array_equal(tree.linkage(end=4.0), [[0, 1, 1, 2], [2, 3, 4, 3]])
    with pytest.raises(ValueError, match="2 clusters have not met"):
        tree.linkage()
    with pytest.raises(ValueError, match="not before that merger; got 0.5"):
        tree.linkage(end=0.5)


def test_merge_tree_checks_its_mergers():
    one = np.array([1.0]), np.array([[0, 1]]), np.array([2])
    with pytest.raises(ValueError, match="merge at most 0 times"):
        MergeTree(1, *one)
    met = np.array([[2, 1]])
    assert MergeTree(3, *one, links=met).links is met
    with pytest.raises(ValueError, match="and ascend: sort the mergers"):
        MergeTree(3, np.array([2.0, 1.0]), np.array([[0, 1], [0, 2]]), np.array([2, 3]))
    with pytest.raises(ValueError, match="not the first tokens of two clusters"):
        MergeTree(3, np.array([1.0, 2.0]), np.array([[0, 1], [1, 2]]), np.array([2, 3])).linkage()
    with pytest.raises(ValueError, match="log1p"):
        MergeTree(2, np.array([0.5]), *one[1:]).linkage(np.log)
    with pytest.raises(ValueError, match="merge_tree takes times"):
        observables.merge_tree([0.0], jf.measure.circle(3))
