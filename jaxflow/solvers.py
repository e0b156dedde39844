"""One-step methods that respect the geometry and the parts of a field, as diffrax solvers.

Retracted(solver)    y_{k+1} = retract(step(y_k)): any diffrax method, projected back
NormalisedEuler      y_{k+1} = retract(y_k + h F), F the force before its projection
Geodesic(solver)     y_{k+1} = exp_{y_k}(u), u by any explicit Runge-Kutta method
RK4                  the classical method, with an error estimate
Frozen(solver)       in each step a field made of pieces is the piece of that step
LieTrotter(solver)   step_K o ... o step_1, over the parts of a sum of fields
Strang(solver)       half steps of 1, ..., K-1, a step of K, half steps of K-1, ..., 1
PiecewiseSteps       fixed steps that end at the breakpoints of a field
Grid                 steps that end at times which a program makes
step_times           given steps that end at the jumps of a field
ScanAdjoint          the derivative of a known number of explicit steps
"""

import abc
import math
from functools import partial, reduce
from typing import ClassVar, cast

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._rules import count, instance
from ._types import ScalarLike
from .explicit import (
    AbstractComposition,
    AbstractMethod,
    combined,
    evaluations_per_step,
    explicit_step,
    is_explicit,
    is_method,
    tableau,
)
from .fields import AbstractField
from .fields.base import same_geometry, unprojected
from .fields.time import frozen, jumps
from .geometry import AbstractGeometry, Euclidean

__all__ = [
    "AbstractFieldSolver",
    "AbstractSplitting",
    "Geodesic",
    "LieTrotter",
    "NormalisedEuler",
    "RK4",
    "ScanAdjoint",
    "Strang",
    "default_adjoint",
]


def __dir__() -> list[str]:
    return __all__


class AbstractFieldSolver(diffrax.AbstractWrappedSolver, AbstractComposition):
    """A diffrax solver around another one, for `jaxflow.flow`, whose `args` hold the field.

    diffrax asks a wrapping solver's `.solver` what kind of method it is, and does not look deeper;
    then it reads, and sets by `equinox.tree_at`, attributes of that kind on the wrapping one: the
    tolerances of `root_finder`, and the `scan_kind` that an adjoint can pass. They are redirected
    to the innermost method.

    **Raises:** `TypeError` where what is wrapped is no diffrax solver.
    """

    wrapped: eqx.AbstractVar[diffrax.AbstractSolver]

    def __check_init__(self):
        instance("wrapped", self.wrapped, diffrax.AbstractSolver, "diffrax.Tsit5()")

    @property
    def solver(self) -> diffrax.AbstractSolver:  # pyright: ignore[reportIncompatibleVariableOverride]
        wrapped = self.wrapped
        return wrapped.solver if is_method(wrapped, AbstractFieldSolver) else wrapped

    @property
    def inner(self):
        return self.wrapped

    def evaluations(self, parts):
        return evaluations_per_step(self.wrapped, parts)

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def scan_kind(self):
        return self.solver.scan_kind  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def root_finder(self):
        return self.solver.root_finder  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def minimal_levy_area(self):
        return self.solver.minimal_levy_area  # pyright: ignore[reportAttributeAccessIssue]

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)


