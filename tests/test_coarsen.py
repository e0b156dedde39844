"""Tokens that have met are one token: exact times, the plain flow, and what must not merge."""

import diffrax
import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from jaxtyping import Array
from scipy.integrate import quad

import jaxflow as jf
from jaxflow import measure
from jaxflow._coarsened import system_of
from jaxflow._meeting import least_close, parting_rates
from jaxflow._saving import FlowArgs
from jaxflow.coarsen import _moves
from jaxflow.fields import AbstractField
from jaxflow.geometry import AbstractGeometry
from jaxflow.observables import MergeTree

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


def meeting_time(beta, delta, n=2):
    """Of n tokens at right angles: the integral to r = cos(delta) of
    (e^{b(1-r)} + n - 1) / (2 (1 - r) (1 + (n-1) r)), with 1 - r = e^{-u}."""
    gap = lambda u: np.exp(-u)
    rate = lambda u: (np.exp(beta * gap(u)) + n - 1) / (2 * (n - (n - 1) * gap(u)))
    end = -np.log(2 * np.sin(delta / 2) ** 2)
    return quad(rate, 0, end, epsabs=0, epsrel=1e-13, limit=500)[0]


def tree_of(sol) -> MergeTree:
    """The mergers of one system."""
    assert isinstance(sol.merges, MergeTree)
    return sol.merges


# ------------------------------------------------------------------ exact times


@pytest.mark.parametrize("beta, delta", [(0.0, 1e-2), (1.0, 0.451), (8.0, 1e-3)])
def test_two_tokens_meet_on_time(beta, delta):
    """F3, and F1 and F2 with it: 1 - cos(delta) = delta^2 / 2 is reached at rate 2."""
    sol = follow(jf.coarsen, np.eye(2), [1, 1], 1e4, beta=beta, delta=delta)
    tree = tree_of(sol)
    exact = meeting_time(beta, delta)
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
    np.testing.assert_allclose(tree_of(sol).times[-1], time, rtol=1e-6)
    assert len(tree_of(sol).times) == 15 and tree_of(sol).sizes[-1] == 16
    assert int(sol.stats["num_steps"]) < 600
    np.testing.assert_array_equal(sol.final.points, np.tile(sol.final.points[:1], (16, 1)))


def test_two_clusters_stay_until_1e16():
    mu0 = measure.uniform_sphere(16, 2, key=jax.random.key(2))
    run = lambda points: follow(jf.coarsen, points, np.ones(16), 1e16, beta=20.0, delta=1e-3)
    sol = run(mu0.points)
    tree = tree_of(sol)
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
    np.testing.assert_allclose(tree_of(other).times, tree.times, rtol=1e-3)
    np.testing.assert_allclose(other.final.points, sol.final.points[order], rtol=0, atol=1e-5)


def test_three_tokens_pair_when_the_plain_flow_does():
    points, delta = CIRCLE(np.array([0.0, 0.5, 1.9])), 1e-3
    sol = follow(jf.coarsen, points, [1, 2, 3], 60.0, beta=3.0, delta=delta)
    assert tree_of(sol).pairs.tolist() == [[0, 1], [0, 2]]
    plain = follow(jf.flow, points, [1, 2, 3], 60.0, beta=3.0)
    x = np.asarray(plain.measures.points)
    first = (x[:, 0] + 2 * x[:, 1]) / 3
    for time, pair in zip(tree_of(sol).times, [(x[:, 0], x[:, 1]), (first, x[:, 2])], strict=True):
        gap = np.linalg.norm(pair[0] - pair[1], axis=1)
        k = int((gap > delta).sum())
        part = np.log(gap[k - 1] / delta) / np.log(gap[k - 1] / gap[k])
        # Distances fall at rate 1, and are right to 1e-4 of delta.
        assert abs(plain.ts[k - 1] + part * (plain.ts[k] - plain.ts[k - 1]) - time) < 1e-4
    with pytest.raises(ValueError, match=r"call jaxflow\.coarsen"):
        _ = plain.merges
    assert sol.labels_at(float(tree_of(sol).times[0])).tolist()[:3] == [0, 0, 2]
    assert sol.labels.tolist() == [0, 0, 0, *range(3, 16)]


# ------------------------------------------------------------------ the plain flow


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
    assert len(tree_of(sol).times) == 3 and 1 < tree_of(sol).times[-1] < 15
    x = np.asarray(sol.measures.points)
    kernel = np.exp(beta * np.einsum("tid,tjd->tij", x, x))
    partition = kernel @ weights
    energy = partition @ weights / (2 * beta)
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


