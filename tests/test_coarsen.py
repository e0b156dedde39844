"""Tokens that have met are one token: exact times, the plain flow, and what must not merge."""

import diffrax
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from scipy.integrate import quad

import jaxflow as jf
from jaxflow import measure, observables

pytestmark = pytest.mark.usefixtures("x64")

CIRCLE = lambda angles: np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def follow(run, points, weights, t1, *, beta=1.0, **options):
    """A flow of 16 tokens on the circle, some of which may have no mass: one program for all."""
    points, weights = (np.asarray(a, float) for a in (points, weights))
    missing = 16 - len(points)
    points = np.concatenate([points, np.tile([[0.0, 1.0]], (missing, 1))])
    with np.errstate(divide="ignore"):
        logs = np.log(np.concatenate([weights, np.zeros(missing)]))
    field = jf.SelfAttention(beta=beta)
    times = diffrax.SaveAt(ts=jnp.linspace(0, t1, 2001))
    return run(field, jf.Measure(points, logs), t1=t1, saveat=times, **options)


def two_token_time(beta, rho):
    """int_0^rho (e^{b(1-r)} + 1) / (2 (1 - r^2)) dr, with 1 - r = e^{-u}."""
    rate = lambda u: (np.exp(beta * np.exp(-u)) + 1) / (2 * (2 - np.exp(-u)))
    return quad(rate, 0, -np.log1p(-rho), epsabs=0, epsrel=1e-13, limit=500)[0]


# ------------------------------------------------------------------ exact times


@pytest.mark.parametrize("beta, delta", [(0.0, 1e-2), (1.0, 0.451), (8.0, 1e-3)])
def test_two_tokens_meet_on_time(beta, delta):
    """F3, and F1 and F2 with it: 1 - cos(delta) = delta^2 / 2 is reached at rate 2."""
    sol = follow(jf.coarsen, np.eye(2), [1, 1], 1e4, beta=beta, delta=delta)
    tree = sol.merges
    exact = two_token_time(beta, np.cos(delta))
    np.testing.assert_allclose(tree.times, [exact], rtol=1e-4 if delta > 0.1 else 1e-6)
    assert tree.pairs.tolist() == [[0, 1]] and tree.sizes.tolist() == [2]
    assert tree.tokens.tolist() == [0, 1]


# The angle between the last two clusters of 16 tokens is delta at that time. beta = 4: by the plain
# flow, to 1e-10, and bisection; beta = 8, 12 and the number of clusters at 20: Tsit5 with an event
# and a new solve at each meeting.
TABLE = [
    (4.0, 1e-3, 444.8959833),
    (4.0, 1e-4, 447.1985694),
    (8.0, 1e-3, 958_105.3),
    (8.0, 1e-4, 958_107.7),
    (12.0, 1e-3, 1.699581101e9),
    (12.0, 1e-4, 1.699581082e9),
]


@pytest.mark.parametrize("beta, delta, time", TABLE)
def test_metastable_times(beta, delta, time):
    mu0 = measure.uniform_sphere(16, 2, key=jax.random.key(2))
    sol = follow(jf.coarsen, mu0.points, np.ones(16), 1e12, beta=beta, delta=delta)
    np.testing.assert_allclose(sol.merges.times[-1], time, rtol=1e-6)
    assert len(sol.merges.times) == 15 and sol.merges.sizes[-1] == 16
    assert int(sol.stats["num_steps"]) < 600
    np.testing.assert_array_equal(sol.final.points, np.tile(sol.final.points[:1], (16, 1)))


def test_two_clusters_stay_until_1e16():
    mu0 = measure.uniform_sphere(16, 2, key=jax.random.key(2))
    run = lambda points: follow(jf.coarsen, points, np.ones(16), 1e16, beta=20.0, delta=1e-3)
    sol = run(mu0.points)
    tree = sol.merges
    assert tree.counts([1.7e7, 1.9e7, 1e16]).tolist() == [3, 2, 2]
    assert len(np.unique(sol.labels)) == 2 and int(sol.stats["num_steps"]) < 600
    coarse = sol.coarse
    assert coarse.n == 2
    np.testing.assert_allclose(coarse.weights.sum(), 1, rtol=1e-15)
    sizes = np.bincount(sol.labels)[np.unique(sol.labels)]
    np.testing.assert_allclose(coarse.weights, sizes / 16, rtol=1e-15)
    np.testing.assert_allclose(sol.final.mean, coarse.mean, rtol=0, atol=1e-15)
    order = np.random.default_rng(0).permutation(16)
    other = run(mu0.points[order])
    # Three pairs meet at the end of one step: which goes into which is a matter of their order.
    np.testing.assert_allclose(other.merges.times, tree.times, rtol=1e-3)
    np.testing.assert_allclose(other.final.points, sol.final.points[order], rtol=0, atol=1e-5)