class Retracted(AbstractFieldSolver):
    """Any diffrax solver, with each step followed by the geometry's retraction.

    Projecting the result of a method of order p on the manifold keeps the order p, since the
    exact solution lies on it (Hairer, Lubich, Wanner, Geometric Numerical Integration, IV.4).
    A method that reuses its last stage (FSAL) stays right for a field that is evaluated at the
    retracted point, as `jaxflow.flow` does.

    How far a step y leaves the manifold is an error that is known, so the estimate e of an
    embedded pair becomes |e| + |y - retract(y)|. On long steps the pair alone is blind to it,
    since the field at the retracted point does not change along the normal; on short ones the
    distance is of higher order than e.

    **Arguments:** any diffrax solver; `geometry`.
    """

    wrapped: diffrax.AbstractSolver
    geometry: AbstractGeometry

    def init(self, terms, t0, t1, y0, args):
        return self.wrapped.init(terms, t0, t1, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, error, dense_info, solver_state, result = self.wrapped.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        retracted = self.geometry.retract(y1)
        if error is not None:
            error = jnp.abs(error) + jnp.abs(y1 - retracted)
        return retracted, error, dense_info, solver_state, result

    def compose(self, step, field, t0, t1, y):
        return self.geometry.retract(step(field, t0, t1, y))


class Frozen(AbstractFieldSolver):
    """Any diffrax solver, in each step of which a field made of pieces is the piece of that step.

    No stage then meets the next piece at its end, and the piece is read once a step.

    **Arguments:** any diffrax solver; `jumps`, the ends of the pieces, at which steps begin.
    """

    wrapped: diffrax.AbstractSolver
    jumps: tuple[float, ...] = eqx.field(static=True)

    def init(self, terms, t0, t1, y0, args):
        return self.wrapped.init(terms, t0, t1, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
        args = args._replace(field=frozen(args.field, t0 + 0.5 * (t1 - t0)))
        # Up to rounding: one that is missed costs accuracy, one too many an evaluation.
        near = jnp.abs(jnp.asarray(self.jumps, t0.dtype) - t0) < 1e-3 * (t1 - t0)
        return self.wrapped.step(terms, t0, t1, y0, args, solver_state, made_jump | near.any())

    def compose(self, step, field, t0, t1, y):
        return step(frozen(field, t0 + 0.5 * (t1 - t0)), t0, t1, y)


def along(solver: diffrax.AbstractSolver, field: AbstractField) -> diffrax.AbstractSolver:
    """The solver for a field that may be made of pieces, and live on a submanifold."""
    solver = Frozen(solver, jumps(field)) if jumps(field) else solver
    flat = isinstance(field.geometry, Euclidean)
    return solver if flat else Retracted(solver, field.geometry)


def check_space(solver: diffrax.AbstractSolver, field: AbstractField):
    """A solver that retracts does so on the geometry of the field.

    **Raises:** `ValueError` if it does not.
    """
    if is_method(solver, NormalisedEuler) and isinstance(field.geometry, Euclidean):
        raise ValueError(
            f"NormalisedEuler normalises the tokens, and those of a field on {field.geometry} are "
            "not: give the field geometry=jaxflow.Sphere(), or take diffrax.Euler()."
        )
    if is_method(solver, Retracted) and not same_geometry(solver.geometry, field.geometry):
        raise ValueError(
            f"a solver retracts its steps on the geometry of the field, {field.geometry}; got "
            f"Retracted on {solver.geometry}. Pass {type(solver.wrapped).__name__}() alone, which "
            "jaxflow.flow retracts, or give the field that geometry."
        )
    if is_method(solver, AbstractComposition):
        check_space(solver.inner, field)
    if is_method(solver, diffrax.HalfSolver):
        check_space(solver.solver, field)


# ------------------------------------------------------------------ the published step


class NormalisedEuler(AbstractComposition):
    """Euler's step in R^d, then normalisation: what most published scripts take, with h = 0.1.

        y_{k+1} = retract(y_k + h F_t[mu](y_k)),    on the unit sphere (y + h F) / |y + h F|

    F is the force of the field X = P F before its projection: V E_{mu_x}[y] for attention. With
    dt0 = h it has order 1, and is late: F = a y + X with a = <y, F>, so that the step moves y by
    h X / (1 + h a), where a is near 1 inside a cluster. At h = 0.1 that makes long times about 10 %
    longer. Euler's step with X, `diffrax.Euler()`, is some 2 % early instead.

    On an `jaxflow.Ellipsoid` the step is LayerNorm(y + h F): Post-LN.

    ```python
    >>> mu0 = jaxflow.measure.from_angles([0.0, 1.0])
    >>> sol = jaxflow.flow(
    ...     jaxflow.SelfAttention(), mu0, t1=0.1, dt0=0.1, solver=jaxflow.solvers.NormalisedEuler()
    ... )
    >>> x, weight = mu0.points, jax.nn.softmax(mu0.points @ mu0.points.T)
    >>> y = x + 0.1 * weight @ x
    >>> bool(jnp.allclose(sol.last.points, y / jnp.linalg.norm(y, axis=1, keepdims=True)))
    True

    ```
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    @property
    def inner(self):
        return diffrax.Euler()

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        evaluate = lambda field, t, y: terms.vf(t, y, args._replace(field=field))
        y1 = explicit_step(self, args.field, t0, t1, y0, evaluate)
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def compose(self, step, field, t0, t1, y):
        return field.geometry.retract(step(unprojected(field), t0, t1, y))

    def evaluations(self, parts):
        return 0, 1


# ------------------------------------------------------------------ exponential maps


class RK4(diffrax.AbstractERK):
    """The classical Runge-Kutta method of order 4 (Kutta 1901), with an error estimate.

    With k_5 the velocity at the end of the step, the first of the next one, the weights
    (1/6, 1/3, 1/3, 1/15, 1/10) have order 3, so h (k_4 - k_5) / 10 is the embedded estimate. Four
    evaluations a step.
    """

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        c=np.array([1 / 2, 1 / 2, 1, 1]),
        a_lower=(
            np.array([1 / 2]),
            np.array([0, 1 / 2]),
            np.array([0, 0, 1]),
            np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        ),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6, 0]),
        b_error=np.array([0, 0, 0, 1 / 10, -1 / 10]),
    )
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


class Geodesic(diffrax.AbstractAdaptiveSolver, diffrax.AbstractStratonovichSolver, AbstractMethod):
    """An explicit Runge-Kutta method in normal coordinates of the field's geometry.

        y_{k+1} = exp_{y_k}(u(h)),    u' = (D exp_{y_k}(u))^{-1} X(exp_{y_k}(u)),    u(0) = 0

    A step is a step of the method for u, in the tangent space at y_k, so that its order and its
    error estimate carry over and each stage lies on the manifold: a Runge-Kutta-Munthe-Kaas
    method of a homogeneous space (Munthe-Kaas 1999; Iserles et al., Lie-group methods, 2000). On
    R^d it is the method itself. `Geodesic(diffrax.Heun())` has order 2, `Geodesic()` order 4. With
    `jaxflow.Noise` its increment in the tangent space at y_k is part of u: without a drift the
    tokens then walk along geodesics, and the weak order is 1.

    **Arguments:** `solver`, any explicit Runge-Kutta method of diffrax's, or `RK4()`.

    **Raises:** `ValueError` for other methods.
    """

    solver: diffrax.AbstractSolver = RK4()

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation

    def __check_init__(self):
        if tableau(self.solver) is None:
            raise ValueError(
                f"Geodesic takes an explicit Runge-Kutta method, got {type(self.solver).__name__}: "
                "use diffrax.Heun(), diffrax.Tsit5(), jaxflow.solvers.RK4(), ..."
            )

    def order(self, terms):
        return self.solver.order(terms)

    def init(self, terms, t0, t1, y0, args):
        drift = terms.terms[0] if isinstance(terms, diffrax.MultiTerm) else terms
        return drift.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        h, noise = t1 - t0, None
        if isinstance(terms, diffrax.MultiTerm):
            terms, diffusion = terms.terms
            noise = diffusion.vf_prod(t0, y0, args, diffusion.contr(t0, t1))
        geometry, method = args.field.geometry, self._tableau
        moved = lambda u, c: h * u if noise is None else h * u + c * noise
        start = lambda: terms.vf(t0, y0, args)
        slopes = [jax.lax.cond(made_jump, start, lambda: solver_state)]
        velocity = slopes[0]
        for c, row in zip(method.c, method.a_lower, strict=True):
            u = moved(combined(row, slopes), float(c))
            velocity = terms.vf(t0 + float(c) * h, geometry.exp(y0, u), args)
            slopes.append(geometry.exp_inverse_derivative(y0, u, velocity))
        y1 = geometry.exp(y0, moved(combined(method.b_sol, slopes), 1.0))
        error = h * combined(method.b_error, slopes)
        last = velocity if method.fsal and noise is None else terms.vf(t1, y1, args)
        dense_info = {"y0": y0, "y1": y1, "k0": h * slopes[0], "k1": h * last}
        if noise is not None:
            dense_info |= {"k0": y1 - y0, "k1": y1 - y0}  # a line
        return y1, error, dense_info, last, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def evaluations(self, parts):
        return 1, self._tableau.num_stages - self._tableau.fsal

    @property
    def _tableau(self) -> diffrax.ButcherTableau:
        return cast(diffrax.ButcherTableau, tableau(self.solver))


# ------------------------------------------------------------------ splitting


class AbstractSplitting(AbstractComposition):
    """A composition of steps, each with one of the parts X_1 + ... + X_K of a field.

    The parts of a sum are those of its terms; a multiple or a curve of sums has parts too.

    **Raises:** `TypeError` where what steps is no diffrax solver.
    """

    solver: eqx.AbstractVar[diffrax.AbstractSolver]

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def __check_init__(self):
        instance("solver", self.solver, diffrax.AbstractSolver, "diffrax.Heun()")

    @abc.abstractmethod
    def substeps(self, parts: int) -> list[tuple[int, float, float]]:
        """(part, start, end) of each substep, times in units of the step."""

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        results = [diffrax.RESULTS.successful]

        def substep(field, t0, t1, y):
            of = args._replace(field=field)
            if is_explicit(self.solver):  # Written out it serves every adjoint.
                evaluate = lambda field, t, y: terms.vf(t, y, args._replace(field=field))
                return explicit_step(self.solver, field, t0, t1, y, evaluate)
            state = self.solver.init(terms, t0, t1, y, of)
            y, _, _, _, result = self.solver.step(terms, t0, t1, y, of, state, False)
            results.append(result)
            return y

        y1 = self.compose(substep, args.field, t0, t1, y0)
        first = lambda a, b: diffrax.RESULTS.where(diffrax.is_okay(a), b, a)
        return y1, None, {"y0": y0, "y1": y1}, None, reduce(first, results)

    @property
    def inner(self):
        return self.solver

    def compose(self, step, field, t0, t1, y):
        at = lambda u: t1 if u == 1 else t0 + u * (t1 - t0)
        parts = field.parts
        for k, start, end in self.substeps(len(parts)):
            y = step(parts[k], at(start), at(end), y)
        return y

    def evaluations(self, parts):
        inner = evaluations_per_step(self.solver)
        times = [part for part, _, _ in self.substeps(parts)].count(0)
        return inner and (0, times * (inner[1] if is_explicit(self.solver) else sum(inner)))

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


class LieTrotter(AbstractSplitting):
    """Steps with X_1, then X_2, ..., then X_K, for a field X_1 + ... + X_K; of order 1.

    With Euler's method, one step a piece and attention + feed-forward this is the transformer
    block x <- x + attention(x), x <- x + feedforward(x) (Trotter 1959).

    **Arguments:** `solver`, any one-step method, used for each part.
    """

    solver: diffrax.AbstractSolver = diffrax.Euler()

    def order(self, terms):
        return 1

    def substeps(self, parts):
        return [(k, 0, 1) for k in range(parts)]


class Strang(AbstractSplitting):
    """Half steps with X_1, ..., X_{K-1}, a step with X_K, half steps back; of order 2.

    (Strang 1968.) The method used for the parts must have order 2 as well.

    **Arguments:** `solver`, any one-step method, used for each part.
    """

    solver: diffrax.AbstractSolver = diffrax.Midpoint()

    def order(self, terms):
        return min(2, self.solver.order(terms) or 1)

    def substeps(self, parts):
        first = [(k, 0, 0.5) for k in range(parts - 1)]
        last = [(k, 0.5, 1) for k in reversed(range(parts - 1))]
        return [*first, (parts - 1, 0, 1), *last]


# ------------------------------------------------------------------ fixed steps


class PiecewiseSteps(diffrax.AbstractStepSizeController):
    """Fixed steps of at most `dt0` that end at each breakpoint.

    Each piece is divided into the fewest equal steps.

    **Arguments:** `breakpoints`, in order.
    """

    breakpoints: tuple[float, ...] = eqx.field(static=True)

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        if dt0 is None:
            raise ValueError("fixed steps need a value for `dt0`.")
        t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
        inside = jnp.clip(jnp.asarray(self.breakpoints, t0.dtype), t0, t1)
        edges = jnp.concatenate([t0[None], inside, t1[None]])
        return self._next(edges, dt0, t0), (edges, dt0)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        end = self._next(state[0], state[1], jnp.asarray(t1))
        return True, t1, end, False, state, diffrax.RESULTS.successful

    def _next(self, edges: Array, dt0: ScalarLike, t: Array):
        """The end of the step from t, by its number in the piece: nothing accumulates."""
        piece = jnp.clip(jnp.searchsorted(edges, t, side="right"), 1, len(edges) - 1)
        start, end = edges[piece - 1], edges[piece]
        # A rounding error in dt0 must not add a step.
        count = jnp.ceil((end - start) / dt0 * (1 - 4 * jnp.finfo(t.dtype).eps))
        done = jnp.round((t - start) / (end - start) * count) + 1
        return jnp.where(done >= count, end, start + (end - start) * (done / count))


class Grid(diffrax.AbstractStepSizeController):
    """Fixed steps that end at `ts`, which may be made inside of the program.

    `diffrax.StepTo` without its checks, which are callbacks to the host for such times: they must
    increase from t0 to t1, and hold the jumps of the field.
    """

    ts: Array

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.ts[1].astype(jnp.result_type(t0)), jnp.array(1)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        end = self.ts[jnp.minimum(state + 1, len(self.ts) - 1)].astype(jnp.result_type(t1))
        return True, t1, end, False, state + 1, diffrax.RESULTS.successful


def step_times(ts: np.ndarray, jumps: tuple[float, ...]) -> np.ndarray:
    """The ends `ts` of steps, with those that are a jump of the field up to rounding put on it.

    **Raises:** `ValueError` if a step leads across a jump.
    """
    ts = ts.astype(float)
    for jump in jumps:
        nearest = np.abs(ts - jump).argmin()
        if np.isclose(ts[nearest], jump, rtol=1e-6, atol=1e-6 * np.ptp(ts)):
            ts[nearest] = jump
        elif ts[0] < jump < ts[-1]:
            raise ValueError(
                f"steps must end where the parameters of the field jump, at {list(jumps)}; none "
                f"ends at {jump}. Add it to StepTo(ts), give a depth a multiple of its layers as "
                "`steps`, or sample the curve (jaxflow.fields.time.sample) at other times."
            )
    return ts


def default_adjoint(steps: int) -> diffrax.RecursiveCheckpointAdjoint:
    """The adjoint for a known number of steps.

    Each state is kept for up to 64 steps, where a gradient then costs what it does for a
    rematerialised `jax.lax.scan`; of more, 8 sqrt(steps) are, and memory grows as the square root.

    **Arguments:** `steps`: at least 1.

    **Returns:** a `diffrax.RecursiveCheckpointAdjoint` that keeps so many states.

    **Raises:** `ValueError` or `TypeError` for fewer than one step.

    ```python
    >>> jaxflow.solvers.default_adjoint(8).checkpoints
    8

    ```
    """
    if count("steps", steps, 0) < 1:
        raise ValueError(f"a solve has at least one step, got {steps}.")
    return diffrax.RecursiveCheckpointAdjoint(min(steps, math.ceil(8 * math.sqrt(steps))))


class ScanAdjoint(diffrax.AbstractAdjoint):
    """Differentiates a known number of explicit steps as `jax.lax.scan` does: in both modes, and to
    any order.

    The loop has as many steps whatever happens in it, so it is for `StepTo(ts)` with `max_steps =
    len(ts) - 1`, an explicit method and no event. diffrax's own loop compiles what a step does once
    more than this one, to reach states that are not kept.

    **Arguments:**

    - `keep`: whether all that a step computes is kept for its gradient, the scores of attention
      too. Otherwise its state alone is, and the step is made again: 4 instead of 3 times the work
      of a step.

    **Raises:** `ValueError` in a solve whose steps are not known.
    """

    keep: bool = eqx.field(static=True, default=False)

    def loop(
        self, *, init_state, max_steps, throw, passed_solver_state, passed_controller_state, **given
    ):
        # What these are for, a fixed number of explicit steps does not have.
        del throw, passed_solver_state, passed_controller_state
        controller = given["stepsize_controller"]
        known = isinstance(controller, diffrax.StepTo | Grid) and given["event"] is None
        if not known or len(controller.ts) - 1 != max_steps:
            raise ValueError(
                "ScanAdjoint makes max_steps steps whatever happens, so it takes StepTo(ts) with "
                f"max_steps = len(ts) - 1 and no event; got {type(controller).__name__} and "
                f"max_steps={max_steps}. Use diffrax.RecursiveCheckpointAdjoint() for others."
            )
        return self._loop(
            init_state=init_state,
            max_steps=max_steps,
            inner_while_loop=partial(eqxi.while_loop, kind="checkpointed"),
            outer_while_loop=self._scan,
            **given,
        )

    def _scan(self, cond_fun, body_fun, init, *, max_steps, buffers):
        state, static = eqx.partition(jax.tree.map(jnp.asarray, init), eqx.is_array)

        def step(state, _):
            after = jax.tree.map(jnp.asarray, body_fun(eqx.combine(state, static)))
            return eqx.filter(after, eqx.is_array), None

        body = step if self.keep else jax.checkpoint(step)
        state, _ = jax.lax.scan(body, state, length=max_steps)
        return eqx.combine(state, static)