@pytest.fixture(params=[False, True], ids=["contracting", "everywhere"])
def met_on_a_saddle(request, x64):
    """x -> (e^{-t} x, e^{t/2} y): tokens that come within delta, and part again."""
    field = jf.LinearDrift(np.diag([-1.0, 0.5]), geometry=jf.Euclidean())
    mu0 = jf.Measure(np.array([[1.0, 0.0], [0.0, 1e-4]]), np.log([3.0, 1.0]))
    return jf.coarsen(field, mu0, t1=14.0, delta=1e-2, everywhere=request.param)


def test_tokens_that_would_part_are_left_apart(met_on_a_saddle):
    sol = met_on_a_saddle
    exact = np.array([[np.exp(-14.0), 0.0], [0.0, 1e-4 * np.exp(7.0)]])
    if sol.bound is None:
        assert len(tree_of(sol).times) == 0 and sol.labels.tolist() == [0, 1]
        np.testing.assert_allclose(sol.final.points, exact, rtol=0, atol=1e-5)
        return
    # Where the distance was delta: e^{-t} and 1e-4 e^{t/2} are its two sides.
    [time] = tree_of(sol).times
    np.testing.assert_allclose(np.hypot(np.exp(-time), 1e-4 * np.exp(time / 2)), 1e-2, rtol=1e-3)
    off = np.linalg.norm(exact - np.asarray(sol.final.points), axis=1)
    # It grows from where tokens merged, at the end of a step, to a quarter and three of the gap.
    assert (off <= sol.bound * (1 + 1e-6)).all() and (off > 0.05 * sol.bound).all()
    np.testing.assert_allclose(sol.bound[1], 3 * sol.bound[0], rtol=1e-6)


CURVE = jf.TimeDependent(
    jf.PiecewiseConstant([jf.SelfAttention(value=v * np.eye(2)) for v in (1.0, -1.0)], [8.0])
)


def test_tokens_that_part_later_are_left_apart_in_time_dependent_fields():
    """V = I until t = 8, and -I from then on: with a bound where they merge on request.

    From t = 8 to 15 rounding grows by e^7, and the errors of both solves, 3e-7 at the end, as much.
    """
    mu0 = jf.Measure(CIRCLE(np.array([0.0, 0.3, 2.0])))
    plain = jf.flow(CURVE, mu0, t1=15.0)
    apart = jf.coarsen(CURVE, mu0, t1=15.0, delta=1e-3)
    assert len(tree_of(apart).times) == 0 and apart.bound is None
    np.testing.assert_allclose(apart.final.points, plain.final.points, rtol=0, atol=1e-9)
    merged = jf.coarsen(CURVE, mu0, t1=15.0, delta=1e-3, everywhere=True)
    assert tree_of(merged).pairs.tolist()[0] == [0, 1] and tree_of(merged).times[0] < 8
    off, bound = np.linalg.norm(plain.final.points - merged.final.points, axis=1), merged.bound
    assert bound is not None
    # The bound is of first order: the other tokens move by the second moments of the two.
    assert (off[:2] <= bound[:2] * (1 + 1e-2)).all() and off[0] > 0.9 * bound[0] > 0.05
    assert bound[2] == 0 and off[2] < bound[0] ** 2


class Masked(AbstractField):
    """A field of which a token sees those that a mask lets it see."""

    geometry: AbstractGeometry
    mask: Array

    def __call__(self, t, x, mu):
        return self.mask @ mu.points - x


