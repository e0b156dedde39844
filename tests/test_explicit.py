"""The second integrator against diffrax's steps; and what of diffrax's inside is relied on."""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow.explicit import evaluations_per_step, explicit_step, is_explicit
from jaxflow.solvers import Frozen, LieTrotter, Retracted, Strang, along

pytestmark = pytest.mark.usefixtures("x64")

T0, T1 = 0.3, 0.7


class Args(NamedTuple):
    field: Any


def matrix(seed, d=2):
    return np.random.default_rng(seed).normal(size=(d, d))


def points(n=3, d=2):
    return jnp.asarray(np.random.default_rng(5).normal(size=(n, d)))


def pieces() -> Any:
    return jf.TimeDependent(
        jf.PiecewiseConstant([jf.LinearDrift(matrix(0)), jf.LinearDrift(matrix(1))], [T1])
    )


# ------------------------------------------------------------------ against diffrax

EXPLICIT = {
    "euler": diffrax.Euler(),
    "heun": diffrax.Heun(),
    "midpoint": diffrax.Midpoint(),
    "ralston": diffrax.Ralston(),
    "bosh3": diffrax.Bosh3(),
    "tsit5": diffrax.Tsit5(),
    "dopri5": diffrax.Dopri5(),
    "dopri8": diffrax.Dopri8(),
    "retracted": Retracted(diffrax.Heun(), jf.Sphere()),
    "in pieces": Frozen(diffrax.Tsit5(), (T1,)),
    "split": LieTrotter(diffrax.Heun()),
}


@pytest.fixture(scope="module")
def steps():
    """One step of each method for x' = A x sin(t), A of the piece that ends with the step, by
    diffrax and written out."""

    @jax.jit
    def run(x):
        def velocity(field, t, y):
            return jnp.sin(t) * field(t, y, jf.Measure(y))

        def both(solver):
            term = diffrax.ODETerm(lambda t, y, args: velocity(args.field, t, y))
            args, t0, t1 = Args(pieces()), jnp.asarray(T0), jnp.asarray(T1)
            state = solver.init(term, t0, t1, x, args)
            theirs = solver.step(term, t0, t1, x, args, state, False)[0]
            return theirs, explicit_step(solver, args.field, t0, t1, x, velocity)

        return {name: both(solver) for name, solver in EXPLICIT.items()}

    with jax.enable_x64(True):
        return run(points())


@pytest.mark.parametrize("name", EXPLICIT)
def test_methods_written_out_are_those_of_diffrax(name, steps):
    assert is_explicit(EXPLICIT[name])
    theirs, ours = steps[name]
    assert np.abs(theirs - points()).max() > 1e-2
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)


def test_a_step_that_ends_at_a_jump_does_not_see_the_next_piece(steps):
    """Without freezing the last stage of Tsit5, at the end of the step, is of the next one."""
    assert np.abs(steps["in pieces"][1] - steps["tsit5"][1]).max() > 1e-4


OTHERS = [
    diffrax.Kvaerno3(),
    diffrax.HalfSolver(diffrax.Euler()),
    LieTrotter(diffrax.ImplicitEuler()),
    diffrax.HalfSolver(LieTrotter()),
    jf.solvers.Geodesic(),
]


@pytest.mark.parametrize("solver", OTHERS, ids=lambda s: str(s)[:40])
def test_other_methods_are_not_written_out(solver):
    assert not is_explicit(solver)
    zero = jnp.zeros(())
    with pytest.raises(ValueError, match="not an explicit Runge-Kutta method"):
        explicit_step(solver, jf.LinearDrift(1.0), zero, zero, points(), lambda f, t, y: y)


def test_evaluations_of_one_step():
    assert evaluations_per_step(diffrax.Euler()) == (0, 1)
    assert evaluations_per_step(diffrax.Tsit5()) == (1, 6)
    assert evaluations_per_step(Retracted(diffrax.Heun(), jf.Sphere())) == (0, 2)
    assert evaluations_per_step(along(diffrax.Tsit5(), pieces())) == (1, 6)
    assert evaluations_per_step(Strang(), parts=1) == (0, 2)
    assert evaluations_per_step(Strang(), parts=2) == (0, 4)
    assert evaluations_per_step(diffrax.HalfSolver(diffrax.Tsit5())) == (2, 18)
    assert evaluations_per_step(jf.solvers.Geodesic(diffrax.Tsit5())) == (1, 6)
    for implicit in (diffrax.Kvaerno3(), LieTrotter(diffrax.Kvaerno3())):
        assert evaluations_per_step(implicit) is None


# ------------------------------------------------------------------ what diffrax reads and sets


class Spy(diffrax.Kvaerno3):
    """A Runge-Kutta method, implicit too, that tells what diffrax set on it."""

    tell: Any = eqx.field(static=True, default=None)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        finder: Any = self.root_finder
        self.tell((self.scan_kind, finder.rtol, finder.atol))
        return super().step(terms, t0, t1, y0, args, solver_state, made_jump)


@pytest.mark.parametrize(
    "adjoint, kind",
    [
        (diffrax.RecursiveCheckpointAdjoint(), None),
        (diffrax.DirectAdjoint(), "bounded"),
        (diffrax.ForwardMode(), "lax"),
    ],
    ids=lambda p: type(p).__name__,
)
def test_diffrax_reaches_the_innermost_method(adjoint, kind):
    """The kind of loop that an adjoint asks for, and the tolerances of the controller, arrive at a
    method inside two of ours: `AbstractFieldSolver` redirects what diffrax reads and sets."""
    told = []
    solver: Any = Retracted(Frozen(Spy(tell=told.append), (0.5,)), jf.Sphere())
    assert isinstance(solver, diffrax.AbstractRungeKutta)
    assert isinstance(solver, diffrax.AbstractImplicitSolver)
    assert isinstance(solver, diffrax.AbstractAdaptiveSolver)
    assert not isinstance(along(diffrax.Heun(), pieces()), diffrax.AbstractImplicitSolver)
    term = diffrax.ODETerm(lambda t, y, args: -y)
    assert (solver.order(term), solver.error_order(term)) == (3, 3)
    assert solver.interpolation_cls is not None and solver.term_structure is not None

    def solve(y):
        return diffrax.diffeqsolve(
            term, solver, 0.0, 1.0, 0.1, y, Args(pieces()), adjoint=adjoint, max_steps=16,
            stepsize_controller=diffrax.PIDController(rtol=0.25, atol=0.125), throw=False,
        ).ys  # fmt: skip

    jax.eval_shape(solve, points())
    assert set(told) == {(kind, 0.25, 0.125)}


def test_a_fixed_step_of_an_implicit_method_needs_tolerances():
    """diffrax's rule is asked of the innermost method."""
    solver = Retracted(diffrax.Kvaerno3(), jf.Sphere())
    term = diffrax.ODETerm(lambda t, y, args: -y)
    with pytest.raises(ValueError, match="tolerances for the implicit solver"):
        diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.1, points())
