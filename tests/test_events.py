"""Events against exact times: two tokens, equiangular tokens, steady states, merges."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import jaxflow as jf
from jaxflow import events, observables

pytestmark = pytest.mark.usefixtures("x64")

TIGHT = diffrax.PIDController(rtol=1e-11, atol=1e-13)


def two_token_time(beta, threshold=0.9):
    """int_0^threshold (e^{b(1-r)} + 1) / (2 (1 - r^2)) dr."""
    rate = lambda r: (np.exp(beta * (1 - r)) + 1) / (2 * (1 - r * r))
    return quad(rate, 0, threshold, epsabs=0, epsrel=1e-13, limit=500)[0]


@pytest.mark.parametrize("beta, published", [(1.0, 1.917028), (8.0, 194.134994), (16.0, None)])
def test_two_tokens_merge_on_time(beta, published):
    """With the default tolerance, to 1e-6 of a time that is 280,000 at beta = 16."""
    time = two_token_time(beta)
    if published is not None:
        np.testing.assert_allclose(time, published, rtol=0, atol=5e-7)
    until = events.until_clustered(threshold=0.9)
    mu0 = jf.Measure(jnp.eye(2))
    sol = jf.flow(jf.SelfAttention(beta=beta), mu0, t1=1e6, event=until)
    np.testing.assert_allclose(sol.ts[-1], time, rtol=1e-6)
    assert bool(sol.event_mask)
    x = sol.measures.points[-1]
    # Just past the crossing: by a hundred-millionth of the last step.
    assert 0.9 < x[0] @ x[1] < 0.9 + 1e-6


@pytest.mark.parametrize("beta, time", [(8.0, 958_101.6), (12.0, 1.6995813e9)])
def test_implicit_steps_cross_metastable_states(beta, time):
    """16 tokens on the circle become one cluster at 9.6e5 (beta 8) and 1.7e9 (beta 12), in some
    hundred implicit steps: by Newton's method, as diffrax's chords call rounding divergence there.
    """
    mu0 = jf.measure.uniform_sphere(16, 2, key=jax.random.key(2))
    sol = jf.flow(
        jf.SelfAttention(beta=beta),
        mu0,
        t1=1e12,
        solver=diffrax.Kvaerno5(),
        event=events.until_clustered(),
    )
    np.testing.assert_allclose(sol.ts[-1], time, rtol=1e-6)
    assert int(sol.stats["num_steps"]) < 600
    assert observables.cluster_count(sol.last) == 1


@pytest.mark.parametrize("x64", [pytest.param(False, marks=pytest.mark.slow), True])
def test_where_an_event_stopped_its_condition_holds(x64):
    """Also as another program computes it, without the bisection and the interpolation."""
    with jax.enable_x64(x64):
        found = []
        for seed in range(24):
            count, threshold = 2 + seed % 2, [0.9, 0.99, 0.999][seed % 3]
            sol = jf.flow(
                jf.SelfAttention(beta=1.0 + seed / 4),
                jf.measure.uniform_sphere(12, 3, key=jax.random.key(seed)),
                t1=1e3,
                event=events.until_clustered(count, threshold),
            )
            found.append(int(observables.cluster_count(sol.last, threshold)) <= count)
        assert all(found)


def test_an_event_sees_the_points_that_are_saved():
    """On the sphere the interpolation leaves it: by 1e-3 and more for one step of the whole way."""
    off = lambda t, y, args, **about: jnp.abs(jnp.linalg.norm(y, axis=-1) - 1).max() - 1e-9
    sol = jf.flow(
        jf.SelfAttention(beta=1.0),
        jf.measure.simplex(4, 4),
        t1=2.0,
        solver=diffrax.Heun(),
        dt0=0.5,
        stepsize_controller=diffrax.ConstantStepSize(),
        event=diffrax.Event(off, direction=True),
    )
    assert not bool(sol.event_mask)


def test_equiangular_tokens_cluster_on_time():
    """n = 32, beta = 4 reach 1 - 1e-3 at 6.95350 (arXiv 2312.10794, sec. 6)."""
    mu0, until = jf.measure.simplex(32, 32), events.until_clustered()
    sol = jf.flow(jf.SelfAttention(beta=4.0), mu0, t1=20.0, event=until)
    np.testing.assert_allclose(sol.ts[-1], 6.95350, rtol=0, atol=5e-6)


@pytest.mark.slow
def test_stragglers_do_not_keep_a_flow():
    """Two tokens meet fast and a third of weight 1e-3, opposite to them, stays."""
    mu0 = jf.Measure(
        jf.measure.from_angles(jnp.array([-0.5, 0.5, jnp.pi])).points,
        jnp.log(jnp.array([1, 1, 2e-3])),
    )
    options: dict[str, Any] = {"t1": 50.0, "saveat": diffrax.SaveAt(t1=True)}
    field = jf.SelfAttention(beta=8.0)
    counted = jf.flow(field, mu0, event=events.until_clustered(min_mass=0.01), **options)
    assert bool(counted.event_mask) and float(counted.end) < 20
    assert observables.cluster_count(counted.last) == 2
    # No token alone has 60 % of the mass: that there is no cluster yet does not end the flow.
    late = jf.flow(field, mu0, event=events.until_clustered(min_mass=0.6), **options)
    np.testing.assert_allclose(late.end, counted.end, rtol=1e-9)


def test_a_flow_that_starts_clustered_stops_at_once():
    mu0 = jf.Measure(jnp.tile(jnp.array([[1.0, 0.0]]), (3, 1)))
    sol = jf.flow(jf.SelfAttention(), mu0, t1=5.0, event=events.until_clustered())
    np.testing.assert_allclose(sol.ts[-1], 0, atol=1e-8)  # a part of its first step
    far = jf.flow(jf.SelfAttention(), jf.measure.circle(3), t1=5.0, event=events.until_clustered())
    assert not bool(far.event_mask)
    np.testing.assert_array_equal(far.ts[-1], 5.0)


@pytest.mark.slow
def test_all_systems_must_have_clustered():
    """The event waits for the slowest of a batch; under vmap each system has its own time."""
    mu0 = jf.Measure(jnp.stack([jf.measure.simplex(3, 3, rho).points for rho in (0.0, 0.5)]))
    field, until = jf.SelfAttention(beta=1.0), events.until_clustered()
    both = jf.flow(field, mu0, t1=20.0, event=until, stepsize_controller=TIGHT)
    times = [
        jf.flow(field, mu, t1=20.0, event=until, stepsize_controller=TIGHT).ts[-1] for mu in mu0
    ]
    assert times[0] > times[1] + 0.5
    np.testing.assert_allclose(both.ts[-1], times[0], rtol=1e-9)
    one = lambda points: jf.flow(
        field, jf.Measure(points), t1=20.0, event=until, stepsize_controller=TIGHT
    )
    np.testing.assert_allclose(jax.vmap(one)(mu0.points).ts[:, -1], times, rtol=1e-9)


def test_levels_of_observables():
    """rho = tanh(t + artanh rho0) at beta = 0: it passes 0.8 at artanh 0.8 - artanh 0.3, and so
    |E x|^2 = (1 + rho)/2 passes 0.9."""
    mu0 = jf.Measure(jnp.array([[1.0, 0.0], [0.3, np.sqrt(1 - 0.09)]]))
    time = np.arctanh(0.8) - np.arctanh(0.3)
    options: dict[str, Any] = {"t1": 9.0, "stepsize_controller": TIGHT}
    square = lambda t, mu: (mu.mean**2).sum()
    above = jf.flow(
        jf.SelfAttention(beta=0.0), mu0, event=events.until_above(square, 0.9), **options
    )
    np.testing.assert_allclose(above.ts[-1], time, rtol=1e-9)
    apart = lambda t, mu: 1 - mu.points[0] @ mu.points[1]
    below = jf.flow(
        jf.SelfAttention(beta=0.0), mu0, event=events.until_below(apart, 0.2), **options
    )
    np.testing.assert_allclose(below.ts[-1], time, rtol=1e-9)
    with pytest.raises(ValueError, match="scalar value, got shape \\(2,\\)"):
        vector = events.until_above(lambda t, mu: mu.mean, 0.9)
        jf.flow(jf.SelfAttention(beta=0.0), mu0, event=vector, **options)


def test_clusters_by_distance():
    """x' = (mean - x) on R^1 of two tokens at +-1: they are 0.1 apart at t = log 20."""
    drift = jf.SelfAttention(beta=0.0, geometry=jf.Euclidean()) - jf.LinearDrift(jnp.eye(1))
    mu0 = jf.Measure(jnp.array([[-1.0], [1.0]]))
    until = events.until_clustered(radius=0.1)
    sol = jf.flow(drift, mu0, t1=9.0, event=until, stepsize_controller=TIGHT)
    np.testing.assert_allclose(sol.ts[-1], np.log(20), rtol=1e-9)


