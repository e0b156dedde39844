"""Splitting methods: their orders and symmetry, their parts, adjoints and counts."""

import functools
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow.explicit import explicit_step
from jaxflow.solvers import LieTrotter, Strang, default_adjoint

pytestmark = pytest.mark.usefixtures("x64")

FIXED = diffrax.ConstantStepSize()


def matrix(seed, d=2):
    return np.random.default_rng(seed).normal(size=(d, d))


def points(n=3, d=2):
    return jnp.asarray(np.random.default_rng(5).normal(size=(n, d)))


def final(field, x, **options: Any):
    return jf.flow(field, jf.Measure(x), **options).measures.points[-1]


def moving() -> Any:
    """A rotation and a drift that moves in time; they do not commute."""
    drift = [jf.LinearDrift(matrix(seed)) for seed in range(3)]
    turn = jf.LinearDrift(np.array([[0.0, -2.0], [2.0, 0.0]]))
    return turn + jf.TimeDependent(jf.Fourier(drift, period=1.5))


# ------------------------------------------------------------------ orders

slow = pytest.mark.slow
ORDERS = [
    (LieTrotter(diffrax.Euler()), 1),
    pytest.param(Strang(diffrax.Euler()), 1, marks=slow),
    (Strang(), 2),
]


@pytest.fixture(scope="module")
def truth():
    with jax.enable_x64(True):
        tight = diffrax.PIDController(1e-11, 1e-12)
        return final(moving(), points(), t1=1.0, stepsize_controller=tight)


@pytest.mark.parametrize("solver, order", ORDERS, ids=lambda p: f"{type(p).__name__}")
def test_orders(solver, order, truth):
    """The slope of the error over the step, for a sum that depends on time."""
    field, x = moving(), points()
    steps = np.array([0.04, 0.02, 0.01])
    run = lambda h: final(field, x, t1=1.0, dt0=h, solver=solver, stepsize_controller=FIXED)
    slope = np.polyfit(np.log(steps), np.log([np.abs(run(h) - truth).max() for h in steps]), 1)[0]
    assert order - 0.2 < slope < order + 0.3
    assert solver.order(None) == order


def test_no_splitting_is_better_than_its_own_order():
    assert LieTrotter(diffrax.Heun()).order(None) == 1  # pyright: ignore[reportArgumentType]
    assert Strang(diffrax.Tsit5()).order(None) == 2  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_strang_is_symmetric():
    """A step back along -X undoes a step along X, where the parts are solved to rounding; the
    steps of Lie and Trotter come back in the wrong order."""
    field, x = jf.LinearDrift(matrix(0)) + jf.LinearDrift(matrix(1)), points()

    def there_and_back(solver):
        options: dict[str, Any] = {"solver": solver, "stepsize_controller": FIXED, "dt0": 0.05}
        there = final(field, x, t1=0.1, **options)
        return np.abs(final(-field, there, t1=0.1, **options) - x).max()

    assert there_and_back(Strang(diffrax.Bosh3())) < 1e-5  # 0.05^4 times a small constant
    assert there_and_back(LieTrotter(diffrax.Bosh3())) > 1e-3


# ------------------------------------------------------------------ parts


def by_hand(parts, x, h, steps):
    for _ in range(steps):
        for part in parts:
            x = x + h * part(0.0, x, jf.Measure(x))
    return x


def test_every_sum_is_split():
    """Sums of sums, multiples of sums and curves of sums."""
    a, b, c = (jf.LinearDrift(matrix(seed)) for seed in range(3))
    x = points()
    cases: list[tuple[Any, Any]] = [
        (a + b + c, (a, b, c)),
        (0.5 * (a - b), (0.5 * a, -0.5 * b)),
        (jf.TimeDependent(jf.Constant(a + b)), (a, b)),
        (jf.TimeDependent(jf.Fourier([a + b], period=1.0)) + c, (a, b, c)),
        (a, (a,)),
    ]
    evaluate = lambda field, t, y: field(t, y, jf.Measure(y))

    @eqx.filter_jit
    def run(cases):
        step = lambda field, y, k: explicit_step(
            LieTrotter(), field, 0.25 * k, 0.25 * (k + 1), y, evaluate
        )
        steps = lambda field: functools.reduce(lambda y, k: step(field, y, k), range(4), x)
        return [(steps(field), by_hand(parts, x, 0.25, 4)) for field, parts in cases]

    for ours, expected in run(cases):
        np.testing.assert_allclose(ours, expected, rtol=1e-13)


def test_implicit_parts():
    """(1 - h A)^-1, part by part."""
    a, b = matrix(0), matrix(1)
    x = points()
    solver = LieTrotter(diffrax.ImplicitEuler(root_finder=diffrax.VeryChord(1e-12, 1e-13)))
    field = jf.LinearDrift(a) + jf.LinearDrift(b)
    y = final(field, x, t1=0.2, dt0=0.1, solver=solver, stepsize_controller=FIXED)
    step = np.linalg.inv(np.eye(2) - 0.1 * b) @ np.linalg.inv(np.eye(2) - 0.1 * a)
    np.testing.assert_allclose(y, x @ (step @ step).T, rtol=1e-9)