def test_three_tokens_pair_when_the_plain_flow_does():
    points, delta = CIRCLE(np.array([0.0, 0.5, 1.9])), 1e-3
    sol = follow(jf.coarsen, points, [1, 2, 3], 60.0, beta=3.0, delta=delta)
    assert sol.merges.pairs.tolist() == [[0, 1], [0, 2]]
    plain = follow(jf.flow, points, [1, 2, 3], 60.0, beta=3.0)
    x = np.asarray(plain.measures.points)
    first = (x[:, 0] + 2 * x[:, 1]) / 3
    for time, pair in zip(sol.merges.times, [(x[:, 0], x[:, 1]), (first, x[:, 2])], strict=True):
        gap = np.linalg.norm(pair[0] - pair[1], axis=1)
        k = int((gap > delta).sum())
        part = np.log(gap[k - 1] / delta) / np.log(gap[k - 1] / gap[k])
        # Distances fall at rate 1, and are right to 1e-4 of delta.
        assert abs(plain.ts[k - 1] + part * (plain.ts[k] - plain.ts[k - 1]) - time) < 1e-4
    assert sol.labels_at(float(sol.merges.times[0])).tolist()[:3] == [0, 0, 2]
    assert sol.labels.tolist() == [0, 0, 0, *range(3, 16)]


# ------------------------------------------------------------------ the plain flow


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.floats(0, 2 * np.pi), min_size=5, max_size=5),
    st.lists(st.floats(0, 3), min_size=2, max_size=2),
    st.lists(st.sampled_from([0.0, 1e-12, 1.0, 3.0]), min_size=4, max_size=4),
    st.floats(-1, 2),
)
@example([0.0, np.pi, 0.0, 0.0, 0.0], [9.0, 9.0], [1, 1, 0, 0], 2.0)  # opposite, to the last bit
@example([0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0], [1, 1, 1, 1], 1.0)  # one place
def test_tokens_are_where_the_plain_flow_has_them(angles, exponents, weights, beta):
    """Tokens within delta of where they are: for a time in which unstable directions grow by less
    than e^{3 * 3}, they and the O(delta^2) of the merger stay below 2 delta."""
    angles = np.array(angles)
    angles[3:] = angles[0] + 10.0 ** -np.array(exponents)  # and some tokens that are close
    weights, delta = [*weights, 1.0], 1e-3
    sol = follow(jf.coarsen, CIRCLE(angles), weights, 3.0, beta=beta, delta=delta)
    plain = follow(jf.flow, CIRCLE(angles), weights, 3.0, beta=beta)
    np.testing.assert_allclose(sol.final.points, plain.final.points, rtol=0, atol=2 * delta)
    massive = np.pad(np.asarray(weights) > 0, (0, 11))
    assert (np.asarray(sol.labels)[~massive] == np.flatnonzero(~massive)).all()
    coarse, logs = sol.coarse, np.asarray(sol.log_weights)
    np.testing.assert_allclose(coarse.weights.sum(), 1, rtol=1e-14)
    own = np.exp(logs) / np.exp(logs).sum()
    sums = np.bincount(sol.labels, own, 16)[np.unique(sol.labels)]
    np.testing.assert_allclose(coarse.weights, sums, rtol=1e-13)
    for label in np.unique(sol.labels):  # one place, exactly
        at = np.asarray(sol.final.points)[np.asarray(sol.labels) == label]
        assert (at == at[0]).all()


