"""Exponential-map methods: orders, norms, tolerances, derivatives."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow.solvers import RK4, Geodesic

pytestmark = pytest.mark.usefixtures("x64")

FIXED = diffrax.ConstantStepSize()
ORDERS = [
    (RK4(), 4),
    (Geodesic(diffrax.Heun()), 2),
    pytest.param(Geodesic(diffrax.Bosh3()), 3, marks=pytest.mark.slow),
    (Geodesic(), 4),
    pytest.param(Geodesic(diffrax.Tsit5()), 5, marks=pytest.mark.slow),
]
names = lambda p: type(getattr(p, "solver", p)).__name__ if not isinstance(p, int) else str(p)


def field(sign=1.0):
    return jf.SelfAttention(value=sign * jnp.eye(3), beta=2.0)


def start():
    return jf.measure.uniform_sphere(6, 3, key=jax.random.key(3))


def end(sign, **options: Any):
    return jf.flow(field(sign), start(), t1=1.0, **options).measures.points[-1]


@pytest.fixture(scope="module")
def truth():
    with jax.enable_x64(True):
        tight = diffrax.PIDController(rtol=1e-12, atol=1e-13)
        options = {"solver": diffrax.Dopri8(), "stepsize_controller": tight}
        return {sign: end(sign, **options) for sign in (1.0, -1.0)}


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["attractive", "repulsive"])
@pytest.mark.parametrize("solver, order", ORDERS, ids=names)
def test_orders(solver, order, sign, truth):
    """The error falls as dt^order: the slope of a fit in log-log. Norms are 1 to rounding."""
    steps = np.array([4, 6, 8, 12])
    errors = []
    for n in steps:
        y = end(sign, dt0=1 / n, solver=solver, stepsize_controller=FIXED)
        np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), 1, rtol=4e-16)
        errors.append(np.abs(y - truth[sign]).max())
    slope = np.polyfit(np.log(1 / steps), np.log(errors), 1)[0]
    # Coarse steps see the next term of the expansion too: within a quarter, or better.
    assert order - 0.25 < slope < order + 1.3


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["attractive", "repulsive"])
@pytest.mark.parametrize("inner", [diffrax.Heun(), RK4()], ids=["order 2", "order 4"])
def test_adaptive_steps_keep_their_tolerance(inner, sign, truth):
    ends = {}
    for tolerance in (1e-4, 1e-7):
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        y = end(sign, solver=Geodesic(inner), stepsize_controller=controller)
        ends[tolerance] = np.abs(y - truth[sign]).max()
        # Ten to a thousand local errors, on flows that part like e^t at most.
        assert ends[tolerance] < 30 * tolerance
    assert ends[1e-7] < 0.1 * ends[1e-4]


@pytest.mark.slow
def test_on_flat_space_it_is_the_method_itself(key):
    flat = jf.SelfAttention(beta=1.0, geometry=jf.Euclidean())
    mu = jf.measure.gaussian(5, 2, key=key)
    options: dict[str, Any] = {"t1": 0.5, "dt0": 0.1, "stepsize_controller": FIXED}
    one, other = (
        jf.flow(flat, mu, solver=solver, **options).measures.points[-1]
        for solver in (diffrax.Tsit5(), Geodesic(diffrax.Tsit5()))
    )
    np.testing.assert_allclose(one, other, rtol=1e-13)


def test_evaluations_are_counted():
    """As many as a field that counts its own calls sees."""
    calls = []

    class Counting(jf.AbstractField):
        geometry: jf.Sphere = jf.Sphere()

        def __call__(self, t, x, mu):
            jax.debug.callback(lambda: calls.append(1))
            return self.geometry.project(x, -x[::-1])

    for inner, expected in ((diffrax.Heun(), 1 + 2 * 5), (RK4(), 1 + 4 * 5)):
        calls.clear()
        options: dict[str, Any] = {"dt0": 0.2, "solver": Geodesic(inner)}
        sol = jf.flow(Counting(), start(), t1=1.0, stepsize_controller=FIXED, **options)
        jax.effects_barrier()
        assert int(sol.stats["num_evaluations"]) == expected
        # One more in the shape of a branch that is not taken costs nothing at run time.
        assert len(calls) == expected


@pytest.mark.slow
def test_gradients_and_saving():
    """Reverse mode is forward mode; a saved time between steps is right to the interpolation."""

    def rho(scale, adjoint):
        sol = jf.flow(
            scale * field(), start(), t1=1.0, dt0=0.25, solver=Geodesic(diffrax.Heun()),
            adjoint=adjoint, stepsize_controller=FIXED,
        )  # fmt: skip
        x = sol.measures.points[-1]
        return x[0] @ x[1]

    reverse = jax.grad(lambda s: rho(s, diffrax.RecursiveCheckpointAdjoint()))(jnp.array(1.0))
    forward = jax.jvp(lambda s: rho(s, diffrax.ForwardMode()), (jnp.array(1.0),), (jnp.array(1.0),))
    np.testing.assert_allclose(reverse, forward[1], rtol=1e-12)
    saveat = diffrax.SaveAt(ts=jnp.array([0.33, 0.5]))
    sol = jf.flow(field(), start(), t1=1.0, solver=Geodesic(), saveat=saveat)
    exact = jf.flow(field(), start(), t1=1.0, solver=diffrax.Dopri8(), saveat=saveat)
    np.testing.assert_allclose(sol.measures.points, exact.measures.points, rtol=0, atol=1e-6)


def test_it_takes_explicit_methods_and_no_backsolve():
    with pytest.raises(ValueError, match="explicit Runge-Kutta method, got Kvaerno5"):
        Geodesic(diffrax.Kvaerno5())
    with pytest.raises(ValueError, match="RecursiveCheckpointAdjoint"):
        jf.flow(field(), start(), t1=1.0, solver=Geodesic(), adjoint=diffrax.BacksolveAdjoint())