@pytest.mark.parametrize("solver", [Strang()], ids=["Strang"])
def test_the_sphere_is_kept(solver):
    sphere = jf.Sphere(2.0)
    forward = jf.FeedForward(3, 4, jnp.tanh, geometry=sphere, key=jax.random.key(0))
    field = jf.SelfAttention(beta=2.0, geometry=sphere) + forward
    x = sphere.retract(points(5, 3))
    sol = jf.flow(
        field, jf.Measure(x), t1=2.0, dt0=0.5, solver=solver, stepsize_controller=FIXED,
        saveat=diffrax.SaveAt(steps=True),
    )  # fmt: skip
    norms = jnp.linalg.norm(sol.measures.points[:4], axis=-1)
    np.testing.assert_allclose(norms, 2.0, rtol=4 * np.finfo(float).eps)
    assert np.abs(sol.measures.points[3] - x).max() > 0.1


# ------------------------------------------------------------------ adjoints and steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver, geometry",
    [(LieTrotter(diffrax.Heun()), jf.Euclidean()), (diffrax.Bosh3(), jf.Sphere())],
    ids=["LieTrotter", "pieces on the sphere"],
)
def test_adjoints_agree(solver, geometry):
    """Reverse and forward mode, through pieces: d/ds of the flow of s X. DirectAdjoint, slow to
    compile, differs by its loop alone: one case shows it."""
    a, b, c = (jf.LinearDrift(matrix(seed), geometry=geometry) for seed in range(3))
    pieces = jf.TimeDependent(jf.PiecewiseConstant([a + b, b + c], [0.0, 0.5, 1.0]))
    x = geometry.retract(points())
    steps = diffrax.StepTo(jnp.linspace(0.0, 1.0, 5))

    def total(s, adjoint):
        options: dict[str, Any] = {"solver": solver, "stepsize_controller": steps}
        return final(s * pieces, x, t1=1.0, adjoint=adjoint, **options).sum()

    s = jnp.asarray(0.7)
    reverse = jax.grad(lambda s: total(s, diffrax.RecursiveCheckpointAdjoint()))(s)
    forward = jax.jacfwd(lambda s: total(s, diffrax.ForwardMode()))(s)
    np.testing.assert_allclose(forward, reverse, rtol=1e-11)
    if isinstance(solver, LieTrotter):
        direct = jax.grad(lambda s: total(s, diffrax.DirectAdjoint()))(s)
        np.testing.assert_allclose(direct, reverse, rtol=1e-11)


def test_half_steps_make_strang_adaptive(truth):
    """Solutions at two step sizes estimate the error."""
    field, x = moving(), points()
    solver = diffrax.HalfSolver(Strang())
    loose = diffrax.PIDController(1e-5, 1e-5)
    sol = jf.flow(field, jf.Measure(x), t1=1.0, solver=solver, stepsize_controller=loose)
    steps = int(sol.stats["num_steps"])
    assert 10 < steps < 200
    assert np.abs(sol.measures.points[-1] - truth).max() < steps * 1e-5 * np.abs(truth).max()
    # Strang twice and once, half a step of the first part twice, Midpoint's two stages; the first
    # step is chosen by two more.
    assert int(sol.stats["num_evaluations"]) == 3 * 2 * 2 * steps + 2


@pytest.mark.parametrize("solver", [LieTrotter(), diffrax.HalfSolver(Strang())], ids=["one", "two"])
def test_backsolve_cannot_be_split(solver):
    with pytest.raises(ValueError, match="cannot be split"):
        final(
            moving(), points(), t1=1.0, dt0=0.1, solver=solver, adjoint=diffrax.BacksolveAdjoint()
        )


def test_default_adjoint():
    """A state a step up to 64 steps, then 8 sqrt(steps) of them."""
    kept = [default_adjoint(steps).checkpoints for steps in (1, 12, 64, 65, 256, 10_000)]
    assert kept == [1, 12, 64, 65, 128, 800]
    with pytest.raises(ValueError, match="at least one step"):
        default_adjoint(0)


# ------------------------------------------------------------------ counts


class Ledger(jf.AbstractField):
    """x' = a x, and each evaluation by its name."""

    rate: jax.Array
    count: Any = eqx.field(static=True)
    geometry: Any = jf.Euclidean()

    def __call__(self, t, x, mu):
        jax.debug.callback(self.count)
        return self.rate * x


COUNTS = [
    (LieTrotter(), 1),
    pytest.param(LieTrotter(diffrax.Tsit5()), 6, marks=slow),
    (Strang(), 4),
    pytest.param(diffrax.HalfSolver(diffrax.Heun()), 6, marks=slow),
    (diffrax.HalfSolver(Strang(diffrax.Euler())), 6),
]


@pytest.mark.parametrize("solver, count", COUNTS, ids=lambda p: str(p)[:40])
def test_evaluations_are_counted(solver, count):
    """Of the first of three parts, over two steps."""
    calls = []
    first = Ledger(rate=jnp.asarray(0.1), count=lambda: calls.append(0))
    field = first + jf.LinearDrift(0.2) + jf.LinearDrift(0.3)
    sol = jf.flow(
        field, jf.Measure(points()), t1=1.0, dt0=0.5, solver=solver, stepsize_controller=FIXED
    )
    jax.effects_barrier()
    assert int(sol.stats["num_evaluations"]) == len(calls) == 2 * count