def test_steady_states():
    """At beta = 0 both tokens move at sqrt(1 - rho^2) / 2 = sech(t) / 2 from rho = 0."""
    until = events.until_steady(1e-3)
    sol = jf.flow(jf.SelfAttention(beta=0.0), jf.Measure(jnp.eye(2)), t1=50.0, event=until,
                  stepsize_controller=TIGHT)  # fmt: skip
    np.testing.assert_allclose(sol.ts[-1], np.arccosh(500), rtol=1e-8)


def test_log_times():
    ts = np.asarray(events.log_times(0.1, 1000.0, 5))
    np.testing.assert_allclose(ts, [0, 0.1, 1, 10, 100, 1000], rtol=1e-14)
    np.testing.assert_allclose(events.log_times(1.0, 5.0, 3, t0=1.0), [1, 2, 3, 5], rtol=1e-14)
    sol = jf.flow(jf.SelfAttention(beta=2.0), jf.measure.circle(4), t1=1000.0,
                  saveat=diffrax.SaveAt(ts=events.log_times(0.1, 1000.0, 5)))  # fmt: skip
    np.testing.assert_allclose(sol.ts, ts)
    for bad in ((0.0, 1.0, 5), (2.0, 1.0, 5), (0.1, 1.0, 1)):
        with pytest.raises(ValueError, match="log_times needs"):
            events.log_times(*bad)