def test_energy_balance_across_mergers():
    """F7: E(T) - E(0) = int sum_i w_i Z_i |x_i'|^2, for a measure of any weights."""
    beta, points = 2.0, CIRCLE(np.array([0.0, 0.4, 1.0, 2.5]))
    weights = np.array([1.0, 2.0, 1.0, 3.0] + [0.0] * 12) / 7
    sol = follow(jf.coarsen, points, [1, 2, 1, 3], 15.0, beta=beta)
    assert len(sol.merges.times) == 3 and 1 < sol.merges.times[-1] < 15
    energy = jax.vmap(lambda mu: observables.interaction_energy(mu, beta))(sol.measures)
    x = np.asarray(sol.measures.points)
    kernel = np.exp(beta * np.einsum("tid,tjd->tij", x, x))
    partition = kernel @ weights
    mean = np.einsum("tij,j,tjd->tid", kernel, weights, x) / partition[..., None]
    speed = ((mean - (mean * x).sum(axis=-1, keepdims=True) * x) ** 2).sum(axis=-1)
    rate = (partition * speed) @ weights
    work = np.trapezoid(rate, sol.ts)
    # The trapezoidal rule's h^2 / 12 (rate' at the end - at the start), rates' below 20.
    np.testing.assert_allclose(
        energy[-1] - energy[0], work, rtol=0, atol=20 * 0.0075**2 / 12 + 1e-7
    )


def test_derivatives_pass_through_mergers():
    """By all of Q, K, V, beta, weights and points, against differences of the plain flow.

    After the last merger the tokens of a cluster come together by e^{-14}: the derivative of their
    places is then that of their mean, up to O(delta^2)."""
    rng = np.random.default_rng(1)
    angles, weights = np.array([0.0, 0.4, 1.0, 2.0, 2.6]), np.ones(5)
    matrices = np.eye(2) + 0.1 * rng.normal(size=(3, 2, 2))
    base = (angles, weights, 2.0, matrices)
    way = jax.tree.map(lambda a: rng.normal(size=np.shape(a)), base)

    def end(run, s, **options):
        angles, weights, beta, matrices = jax.tree.map(lambda a, u: a + s * u, base, way)
        points = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
        field = jf.SelfAttention(*matrices, beta=beta)
        times = diffrax.SaveAt(ts=jnp.linspace(0, 25.0, 2001))
        mu0 = jf.Measure(points, jnp.log(weights))
        sol = run(field, mu0, t1=25.0, saveat=times, **options)
        return sol.final.points, sol

    step = 1e-5
    found, sol = jax.jvp(
        lambda s: end(jf.coarsen, s, adjoint=diffrax.ForwardMode())[0], (0.0,), (1.0,)
    )
    ends = [end(jf.flow, s, max_steps=10_000)[0] for s in (step, -step)]
    np.testing.assert_allclose(sol, (ends[0] - ends[1]) / (2 * step), rtol=0, atol=1e-5)
    assert len(np.unique(np.round(found, 6), axis=0)) < 5


# ------------------------------------------------------------------ what must not merge

SADDLE = jf.LinearDrift(jnp.diag(jnp.array([-1.0, 0.5])), geometry=jf.Euclidean())


@pytest.fixture(params=[False, True], ids=["contracting", "everywhere"])
def met_on_a_saddle(request, x64):
    """x -> (e^{-t} x, e^{t/2} y): tokens that come within delta, and part again."""
    field = jf.LinearDrift(np.diag([-1.0, 0.5]), geometry=jf.Euclidean())
    mu0 = jf.Measure(np.array([[1.0, 0.0], [0.0, 1e-3]]), np.log([3.0, 1.0]))
    return jf.coarsen(field, mu0, t1=14.0, delta=1e-2, everywhere=request.param)


def test_tokens_that_would_part_are_left_apart(met_on_a_saddle):
    sol = met_on_a_saddle
    exact = np.array([[np.exp(-14.0), 0.0], [0.0, 1e-3 * np.exp(7.0)]])
    if sol.bound is None:
        assert len(sol.merges.times) == 0 and sol.labels.tolist() == [0, 1]
        np.testing.assert_allclose(sol.final.points, exact, rtol=0, atol=1e-5)
        return
    # Where the distance was delta: e^{-t} and 1e-3 e^{t/2} are its two sides.
    [time] = sol.merges.times
    np.testing.assert_allclose(np.hypot(np.exp(-time), 1e-3 * np.exp(time / 2)), 1e-2, rtol=1e-3)
    off = np.linalg.norm(exact - np.asarray(sol.final.points), axis=1)
    # It grows from where tokens merged, at the end of a step, to a quarter and three of the gap.
    assert (off <= sol.bound * (1 + 1e-6)).all() and (off > 0.05 * sol.bound).all()
    np.testing.assert_allclose(sol.bound[1], 3 * sol.bound[0], rtol=1e-6)