REFUSED = {
    "a mask": ({"field": jf.SelfAttention(causal=True)}, "causal=True"),
    "a window within a sum": (
        {"field": jf.SelfAttention() + jf.SelfAttention(window=2)},
        "window=2",
    ),
    "a mask in time": (
        {"field": jf.TimeDependent(jf.Constant(jf.SelfAttention(causal=True)))},
        "causal=True",
    ),
    "a mask of the user's own": (
        {"field": Masked(jf.Sphere(), jnp.eye(2))},
        r"Masked\(mask=an array of shape \(2, 2\)\)",
    ),
    "a delta of zero": ({"delta": 0.0}, "above 0 and below pi/2.*got 0"),
    "a delta of nan": ({"delta": np.nan}, "above 0"),
    "a hemisphere": ({"delta": 1.6}, "got 1.6"),
    "fixed steps": (
        {"solver": diffrax.Heun(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1},
        "ConstantStepSize has no rtol",
    ),
    "another equation": ({"adjoint": diffrax.BacksolveAdjoint()}, "BacksolveAdjoint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changed, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        jf.coarsen(
            **({"field": jf.SelfAttention(), "mu0": jf.Measure(np.eye(2)), "t1": 1.0} | changed)
        )


def test_rotary_positions_are_refused(key):
    field = jf.MultiHeadAttention(2, 1, rotary=1e4, key=key)
    with pytest.raises(ValueError, match="rotary"):
        jf.coarsen(field, jf.Measure(np.eye(2)), t1=1.0)


class Ordered(AbstractField):
    """A field of a user's own, in which a token follows the one before it."""

    geometry: AbstractGeometry
    shift: int = eqx.field(static=True, default=1)

    def __call__(self, t, x, mu):
        return jnp.roll(mu.points, self.shift, axis=0)[: len(x)] - x


class Waning(AbstractField):
    """x' = rate(t) (mean - x)."""

    geometry: AbstractGeometry
    wave: bool = eqx.field(static=True)

    def __call__(self, t, x, mu):
        rate = jnp.cos(t) if self.wave else 1 / (1 + t)
        return rate * (mu.mean[None] - x)


def test_fields_of_the_users_own_are_asked():
    mu0 = jf.Measure(np.random.default_rng(0).normal(size=(20, 2)))
    with pytest.raises(ValueError, match="law of the tokens alone, and Ordered does not"):
        jf.coarsen(Ordered(jf.Euclidean()), mu0, t1=1.0)
    assert not _moves(Waning(jf.Euclidean(), False), mu0, 0.0, 3.0)
    assert _moves(Waning(jf.Euclidean(), True), mu0, 0.0, 3.0)


# ------------------------------------------------------------------ one program


class Counted(AbstractField):
    """x' = rate (mean - x), which counts how often it is traced."""

    geometry: AbstractGeometry
    rate: jax.Array
    traces: list = eqx.field(static=True)

    def __call__(self, t, x, mu):
        self.traces.append(None)
        return self.rate * (mu.mean[None] - x)


def test_no_number_and_no_merger_compiles_again():
    """Distances fall as e^{-rate t}, and three tokens become one, by one program."""
    traces, mu0 = [], jf.Measure(np.array([[0.0], [0.5], [3.0]]))
    counts = []
    for rate, t1, delta in ((1.0, 5.0, 0.1), (2.0, 9.0, 1e-3)):
        field = Counted(jf.Euclidean(), jnp.asarray(rate), traces)
        sol = jf.coarsen(field, mu0, t1=t1, delta=delta)
        exact = np.log(np.array([0.5, 2.75]) / delta) / rate
        np.testing.assert_allclose(tree_of(sol).times, exact, rtol=1e-5)
        np.testing.assert_allclose(sol.final.points, 3.5 / 3, rtol=0, atol=1e-15 + 2e-3 * delta)
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


# ------------------------------------------------------------------ many tokens, many systems


def test_close_tokens_are_found_in_blocks():
    """Against all pairs: 700 tokens in six blocks, a ring among them and a tenth that is absent."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 3))
    x[:200] = np.c_[np.cos(np.arange(200) / 31.8), np.sin(np.arange(200) / 31.8), np.zeros(200)]
    x[rng.choice(700, 70, replace=False)] = np.nan
    asked = rng.random(700) < 0.7
    found = jax.jit(least_close)(jnp.asarray(x), jnp.asarray(asked), jnp.asarray(0.1))
    close = np.linalg.norm(x[:, None] - x[None], axis=2) <= 0.1
    close &= (np.arange(700) < np.arange(700)[:, None]) & asked
    np.testing.assert_array_equal(found, np.where(close.any(axis=1), close.argmax(axis=1), 700))
    assert 100 < (np.asarray(found) < 700).sum() < 400


def test_the_cost_falls_with_the_number_of_clusters():
    """300 tokens, of which few stand for all: the field sees no more than a quarter of them."""
    seen = []

    class Seeing(AbstractField):
        geometry: AbstractGeometry

        def __call__(self, t, x, mu):
            jax.debug.callback(lambda _: seen.append(mu.n), t, ordered=False)
            return mu.mean[None] - x

    mu = measure.gaussian(300, 2, key=jax.random.key(0))
    args = FlowArgs(Seeing(jf.Euclidean()), None, {})
    velocity = jax.jit(
        lambda labels: system_of(labels, mu.log_probabilities).velocity(0.0, mu.points, args)
    )
    for clusters, sizes in ((20, {75}), (75, {75}), (76, {300})):
        labels = jnp.arange(300) % clusters
        points = mu.points[labels]
        exact = points.mean(axis=0)[None] - points
        np.testing.assert_allclose(velocity(labels), exact, rtol=0, atol=1e-12)
        jax.effects_barrier()
        assert set(seen) == sizes
        seen.clear()


def test_rates_at_which_tokens_part():
    """D (P F) = P (beta Cov_{mu_x} - <x, E[y]>) P on the tangent space, by F8."""
    x = np.asarray(measure.uniform_sphere(5, 3, key=jax.random.key(0)).points)
    field = jf.SelfAttention(beta=2.0)
    rates, _ = jax.jit(lambda x: parting_rates(field, 0.0, x, jf.Measure(x)))(x)
    kernel = np.exp(2 * x @ x.T)
    weights = kernel / kernel.sum(axis=1, keepdims=True)
    for i in range(5):
        mean = weights[i] @ x
        covariance = 2 * (x - mean).T @ (weights[i][:, None] * (x - mean))
        project = np.eye(3) - np.outer(x[i], x[i])
        matrix = project @ covariance @ project - (x[i] @ mean) * project
        exact = np.linalg.eigvalsh(matrix - 9 * np.outer(x[i], x[i]))[-1]
        np.testing.assert_allclose(rates[i], exact, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_systems_of_a_batch_merge_on_their_own():
    """With one step size for all, and with one each (jax.vmap, under jit): no time moves by more
    than the steps' accuracy, and none of another system's tokens by anything.

    Each has a pair that is far closer than the third: which tokens merge is then no matter of
    where steps end, as it is where several of one cluster come within delta in one step."""
    angles = [[0.0, 0.05, 1.5], [0.0, 1.8, 0.1], [2.0, 0.1, 0.0]]
    pairs = [[[0, 1], [0, 2]], [[0, 2], [0, 1]], [[1, 2], [0, 1]]]
    points = np.stack([CIRCLE(np.array(system)) for system in angles])
    field = jf.SelfAttention(beta=2.0)
    together = jf.coarsen(field, jf.Measure(points), t1=30.0)
    each = jax.jit(jax.vmap(lambda x: jf.coarsen(field, jf.Measure(x), t1=30.0)))(points)
    trees = [sol.merges for sol in (together, each)]
    for k in range(3):
        alone = jf.coarsen(field, jf.Measure(points[k]), t1=30.0)
        assert tree_of(alone).pairs.tolist() == pairs[k]
        for of_all in trees:
            assert isinstance(of_all, list)
            np.testing.assert_array_equal(of_all[k].pairs, pairs[k])
            # Places are right to some 1e-8 each, a distance of 1e-4 then to 1e-3 of itself.
            np.testing.assert_allclose(of_all[k].times, tree_of(alone).times, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(together.labels[k], alone.labels)
        np.testing.assert_array_equal(each.labels[k], alone.labels)
        np.testing.assert_allclose(together.final.points[k], alone.final.points, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one system"):
        _ = together.coarse


@pytest.mark.slow
@pytest.mark.parametrize("solver", [diffrax.Kvaerno5(), jf.solvers.Geodesic()])
def test_any_solver(solver):
    """Three tokens at right angles meet at one time. With 1e-10 a step, places are right to 1e-8, a
    distance of 1e-3 to 1e-5 of itself, and so is the time at which it is left: it falls at rate 1.
    """
    sol = jf.coarsen(
        jf.SelfAttention(beta=4.0),
        jf.Measure(np.eye(3)),
        t1=100.0,
        solver=solver,
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-10),
        delta=1e-3,
    )
    exact = meeting_time(4.0, 1e-3, 3)
    np.testing.assert_allclose(tree_of(sol).times, [exact, exact], rtol=0, atol=1e-5)
    assert tree_of(sol).sizes.tolist() == [2, 3]


@pytest.mark.slow
def test_gradients_pass_through_mergers():
    """By points, weights, Q, K, V and beta, at a time at which the tokens of a cluster have come
    together: those of the plain flow, to the error of a cluster's moments and of both solves."""
    mu0 = measure.uniform_sphere(6, 3, key=jax.random.key(1))
    rng = np.random.default_rng(0)
    matrices = jnp.asarray(np.eye(3) + 0.2 * rng.normal(size=(3, 3, 3)))

    def loss(parameters, run):
        points, logs, matrices, beta = parameters
        mu = jf.Measure(jf.Sphere().retract(points), logs)
        sol = run(jf.SelfAttention(*matrices, beta=beta), mu, t1=25.0)
        return (sol.final.points * jnp.array([[1.0, 2.0, 3.0]])).sum(), sol

    parameters = (mu0.points, jnp.zeros(6), matrices, jnp.array(4.0))
    found, sol = jax.grad(loss, has_aux=True)(parameters, jf.coarsen)
    exact, _ = jax.grad(loss, has_aux=True)(parameters, jf.flow)
    assert len(tree_of(sol).times) >= 3
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max() + 1e-6)