# ------------------------------------------------------------------ merges


def test_each_merge_has_its_time_and_pair():
    """A grid of saved times that brackets each merge by a millionth finds the same tree."""
    mu0 = jf.measure.from_angles(jnp.array([0.0, 0.4, 1.6, 1.8, 3.0]))
    field, seen = jf.SelfAttention(beta=4.0), []
    tree = events.merges(field, mu0, t1=1e3, progress=lambda t, count: seen.append(count))
    assert seen == [5, 4, 3, 2, 1]
    assert tree.pairs.tolist() == [[2, 3], [0, 1], [2, 4], [0, 2]]
    assert tree.links is not None and tree.links.tolist() == [[2, 3], [0, 1], [3, 4], [1, 2]]
    assert tree.sizes.tolist() == [2, 2, 3, 5]
    around = np.sort(np.concatenate([tree.times * (1 - 1e-6), tree.times * (1 + 1e-6)]))
    saved = jf.flow(field, mu0, t1=1e3, saveat=diffrax.SaveAt(ts=jnp.asarray(around)))
    on_grid = observables.merge_tree(saved.ts, saved.measures, 0.999)
    np.testing.assert_array_equal(on_grid.times, tree.times * (1 + 1e-6))
    np.testing.assert_array_equal(on_grid.pairs, tree.pairs)
    np.testing.assert_array_equal(on_grid.sizes, tree.sizes)


@pytest.mark.slow
def test_simultaneous_merges_are_all_found():
    """Equiangular tokens meet at one time; tokens without mass and clusters at t = 0 as well."""
    field = jf.SelfAttention(beta=1.0)
    tree = events.merges(field, jf.measure.simplex(4, 4), t1=20.0)
    assert tree.sizes.tolist() == [2, 3, 4] and np.ptp(tree.times) < 1e-6
    x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    masked = events.merges(field, jf.Measure(x, jnp.array([0.0, 0.0, -jnp.inf, 0.0])), t1=20.0)
    assert masked.pairs.tolist() == [[0, 1], [0, 3]] and masked.times[0] == 0
    assert masked.tokens.tolist() == [0, 1, 3]


@pytest.mark.slow
def test_mergers_by_fixed_steps():
    """A step of 1e-3 of Euler's method errs by about as much of the time."""
    field, mu0 = jf.SelfAttention(beta=1.0), jf.measure.simplex(4, 4)
    fixed = {"solver": diffrax.Euler(), "dt0": 1e-3, "max_steps": None}
    found, by_euler = (
        events.merges(field, mu0, t1=20.0),
        events.merges(field, mu0, t1=20.0, **fixed),
    )
    np.testing.assert_allclose(by_euler.times, found.times, rtol=1e-3)


def test_mergers_found_before_a_failure_are_kept():
    mu0 = jf.measure.from_angles(jnp.array([0.0, 0.4, 1.6, 1.8, 3.0]))
    field = jf.SelfAttention(beta=4.0)
    whole = events.merges(field, mu0, t1=1e3)
    steps = 26  # enough for the first three mergers, not for the last
    with pytest.warns(UserWarning, match=rf"3 of the mergers.*max_steps = {steps} was reached"):
        part = events.merges(field, mu0, t1=1e3, max_steps=steps)
    assert part.failure is not None and "rejected" in part.failure
    np.testing.assert_allclose(part.times, whole.times[:3], rtol=1e-9)
    assert part.pairs.tolist() == whole.pairs[:3].tolist() and whole.failure is None


def test_bad_input():
    for make, message in (
        (lambda: events.until_clustered(0), "at least one cluster, got count=0"),
        (lambda: events.until_steady(0.0), "must be positive, got 0"),
        (lambda: events.until_below(lambda t, mu: t, jnp.ones(2)), "scalar level"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    batch = jf.Measure(jnp.eye(2)[None])
    with pytest.raises(ValueError, match="one system"):
        events.merges(jf.SelfAttention(), batch, t1=1.0)
