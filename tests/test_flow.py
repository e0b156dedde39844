"""The flow: exact solutions, adjoints, orders, saving, batches, failures and their messages."""

import inspect
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

import jaxflow as jf
from jaxflow import _memory
from jaxflow.explicit import evaluations_per_step

TIGHT = diffrax.PIDController(rtol=1e-10, atol=1e-12)


def unchecked(fn: Any) -> Any:
    """The function as users call it: without the types that the tests check."""
    return inspect.unwrap(fn)


def two_tokens(rho):
    """Unit vectors in the plane with inner product rho."""
    return jnp.stack([jnp.array([1.0, 0.0]), jnp.stack([rho, jnp.sqrt(1 - rho**2)])])


def final_rho(rho, beta, t1=1.0, **options: Any):
    options = {"stepsize_controller": TIGHT} | options
    sol = jf.flow(jf.SelfAttention(beta=beta), jf.Measure(two_tokens(rho)), t1=t1, **options)
    x = sol.measures.points[-1]
    return x[0] @ x[1]


# R, dR/drho0 and dR/dbeta at beta = 0, rho0 = 0.3, T = 1 for two tokens, in closed form.
A = np.arctanh(0.3)
R = np.tanh(1 + A)
D_RHO = (1 - R**2) / (1 - 0.3**2)
D_BETA = -(1 - R**2) / 2 * (1 - np.log(np.cosh(1 + A)) + np.log(np.cosh(A)))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_forward_over_reverse():
    """d^2 R / drho0^2 = -2 R (1 - R^2) / (1 - rho0^2)^2 + 2 rho0 (1 - R^2) / (1 - rho0^2)^2."""
    exact = 2 * (1 - R**2) * (0.3 - R) / (1 - 0.3**2) ** 2
    fn = lambda rho: final_rho(rho, 0.0, adjoint=diffrax.DirectAdjoint())
    second = jax.jit(jax.jacfwd(jax.grad(fn)))(jnp.array(0.3))
    np.testing.assert_allclose(second, exact, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradient_through_an_implicit_solver():
    gradient = jax.jit(jax.grad(lambda r, b: final_rho(r, b, solver=diffrax.Kvaerno3()), (0, 1)))
    np.testing.assert_allclose(gradient(jnp.array(0.3), jnp.array(0.0)), [D_RHO, D_BETA], rtol=1e-6)


ORDERS = [
    (diffrax.Euler(), 1),
    (diffrax.Heun(), 2),
    (diffrax.Tsit5(), 5),
    (diffrax.Kvaerno3(root_finder=optimistix.Newton(1e-9, 1e-10)), 3),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver, order", ORDERS, ids=lambda p: type(p).__name__)
def test_retraction_keeps_the_order(solver, order):
    """The error of rho(1), beta = 0, falls as dt^order: the slope of a fit in log-log."""
    steps = np.array([8, 12, 16, 24])
    fixed = {"solver": solver, "stepsize_controller": diffrax.ConstantStepSize()}
    rho = [final_rho(jnp.array(0.3), 0.0, dt0=1 / n, **fixed) for n in steps]
    slope = np.polyfit(np.log(1 / steps), np.log(np.abs(np.array(rho) - R)), 1)[0]
    # Superconvergence on this symmetric problem may raise the slope, never lower it.
    assert slope > order - 0.2


@pytest.mark.usefixtures("x64")
def test_repulsive_fields_stay_on_the_sphere():
    """V = -I: without retraction |x| - 1 = 1e-8 grows to 0.09 by t = 20 (n = 4 simplex, beta 1)."""
    mu0 = jf.measure.uniform_sphere(12, 3, key=jax.random.key(0))
    off = jf.Measure(mu0.points * (1 + 1e-8))
    sol = jf.flow(-jf.SelfAttention(beta=1.0), off, t1=20.0)
    norms = jnp.linalg.norm(sol.measures.points, axis=-1)
    assert np.abs(norms - 1).max() <= 4 * jnp.finfo(norms.dtype).eps


@pytest.mark.slow
def test_float32_default_reaches_its_tolerance():
    sol = jf.flow(jf.SelfAttention(beta=1.0), jf.measure.simplex(8, 8), t1=2.0)
    x = sol.measures.points[-1]
    with jax.enable_x64(True):
        mu0 = jf.measure.simplex(8, 8)
        y = jf.flow(jf.SelfAttention(beta=1.0), mu0, t1=2.0, stepsize_controller=TIGHT)
    assert x.dtype == jnp.float32
    # rtol = atol = 1e-5 a step, a dozen steps, contracting.
    np.testing.assert_allclose(x, y.measures.points[-1], atol=5e-5)
    np.testing.assert_allclose(jnp.linalg.norm(x, axis=1), 1, atol=3e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_each_step_keeps_a_loose_tolerance():
    """The true error of a step, in the controller's norm; without the distance to the sphere in
    the estimate it is 9, from one step of 3 to 4 units of time."""
    field, tol = jf.SelfAttention(beta=4.0), 1e-2
    mu0 = jf.measure.uniform_sphere(96, 3, key=jax.random.key(3))
    loose = diffrax.PIDController(rtol=tol, atol=tol)
    saveat = diffrax.SaveAt(t0=True, steps=True)
    options: dict[str, Any] = {"solver": diffrax.Dopri5(), "stepsize_controller": loose}
    sol = jf.flow(field, mu0, t1=5.0, saveat=saveat, max_steps=32, **options)
    steps = int(sol.stats["num_accepted_steps"])
    assert steps < 10  # so the tolerance decides, not a small step
    for i in range(steps):
        start = jf.Measure(sol.measures.points[i])
        y = sol.measures.points[i + 1]
        truth = jf.flow(field, start, t0=sol.ts[i], t1=sol.ts[i + 1], stepsize_controller=TIGHT)
        scale = tol + tol * jnp.maximum(jnp.abs(start.points), jnp.abs(y))
        scaled = (y - truth.measures.points[-1]) / scale
        assert jnp.sqrt((scaled**2).mean()) <= 1


@pytest.mark.usefixtures("x64")
def test_float32_points_stay_float32_with_x64():
    mu0 = jf.Measure(np.eye(3, dtype=np.float32))
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-4)
    sol = jf.flow(jf.SelfAttention(beta=2.0), mu0, t1=1.0, stepsize_controller=controller)
    assert sol.measures.points.dtype == sol.ts.dtype == jnp.float32


class Counting(jf.AbstractField):
    """Counts how often it is traced."""

    field: jf.SelfAttention
    traces: list = eqx.field(static=True)

    @property
    def geometry(self):
        return self.field.geometry

    def __call__(self, t, x, mu):
        self.traces.append(None)
        return self.field(t, x, mu)


class Ledger(list):
    """A list that compares by identity, as a static field must."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = object.__eq__


def test_new_numbers_do_not_recompile():
    ledger = Ledger()
    mu0 = jf.measure.uniform_sphere(6, 3, key=jax.random.key(1))
    counts = []
    for beta, t1, rtol in [(1.0, 1.0, 1e-4), (2.0, 3.0, 1e-5), (jnp.array(5.0), 2, 1e-3)]:
        jf.flow(
            Counting(field=jf.SelfAttention(beta=beta), traces=ledger),  # pyright: ignore[reportCallIssue]
            mu0,
            t1=t1,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0, float(t1), 5)),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol),
            observe={"energy": jf.observables.InteractionEnergy(beta=beta)},
        )
        counts.append(len(ledger))
    assert counts[0] > 0 and counts[1:] == [counts[0]] * 2


def test_saving(key):
    mu0 = jf.measure.uniform_sphere(10, 3, key=key)
    field = jf.SelfAttention(beta=2.0)
    ts = jnp.linspace(0.0, 2.0, 5)
    energy = jf.observables.InteractionEnergy(beta=2.0)
    sol = jf.flow(field, mu0, t1=2.0, saveat=diffrax.SaveAt(ts=ts), observe={"energy": energy})
    assert sol.measures.points.shape == (5, 10, 3) and len(sol.measures) == 5
    np.testing.assert_allclose(sol.ts, ts)
    np.testing.assert_allclose(sol.measures[0].points, mu0.points, atol=1e-6)
    expected = jf.observables.interaction_energy(sol.measures, 2.0)
    np.testing.assert_allclose(sol.observed["energy"], expected, rtol=1e-5)
    assert np.all(np.diff(sol.observed["energy"]) > 0)

    every = jf.flow(field, mu0, t1=2.0, saveat=diffrax.SaveAt(steps=True), max_steps=64)
    taken = int(every.stats["num_accepted_steps"])
    assert np.isfinite(every.ts[:taken]).all() and np.isinf(every.ts[taken:]).all()

    only = diffrax.SaveAt(ts=ts, fn=lambda t, y, args: y.mean(axis=0))
    means = jf.flow(field, mu0, t1=2.0, saveat=only, observe={"energy": energy})
    assert means.measures is None
    np.testing.assert_allclose(means.ys, sol.measures.points.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(means.observed["energy"], sol.observed["energy"], rtol=1e-6)

    with pytest.raises(ValueError, match="dense=True"):
        sol.evaluate(1.0)


@pytest.mark.slow
def test_backsolve_saves_and_observes_too(key):
    mu0 = jf.measure.uniform_sphere(10, 3, key=key)
    options = {
        "saveat": diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 3)),
        "observe": {"clusters": jf.observables.ClusterCount(0.9)},
    }
    field = jf.SelfAttention(beta=2.0)
    expected = jf.flow(field, mu0, t1=1.0, **options)
    actual = jf.flow(field, mu0, t1=1.0, adjoint=diffrax.BacksolveAdjoint(), **options)
    np.testing.assert_allclose(actual.measures.points, expected.measures.points, atol=1e-5)
    np.testing.assert_array_equal(actual.observed["clusters"], expected.observed["clusters"])


def test_statistics():
    mu0 = jf.measure.simplex(4, 4)
    euler = jf.flow(jf.SelfAttention(), mu0, t1=1.0, dt0=0.1, solver=diffrax.Euler())
    assert int(euler.stats["num_steps"]) == 10 and int(euler.stats["num_evaluations"]) == 10
    ledger = Ledger()

    class Evaluated(jf.AbstractField):
        geometry: jf.Sphere = jf.Sphere()

        def __call__(self, t, x, mu):
            jax.debug.callback(lambda: ledger.append(None))
            return jf.SelfAttention()(t, x, mu)

    sol = jf.flow(Evaluated(), mu0, t1=1.0, dt0=0.1)
    jax.effects_barrier()
    assert int(sol.stats["num_evaluations"]) == len(ledger) > 6
    assert evaluations_per_step(diffrax.Kvaerno3()) is None  # so that they are not counted


def test_ten_euler_steps_are_exact():
    """x' = x: ten steps of 0.1 give 1.1**10."""
    mu0 = jf.Measure(jnp.ones((3, 2)))
    sol = jf.flow(jf.LinearDrift(1.0), mu0, t1=1.0, dt0=0.1, solver=diffrax.Euler())
    np.testing.assert_allclose(sol.measures.points, 1.1**10, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_systems_share_a_step_or_have_their_own(key):
    """A batch flows as each of its systems does; under vmap each takes its own steps."""
    points = jax.random.normal(key, (3, 8, 3))
    points = points / jnp.linalg.norm(points, axis=-1, keepdims=True)
    logs = jnp.log(jax.random.uniform(key, (3, 8), minval=0.1))
    field = jf.SelfAttention(beta=3.0)
    run = lambda x, w: jf.flow(field, jf.Measure(x, w), t1=1.0, stepsize_controller=TIGHT)
    shared = run(points, logs)
    assert shared.measures.points.shape == (1, 3, 8, 3) and shared.measures.weights.shape == (
        1,
        3,
        8,
    )
    single = jnp.stack([run(x, w).measures.points for x, w in zip(points, logs, strict=True)])
    # Both solve to 1e-10.
    np.testing.assert_allclose(shared.measures.points[0], single[:, 0], atol=1e-8)
    own = jax.vmap(run)(points, logs)
    np.testing.assert_allclose(own.measures.points, single, atol=1e-8)
    assert len(set(np.asarray(own.stats["num_steps"]).tolist())) > 1


@pytest.mark.slow
def test_under_jit_grad_and_vmap(key):
    mu0 = jf.measure.uniform_sphere(6, 3, key=key)

    @jax.jit
    @jax.vmap
    @jax.grad
    def slope(beta):
        sol = jf.flow(jf.SelfAttention(beta=beta), mu0, t1=1.0)
        return jf.observables.interaction_energy(sol.measures[-1], 1.0)

    h = 1e-2
    value = lambda b: jf.observables.interaction_energy(
        jf.flow(jf.SelfAttention(beta=b), mu0, t1=1.0).measures[-1], 1.0
    )
    numeric = (value(1.0 + h) - value(1.0 - h)) / (2 * h)
    # Central differences in float32: rounding 1e-6 / h and truncation h^2.
    np.testing.assert_allclose(slope(jnp.array([1.0]))[0], numeric, atol=2e-3)


def test_events_pass_through():
    mu0 = jf.measure.simplex(4, 4)

    def clustered(t, y, args, **kwargs):
        return (y[0] * y[1]).sum() - 0.5

    event = diffrax.Event(clustered, optimistix.Newton(rtol=1e-5, atol=1e-5))
    sol = jf.flow(jf.SelfAttention(), mu0, t1=20.0, event=event)
    x = sol.measures[-1].points
    assert float(sol.ts[-1]) < 20 and bool(sol.event_mask)
    np.testing.assert_allclose(x[0] @ x[1], 0.5, atol=1e-4)
    steady = diffrax.Event(diffrax.steady_state_event(1e-4, 1e-4))
    sol = jf.flow(jf.SelfAttention(), mu0, t1=1000.0, event=steady)
    assert float(sol.ts[-1]) < 100
    np.testing.assert_allclose(jf.observables.inner_products(sol.measures[-1]), 1, atol=1e-3)


class Broken(jf.AbstractField):
    """Infinite from t = 1 on."""

    geometry: jf.Euclidean = jf.Euclidean()

    def __call__(self, t, x, mu):
        return jnp.where(t < 1, 1.0, jnp.nan) * x


class Misshapen(jf.AbstractField):
    geometry: jf.Euclidean = jf.Euclidean()

    def __call__(self, t, x, mu):
        return x[:, :1]


def test_failures_say_how_far_they_came_and_what_to_change():
    mu0 = jf.measure.simplex(4, 4)
    field = jf.SelfAttention(beta=4.0)
    with pytest.raises(
        jf.FlowError,
        match=r"at t = [\d.]+ of t1 = 50 after 5 steps, of which \d were rejected.*Kvaerno5",
    ):
        jf.flow(field, mu0, t1=50.0, max_steps=5)
    sol = jf.flow(field, mu0, t1=50.0, max_steps=5, throw=False)
    assert sol.result == diffrax.RESULTS.max_steps_reached
    with pytest.raises(jf.FlowError, match="velocity X_t.* is not finite .first at index .0, 0"):
        jf.flow(Broken(), mu0, t1=2.0, max_steps=200)
    with pytest.raises(
        jf.FlowError, match="t = 2 of t1 = 2 after 4 steps.*: the points are not finite"
    ):
        jf.flow(Broken(), mu0, t1=2.0, dt0=0.5, solver=diffrax.Euler())
    jitted = eqx.filter_jit(lambda t1: jf.flow(field, mu0, t1=t1, max_steps=5).measures.points)
    with pytest.raises(eqx.EquinoxRuntimeError, match="outside jit"):
        jax.block_until_ready(jitted(jnp.array(50.0)))


def test_forward_mode_names_the_adjoint_that_it_needs():
    run = lambda b: jf.flow(jf.SelfAttention(beta=b), MU, t1=1.0).measures.points
    with pytest.raises(TypeError, match="RecursiveCheckpointAdjoint; pass adjoint=diffrax.Forward"):
        jax.jvp(run, (1.0,), (1.0,))


@jax.custom_vjp
def reverse_only(x):
    return -x


reverse_only.defvjp(lambda x: (-x, None), lambda _, g: (-g,))


class ReverseOnly(jf.AbstractField):
    geometry: jf.Euclidean = jf.Euclidean()

    def __call__(self, t, x, mu):
        return reverse_only(x)


@pytest.mark.parametrize("adjoint", [diffrax.ForwardMode(), diffrax.DirectAdjoint()], ids=repr)
def test_forward_mode_names_the_field_that_has_no_jvp(adjoint):
    run = lambda x: jf.flow(ReverseOnly(), jf.Measure(x), t1=1.0, adjoint=adjoint).measures.points
    with pytest.raises(TypeError) as failed:
        jax.jvp(run, (MU.points,), (MU.points,))
    notes = " ".join(failed.value.__notes__)
    assert "custom_vjp function" in notes and "the field ReverseOnly" in notes


def test_a_second_derivative_names_the_adjoint_that_it_needs():
    run = lambda b: jf.flow(jf.SelfAttention(beta=b), MU, t1=1.0).measures.points.sum()
    for second in (jax.grad(jax.grad(run)), jax.hessian(run)):
        with pytest.raises(TypeError, match="second derivative.*DirectAdjoint"):
            second(1.0)


MU = jf.Measure(np.eye(3, dtype=np.float32))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: jf.flow(jf.SelfAttention(), MU, t0=1.0, t1=0.5),
            ValueError,
            "t0=1.0, t1=0.5; flow",
        ),
        (lambda: jf.flow(jf.SelfAttention(), MU, t1=np.nan), ValueError, "t1 must be finite"),
        (
            lambda: jf.flow(jf.SelfAttention(), MU, t1=jnp.ones(2)),
            ValueError,
            "t1 must be a scalar",
        ),
        (
            lambda: jf.flow(jf.SelfAttention(), jf.Measure(2 * MU.points), t1=1.0),
            ValueError,
            r"index \(0,\) has length 2\. Retract",
        ),
        (
            lambda: jf.flow(
                jf.SelfAttention(), jf.Measure(MU.points.at[1, 2].set(jnp.nan)), t1=1.0
            ),
            ValueError,
            r"finite, got nan at index \(1, 2\)",
        ),
        (lambda: jf.flow(Misshapen(), MU, t1=1.0), ValueError, r"\(3, 3\) to velocities.*\(3, 1\)"),
        (
            lambda: jf.flow(jf.SelfAttention(), MU, t1=1.0, solver=diffrax.Euler()),
            ValueError,
            "Euler takes fixed steps: pass dt0",
        ),
        (
            lambda: jf.flow(jf.SelfAttention(), MU, t1=1.0, max_steps=0),
            ValueError,
            "max_steps must",
        ),
        (
            lambda: jf.flow(jf.SelfAttention(backend="gpu"), MU, t1=1.0),
            ValueError,
            "backend must be one of .*'gpu'",
        ),
        (lambda: jf.SelfAttention(beta=jnp.nan), ValueError, "beta must be finite, got nan"),
        (lambda: jf.SelfAttention(beta=np.ones(2)), ValueError, r"beta must be a scalar.*\(2,\)"),
        (lambda: jf.SelfAttention(np.eye(3)[0]), ValueError, "query must be a matrix"),
        (lambda: jf.SelfAttention(np.eye(3, dtype=int)), TypeError, "query must be floating point"),
        (lambda: jf.SelfAttention(np.ones((2, 3))), ValueError, "with the other one the identity"),
        (
            lambda: jf.SelfAttention(np.ones((2, 3)), np.ones((2, 4))),
            ValueError,
            r"query \(2, 3\) and key \(2, 4\)",
        ),
        (lambda: jf.SelfAttention(value=np.ones((2, 3))), ValueError, r"value \(2, 3\)"),
        (
            lambda: jf.SelfAttention() + jf.LinearDrift(1.0),
            ValueError,
            "live on one geometry.*Sphere.*Euclidean.*geometry=",
        ),
        (
            lambda: jf.MultiHeadAttention(6, 4, key=jax.random.key(0)),
            ValueError,
            "heads must divide",
        ),
        (
            lambda: jf.SelfAttention(interaction=jf.Sinkhorn(), causal=True)(0.0, MU.points, MU),
            ValueError,
            "Sinkhorn attention has no causal",
        ),
        (lambda: jf.SelfAttention()(0.0, MU.points[:, :2], MU), ValueError, "query points"),
        (
            lambda: jf.Sphere(radius=0.0),
            ValueError,
            "sphere must be positive and finite, got 0",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_traced_input_is_checked_at_run_time():
    mu0 = jf.measure.simplex(3, 3)

    @eqx.filter_jit
    def run(x, t0, ts):
        saveat = diffrax.SaveAt(ts=ts)
        return jf.flow(jf.SelfAttention(), jf.Measure(x), t0=t0, t1=1.0, saveat=saveat).ts

    ts = jnp.array([0.25, 0.5])
    np.testing.assert_array_equal(run(mu0.points, jnp.array(0.0), ts), ts)
    for x, t0, times, message in (
        (mu0.points, 2.0, ts, "t1 must not be less than t0"),
        (2 * mu0.points, 0.0, ts, "points must lie on"),
        (mu0.points, 0.0, ts[::-1], "saveat.ts must be increasing"),
    ):
        with pytest.raises(eqx.EquinoxRuntimeError, match=message):
            jax.block_until_ready(run(x, jnp.array(t0), times))


def test_a_program_that_takes_one_number_keeps_the_check():
    """Also a whole number, on which nothing else depends."""

    @eqx.filter_jit
    def steps(x):
        return jf.flow(jf.SelfAttention(), jf.Measure(x), t1=9.0, max_steps=2).stats["num_steps"]

    with pytest.raises(eqx.EquinoxRuntimeError, match="the flow failed"):
        jax.block_until_ready(steps(jf.measure.simplex(3, 3).points))


def test_a_program_that_raises_nothing_calls_no_host():
    """So that it can be kept on disk, and compiled for a device that is not there."""
    flow = lambda x: jf.flow(jf.SelfAttention(), jf.Measure(x), t1=1.0, throw=False)
    x = jf.measure.simplex(3, 3).points
    program = jax.make_jaxpr(jax.grad(lambda x: flow(x).final.points.sum()))(x)
    assert "callback" not in str(program)
    # Points off the sphere, which there is nobody to tell of, make a solve that fails.
    assert jax.jit(lambda x: flow(x).ok)(x)
    assert not jax.jit(lambda x: flow(x).ok)(2 * x)


def test_the_measure_at_any_time():
    """x' = x: the dense solution is e^t to the tolerance, up to the event and no further."""
    start = jnp.ones((2, 1))
    grown = jf.events.until_above(lambda t, mu: mu.points[0, 0], 3.0)
    dense = diffrax.SaveAt(dense=True)
    sol = jf.flow(jf.LinearDrift(1.0), jf.Measure(start), t1=2, saveat=dense, event=grown)
    np.testing.assert_allclose(sol.end, np.log(3), rtol=1e-3)
    for t in (1, 0.5, np.float32(0.5), 0, float(sol.end)):
        np.testing.assert_allclose(sol.evaluate(t).points, np.exp(t) * start, rtol=1e-4)
    several = sol.evaluate([0, 0.25, 1.0]).points
    np.testing.assert_allclose(several[:, 0, 0], np.exp([0, 0.25, 1.0]), rtol=1e-4)
    for t in (-0.1, 1.5, [0.5, 2.0], np.nan):  # 1.5 is after the event
        with pytest.raises(ValueError, match="in the interval that was solved"):
            sol.evaluate(t)
    for t, error in (("1", TypeError), (True, TypeError), (1j, TypeError), ([[0.5]], ValueError)):
        with pytest.raises(error, match="t must be"):
            unchecked(jf.FlowSolution.evaluate)(sol, t)
    with pytest.raises(eqx.EquinoxRuntimeError, match="interval that was solved"):
        jax.block_until_ready(
            eqx.filter_jit(lambda s, t: s.evaluate(t).points)(sol, jnp.array(1.5))
        )


def test_an_implicit_solver_that_fails_is_not_advised_again():
    options: dict[str, Any] = {"solver": diffrax.Kvaerno3(), "max_steps": 3}
    with pytest.raises(jf.FlowError, match="double precision") as failed:
        jf.flow(jf.SelfAttention(beta=4.0), MU, t1=50.0, **options)
    assert "Kvaerno" not in str(failed.value)


def test_a_root_finder_of_the_user_stays(monkeypatch):
    seen = []

    def solve(terms, solver, *args, **options):
        seen.append(solver)
        raise ZeroDivisionError

    monkeypatch.setattr(diffrax, "diffeqsolve", solve)
    own = diffrax.with_stepsize_controller_tols(optimistix.Chord)()
    for solver, expected in (
        (diffrax.Kvaerno5(), optimistix.Newton),
        (diffrax.Kvaerno5(root_finder=own), optimistix.Chord),
    ):
        with pytest.raises(ZeroDivisionError):
            jf.flow(jf.LinearDrift(1.0), MU, t1=1.0, solver=solver)
        assert type(seen[-1].root_finder) is expected


def test_a_run_that_does_not_fit_is_refused(monkeypatch):
    mu0 = jf.measure.uniform_sphere(100, 3, key=jax.random.key(0))
    saveat = diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 1001))
    estimate = jf.memory_estimate(mu0, saveat=saveat)
    assert 1001 * 100 * 3 * 4 <= estimate <= 1.1 * 1001 * 100 * 3 * 4
    monkeypatch.setattr(_memory, "available_memory", lambda: 10**6)
    with pytest.raises(MemoryError, match=r"needs about 0.0 GB .*Save fewer times.*observe="):
        jf.flow(jf.SelfAttention(), mu0, t1=1.0, saveat=saveat)
    jf.flow(jf.SelfAttention(), mu0, t1=1.0)


def test_saved_statistics_and_points_are_checked_each_at_its_own_times(key):
    mu, field = jf.measure.uniform_sphere(8, 3, key=key), jf.SelfAttention(beta=2.0)
    ts = jnp.linspace(0.0, 1.0, 5)
    sums = diffrax.SubSaveAt(ts=ts, fn=lambda t, y, args: y.sum())
    saveat = diffrax.SaveAt(subs={"sums": sums, "points": diffrax.SubSaveAt(ts=ts[:3])})
    sol = jf.flow(field, mu, t1=1.0, saveat=saveat)
    assert sol.measures["sums"] is None and sol.ys["sums"].shape == (5,)
    points = sol.measures["points"].points
    assert points.shape == (3, 8, 3)
    np.testing.assert_allclose(sol.ys["sums"][:3], points.sum(axis=(1, 2)), atol=1e-5)


def test_points_in_16_bits_flow_in_32(key):
    mu, field = jf.measure.uniform_sphere(8, 3, key=key), jf.SelfAttention(beta=2.0)
    whole = jf.flow(field, mu, t1=1.0).measures[-1].points
    half = jf.flow(field, jf.Measure(mu.points.astype(jnp.bfloat16)), t1=1.0).measures[-1].points
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, whole, atol=2e-2)  # 2^-9 at the start, which may grow


def test_a_gradient_of_a_flow_that_fails_says_why(key):
    mu, field = jf.measure.uniform_sphere(8, 3, key=key), jf.SelfAttention(beta=2.0)
    last = lambda x: jf.flow(field, jf.Measure(x), t1=50.0, max_steps=3).measures[-1].points.sum()
    with pytest.raises(jf.FlowError, match="max_steps = 3 was reached"):
        jax.grad(last)(mu.points)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dt0": 0.0}, "dt0.*positive"),
        ({"dt0": -0.1}, "dt0.*positive"),
        ({"saveat": diffrax.SaveAt(ts=[0.0, 2.0])}, r"increase within \[t0, t1\]"),
        ({"saveat": diffrax.SaveAt(ts=[0.5, 0.2])}, "increase within"),
        ({"saveat": diffrax.SaveAt(ts=[0.5, np.nan])}, "increase within"),
        ({"saveat": "all"}, "saveat must be a diffrax.SaveAt"),
        ({"stepsize_controller": "pid"}, "stepsize_controller must be a diffrax.Abstract"),
        ({"stepsize_controller": diffrax.PIDController(-1, 1e-3)}, "rtol must be.*>= 0, got -1"),
        ({"stepsize_controller": diffrax.PIDController(1e-3, np.nan)}, "atol must be"),
        ({"stepsize_controller": diffrax.PIDController(0, 0)}, "not both be 0"),
        ({"stepsize_controller": diffrax.StepTo([0.0, 0.5])}, "begin at t0 and end at t1"),
        ({"stepsize_controller": diffrax.StepTo([0.0, 0.5, 0.5, 1.0])}, "must increase"),
        ({"solver": "tsit5"}, "solver must be a diffrax.AbstractSolver"),
        ({"adjoint": None}, "adjoint must be a diffrax.AbstractAdjoint"),
        ({"event": lambda t, y, args: y.sum()}, "event must be a diffrax.Event"),
        ({"observe": ["energy"]}, "observe must be a dictionary"),
        ({"observe": {"energy": 1.0}}, "observe maps names to functions"),
        ({"max_steps": 10.5}, "max_steps must be a whole number"),
        ({"max_steps": True}, "max_steps must be a whole number"),
        ({"t0": 1e8, "t1": 1e8 + 1}, "1 long, and 0 in float32"),
        ({"t0": 1e8, "t1": 1e8 + 5}, "5 long, and 8 in float32"),
        ({"t1": "1"}, "t1 must be a real number"),
        ({"t1": True}, "t1 must be a real number"),
        ({"t0": 1j}, "t0 must be a real number"),
        ({"t1": None}, "t1 must be a real number"),
    ],
)
def test_what_a_flow_refuses_at_once(options, message):
    mu = jf.measure.simplex(3, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        unchecked(jf.flow)(jf.SelfAttention(), mu, **{"t1": 1.0} | options)


@pytest.mark.parametrize("weights", ([-jnp.inf] * 3, [0.0, jnp.nan, 0.0], [0.0, jnp.inf, 0.0]))
def test_a_measure_without_mass_does_not_flow(weights):
    """Nor one whose weights were put in place of others, which no constructor sees."""
    uniform = jf.Measure(jf.measure.simplex(3, 3).points, jnp.zeros(3))
    with pytest.raises(ValueError, match="log_weights"):
        jf.Measure(uniform.points, jnp.array(weights))
    mu = eqx.tree_at(lambda m: m.log_weights, uniform, jnp.array(weights))
    with pytest.raises(ValueError, match="log_weights"):
        jf.flow(jf.SelfAttention(), mu, t1=1.0)
